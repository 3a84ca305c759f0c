"""States to the bit: what a state gives is what a sequence fed the same way gives, whatever was
forked, saved, loaded, shared or interrupted in between."""

import contextlib

import kimi_linear as kl
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kimi_linear.testing import random_model, tiny_config
from states import first_bound

LENGTHS = (1, 63, 64, 65, 300)
VOCAB = 320


def ids(n, seed=0):
    return np.random.default_rng([n, seed]).integers(0, 256, n).tolist()


def same(a, b):
    return a.token_ids == b.token_ids and np.array_equal(a.logits(), b.logits())


@pytest.fixture(params=["f32", "bf16", "int8", "bf16, fp8 latents"])
def model(request, device):
    dtype, _, latents = request.param.partition(", ")
    if device == "cuda" and dtype == "f32":
        pytest.skip("CUDA has no f32 weights")
    with random_model(
        tiny_config(), device=device, dtype=dtype, max_context=1024, max_batch=8,
        kv_cache_dtype="fp8" if latents else "auto", batch_invariant=device == "cuda",
    ) as m:  # fmt: skip
        yield m
        assert m._engine.usage() == (0, 0)


# ---- one state --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_fed_at_once(model, n):
    s = model.state().feed(ids(n))
    assert s.position == len(s) == n and s.token_ids == ids(n)
    assert np.array_equal(s.logits(), model.logits(ids(n)))
    assert s.logits().std() > 0.01


def test_fed_in_pieces_at_chunk_borders(model):
    whole = model.state().feed(ids(300))
    for pieces in ((64, 236), (128, 64, 108), (64, 64, 64, 64, 44)):
        s, at = model.state(), 0
        for n in pieces:
            s.feed(ids(300)[at : at + n])
            at += n
        assert same(s, whole), pieces
        s.release()


@pytest.mark.parametrize("n", LENGTHS)
def test_a_fork_is_a_recomputation(model, n):
    s = model.state().feed(ids(n))
    forks = [s.fork() for _ in range(3)]
    s.release()  # its pages live on in the forks
    for i, fork in enumerate(forks):
        fork.feed(ids(70, i))
    for i, fork in enumerate(forks):
        alone = model.state().feed(ids(n)).feed(ids(70, i))
        assert same(fork, alone)
        assert not np.array_equal(fork.logits(), forks[i - 1].logits())


