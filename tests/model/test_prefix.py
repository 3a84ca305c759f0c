"""The prefix cache: to the bit what reading everything gives, and never in anyone's way."""

import contextlib

import kimi_linear as kl
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kimi_linear.testing import random_model, tiny_config

ASK = dict(max_new_tokens=3, logprobs=2, ignore_eos=True)


def ids(n, seed=0):
    return np.random.default_rng([7, seed]).integers(0, 256, n).tolist()


def outcome(completion):
    return completion.token_ids, completion.logprobs


def cached(completions):
    return [c.stats.cached_tokens for c in completions]


def open_model(device="cpu", dtype="bf16", **options):
    options = dict(max_context=2048, max_batch=4) | options
    invariant = device == "cuda"
    return random_model(
        tiny_config(), device=device, dtype=dtype, batch_invariant=invariant, **options
    )


@pytest.fixture(params=["f32", "bf16", "int8"])
def model(request, device):
    if device == "cuda" and request.param == "f32":
        pytest.skip("CUDA has no f32 weights")
    with open_model(device, request.param) as m:
        yield m
        assert m._engine.usage() == (0, 0)
        m.clear_prefix_cache()
        assert m._engine.prefix_stats()["bytes"] == 0


def with_and_without(m, prompts, **options):
    """The answers of the model, checked against those of reading all."""
    options = ASK | options
    got = m.generate(prompts, **options)
    with open_model(m.device, m.dtype) as plain:
        want = plain.generate(prompts, **options)
    assert [outcome(c) for c in got] == [outcome(c) for c in want]
    return got


# ---- what is reused ---------------------------------------------------------------------------


def test_off_at_first(model):
    assert model.prefix_cache is False
    assert cached(model.generate([ids(200)] * 3, **ASK)) == [0, 0, 0]
    assert "prefixes    not kept (prefix_cache)" in str(model.info())
    with pytest.raises(TypeError, match="prefix_cache: must be True or False, got 1"):
        model.prefix_cache = 1


def test_a_conversation(model):
    """Every turn begins with all whole blocks of the one before."""
    model.prefix_cache = True
    text, expected = ids(150), 0
    for turn in range(5):
        (answer,) = with_and_without(model, [text])
        assert answer.stats.cached_tokens == expected
        assert answer.stats.prompt_tokens == len(text)
        expected = (len(text) - 1) // 64 * 64
        text = text + answer.token_ids + ids(40 + 30 * turn, turn)
    assert f"spared {model._engine.prefix_stats()['cached_tokens']:,} tokens" in str(
        model.info()
    )


@pytest.mark.parametrize("n", [1, 64, 65, 129, 193])
def test_the_same_again(model, n):
    """At every kind of end: a token is left to be read, of whatever length the rest is."""
    model.prefix_cache = True
    expected = (n - 1) // 64 * 64
    for want in (0, expected):
        assert cached(with_and_without(model, [ids(n)])) == [want]
    assert cached(model.generate([ids(n)] * 9, **ASK)) == [expected] * 9
    model.clear_prefix_cache()
    assert cached(with_and_without(model, [ids(n)] * 9)) == [0] + [expected] * 8
    model.prefix_cache = False
    assert cached(model.generate([ids(n)] * 2, **ASK)) == [0, 0]


