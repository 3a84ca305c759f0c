"""The promises about bits that README.md makes, line by line: "Reproducibility" names these tests.

    T0  the same call gives the same bits
    T1  whatever else is in the batch
    T2  however a text was read: in pieces, from a file, on a fork, as a shared context

T0 holds always; T1 and T2 on a CPU, and on a GPU for a model loaded with batch_invariant=True. One
that was not keeps them within the rounding of its activations.
"""

import json
import os
import random
import re
import subprocess
import sys

import kimi_linear as kl
import numpy as np
import pytest
from checkpoints import relative_rms
from conftest import ROOT
from engines import cut, in_pieces, next_tokens, open_engine, whole
from generators import recall, tasks
from random_weights import T, calm, calm_rounding, ids, others, path, same  # noqa: F401  fixtures


@pytest.fixture(params=["f32", "bf16"])
def engine(path, request, device):
    e = open_engine(path, device=device, format=request.param, invariant=True)
    yield e
    e.close()


@pytest.fixture(params=["f32", "bf16"])
def default_engine(calm, request, device):
    """As people open it, with the rounding that another order of sums may show."""
    e = open_engine(calm[1], device=device, format=request.param)
    yield e, {"f32": 1e-5, "bf16": calm_rounding(calm)}[request.param]
    e.close()


# ---- T0: the same call ------------------------------------------------------------------------


def test_same_call_twice(engine, ids):
    first = whole(engine, ids)
    assert np.isfinite(first).all()
    assert same(whole(engine, ids), first)


def test_same_call_twice_by_default(default_engine, ids):
    engine, _ = default_engine
    assert same(whole(engine, ids), whole(engine, ids))
    rows = [ids[:9], ids[:70], ids[:1]]
    assert same(turns_of(engine, rows), turns_of(engine, rows))


SAID = """
import json, sys
import kimi_linear as kl
with kl.load(device=sys.argv[1], max_context=512, progress=False) as m:
    c = m.generate(["Once upon a time", "The sea"], max_new_tokens=12, temperature=0.8, seed=3,
                   logprobs=2, ignore_eos=True)
    print(json.dumps([[c.token_ids, [t.logprob.hex() for t in c.logprobs]] for c in c]))
"""


def test_another_process_says_the_same(device):
    """Of samples, too: whatever ran before, and however many threads run."""
    found = set()
    for threads in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", SAID, device], capture_output=True, text=True, check=True,
            env=os.environ | {"KIMI_LINEAR_THREADS": threads},
        )  # fmt: skip
        found.add(run.stdout)
    assert len(found) == 1 and len(json.loads(found.pop())) == 2


def test_a_saved_state_goes_on_as_it_was(path, device, tmp_path):
    """On a GPU as people load it."""
    options = dict(max_new_tokens=9, logprobs=2, ignore_eos=True, temperature=0.9, seed=4)
    with kl.load(path, device=device, dtype="bf16", max_context=512, progress=False) as m:
        with m.state().feed(others(100, 1)) as live:
            live.save(tmp_path / "s")
            with kl.State.load(tmp_path / "s", m) as loaded:
                assert same(loaded.logits(), live.logits())
                assert loaded.score([[5, 6], [7]]) == live.score([[5, 6], [7]])
                a, b = (s.generate(others(70, 2), **options) for s in (loaded, live))
                assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
                assert same(loaded.logits(), live.logits())