@pytest.mark.parametrize("n", LENGTHS)
def test_saved_is_live(model, n, tmp_path):
    live = model.state().feed(ids(n))
    live.save(tmp_path / "a.klstate")
    loaded = kl.State.load(tmp_path / "a.klstate", model)
    assert same(live, loaded)
    loaded.save(tmp_path / "b.klstate")
    assert (tmp_path / "a.klstate").read_bytes() == (tmp_path / "b.klstate").read_bytes()
    options = dict(max_new_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    a, b = (s.generate(ids(5), **options) for s in (live, loaded))
    assert a.token_ids == b.token_ids and same(live, loaded)
    for s in (live, loaded):
        s.feed(ids(100, 1))
    assert same(live, loaded)


def test_an_empty_state_is_kept_too(model, tmp_path):
    model.state().save(tmp_path / "empty")
    s = kl.State.load(tmp_path / "empty", model)
    assert s.position == 0
    assert same(s.feed(ids(65)), model.state().feed(ids(65)))


SAMPLING = dict(max_new_tokens=12, temperature=0.9, top_p=0.95, repetition_penalty=1.3,
                logprobs=3, seed=11, ignore_eos=True)  # fmt: skip


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("n_prompt", [0, 1, 64])
def test_generation_is_that_of_the_whole_prompt(model, n, n_prompt):
    """Where the prompt begins at a chunk's border, or is read in the same pieces."""
    whole = model.state().feed(ids(n))
    if n_prompt:
        whole.feed(ids(n_prompt, 1))
    s = model.state().feed(ids(n))
    got = s.generate(ids(n_prompt, 1) or None, **SAMPLING)
    want = whole.generate(**SAMPLING)
    assert got.token_ids == want.token_ids and got.logprobs == want.logprobs
    assert same(s, whole)
    assert s.token_ids == ids(n) + ids(n_prompt, 1) + got.token_ids
    if n % 64 == 0 or n_prompt == 0:
        plain = model.generate(ids(n) + ids(n_prompt, 1), **SAMPLING)
        assert plain.token_ids == got.token_ids and plain.logprobs == got.logprobs


def test_after_a_generation_all_tokens_were_read(model):
    """The last one too, each as a step of its own."""
    s = model.state().feed(ids(65))
    made = s.generate(max_new_tokens=7, ignore_eos=True).token_ids
    alone = model.state().feed(ids(65))
    for token in made:
        assert token == alone.logits().argmax()
        alone.feed([token])
    assert same(s, alone)


def test_a_batch_of_prompts_on_one_state(model):
    """More rows than sequences: the same as each alone, and the state stays as it is."""
    s = model.state().feed(ids(300))
    before = s.logits()
    prompts = [ids(n, n) for n in (1, 3, 64, 65, 2, 9, 30, 5, 128, 4, 7, 1)]
    rows = s.generate(prompts, **SAMPLING)
    assert s.token_ids == ids(300) and np.array_equal(s.logits(), before)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.prompt_token_ids == prompt
        assert row.stats.prompt_tokens == len(prompt)
    greedy = dict(max_new_tokens=6, ignore_eos=True)
    for prompt, row in zip(prompts, s.generate(prompts, **greedy), strict=True):
        assert s.fork().generate(prompt, **greedy).token_ids == row.token_ids


def test_scores(model):
    s = model.state().feed(ids(128))
    want = model.logprobs(ids(128) + ids(70, 1), top=5)
    got = s.logprobs(ids(70, 1), top=5)
    assert got.logprobs.shape == got.greedy.shape == (70,) and got.top[0].shape == (70, 5)
    allowed = first_bound(model, s.logits())
    assert np.array_equal(got.logprobs[1:], want.logprobs[128:])
    assert abs(got.logprobs[0] - want.logprobs[127]) < allowed
    assert np.array_equal(got.greedy[1:], want.greedy[128:])
    assert np.array_equal(got.top[0][1:], want.top[0][128:])
    assert np.array_equal(got.top[1][1:], want.top[1][128:])
    assert np.abs(got.top[1][0] - want.top[1][127]).max() < allowed
    total, greedy = s.score(ids(70, 1))
    assert abs(total - model.score(ids(128), ids(70, 1))[0]) < allowed + 1e-5 and not greedy
    best = [int(s.logits().argmax())]
    assert s.score(best)[1] and s.position == 128
    assert np.array_equal(model.state().logprobs(ids(9)).logprobs, model.logprobs(ids(9)).logprobs)


def test_hundreds_of_forks_share_the_pages(device):
    n, options = 1000, dict(device=device, max_context=1024, batch_invariant=device == "cuda")
    with random_model(tiny_config(), max_batch=1, **options) as m:
        cache = 301 * m.plan.kda_state_per_sequence + m.plan.of_pages(20) + (1 << 14)
    with random_model(tiny_config(), max_batch=301, cache_bytes=cache, **options) as m:
        s = m.state().feed(ids(n))
        forks = [s.fork() for _ in range(300)]
        assert m._engine.usage() == (301, 16)
        assert s.nbytes == m.plan.of_sequence(n) == forks[7].nbytes
        assert s.shared_nbytes == m.plan.of_pages(16)
        forks[7].feed([1])  # the partial page becomes its own
        assert m._engine.usage() == (301, 17)
        assert forks[7].nbytes - forks[7].shared_nbytes == m.plan.of_fork(n, n + 1)
        for fork in forks:
            fork.release()
        assert m._engine.usage() == (1, 16) and s.shared_nbytes == 0


# ---- any sequence of operations ---------------------------------------------------------------


class Interrupted(Exception):
    pass


class World:
    """States of a model, each beside the list of calls that would make it anew."""

    def __init__(self, model, oracle, folder):
        self.model, self.oracle, self.folder = model, oracle, folder
        self.states, self.files = [], []
        self.known = {}

    def run(self, operations):
        for name, i, n in operations:
            getattr(self, name)(i, n)
            for state, calls in self.states:
                self.check(state, calls)

    def logits(self, calls):
        """Of a sequence that is only ever fed: (ids at once), ... ."""
        if calls not in self.known:
            engine = self.oracle._engine
            seq = engine.seq_new()
            for part in calls:
                logits = engine.logits(seq, list(part), True, None)
            engine.seq_release(seq)
            self.known[calls] = np.array(logits)
        return self.known[calls]

    def check(self, state, calls):
        assert state.token_ids == [i for part in calls for i in part]
        if calls:
            assert np.array_equal(state.logits(), self.logits(calls))

    def pick(self, i):
        return i % len(self.states) if self.states else None

    def attempt(self, call):
        """Refused for want of room, or done; never half done."""
        try:
            return call()
        except kl.OutOfMemory:
            return None
        except ValueError as e:
            assert "max_context" in str(e), e

    def new(self, i, n):
        if (s := self.attempt(self.model.state)) is not None:
            self.states.append((s, ()))

    def feed(self, i, n):
        k = self.pick(i)
        if k is None:
            return self.new(i, n)
        s, calls = self.states[k]
        if self.attempt(lambda: s.feed(ids(n, i))) is not None:
            self.states[k] = s, (*calls, tuple(ids(n, i)))

    def fork(self, i, n):
        k = self.pick(i)
        if k is None:
            return
        s, calls = self.states[k]
        if (t := self.attempt(s.fork)) is not None:
            self.states.append((t, calls))

    def generate(self, i, n):
        k = self.pick(i)
        if k is None or not self.states[k][1]:
            return
        s, calls = self.states[k]
        prompt = ids(n, i) if i % 2 else None
        done = self.attempt(
            lambda: s.generate(prompt, max_new_tokens=i % 5, ignore_eos=True)
        )
        if done is None:
            return
        if prompt:
            calls = (*calls, tuple(prompt))
        for token in done.token_ids:
            assert token == self.logits(calls).argmax()
            calls = (*calls, (token,))
        self.states[k] = s, calls

    def interrupt(self, i, n):
        """A call that fails leaves the state as it was if a sequence was free for it."""
        k = self.pick(i)
        if k is None or not self.states[k][1]:
            return
        s, calls = self.states[k]

        def fail(seen, logits):
            assert list(seen) == s_tokens
            raise Interrupted

        s_tokens = s.token_ids + ids(n, i)
        try:
            self.attempt(lambda: s.generate(ids(n, i), max_new_tokens=3, logits_processor=fail))
        except Interrupted:
            if repr(s) == "<kimi_linear.State was lost>":
                assert len(self.states) == self.model.plan.max_batch or self.is_full()
                with pytest.raises(ValueError, match="was lost when a call on it did not end"):
                    s.logits()
                del self.states[k]

    def cancel(self, i, n):
        """A stream that is left early leaves the state as it was."""
        k = self.pick(i)
        if k is None or not self.states[k][1]:
            return
        s, calls = self.states[k]
        chunks = self.attempt(lambda: s.stream(ids(n, i), max_new_tokens=4, ignore_eos=True))
        if chunks is None:
            return
        with contextlib.closing(chunks):
            for _ in range(i % 4):
                chunk = self.attempt(lambda: next(chunks))
                if chunk is None or chunk.finish_reason:  # the last one, where the context ends
                    break

    def ask(self, i, n):
        """Prompts that begin alike and leave snapshots, where sequences and pages are over."""
        prompt = ids(130, i % 2)[: 64 + 64 * (i % 2)] + ids(n, i)
        answers = self.attempt(
            lambda: self.model.generate([prompt] * 2, max_new_tokens=1, ignore_eos=True)
        )
        for answer in answers or ():
            assert answer.token_ids == [self.logits((tuple(prompt),)).argmax()]

    def evict(self, i, n):
        self.model.prefix_cache = i % 3 > 0
        self.model.clear_prefix_cache()
        assert self.model._engine.prefix_stats()["snapshots"] == 0

    def is_full(self):
        plan = self.model.plan
        return self.model._engine.usage()[1] >= plan.mla_pages // plan.of_pages(1) - 4

    def save(self, i, n):
        k = self.pick(i)
        if k is None:
            return
        s, calls = self.states[k]
        file = self.folder / f"{i % 3}.klstate"
        s.save(file)
        self.files = [f for f in self.files if f[0] != file] + [(file, calls)]

    def load(self, i, n):
        if not self.files:
            return
        file, calls = self.files[i % len(self.files)]
        s = self.attempt(lambda: kl.State.load(file, self.model))
        if s is not None:
            self.states.append((s, calls))

    def release(self, i, n):
        k = self.pick(i)
        if k is None:
            return
        s, _ = self.states.pop(k)
        if i % 2:
            s.release()
            s.release()
            with pytest.raises(ValueError, match="state: is released"):
                s.feed([1])


OPERATIONS = ("new", "feed", "feed", "fork", "generate", "interrupt", "save", "load", "release",
              "cancel", "ask", "ask", "evict")  # fmt: skip


def test_any_sequence_of_operations(pytestconfig, tmp_path, device):
    """Against a model that knows neither forks nor files nor generation. Few sequences and
    pages, so that both run out; what the prefix cache keeps goes for a state's sake. On a GPU a
    quarter of them: each operation waits for it."""
    n_sequences = pytestconfig.getoption("sequences")
    options = dict(device=device, dtype="f32", max_context=200)
    if device == "cuda":
        options |= dict(dtype="bf16", batch_invariant=True)
        n_sequences = -(-n_sequences // 4)
    config = tiny_config()
    with random_model(config, max_batch=1, **options) as oracle:
        per_sequence, page = oracle.plan.kda_state_per_sequence, oracle.plan.of_pages(1)
        cache = 5 * per_sequence + 9 * page + (1 << 14)
        with random_model(config, max_batch=5, cache_bytes=cache, **options) as model:
            known = {}

            @settings(
                max_examples=n_sequences,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(
                st.lists(
                    st.tuples(
                        st.sampled_from(OPERATIONS),
                        st.integers(0, 11),
                        st.sampled_from([1, 2, 5, 63, 64, 65]),
                    ),
                    min_size=5,
                    max_size=20,
                )
            )
            def run(operations):
                world = World(model, oracle, tmp_path)
                world.known = known
                model.prefix_cache = True
                try:
                    world.run(operations)
                finally:
                    for state, _ in world.states:
                        state.release()
                assert model._engine.usage() == (0, 0)

            run()
            assert len(known) > 20
            reused = model._engine.prefix_stats()
            assert reused["hits"] > 20 and reused["evicted"] > 0