def test_questions_on_a_document(model):
    """At once it is read once; one by one, once and an eighth."""
    document = ids(1300)
    questions = [document + ids(60 + 11 * i, 100 + i) for i in range(6)]
    model.prefix_cache = True
    assert cached(with_and_without(model, questions)) == [0] + [1280] * 5
    model.clear_prefix_cache()
    found = [cached(with_and_without(model, [q]))[0] for q in questions]
    first = (len(questions[0]) - 1) // 64 * 64
    assert found == [0, (first - first // 8) // 64 * 64] + [1280] * 4


def test_trees():
    """System message, two documents under it, questions on each, in any order."""
    system, documents = ids(200), [ids(400, 1), ids(300, 2)]
    prompts = [system + documents[i % 2] + ids(20 + i, 10 + i) for i in range(8)]
    prompts.insert(3, system)
    prompts.append(ids(500, 3))
    with open_model(max_batch=16) as m:
        m.prefix_cache = True
        assert cached(with_and_without(m, prompts)) == [
            0, 192, 576, 192, 448, 576, 448, 576, 448, 0
        ]  # fmt: skip
        again = cached(with_and_without(m, prompts[::-1]))
        assert again == [448, 512, 576, 512, 576, 512, 192, 576, 512, 576]


def test_scores_share_contexts_across_calls(model):
    """With earlier scores and with prompts, a token before the first that is scored."""
    with open_model(model.device, model.dtype) as plain:
        pairs = [(ids(n), ids(k, 9)) for n in (200, 193, 192, 65) for k in (1, 70)]
        want = plain.score_pairs(pairs)
        model.prefix_cache = True
        for expected in (0, 1, 2):
            assert model.score(ids(200), ids(70, 9)) == want[1]
            assert model._engine.prefix_stats()["hits"] == expected
        assert model._engine.prefix_stats()["cached_tokens"] == 2 * 192
        assert model.score_pairs(pairs) == want
        assert [model.score(*pair) for pair in pairs] == want
        assert cached([model.generate(ids(193), **ASK)]) == [192]


def test_states_take_no_part(model):
    model.prefix_cache = True
    model.generate(ids(200), **ASK)
    s = model.state().feed(ids(128))
    answer = s.generate(ids(200)[128:], **ASK)
    assert answer.stats.cached_tokens == 0
    assert outcome(answer) == outcome(model.generate(ids(200), **ASK))
    s.release()


def test_sampling_and_penalties_see_the_whole_prompt(model):
    model.prefix_cache = True
    seen = []

    def processor(prompt, logits):
        seen.append(len(prompt))

    options = dict(temperature=0.9, seed=3, repetition_penalty=1.5, top_p=0.9)
    for _ in range(2):
        with_and_without(
            model, [ids(130), ids(140)], logits_processor=processor, **options
        )
    assert sorted(set(seen)) == [130, 131, 132, 140, 141, 142]


# ---- what does not get in the way -------------------------------------------------------------


def test_a_poisoned_prompt_is_not_reused():
    with open_model() as m:
        m.prefix_cache = True

        def poison(_, logits):
            logits[...] = np.nan

        m.generate(ids(100), **ASK)
        with pytest.raises(kl.NumericalError):
            m.generate(ids(100) + ids(200, 1), logits_processor=poison, **ASK)
        assert cached([m.generate(ids(100) + ids(200, 1), **ASK)]) == [0]


def test_every_sequence_can_be_had(device):
    """Snapshots in all slots: max_batch states still fit, and all pages."""
    with open_model(device, max_batch=3) as m:
        m.prefix_cache = True
        for seed in range(9):
            m.generate(ids(200, seed), **ASK)
        assert m._engine.prefix_stats()["snapshots"] == 3 + m.plan.snapshot_slots - 1
        states = [m.state() for _ in range(3)]
        with pytest.raises(kl.OutOfMemory, match="all 3 are in use"):
            m.state()
        assert m._engine.prefix_stats()["snapshots"] == m.plan.snapshot_slots
        for i, s in enumerate(states):
            s.feed(ids(2048, i))
        assert m._engine.prefix_stats()["snapshots"] == 0
        for s in states:
            s.release()
        assert m._engine.usage() == (0, 0)


def test_a_plan_counts_what_is_kept():
    with open_model(max_batch=16) as m:
        plan = m.plan
        assert plan.snapshot_slots == 4
        assert plan.snapshots == 4 * plan.kda_state_per_sequence
        m.prefix_cache = True
        for seed in range(30):
            m.generate(ids(300, seed), **ASK)
        kept = m._engine.prefix_stats()
        assert kept["snapshots"] == 16 + 4 - 1  # the last prompt ran in the other
        assert kept["evicted"] == 30 - 19
        assert kept["bytes"] == 19 * plan.kda_state_per_sequence + plan.of_pages(19 * 4)
        assert kept["bytes"] <= plan.kda_states + plan.snapshots + plan.mla_pages


# ---- any sequence of calls --------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Pair:
    """A model and its twin without the cache, which must do alike whatever is asked of them; but
    two prompts that share pages may fit where they would not alone."""

    def __init__(self, model, twin):
        self.models = (model, twin)
        self.states = []

    def both(self, call):
        """Run it on each; results and refusals must be the same, or there is no refusal."""
        found = []
        for k, m in enumerate(self.models):
            try:
                found.append(call(m, k))
            except (kl.OutOfMemory, kl.NumericalError, Interrupted) as e:
                found.append(type(e))
        assert found[0] == found[1] or found[1] is kl.OutOfMemory

    def generate(self, prompts, i):
        self.both(lambda m, _: [outcome(c) for c in m.generate(prompts, **ASK)])

    def sampled(self, prompts, i):
        options = ASK | dict(temperature=0.8, seed=i, max_new_tokens=1 + i)
        self.both(lambda m, _: [outcome(c) for c in m.generate(prompts, **options)])

    def stream(self, prompts, i):
        """Left after i tokens; sometimes others are asked meanwhile."""

        def run(m, _):
            chunks, found = m.stream(prompts[0], **ASK), []
            with contextlib.closing(chunks):
                for n, chunk in zip(range(i + 1), chunks, strict=False):
                    found.append((chunk.token_id, chunk.logprob))
                    if n == 0 and i % 2:
                        found.append(outcome(m.generate(prompts[-1], **ASK)))
            return found

        self.both(run)

    def interrupt(self, prompts, i):
        """A prompt that is not read to its end, or whose logits are bad."""

        def fail(seen, logits):
            raise Interrupted

        def poison(seen, logits):
            logits[...] = np.nan

        def halfway(done, total):
            if done > 128:
                raise Interrupted

        options = (
            {"logits_processor": fail},
            {"logits_processor": poison},
            {"progress": halfway},
        )
        self.both(lambda m, _: m.generate(prompts, **ASK, **options[i % 3]) and None)

    def state(self, prompts, i):
        """Held by a caller, who takes sequences and pages."""
        held = [None, None]

        def run(m, k):
            s = m.state()
            try:
                held[k] = s.feed(prompts[0])
            except BaseException:
                s.release()
                raise
            return s.logits().tolist()

        self.both(run)
        if held[0] is not None:
            self.states.append(held)

    def release(self, prompts, i):
        if self.states:
            for s in self.states.pop(i % len(self.states)):
                s.release()

    def logprobs(self, prompts, i):
        self.both(lambda m, _: m.logprobs(prompts[0]).logprobs.tolist())

    def score(self, prompts, i):
        """Continuations of a context, and of another that may begin alike."""
        pairs = [(prompts[0], own) for own in ([1], [2, 3], ids(i + 1))] + [(prompts[-1], [5])]
        self.both(lambda m, _: m.score_pairs(pairs))

    def clear(self, prompts, i):
        if i % 3 == 0:
            self.models[0].clear_prefix_cache()
        if i % 3 == 1:
            self.models[0].prefix_cache = i % 2 == 0
        else:
            self.models[0].prefix_cache = True

    def close(self):
        for i in range(len(self.states)):
            self.release(None, i)


CALLS = ("generate", "generate", "generate", "sampled", "stream", "interrupt", "state", "release",
         "logprobs", "score", "score", "clear")  # fmt: skip


def prompt(family, shared, own):
    """Prompts of a family begin alike; `own` says how they go on."""
    return ids(shared, family) + ids(own, 1000 + own)


prompts = st.lists(
    st.builds(
        prompt,
        st.integers(0, 2),
        st.sampled_from([0, 63, 64, 150, 200, 320]),
        st.sampled_from([1, 2, 63, 64, 65, 130]),
    ),
    min_size=1,
    max_size=5,
)


def test_any_sequence_of_calls(pytestconfig):
    """Few sequences and pages, so that both run out; a wide document would fill them alone."""
    config = tiny_config()
    options = dict(device="cpu", dtype="f32", max_context=500, max_batch=3)
    with random_model(config, **options) as m:
        per_sequence, page = m.plan.kda_state_per_sequence, m.plan.of_pages(1)
    options["cache_bytes"] = 3 * per_sequence + 13 * page + (1 << 13)
    found = {"hits": 0, "evicted": 0}
    with (
        random_model(config, **options) as model,
        random_model(config, **options) as twin,
    ):

        @settings(
            max_examples=pytestconfig.getoption("sequences") // 4,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            st.lists(
                st.tuples(st.sampled_from(CALLS), prompts, st.integers(0, 5)),
                min_size=3,
                max_size=10,
            )
        )
        def run(calls):
            model.prefix_cache = True
            pair = Pair(model, twin)
            try:
                for name, rows, i in calls:
                    getattr(pair, name)(rows, i)
            finally:
                pair.close()
            assert model._engine.usage() == twin._engine.usage() == (0, 0)
            model.clear_prefix_cache()
            assert model._engine.prefix_stats()["bytes"] == 0
            for key in found:
                found[key] = model._engine.prefix_stats()[key]

        run()
        assert min(found.values()) > 20, found
