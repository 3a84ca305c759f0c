"""Palindromes, MQAR, stacks and JSON objects: every label follows from the input."""

import json
import re

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import Tokenizer
from kimi_linear.evals import jsonkv, synthetic
from kimi_linear.evals.synthetic import IGNORE, PAD, POP, PUSH, SEPARATOR
from kimi_linear.model import SMALL_MODEL


@pytest.mark.parametrize("length", [5, 6, 64, 257])
def test_palindromes(length):
    inputs, labels = synthetic.palindrome(40, length, seed=1)
    k = (length - 1) // 2
    for row, target in zip(inputs, labels, strict=True):
        assert row[k] == SEPARATOR and (row[:k] > 3).all()
        assert (row[k + 1 : 2 * k + 1] == row[:k][::-1]).all()
        assert (row[2 * k + 1 :] == PAD).all()
        supervised = np.flatnonzero(target != IGNORE)
        assert supervised.tolist() == list(range(k + 1, 2 * k))  # k - 1 of them
        assert (target[supervised] == row[supervised + 1]).all()


@pytest.mark.parametrize(
    "length,options", [(16, {}), (256, {}), (101, {"pairs": 40, "queries": 7})]
)
def test_mqar(length, options):
    inputs, labels = synthetic.mqar(40, length, vocab=500, seed=2, **options)
    pairs = options.get("pairs", length // 4)
    for row, target in zip(inputs, labels, strict=True):
        held = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(held) == pairs and max(held) < min(held.values())
        assert row[2 * pairs] == SEPARATOR
        asked = np.flatnonzero(target != IGNORE)
        assert len(asked) == options.get("queries", min(pairs, length - 2 * pairs - 1))
        assert [held[row[i]] for i in asked] == target[asked].tolist()
        assert len(set(row[asked])) == len(asked)
        assert not set(row[2 * pairs :]) & set(held.values())  # values are not echoed


def test_stacks():
    inputs, labels = synthetic.stack(40, 300, stacks=5, vocab=60, seed=3)
    n_pops = 0
    for row, target in zip(inputs, labels, strict=True):
        held = {}
        for at in range(0, 300, 3):
            op, which, element = row[at : at + 3]
            if op == PUSH:
                held.setdefault(which, []).append(element)
            else:
                assert op == POP and held[which].pop() == element == target[at + 1]
                n_pops += 1
        assert (target != IGNORE).sum() == (row[::3] == POP).sum()
    assert 0.4 < n_pops / 4000 < 0.5  # half, but where a stack is empty


@pytest.mark.parametrize("make", [synthetic.palindrome, synthetic.mqar, synthetic.stack])
def test_the_seed_makes_the_rows(make):
    assert (make(3, 66, seed=5)[0] == make(3, 66, seed=5)[0]).all()
    assert (make(3, 66, seed=5)[0] != make(3, 66, seed=6)[0]).any()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: synthetic.palindrome(1, 4), "length: must be at least 5"),
        (lambda: synthetic.palindrome(1, 9, vocab=4), "vocab"),
        (lambda: synthetic.mqar(1, 16, pairs=8), "pairs, queries"),
        (lambda: synthetic.mqar(1, 16, pairs=2, queries=3), "pairs, queries"),
        (lambda: synthetic.mqar(1, 400, vocab=100), "pairs, queries"),
        (lambda: synthetic.stack(1, 30, stacks=64, vocab=68), "vocab: must be above 68"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_accuracy_is_the_share_of_likeliest_tokens():
    config = kl.testing.tiny_config()
    with kl.testing.random_model(config, device="cpu", dtype="f32", seed=1) as model:
        inputs = np.arange(24).reshape(2, 12) % config.vocab_size
        best = np.stack([model.logits(row, last=False).argmax(axis=1) for row in inputs])
        labels = np.full_like(best, IGNORE)
        labels[:, 3:7] = best[:, 3:7]
        assert synthetic.accuracy(model, inputs, labels) == (1.0, 1.0)
        labels[1, 4] += 1
        assert synthetic.accuracy(model, inputs, labels) == (7 / 8, 1 / 2)
        with pytest.raises(ValueError, match="must hold a label"):
            synthetic.accuracy(model, inputs, np.full_like(best, IGNORE))


def test_json_objects():
    tokenizer = Tokenizer.from_dir(SMALL_MODEL)
    suite = jsonkv.Suite(lengths=[1500], samples=5, questions=3, prefix="raw")
    for document in suite.documents(tokenizer):
        made = document.make()
        assert len(made) == 3 and len({e.id for e in made}) == 3
        for e in made:
            assert 1500 - 120 < len(e.prompt_ids) + e.max_new_tokens <= 1500
            text = tokenizer.decode(e.prompt_ids)
            held = json.loads(text[text.index("{") : text.index("}") + 1])
            key = re.search(r'Key: "(.*)"\nCorresponding value:$', text)[1]
            assert [held[key]] == e.references and len(held) == e.details["units"]
            assert list(held).index(key) / len(held) == pytest.approx(
                e.details["depth"], abs=1e-4
            )
            assert suite.grade(e, f' "{held[key].upper()}".') == {"score": 1.0}
            assert suite.grade(e, held[key][:-1]) == {"score": 0.0}
