"""Guesses of next tokens (speculate): what they gain where text repeats itself, and what they cost
where it does not.

    python benchmarks/bench_speculate.py                               # the small model, on the CPU
    python benchmarks/bench_speculate.py --device cuda --shape 48b --dtype int8

Texts are the small model's own: numbers and lists that it goes on repeating, and stories that are
drawn at temperature 1, for its likeliest ones go round, too. Random weights write none, and
there, as here, the limits are measured: an oracle, whose guesses are all right, and an adversary,
whose guesses are wrong wherever the answer is new. Both are text that the model has not read, put
where guesses are looked up. Every answer must be the one without guesses, to the bit of each log-
probability, on the CPU and with --batch-invariant; else the line says how many tokens are the
same before the first other one.
"""

import dataclasses
import sys
from typing import Any

import numpy as np
from common import Results
from small_or_random import model_arguments, open_model

import kimi_linear as kl

TEXTS = {
    "repetitive": [
        "12 34 56 78 90 " * 6,
        "a b c d e f g h " * 6,
        "one, two, three. one, two, three. one, two",
    ],
    "plain": ["Once upon a time", "Maya wanted to", "The fisherman went to the sea and"],
}
ANSWER = {"ignore_eos": True, "logprobs": 0, "progress": False}


def main() -> None:
    parser = model_arguments(__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="of limits")
    parser.add_argument("--new-tokens", type=int, default=80, metavar="N", help="of an answer")
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2, 4, 8, 15], metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="the best counts")
    options = parser.parse_args()
    results = Results(options, options.device)
    context = options.context + options.new_tokens + 1
    with open_model(options, max_context=context, max_batch=4) as model:
        if options.shape is None:
            measure_texts(model, options, results)
        measure_limits(model, options, results)


# ---- texts ------------------------------------------------------------------------------------


def measure_texts(model: kl.Model, options: Any, results: Results) -> None:
    for kind, prompts in TEXTS.items():
        way = ANSWER | {"max_new_tokens": 4 * options.new_tokens, "seed": 1}
        way["temperature"] = 1.0 if kind == "plain" else 0.0

        def ask(prompt: str, guesses: int, way: Any = way) -> kl.Completion:
            return model.generate(prompt, speculate=guesses, **way)

        plain = [best(options, lambda p=p: ask(p, 0)) for p in prompts]
        for guesses in options.guesses:
            guessed = [best(options, lambda p=p, g=guesses: ask(p, g)) for p in prompts]
            report(options, results, kind, guesses, plain, guessed)


# ---- limits -----------------------------------------------------------------------------------


def measure_limits(model: kl.Model, options: Any, results: Results) -> None:
    """Of one answer to a context of random tokens, guessed right or wrong throughout."""
    random = np.random.default_rng(0)
    vocab = model.config.vocab_size
    with model.state().feed(random.integers(0, vocab, options.context), progress=False) as state:
        ask(state, [7], options, 0)
        plain = best(options, lambda: ask(state, [7], options, 0))
        text = [7, *plain.token_ids]
        for guesses in options.guesses:
            for kind, words in (("right", text), ("wrong", misleading(text, guesses, vocab))):
                words = words[: options.context]
                looked_up = np.array([0] * (options.context - len(words)) + words, np.int32)
                state._held = dataclasses.replace(state._held, ids=looked_up)
                guessed = best(options, lambda g=guesses: ask(state, [7], options, g))
                report(options, results, kind, guesses, [plain], [guessed])


def misleading(text: list[int], guesses: int, vocab: int) -> list[int]:
    """After any tokens of a text, twice as many as are guessed from them, come others."""
    words = []
    for end in range(2, len(text)):
        same = text[max(0, end - 2 * guesses) : end]
        words += [*same, *[(text[end] + 1) % vocab] * guesses]
    return words


def ask(state: kl.State, prompt: list[int], options: Any, guesses: int) -> kl.Completion:
    """From a fork of a state."""
    (answer,) = state.generate(
        [prompt], max_new_tokens=options.new_tokens, speculate=guesses, **ANSWER
    )
    return answer


# ---- figures ----------------------------------------------------------------------------------


def best(options: Any, call: Any) -> kl.Completion:
    return min((call() for _ in range(options.repeat)), key=lambda a: a.stats.decode_s)


def report(
    options: Any,
    results: Results,
    kind: str,
    guesses: int,
    plain: list[kl.Completion],
    guessed: list[kl.Completion],
) -> None:
    same, tokens = sum(map(common_tokens, plain, guessed)), sum(len(a.token_ids) for a in plain)
    exact = [(a.token_ids, a.logprobs) for a in plain] == [
        (a.token_ids, a.logprobs) for a in guessed
    ]
    if not exact and (options.device == "cpu" or options.batch_invariant):
        sys.exit(f"{kind}, {guesses} guesses: answers differ after {same} of {tokens} tokens")
    plain_s, seconds = (sum(a.stats.decode_s for a in answers) for answers in (plain, guessed))
    drafted, accepted = (
        sum(getattr(a.stats, name) for a in guessed) for name in ("drafted", "accepted")
    )
    drawn = tokens - len(plain)  # the first token of each comes with its prompt
    results.add(
        "speculate",
        case_of(options, kind, guesses),
        tokens=drawn,
        steps=drawn - accepted,
        drafted=drafted,
        accepted=accepted,
        plain_ms=1e3 * plain_s / drawn,
        token_ms=1e3 * seconds / drawn,
        step_ms=1e3 * seconds / (drawn - accepted),
        speedup=plain_s / seconds,
        same=f"{same} of {tokens}",
    )


def common_tokens(a: kl.Completion, b: kl.Completion) -> int:
    pairs = zip(a.token_ids, b.token_ids, strict=True)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(a.token_ids))


def case_of(options: Any, kind: str, guesses: int) -> dict[str, Any]:
    return {
        "model": options.shape or "small model",
        "dtype": options.dtype,
        "batch_invariant": options.batch_invariant,
        "text": kind,
        "guesses": guesses,
        "context": options.context if kind in ("right", "wrong") else None,
    }


if __name__ == "__main__":
    main()