# ---- T1: company ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_threads_do_not_change_bits(path, ids, format, threads):
    two, other = (open_engine(path, format=format, threads=n) for n in (2, threads))
    assert same(whole(other, ids), whole(two, ids))
    seqs = [(e, e.seq_new()) for e in (two, other)]
    decoded = [next_tokens(e, seq, e.step([(seq, ids[:70])])[0], 8) for e, seq in seqs]
    assert decoded[0] == decoded[1]
    for e in (two, other):
        e.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_row_in_a_batch_is_the_row_alone(engine, seed):
    """Ragged steps over sequences with other pasts, some rows of a single token."""
    r = np.random.default_rng(seed)
    lengths = r.choice([1, 1, 2, 17, 64, 65], (4, 5))
    rows = [[others(n, 100 * seed + i) for n in row] for i, row in enumerate(lengths)]
    together = [engine.seq_new() for _ in rows]
    batched = [np.array(engine.step(list(zip(together, turn, strict=True))))
               for turn in zip(*rows, strict=True)]  # fmt: skip
    for seq in together:
        engine.seq_release(seq)
    for i, row in enumerate(rows):
        seq = engine.seq_new()
        for turn, feed in enumerate(row):
            assert same(engine.step([(seq, feed)])[0], batched[turn][i]), (i, turn)
        engine.seq_release(seq)


def turns_of(engine, rows):
    """Logits of the last tokens after reading the rows in one step, then a token each."""
    seqs = [engine.seq_new() for _ in rows]
    turns = [np.array(engine.step(list(zip(seqs, feeds, strict=True))))
             for feeds in (rows, [row[:1] for row in rows])]  # fmt: skip
    for seq in seqs:
        engine.seq_release(seq)
    return np.concatenate(turns, axis=-1)


def test_a_row_in_a_batch_is_near_the_row_alone(default_engine):
    engine, rounding = default_engine
    rows = [others(n, n) for n in (1, 64, 100, 9)]
    together = turns_of(engine, rows)
    alone = np.concatenate([turns_of(engine, [row]) for row in rows])
    assert relative_rms(together, alone) < rounding


def generated(model, prompts, **options):
    options = dict(max_new_tokens=9, logprobs=2, ignore_eos=True) | options
    return [(c.token_ids, c.logprobs) for c in model.generate(prompts, **options)]


@pytest.fixture(params=["f32", "bf16", "int8"])
def model(path, request, device):
    """The package's, of weights that amplify."""
    if device == "cuda" and request.param == "f32":
        pytest.skip("CUDA has no f32 weights")
    with kl.load(
        path, device=device, dtype=request.param, max_context=1024, max_batch=5,
        batch_invariant=device == "cuda", progress=False,
    ) as m:  # fmt: skip
        yield m
        assert m._engine.usage() == (0, 0)


def test_a_generation_in_company_is_the_one_alone(model):
    """Prompts of all lengths, more than sequences: read and continued in the same steps."""
    prompts = [others(n, n) for n in (1, 300, 64, 17, 600, 2, 65, 128, 33)]
    together = generated(model, prompts)
    assert [generated(model, [p])[0] for p in prompts] == together
    assert generated(model, prompts[::-1]) == together[::-1]
    sampled = generated(model, prompts, temperature=1.0, seed=5)
    assert generated(model, prompts, temperature=1.0, seed=5) == sampled != together
    assert generated(model, prompts[:3], temperature=1.0, seed=5) == sampled[:3]


@pytest.mark.parametrize("n", [1, 7, 64, 100, 127])
def test_prompts_after_a_state_in_company_are_those_alone(model, n):
    """Wherever in a page they begin, and as a state that is fed reads them."""
    prompts = [others(k, k) for k in (300, 400, 64, 65, 16, 170, 500)]
    options = dict(max_new_tokens=5, logprobs=2, ignore_eos=True)
    with model.state().feed(others(n, 9)) as s:
        together = [(c.token_ids, c.logprobs) for c in s.generate(prompts, **options)]
        for prompt, want in zip(prompts, together, strict=True):
            (alone,) = s.generate([prompt], **options)
            assert (alone.token_ids, alone.logprobs) == want
            with s.fork().feed(prompt) as fed:
                alone = fed.generate(**options)
            assert (alone.token_ids, alone.logprobs) == want
        assert s.score(prompts) == [s.score(p) for p in prompts]


