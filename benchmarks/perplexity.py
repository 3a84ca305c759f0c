"""Perplexity of a checkpoint by storage of its weights and of its latents.

    python benchmarks/perplexity.py [--model DIR] [--text FILE] [--dtypes bf16 int8 int4]
                                   [--kv-cache-dtypes auto fp8]

The text is FILE's, or 200 stories of examples/small_model/words.py from a seed never used in
training, read in one piece of at most 8,192 tokens. Appends to results/perplexity.jsonl.
"""

import math
import random
import sys
from itertools import product
from pathlib import Path

from common import Results, arguments

import kimi_linear as kl

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "small_model"))
from tasks import HELD_OUT_SEED  # noqa: E402
from words import story  # noqa: E402

TOKENS = 8192


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16", "int8", "int4"])
    parser.add_argument("--kv-cache-dtypes", nargs="+", default=["auto"])
    options = parser.parse_args()
    results, r = Results(options), random.Random(HELD_OUT_SEED)
    text = options.text.read_text() if options.text else "\n".join(story(r) for _ in range(200))
    for dtype, latents in product(options.dtypes, options.kv_cache_dtypes):
        how = dict(dtype=dtype, kv_cache_dtype=latents, max_context=TOKENS)
        with kl.load(options.model, **how) as model:
            ids = model.tokenizer.encode(text)[:TOKENS]
            logprobs = model.logprobs(ids).logprobs
            case = {"model": options.model or "small", "dtype": model.dtype, "tokens": len(ids)}
            case["kv_cache_dtype"] = model.kv_cache_dtype
            case["text"] = options.text.name if options.text else "stories"
            results.add("perplexity", case, perplexity=math.exp(-logprobs.mean()))


if __name__ == "__main__":
    main()
