"""Random histories of calls on one model, several of them under way at a time: each gives what it
gives alone, to the bit, and leaves nothing behind. Few sequences and pages, and steps that one
prompt fills; weights that amplify, so that a sum in another order shows, and the small model, which
repeats itself, so that guesses are right."""

import random

import kimi_linear as kl
import numpy as np
import pytest
from kimi_linear import _device
from kimi_linear._generation import Past, Run
from random_weights import path  # noqa: F401  a fixture

CONTEXT, BATCH, PAGES, STEP_TOKENS = 300, 4, 11, 128
LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 100, 129, 140)


class Alone:
    """What a call gives on a model that nobody else uses."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def state(self, parts):
        """One that was only ever fed, a part at a time."""
        s = self.model.state()
        for part in parts:
            s.feed(list(part))
        return s

    def logits(self, parts):
        if parts not in self.known:
            with self.state(parts) as s:
                self.known[parts] = s.logits()
        return self.known[parts]

    def chunks(self, parts, ids, options):
        key = parts, tuple(ids), tuple(options.items())
        if key not in self.known:
            options = options | dict(speculate=0)
            with self.state(parts) as s:
                source = s if parts else self.model
                self.known[key] = [told(c) for c in source.stream(ids, **options)]
        return self.known[key]


def told(chunk):
    return chunk.token_id, chunk.logprob, chunk.finish_reason, chunk.top


class Call:
    """Chunks that come by and by, beside those of the call alone."""

    def __init__(self, want):
        self.want, self.n = want, 0

    def take(self, chunk):
        assert told(chunk) == self.want[self.n]
        self.n += 1


class History:
    def __init__(self, model, alone, seed):
        self.model, self.alone, self.r = model, alone, random.Random(seed)
        self.states, self.streams, self.rows = [], [], {}  # states: [state, its parts]
        self.run = Run(model._engine)
        self.refused = self.accepted = 0

    def ids(self):
        """Few texts, of few tokens: prefixes to share, pairs to guess from."""
        text, own = random.Random(self.r.randrange(2)), random.Random(self.r.randrange(4))
        ids = [text.randrange(10, 14) for _ in range(self.r.choice(LENGTHS))]
        shared = self.r.choice([0, 64, 128, len(ids) - 1])
        return ids[:shared] + [own.randrange(10, 14) for _ in ids[shared:]]

    def options(self):
        r = self.r
        options = dict(max_new_tokens=r.choice([1, 2, 4, 20]), ignore_eos=True, seed=r.randrange(2))
        if r.random() < 0.4:
            options |= dict(temperature=0.7)
        if r.random() < 0.3:
            options |= dict(repetition_penalty=1.2)
        if r.random() < 0.3:
            options |= dict(logprobs=2)
        return options | dict(speculate=r.choice([0, 0, 3, 15]))

    def attempt(self, call):
        """None where it is refused for want of room."""
        try:
            return call()
        except kl.OutOfMemory:
            self.refused += 1
        except ValueError as e:
            if "max_context" not in str(e):
                raise
        return None

    def source(self):
        """A state that holds something and its parts, or the model."""
        known = [entry for entry in self.states if entry[1]]
        return self.r.choice(known) if known and self.r.random() < 0.6 else [self.model, ()]

    # ---- what may happen ---------------------------------------------------------------------

    def feed(self):
        if not self.states or self.r.random() < 0.3:
            s = self.attempt(self.model.state)
            if s is not None:
                self.states.append([s, ()])
            return
        entry, ids = self.r.choice(self.states), self.ids()
        if self.attempt(lambda: entry[0].feed(ids)) is not None:
            entry[1] = (*entry[1], tuple(ids))

    def fork(self):
        s, parts = self.source()
        fork = self.attempt(s.fork) if parts else None
        if fork is not None:
            self.states.append([fork, parts])

    def answer(self):
        """A prompt continues a state or begins anew."""
        entry, ids, options = self.source(), self.ids(), self.options()
        s, parts = entry
        got = self.attempt(lambda: s.generate(ids, **options))
        if got is None:
            return
        self.check(got, self.alone.chunks(parts, ids, options))
        if parts:
            entry[1] = (*parts, tuple(ids), *((token,) for token in got.token_ids))

    def answers(self):
        (s, parts), options = self.source(), self.options() | dict(temperature=0.0)
        prompts = [self.ids() for _ in range(self.r.randrange(2, 6))]
        got = self.attempt(lambda: s.generate(prompts, **options))
        for prompt, answer in zip(prompts, got or (), strict=got is not None):
            self.check(answer, self.alone.chunks(parts, prompt, options))

    def check(self, answer, want):
        assert answer.token_ids == [token for token, *_ in want]
        if answer.logprobs:
            assert [t.logprob for t in answer.logprobs] == [logprob for _, logprob, *_ in want]
        self.accepted += answer.stats.accepted

    def stream(self):
        (s, parts), ids, options = self.source(), self.ids(), self.options()
        chunks = self.attempt(lambda: s.stream(ids, **options))
        if chunks is not None and not parts:  # a state's own stream would change it at its end
            self.streams.append((chunks, Call(self.alone.chunks(parts, ids, options))))

    def read(self):
        for chunks, call in self.streams[:]:
            chunk = self.attempt(lambda chunks=chunks: next(chunks, None))
            if chunk is None or self.r.random() < 0.1:
                self.streams.remove((chunks, call))
                chunks.close()
            if chunk is not None:
                call.take(chunk)

    def submit(self):
        """To a run that goes on beside all else."""
        (s, parts), ids, options = self.source(), self.ids(), self.options()
        past = None
        if parts:
            past = Past(s._held.sequence.seq, s._held.ids, logits=s._held.logits)
        checked = self.model._check_sampling(**options)
        try:
            (row,) = self.model._rows([np.array(ids, np.int32)], checked, past)
            self.run.submit(row)
        except ValueError as e:
            assert "max_context" in str(e) or "more than the cache" in str(e)
        else:
            held = s._held if parts else None
            self.rows[row] = s, held, Call(self.alone.chunks(parts, ids, options))

    def step(self):
        for row, chunk in self.run.step(self.r.choice([1, 1, 3, 16]), False):
            s, held, call = self.rows[row]
            if chunk is not None:
                call.take(chunk)
                continue
            changed = held is not None and s._held is not held
            assert changed or isinstance(row.error, kl.OutOfMemory)
        if self.rows and self.r.random() < 0.1:
            self.run.finish(self.r.choice(list(self.rows)))
        self.rows = {row: entry for row, entry in self.rows.items() if row.id in self.run._rows}

    def release(self):
        if self.states:
            self.states.pop(self.r.randrange(len(self.states)))[0].release()

    def forget(self):
        self.model.prefix_cache = self.r.random() < 0.7

    # ---- all of it ---------------------------------------------------------------------------

    CALLS = (
        *("feed", "fork", "answer", "read", "submit") * 2, *("step",) * 4,
        "answers", "stream", "release", "forget",
    )  # fmt: skip

    def play(self, n):
        for _ in range(n):
            getattr(self, self.r.choice(self.CALLS))()
            for s, parts in self.states:
                assert s.token_ids == [i for part in parts for i in part]
                assert not parts or np.array_equal(s.logits(), self.alone.logits(parts))
        self.run.close()
        for chunks, _ in self.streams:
            chunks.close()
        while self.states:
            self.release()
        self.rows = {}


def open_model(path, device, **options):  # noqa: F811
    dtype = "bf16" if device == "cuda" else "f32"
    how = dict(device=device, dtype=dtype, batch_invariant=device == "cuda", max_context=CONTEXT)
    return kl.load(path, progress=False, **how, **options)


def all_pages_can_be_had(engine):
    """None is promised to anybody still."""
    pages, seqs = engine.plan()["n_pages"], []
    while pages > 0:
        n = min(64 * pages, CONTEXT)
        seqs.append(engine.seq_restore(n))
        pages -= -(-n // 64)
    for seq in seqs:
        engine.seq_release(seq)


@pytest.mark.parametrize("part", range(4))
def test_a_history_of_calls_beside_each_other(path, device, part, monkeypatch):  # noqa: F811
    where, n, calls = (path, 6, 120) if part else (None, 2, 60)
    with open_model(where, device, max_batch=2) as oracle:
        alone, plan = Alone(oracle), oracle.plan
        cache = (BATCH + 2) * plan.kda_state_per_sequence + plan.of_pages(PAGES) + (1 << 14)
        core = _device.Options.core
        small = dict(step_tokens=STEP_TOKENS)
        monkeypatch.setattr(_device.Options, "core", lambda o, d: core(o, d) | small)
        with open_model(where, device, max_batch=BATCH, cache_bytes=cache) as model:
            refused = accepted = 0
            for seed in range(n * part, n * part + n):
                model.prefix_cache = True
                history = History(model, alone, seed)
                history.play(calls)
                assert model._engine.usage() == (0, 0), seed
                refused += history.refused
                accepted += history.accepted
            assert refused > 0 and model._engine.prefix_stats()["hits"] > 0
            assert accepted > 0 or where
            model.clear_prefix_cache()
            assert model._engine.prefix_stats()["bytes"] == 0
            all_pages_can_be_had(model._engine)
