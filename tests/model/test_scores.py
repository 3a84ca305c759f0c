"""Log-likelihoods of many texts in one call: each what it is alone, to the bit on the CPU and on a
GPU that was asked for it; how the core walks what contexts share is told in tests/c/test_score.c."""

import random

import kimi_linear as kl
import numpy as np
import pytest
from kimi_linear import inspection
from kimi_linear._scoring import windows
from kimi_linear.testing import random_model, tiny_config
from states import first_bound

VOCAB = 256


def ids(n, seed=0):
    return np.random.default_rng([n, seed]).integers(0, VOCAB, n).tolist()


def make(device, dtype="bf16", **options):
    options = dict(max_context=1024, max_batch=6, batch_invariant=device == "cuda") | options
    return random_model(tiny_config(), device=device, dtype=dtype, seed=1, **options)


@pytest.fixture(params=["f32", "bf16", "int8"])
def model(request, device):
    if device == "cuda" and request.param == "f32":
        pytest.skip("CUDA has no f32 weights")
    with make(device, request.param) as m:
        yield m
        assert m._engine.usage() == (0, 0)


def alone(m, context, continuation):
    """By one pass over both."""
    found = m.logprobs([*context, *continuation])
    tail = slice(len(context) - 1, None)
    total = float(found.logprobs[tail].sum(dtype=np.float64))
    return total, bool(found.greedy[tail].all())


def some_pairs(seed, n=30):
    """Contexts that begin alike, some the same list, and continuations of a token or many."""
    r = random.Random(seed)
    bases = [ids(length, seed) for length in (300, 64, 10, 200)]
    pairs = []
    for k in range(n):
        base = r.choice(bases)
        context = base[: r.choice((1, 63, 64, 65, 130, len(base)))] + ids(r.choice((0, 1, 70)), k)
        rest = ids(r.choice((1, 2, 5, 70)), k)
        pairs += [(context, rest[:-1] + [last]) for last in range(r.choice((1, 1, 4)))]
    r.shuffle(pairs)
    return pairs


# ---- pairs ------------------------------------------------------------------------------------


def test_pairs_are_each_what_they_are_alone(model):
    pairs, calls = some_pairs(1), []
    got = model.score_pairs(pairs, progress=lambda *call: calls.append(call))
    assert got == [alone(model, *pair) for pair in pairs]
    assert len({total for total, _ in got}) > len(pairs) // 2
    tokens = sum(len(c) + len(x) - 1 for c, x in pairs)
    assert calls[-1] == (tokens, tokens) and calls == sorted(set(calls))


def test_many_continuations_of_one_context(model):
    context, rests = ids(150), [ids(n, n) for n in (1, 1, 4, 30, 2, 65)]
    want = [alone(model, context, rest) for rest in rests]
    assert model.score(context, rests) == want
    assert [model.score(context, rest) for rest in rests] == want
    assert model.score(context, np.array(rests[3])) == want[3]
    best = model.generate(context, max_new_tokens=3, ignore_eos=True).token_ids
    assert all(ok for _, ok in model.score(context, [best, best[:1]]))
    assert model.score_pairs([]) == []


def test_contexts_that_earlier_calls_have_read(model):
    """Wholly, in part, and by some of the pairs."""
    context = ids(300)
    calls = [[(context, [k, k + 1, 5]) for k in range(4)], some_pairs(3, 12), some_pairs(4, 12)]
    want = [model.score_pairs(pairs) for pairs in calls]
    model.prefix_cache = True
    for _ in range(3):
        assert [model.score_pairs(pairs) for pairs in calls] == want


def test_continuations_of_a_state(model):
    context, rests = ids(128), [ids(n, n) for n in (1, 4, 30, 65, 1)]
    with model.state() as s:
        s.feed(context)
        got = s.score(rests)
        assert got == [s.score(rest) for rest in rests] and s.position == 128
        for (total, greedy), rest in zip(got, rests, strict=True):
            found = s.logprobs(rest)
            assert (total, greedy) == (found.total, bool(found.greedy.all()))
            want = alone(model, context, rest)
            assert abs(total - want[0]) < first_bound(model, s.logits()) + 1e-5
            assert not greedy and not want[1]


