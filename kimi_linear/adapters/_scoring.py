"""What several harnesses ask of a model in the same way."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..engine import Engine

if TYPE_CHECKING:
    from ..model import Model
    from ..results import Completion
    from ..tokenizer import Tokenizer

log = logging.getLogger(__name__)

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of what continues it
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
PART = 1024  # pairs of one call: what an interruption loses at most
AHEAD = 4  # prompts made before their turn, for each sequence that may be alive


def scores(model: "Model", pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(index, (log p of the continuation, whether it is the greedy one)) of each pair.

    Contexts that begin alike come together: what they share is read once (`score_pairs`).
    """
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    contexts = [known.setdefault(ids, ids) for ids in (tuple(c) for c, _ in pairs)]
    order = sorted(range(len(pairs)), key=contexts.__getitem__)
    for at in range(0, len(order), PART):
        part = order[at : at + PART]
        found = model.score_pairs([(contexts[i], pairs[i][1]) for i in part], progress=False)
        yield from zip(part, found, strict=True)


def answers(
    model: "Model", asked: Iterable[tuple[Sequence[int], dict[str, Any]]]
) -> "Iterator[Completion]":
    """The answers to prompts, each (token ids, arguments of `Model.generate`), in their order.

    They share the steps of an engine; with a seed the i-th draws from seed + i, for a harness
    that asks the same thing again wants another answer.
    """
    waiting: deque[Any] = deque()
    with Engine(model) as engine:
        for i, (ids, sampling) in enumerate(asked):
            if sampling.get("seed") is not None:
                sampling = sampling | {"seed": sampling["seed"] + i}
            waiting.append(engine.submit(ids, **sampling))
            if len(waiting) > AHEAD * model.plan.max_batch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fit(pair: Pair, most: int) -> Pair:
    """A pair whose context lost tokens on its left, where all but the last token must be at most
    `most`: the harnesses' convention. Raises ValueError where the continuation alone is longer."""
    context, continuation = pair
    excess = len(context) + len(continuation) - 1 - most
    if excess <= 0:
        return pair
    if excess >= len(context):
        raise ValueError(
            f"continuation: must have at most {most} tokens (max_length), has {len(continuation)}"
        )
    log.warning("a context of %d tokens was cut on its left by %d", len(context), excess)
    return context[excess:], continuation


def fit_prompt(ids: Sequence[int], new: int, most: int) -> Sequence[int]:
    """A prompt that leaves room for new tokens, cut on its left as the harnesses do it."""
    room = most - new
    if room < 1:
        raise ValueError(f"max_gen_toks: must be below max_length ({most}), got {new}")
    if len(ids) > room:
        log.warning("a prompt of %d tokens was cut on its left to %d", len(ids), room)
    return ids[-room:]


def render(
    tokenizer: "Tokenizer", messages: Sequence[dict[str, str]], add_generation_prompt: bool
) -> str:
    """A conversation as text with the names of control tokens, for harnesses that want text.

    add_generation_prompt: open the assistant's turn; without, a last turn that is the
    assistant's stays open, for the model to go on with it.
    """
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert isinstance(text, str)
    is_open = not add_generation_prompt and messages[-1]["role"] == "assistant"
    return text.removesuffix("<|im_end|>") if is_open else text


def tokenizer_name(tokenizer: "Tokenizer") -> str:
    """A tokenizer as keys of the harnesses' caches name it."""
    from ..evals.suite import tokenizer_name

    return tokenizer_name(tokenizer).replace(" ", "-")