def test_log_likelihoods_in_company_are_those_alone(model):
    pairs = [(others(n, 1)[: n - 3], others(3, n)) for n in (5, 70, 200, 201, 130)] * 2
    assert model.score_pairs(pairs) == [model.score(*pair) for pair in pairs]
    found = model.logprobs(others(300, 2), top=3)
    again = model.rolling_logprobs([others(300, 2)[1:], others(40, 3)], prefix=others(300, 2)[0])
    assert np.array_equal(again[0].logprobs, found.logprobs)


# ---- T2: pieces -------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[64, 136], [128, 72], [64, 64, 64, 8], [192, 8]])
def test_cut_at_chunks_is_the_whole_to_the_bit(engine, ids, lengths):
    assert same(in_pieces(engine, ids, lengths), whole(engine, ids))


@pytest.mark.parametrize(
    "lengths", [cut(T, 1), cut(T, 7), cut(T, 64), cut(T, 65), [63, 1, 1, 135], [199, 1]]
)
def test_cut_anywhere_is_the_whole(default_engine, ids, lengths):
    engine, rounding = default_engine
    assert relative_rms(in_pieces(engine, ids, lengths), whole(engine, ids)) < rounding


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_a_small_step_does_not_show(path, ids, device, format):
    """A prompt is cut into steps of the planner's size inside one call."""
    small, large = (open_engine(path, device=device, format=format, invariant=True,
                                step_tokens=n) for n in (64, 256))  # fmt: skip
    assert small.plan()["step_tokens"] < large.plan()["step_tokens"]
    assert same(whole(small, ids), whole(large, ids))
    for n in (7, 127):
        assert same(in_pieces(small, ids, [n, T - n]), in_pieces(large, ids, [n, T - n]))


def test_fork_is_recomputing(engine, ids):
    """Forked within a page, both go on by turns; what one writes the other never reads."""
    seq = engine.seq_new()
    engine.feed(seq, ids[:70], None)
    both = [seq, engine.seq_fork(seq)]
    turns = [[others(n, 10 * i + n) for n in (30, 75, 1, 5)] for i in range(2)]
    got = [[], []]
    for turn in range(4):
        for i in (1, 0):
            got[i].append(np.array(engine.step([(both[i], turns[i][turn])])))
    for i in range(2):
        again = engine.seq_new()
        engine.feed(again, ids[:70], None)
        for feed, logits in zip(turns[i], got[i], strict=True):
            assert same(engine.step([(again, feed)]), logits)
        engine.seq_release(again)


def borders(r, n):
    """Random multiples of 64 up to n, and n."""
    inner = [b for b in range(64, n, 64) if r.random() < 0.5]
    return list(zip([0, *inner], [*inner, n], strict=True))


def read_in_pieces(model, text, r, folder):
    s = model.state()
    for a, b in borders(r, len(text)):
        s.feed(text[a:b])
    return s


def read_through_files(model, text, r, folder):
    s = model.state()
    for a, b in borders(r, len(text)):
        s.feed(text[a:b]).save(folder / "piece")
        s.release()
        s = kl.State.load(folder / "piece", model)
    return s


def read_on_forks(model, text, r, folder):
    """Of each state that is left behind, another fork has gone another way."""
    s = model.state()
    for a, b in borders(r, len(text)):
        fork, other = s.fork(), s.fork()
        other.feed(others(70, a))
        s.release()
        s = fork.feed(text[a:b])
        other.release()
    return s


def read_in_company(model, text, r, folder):
    """While other sequences are there, some of them fed in between."""
    beside = [model.state().feed(others(n, n)) for n in (3, 100)]
    s = model.state()
    for a, b in borders(r, len(text)):
        s.feed(text[a:b])
        beside[r.randrange(2)].generate(max_new_tokens=2, ignore_eos=True)
    return s


