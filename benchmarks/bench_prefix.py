"""Many questions on one document: with the prefix cache, at once and one by one, and without it.

    python benchmarks/bench_prefix.py                                  # the small model, on the CPU
    python benchmarks/bench_prefix.py --device cuda --shape 48b --dtype int8 --document 131072

Without the cache every question reads the document again, which takes hours where this is worth
measuring: `--plain` questions are asked so, one by one, and their mean stands for each. Their
answers must be those with the cache: on the CPU token by token and to the bit of every
log-probability, on a GPU so with --batch-invariant; else the line says how many are the same.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Results
from small_or_random import model_arguments, open_model

import kimi_linear as kl

WARM_UP = 300  # tokens of a first prompt that is not measured


def main() -> None:
    parser = model_arguments(__doc__.splitlines()[0])
    parser.add_argument("--document", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--questions", type=int, default=200, metavar="N")
    parser.add_argument("--question-tokens", type=int, default=40, metavar="N", help="on average")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--plain", type=int, default=3, metavar="N", help="without the cache")
    parser.add_argument("--only", default="batch,loop", help="of batch and loop")
    options = parser.parse_args()
    results = Results(options, options.device)
    context = options.document + 2 * options.question_tokens + options.new_tokens
    with open_model(options, max_context=context) as model:
        measure(model, options, results)


def make_questions(model: kl.Model, options: Any) -> list[np.ndarray]:
    """Each is the document and a question of its own, half to one and a half times as long as
    was asked for."""
    random = np.random.default_rng(0)
    vocab, mean = model.config.vocab_size, options.question_tokens
    document = random.integers(0, vocab, options.document)
    lengths = random.integers(mean - mean // 2, mean + mean // 2 + 1, options.questions)
    return [np.concatenate([document, random.integers(0, vocab, n)]) for n in lengths]


def timed(call: Callable[[], list[kl.Completion]]) -> tuple[float, list[kl.Completion]]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def measure(model: kl.Model, options: Any, results: Results) -> None:
    asked = {"max_new_tokens": options.new_tokens, "ignore_eos": True, "logprobs": 0}
    questions = make_questions(model, options)
    ways = {
        "batch": lambda: model.generate(questions, **asked, progress=False),
        "loop": lambda: [model.generate(q, **asked, progress=False) for q in questions],
    }
    model.generate(questions[0][:WARM_UP], **asked)
    plain, want = timed(
        lambda: [model.generate(q, **asked, progress=False) for q in questions[: options.plain]]
    )
    model.prefix_cache = True
    for way in options.only.split(","):
        model.clear_prefix_cache()
        seconds, got = timed(ways[way])
        same = sum(outcome(a) == outcome(b) for a, b in zip(want, got, strict=False))
        if same < len(want) and (options.device == "cpu" or options.batch_invariant):
            sys.exit(f"{way}: {len(want) - same} of {len(want)} answers differ")
        without = plain / options.plain * options.questions
        results.add(
            "prefix",
            case_of(options, way),
            without_s=without,
            with_s=seconds,
            speedup=without / seconds,
            read=1 - sum(a.stats.cached_tokens for a in got) / sum(map(len, questions)),
            same=f"{same} of {len(want)}",
            kept_mib=model._engine.prefix_stats()["bytes"] / 2**20,
        )


def outcome(answer: kl.Completion) -> tuple[Any, ...]:
    return answer.token_ids, answer.logprobs


def case_of(options: Any, way: str) -> dict[str, Any]:
    return {
        "model": options.shape or "small model",
        "dtype": options.dtype,
        "batch_invariant": options.batch_invariant,
        "document": options.document,
        "questions": options.questions,
        "question_tokens": options.question_tokens,
        "new_tokens": options.new_tokens,
        "asked": way,
        "plain": options.plain,
    }


if __name__ == "__main__":
    main()
