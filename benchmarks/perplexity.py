"""Perplexity of a checkpoint by storage of its weights.

    python benchmarks/perplexity.py [--model DIR] [--text FILE] [--dtypes bf16 int8 int4]

The text is FILE's, or 200 stories of examples/small_model/words.py from a seed never used in
training, read in one piece of at most 8,192 tokens. Appends to results/perplexity.jsonl.
"""

import math
import random
import sys
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
    options = parser.parse_args()
    results, r = Results(options), random.Random(HELD_OUT_SEED)
    text = options.text.read_text() if options.text else "\n".join(story(r) for _ in range(200))
    for dtype in options.dtypes:
        with kl.load(options.model, dtype=dtype, max_context=TOKENS) as model:
            ids = model.tokenizer.encode(text)[:TOKENS]
            logprobs = model.logprobs(ids).logprobs
            case = {"model": options.model or "small", "dtype": model.dtype, "tokens": len(ids)}
            case["text"] = options.text.name if options.text else "stories"
            results.add("perplexity", case, perplexity=math.exp(-logprobs.mean()))


if __name__ == "__main__":
    main()