WAYS = [read_in_pieces, read_through_files, read_on_forks, read_in_company]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_text_is_the_same(model, way, tmp_path):
    """What comes after it: logits, samples, log-likelihoods."""
    r = random.Random(way.__name__)
    options = dict(max_new_tokens=9, logprobs=2, ignore_eos=True, temperature=0.9, seed=4)
    for n in (r.randrange(65, 200), r.randrange(400, 700), 512):
        text = others(n, n)
        with model.state().feed(text) as want, way(model, text, r, tmp_path) as got:
            assert got.token_ids == text
            assert same(got.logits(), want.logits())
            assert same(got.logits(), model.logits(text))
            rests = [others(70, 1), others(2, 2)]
            assert got.score(rests) == want.score(rests)
            a, b = (s.generate(others(66, 3), **options) for s in (got, want))
            assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
            assert same(got.logits(), want.logits())


def test_a_shared_context_is_the_whole_text(model):
    context = others(300, 1)
    rests = [others(n, n) for n in (1, 5, 70)]
    for rest, found in zip(rests, model.score(context, rests), strict=True):
        want = model.logprobs(context + rest)
        assert found[0] == float(want.logprobs[299:].sum(dtype=np.float64))


def test_a_prompt_continues_a_state_as_a_whole(model):
    """Where the state ends at a multiple of 64."""
    text = others(300, 1)
    with model.state().feed(text[:192]) as s:
        options = dict(max_new_tokens=9, logprobs=2, ignore_eos=True)
        (want,) = generated(model, [text])
        (row,) = s.generate([text[192:]], **options)
        done = s.generate(text[192:], **options)
        assert (row.token_ids, row.logprobs) == (done.token_ids, done.logprobs) == want


# ---- what the small model finds again -----------------------------------------------------------

COLUMNS = ("single", "multikey 4", "multivalue 4", "multiquery 4", "i-th of 4", "MQAR 16")
SAMPLES = 4  # of each


def asked(model):
    """[(column, token ids of a conversation, answer), ...] as benchmarks/recall.py asks them."""
    found = []
    for column in COLUMNS:
        name, options = recall.COLUMNS[column]
        for i in range(SAMPLES):
            seed = tasks.HELD_OUT_SEED + i
            messages, answer = recall.conversation(model, name, options, 500, seed)
            found.append((name, model.tokenizer.apply_chat_template(messages), answer))
    return found


def test_recall_is_the_same_however_it_was_read(device, tmp_path):
    """Tokens of answers, too: alone, in a mixed batch, from the prefix cache, in pieces, through
    files, on forks."""
    answer = dict(max_new_tokens=48, progress=False)
    r = random.Random(1)
    with kl.load(device=device, dtype="bf16", max_context=1024, max_batch=5,
                 batch_invariant=device == "cuda", progress=False) as m:  # fmt: skip
        questions = asked(m)
        want = [m.generate(text, **answer) for _, text, _ in questions]
        right = [recall.is_right(name, a, c.text)
                 for (name, _, a), c in zip(questions, want, strict=True)]  # fmt: skip
        assert sum(right) >= 0.8 * len(questions)
        want = [c.token_ids for c in want]
        together = m.generate([text for _, text, _ in questions], **answer)
        assert [c.token_ids for c in together] == want
        m.prefix_cache = True  # of each question twice, the second begins where the first ends
        twice = m.generate([text for _, text, _ in questions for _ in range(2)], **answer)
        assert [c.token_ids for c in twice[::2]] == [c.token_ids for c in twice[1::2]] == want
        for c in twice[1::2]:
            assert c.stats.cached_tokens == (len(c.prompt_token_ids) - 1) // 64 * 64 > 0
        m.prefix_cache = False
        for i, (_, text, _) in enumerate(questions):
            with WAYS[i % len(WAYS)](m, text, r, tmp_path) as s:
                assert s.generate(**answer).token_ids == want[i], i


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_names_tests_that_are_there():
    page = (ROOT / "README.md").read_text().split("## Reproducibility")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+/\w+\.py)` ((?:`\w+`(?:, )?)+)", page)
    assert len(named) >= 8
    for file, names in named:
        source = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^def test_{name}\(", source, re.M), f"{file}: {name}"