def test_a_context_as_text_is_a_context_as_ids(device):
    with make(device, max_batch=2) as m:
        texts = [("the ", "file"), ("the ", "token"), ("a ", "file")]
        encode = m.tokenizer.encode
        want = m.score_pairs([(encode(c), encode(x)) for c, x in texts])
        assert m.score_pairs(texts) == want == [m.score(*pair) for pair in texts]
        assert m.score("the ", ["file", "token"]) == want[:2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.score_pairs([([1], [2]), ([], [2])]), ValueError, r"pairs\[1\], context"),
        (lambda m: m.score_pairs([([1], [])]), ValueError, r"pairs\[0\], continuation: must hold"),
        (lambda m: m.score_pairs([([1], [999])]), ValueError, r"continuation: token ids must be"),
        (lambda m: m.score_pairs([[1, 2, 3]]), TypeError, r"pairs\[0\]: must be \(context"),
        (lambda m: m.score_pairs([7]), TypeError, r"pairs\[0\]: must be .* got int"),
        (lambda m: m.score([1] * 200, [1] * 200), ValueError, "context, continuation: .* 257"),
        (lambda m: m.score([1], []), ValueError, "continuation: must hold at least one"),
        (lambda m: m.score([1], [[1], []]), ValueError, r"continuation\[1\]: must hold"),
        (lambda m: m.score([1], 7), TypeError, "continuation: must be str"),
        (lambda m: m.score([1], [2], progress=3), TypeError, "progress"),
        (lambda m: m.rolling_logprobs([1], prefix=-1), ValueError, "prefix: must be in"),
        (lambda m: m.rolling_logprobs([1] * 300), ValueError, "a window reads longer ones"),
        (lambda m: m.rolling_logprobs([1] * 300, window=299), ValueError, "window: must be at most"),
        (lambda m: m.rolling_logprobs([1], window=0), ValueError, "window: must be at least 1"),
        (lambda m: m.score_pairs(None), TypeError, "pairs: must be a list of"),
        (lambda m: m.score_pairs("ab"), TypeError, "pairs: must be a list of"),
        (lambda m: m.rolling_logprobs([1], window=2.0), TypeError, "window: must be an integer"),
        (lambda m: m.rolling_logprobs([1], window=4, overlap=4), ValueError, "less than the window"),
        (lambda m: m.rolling_logprobs([1], overlap=4), ValueError, "overlap: needs a window"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    with make("cpu", max_context=256, max_batch=2) as m:
        with pytest.raises(error, match=message):
            call(m)
        assert m._engine.usage() == (0, 0)


def test_without_room(device):
    """One sequence is enough; none is not."""
    with make(device, max_context=512, max_batch=2) as m:
        pairs = some_pairs(2, 6)
        want = [alone(m, *pair) for pair in pairs]
        with m.state() as s, m.state() as t:
            t.feed(ids(3))
            assert t.score([1]) == t.score([[1]])[0]  # nothing to read
            for call in (lambda: m.score_pairs(pairs), lambda: t.score([1, 2])):
                with pytest.raises(kl.OutOfMemory, match=r"all 2 are in use \(max_batch\)"):
                    call()
            s.release()
            assert m.score_pairs(pairs) == want


# ---- whole documents --------------------------------------------------------------------------


def harness_windows(tokens, prefix, most, context_len):
    """lm_eval.utils.get_rolling_token_windows and make_disjoint_window, by their description: the
    first window predicts all it has, each later one the last most - context_len + 1 tokens (or
    what is left) of the `most` that it is given; then inputs lose what is predicted."""
    found, done = [], 0
    while done < len(tokens):
        n = most if done == 0 else most - context_len + 1
        n = min(n, len(tokens) - done)
        end = done + n
        given = [prefix, *tokens][: end] if done == 0 else tokens[end - most - 1 : end - 1]
        found.append((given[: len(given) - (n - 1)], tokens[done:end]))
        done = end
    return found


def test_windows_are_the_harness():
    for n in (1, 2, 7, 8, 9, 20, 100):
        for window in (1, 2, 8, 99, 100, 101):
            for overlap in {0, 1, window // 2, window - 1} - {window}:
                if overlap >= window:
                    continue
                tokens = ids(n)
                got = windows(np.array(tokens, np.int32), 5, window, overlap)
                want = harness_windows(tokens, 5, window, overlap + 1)
                assert [(c.tolist(), x.tolist()) for c, x in got] == want, (n, window, overlap)
                assert all(len(c) + len(x) - 1 <= window for c, x in got)


def test_a_document_is_told_whole_or_in_windows(model):
    bos = model.tokenizer.bos_id
    documents = [ids(n, n) for n in (1, 40, 300)]
    whole = model.rolling_logprobs(documents)
    for document, found in zip(documents, whole, strict=True):
        want = model.logprobs([bos, *document])
        assert found.token_ids == document
        assert np.array_equal(found.logprobs, want.logprobs)
        assert np.array_equal(found.greedy, want.greedy)
        assert found.total == float(want.logprobs.sum(dtype=np.float64))
        assert model.rolling_logprobs(document, prefix=bos).total == found.total
    for options in ({"window": 64}, {"window": 100, "overlap": 30}):
        found = model.rolling_logprobs(documents[2], **options)
        parts = windows(np.array(documents[2], np.int32), bos, options["window"],
                        options.get("overlap", 0))  # fmt: skip
        want = [model.logprobs([*c, *x]).logprobs[len(c) - 1 :] for c, x in parts]
        assert np.array_equal(found.logprobs, np.concatenate(want))
        assert found.total != whole[2].total
    assert model.rolling_logprobs(documents[1], window=300).total == whole[1].total


# ---- streams ----------------------------------------------------------------------------------


def test_streams_in_parts_are_the_whole(model, monkeypatch):
    monkeypatch.setattr(inspection, "STREAM_BLOCK", 64)
    whole = model.hidden(ids(200), layers=[0, 3])
    seen = 0
    for first, part in model.iter_hidden(ids(200), layers=[3, 0]):
        assert first == seen and list(part) == [3, 0]
        seen += len(part[0])
        for layer, x in part.items():
            assert np.array_equal(x, whole[layer][first:seen])
    assert seen == 200
    parts = model.iter_hidden(ids(200))
    next(parts)
    assert model._engine.usage()[0] == 1
    parts.close()


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_streams_of_few_tokens(model, tokens):
    """Up to 16 tokens, norms and sums belong to the products; in a long prompt they do not."""
    given = ids(128 + tokens)
    whole = model.hidden(given, layers=[0, 3])
    with model.state() as s:
        s.feed(given[:128])
        got = s.hidden(given[128:], layers=[0, 3])
    for layer in (0, 3):
        assert np.array_equal(got[layer], whole[layer][128:])


def test_streams_after_a_state(model):
    whole = model.hidden(ids(200), layers=[1])[1]
    with model.state() as s:
        s.feed(ids(200)[:128])
        got = s.hidden(ids(200)[128:], layers=[1])[1]
        assert np.array_equal(got, whole[128:]) and s.position == 128
