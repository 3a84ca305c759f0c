"""The runner without the package's front: a checkpoint in an engine of chosen options."""

import numpy as np
from kimi_linear import _core
from kimi_linear._backends import CUDA_LIBRARY
from kimi_linear.checkpoint import Checkpoint

AUTO = dict(step_tokens=0, cache_bytes=0, budget_bytes=0)


def open_backend(device="cpu", *, threads=1, variant=None, invariant=False):
    """`invariant`: on CUDA, bits that do not depend on the company; the CPU's never do."""
    if device == "cpu":
        return _core.Backend("cpu", 0, threads, variant, "")
    return _core.Backend(device, 0, 0, None, CUDA_LIBRARY, invariant)


def open_engine(path, *, device="cpu", format="f32", threads=2, variant=None, invariant=False,
                max_context=512, max_batch=4, **options):  # fmt: skip
    backend = open_backend(device, threads=threads, variant=variant, invariant=invariant)
    options = AUTO | dict(format=format, max_context=max_context, max_batch=max_batch) | options
    with Checkpoint(path) as files:
        engine = _core.Engine(backend, files.config.to_core(), options)
        unused = engine.load(files.fds, files.sources(), None)
    assert unused == 0
    return engine


def whole(engine, ids) -> np.ndarray:
    """Logits [T, vocab] of a sequence read in one call."""
    return np.array(engine.logits(0, list(ids), False, None))


def in_pieces(engine, ids, lengths) -> np.ndarray:
    """The same, read in calls of these lengths."""
    seq, done, found = engine.seq_new(), 0, []
    for n in lengths:
        found.append(np.array(engine.logits(seq, list(ids[done : done + n]), False, None)))
        done += n
    assert done == len(ids) == engine.seq_length(seq)
    engine.seq_release(seq)
    return np.concatenate(found)


def cut(total: int, n: int) -> list[int]:
    """`total` in pieces of n and a rest."""
    return [min(n, total - at) for at in range(0, total, n)]


def next_tokens(engine, seq, last_logits, n: int) -> list[int]:
    """n greedy tokens of a sequence whose last logits are given."""
    tokens = [int(np.argmax(last_logits))]
    while len(tokens) < n:
        logits = np.array(engine.step([(seq, tokens[-1:])]))
        tokens.append(int(np.argmax(logits[0])))
    return tokens


def run(generation, *, max_steps=4, process=None, progress=None) -> dict[int, list[int]]:
    """The tokens of every request, from here to the end of the generation; raises what ended one."""
    tokens: dict[int, list[int]] = {}
    while not generation.done():
        for request, token, _, finish, *_ in generation.run(max_steps, process, progress):
            if isinstance(finish, Exception):
                raise finish
            tokens.setdefault(request, []).append(token)
    return tokens
