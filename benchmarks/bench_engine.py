"""Hundreds of mixed requests on one engine, against an ideal full batch of the same steps.

    python benchmarks/bench_engine.py --scale 16                  # the small model, on the CPU
    python benchmarks/bench_engine.py --device cuda --shape 48b --dtype int8
    python benchmarks/bench_engine.py --device cuda --shape wide5 --batch-invariant --check 20

All requests are submitted at once: prompts of 10 to 8,000 random tokens, answers of 10 to 500,
both divided by --scale, every other one greedy. The ideal has no empty place and no gap: all
prompts read in full steps, and every further token drawn in a step of max_batch rows that hold
the mean context; both rates are measured in the same run. `share` is its time over the measured
one. `between_s` is what passed between steps, in Python.

--check requests are generated once more, one at a time: their tokens must be the same, on the
CPU always (there all are checked unless told otherwise), on a GPU with --batch-invariant; else
the line says how many are.
"""

import sys
import time
from typing import Any

import numpy as np
from bench_model import BLOCK
from common import Results
from kimi_linear._sampling import check_sampling
from small_or_random import model_arguments, open_model

import kimi_linear as kl

PROMPT, ANSWER = (10, 8000), (10, 500)  # tokens, from and to


class Load:
    """The requests: (prompt, arguments of generate)."""

    def __init__(self, options: Any, vocab_size: int) -> None:
        random = np.random.default_rng(options.seed)
        n, scale = options.requests, options.scale
        (short, long), (few, many) = PROMPT, (ANSWER[0], max(ANSWER[1] // scale, ANSWER[0]))
        self.prompts = [
            random.integers(0, vocab_size, length)
            for length in random.integers(short, max(long // scale, short) + 1, n)
        ]
        self.answers = random.integers(few, many + 1, n)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def new_tokens(self) -> int:
        return int(self.answers.sum())

    @property
    def mean_context(self) -> int:
        """Of a row that generates."""
        return int(np.mean([len(p) for p in self.prompts]) + self.answers.mean() / 2)

    def sampling(self, i: int) -> dict[str, Any]:
        drawn = {"temperature": 0.8, "top_p": 0.95, "seed": i} if i % 2 else {}
        return {"max_new_tokens": int(self.answers[i]), "ignore_eos": True} | drawn


def sizes(options: Any) -> dict[str, int]:
    room = (PROMPT[1] + ANSWER[1]) // options.scale + ANSWER[0] + 2 * BLOCK
    return {
        "max_batch": options.max_batch or (64 if options.device == "cuda" else 8),
        "max_context": max(room, 256),
    }


# ---- the ideal ---------------------------------------------------------------------------


def prefill_rate(model: kl.Model, load: Load) -> float:
    """Prompt tokens a second, where they fill every step."""
    mean = max(load.prompt_tokens // len(load.prompts), 1)
    n = max(4 * model.plan.step_tokens // mean, 1)
    prompts = [np.resize(load.prompts[i % len(load.prompts)], mean) for i in range(n)]
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=1, ignore_eos=True, progress=False)
        best = max(best, n * mean / (time.perf_counter() - start))
    return best


def decode_step(model: kl.Model, load: Load, blocks: int = 4) -> float:
    """Seconds of a step that draws a token for each of max_batch rows of the mean context."""
    batch, context = model.plan.max_batch, max(load.mean_context - 2 * BLOCK, 1)
    early = batch * -(-context // model.plan.step_tokens)  # tokens of rows that are read first
    sampling = check_sampling(model.config.vocab_size, (), ignore_eos=True,
                              max_new_tokens=early + (blocks + 3) * BLOCK)  # fmt: skip
    prompts = [np.resize(load.prompts[i % len(load.prompts)], context) for i in range(batch)]
    run = model._run(model._rows(prompts, sampling))
    try:
        begun: set[int] = set()
        while len(begun) < batch:
            begun |= {row.id for row, _ in run.step(1, None)}
        times = []
        for _ in range(blocks + 1):
            start, drawn = time.perf_counter(), 0
            while drawn < BLOCK * batch:
                drawn += len(run.step(1, None))
            times.append((time.perf_counter() - start) / BLOCK)
        return float(np.median(times[1:]))
    finally:
        run.close()


def ideal(model: kl.Model, load: Load) -> dict[str, float]:
    rate, step = prefill_rate(model, load), decode_step(model, load)
    further = load.new_tokens - len(load.prompts)  # the first one belongs to the prompt
    return {
        "ideal_s": load.prompt_tokens / rate + further / model.plan.max_batch * step,
        "prefill_tok_s": rate,
        "decode_ms": 1e3 * step,
    }


# ---- the engine --------------------------------------------------------------------------


class Clock:
    """When each token of each request came, told by the engine's own thread."""

    def __init__(self) -> None:
        self.times: dict[kl.Request, list[float]] = {}
        tell = kl.Request._tell

        def timed(request: kl.Request, chunk: Any, wakes: Any) -> None:
            if chunk is not None:
                self.times.setdefault(request, []).append(time.perf_counter())
            tell(request, chunk, wakes)

        kl.Request._tell = timed

    def latencies(self, start: float) -> dict[str, float]:
        first = [times[0] - start for times in self.times.values()]
        gaps = np.concatenate([np.diff(times) for times in self.times.values()])
        return {
            "first_token_s": float(np.median(first)),
            "last_first_token_s": max(first),
            "gap_ms": 1e3 * float(np.median(gaps)),
            "gap_p99_ms": 1e3 * float(np.quantile(gaps, 0.99)),
            "gap_max_ms": 1e3 * float(gaps.max()),
        }


def serve(model: kl.Model, load: Load) -> tuple[dict[str, float], list[kl.Completion]]:
    clock = Clock()
    with kl.Engine(model) as engine:
        start = time.perf_counter()
        requests = [
            engine.submit(prompt, **load.sampling(i)) for i, prompt in enumerate(load.prompts)
        ]
        submitted = time.perf_counter() - start
        answers = [request.result() for request in requests]
        seconds = time.perf_counter() - start
        core = engine._worker._run.stats
    figures = {
        "seconds": seconds,
        "new_tok_s": load.new_tokens / seconds,
        "prompt_tok_s": load.prompt_tokens / seconds,
        "between_s": seconds - core["prefill_s"] - core["decode_s"],
        "submit_ms": 1e3 * submitted / len(requests),
    }
    return figures | clock.latencies(start), answers


def check(
    model: kl.Model, load: Load, answers: list[kl.Completion], n: int, must_equal: bool
) -> str:
    """Some of them by themselves."""
    chosen = np.random.default_rng(1).permutation(len(answers))[:n]
    same = 0
    for i in map(int, chosen):
        alone = model.generate(load.prompts[i], **load.sampling(i), progress=False)
        assert len(alone.token_ids) == load.answers[i]
        same += alone.token_ids == answers[i].token_ids
    if must_equal and same < n:
        sys.exit(f"{n - same} of {n} requests have other tokens than alone")
    return f"{same} of {n}"


def main() -> None:
    parser = model_arguments(__doc__.splitlines()[0], ["cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=500, metavar="N")
    parser.add_argument("--scale", type=int, default=1, help="divides all lengths")
    parser.add_argument("--max-batch", type=int, default=0, metavar="N")
    parser.add_argument("--check", type=int, metavar="N", help="how many; else all on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = Results(options, options.device)
    with open_model(options, **sizes(options)) as model:
        load = Load(options, model.config.vocab_size)
        of_ideal = ideal(model, load)
        figures, answers = serve(model, load)
        n = len(answers) if options.check is None and options.device == "cpu" else options.check
        exact = options.device == "cpu" or options.batch_invariant
        same = check(model, load, answers, n or 0, exact)
        case = {
            "model": options.shape or "small model",
            "dtype": options.dtype,
            "batch_invariant": options.batch_invariant,
            "requests": options.requests,
            "scale": options.scale,
            "max_batch": model.plan.max_batch,
            "step_tokens": model.plan.step_tokens,
            "prompt_tokens": load.prompt_tokens,
            "new_tokens": load.new_tokens,
            "seed": options.seed,
        }
        share = of_ideal["ideal_s"] / figures["seconds"]
        results.add("engine", case, share=share, **figures, **of_ideal, same=same)


if __name__ == "__main__":
    main()
