"""A batch-invariant model at the 48B's width: rows alone and in company, prompts whole and in
pieces, the same bits. Five layers with random weights made on a GPU; on the CPU a small shape."""

import numpy as np
import pytest
from engines import AUTO, cut, open_backend
from kimi_linear import _core
from kimi_linear.config import KimiLinearConfig
from kimi_linear.testing import tiny_config
from variants import DEVICES

ROWS = 32
NEEDED = 32 << 30  # bytes of a GPU


def shape(device):
    if device == "cpu":
        return tiny_config(model_max_length=1 << 15)
    data = KimiLinearConfig.kimi_linear_48b().to_dict()
    data["num_hidden_layers"] = 5
    data["linear_attn_config"] |= dict(kda_layers=(1, 2, 3, 5), full_attn_layers=(4,))
    return KimiLinearConfig.from_dict(data)


@pytest.fixture(scope="module", params=DEVICES)
def where(request):
    return request.param


@pytest.fixture(scope="module", params=["bf16", "int8"])
def engine(request, where):
    backend = open_backend(where, invariant=True)
    if where == "cuda" and backend.info()["free_bytes"] < NEEDED:
        pytest.skip("needs 32 GiB of GPU memory")
    options = AUTO | dict(format=request.param, max_context=16448, max_batch=ROWS)
    options |= dict(step_tokens=8192, cache_bytes=0 if where == "cpu" else 6 << 30)
    e = _core.Engine(backend, shape(where).to_core(), options)
    e.randomize(1, 1)
    yield e
    e.close()


@pytest.fixture(scope="module")
def tokens(where):
    """A prompt: long on a GPU."""
    vocab = shape(where).vocab_size
    n = {"cpu": 640, "cuda": 16384}[where]
    return np.random.default_rng(0).integers(3, vocab - 30, n).astype(np.int32)


def after(engine, ids, lengths):
    """Logits of the last token and of two more steps, the prompt read in these pieces."""
    seq, at = engine.seq_new(), 0
    for n in lengths[:-1]:
        engine.feed(seq, ids[at : at + n], None)
        at += n
    found = [np.array(engine.step([(seq, ids[at:])]))]
    found += [np.array(engine.step([(seq, [token])])) for token in (7, 8)]
    engine.seq_release(seq)
    assert all(np.isfinite(x).all() for x in found)
    return np.concatenate(found)


def test_pieces_are_the_whole_to_the_bit(engine, tokens, where):
    large = min(8192, len(tokens))
    want = after(engine, tokens, cut(len(tokens), large))
    for n in (512, 2048) if where == "cuda" else (64, 128, 320):
        got = after(engine, tokens, cut(len(tokens), n))
        assert np.array_equal(got, want), f"{n}: {np.abs(got - want).max()}"


def in_company(engine, rows):
    """Logits of a ragged prompt step and of three token steps, [4, rows, vocab]."""
    seqs = [engine.seq_new() for _ in rows]
    found = [np.array(engine.step(list(zip(seqs, rows, strict=True))))]
    for token in (5, 6, 7):
        found.append(np.array(engine.step([(seq, [token]) for seq in seqs])))
    for seq in seqs:
        engine.seq_release(seq)
    return np.stack(found)


def test_a_row_of_32_is_the_row_alone_to_the_bit(engine, tokens):
    lengths = np.random.default_rng(1).integers(1, 250, ROWS)
    rows = [tokens[i : i + n] for i, n in enumerate(lengths)]
    together = in_company(engine, rows)
    for i in (0, 1, 13, ROWS - 1):
        alone = in_company(engine, rows[i : i + 1])[:, 0]
        assert np.array_equal(together[:, i], alone), f"row {i} of {lengths[i]} tokens"


def test_a_token_beside_a_prompt_is_the_token_alone(engine, tokens):
    """A step of single tokens runs other kernels than one that reads a prompt as well."""
    found = []
    for beside in ([], [tokens[:300]], [tokens[:1], tokens[:65]]):
        seqs = [engine.seq_new() for _ in range(1 + len(beside))]
        engine.feed(seqs[0], tokens[:100], None)
        for token in (5, 6):
            feeds = [[token], *beside]
            found.append(np.array(engine.step(list(zip(seqs, feeds, strict=True))))[0])
        for seq in seqs:
            engine.seq_release(seq)
    assert all(np.array_equal(x, y) for x, y in zip(found[2:], found[:2] * 2, strict=True))


def test_a_last_piece_of_one_token(engine, tokens):
    """As continuations of a token have it whose context ends at a border."""
    for n in (65, 129):
        whole, pieces = (after(engine, tokens[:n], lengths) for lengths in ([n], [n - 1, 1]))
        assert np.array_equal(whole, pieces)
        context, ids = tokens[: n - 1], tokens[n - 1 : n + 1]
        alone = engine.logprobs(0, tokens[:n], tokens[1 : n + 1], 0, None)[0][-2:]
        shared = [(0, ids), (0, [ids[0], 7]), (0, [9, 7])]
        assert np.array_equal(engine.score(0, [context], shared, None)[0][:2], alone)
