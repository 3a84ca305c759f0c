"""lighteval's custom model file on the small model, loaded and asked as lighteval does it."""

import pytest

REASON = "needs lighteval: pip install 'kimi_linear[lighteval]'"
pytest.importorskip("lighteval", reason=REASON)

import kimi_linear as kl  # noqa: E402
from kimi_linear.adapters import lighteval as adapter  # noqa: E402
from lighteval.models.custom.custom_model import CustomModelConfig  # noqa: E402
from lighteval.models.model_input import GenerationParameters  # noqa: E402
from lighteval.models.model_loader import load_model  # noqa: E402
from lighteval.tasks.requests import Doc  # noqa: E402

PAIRS = "Remember these pairs: fox 17, owl 230, bear 4. What is the value of {}?"
NAME = "small?device=cpu&dtype=f32&max_context=512"


def config(name=NAME, **options):
    return CustomModelConfig(
        model_name=name, model_definition_file_path=adapter.__file__, **options
    )


@pytest.fixture(scope="module")
def model():
    with kl.load(device="cpu", dtype="f32", max_context=512) as m:
        yield m


def doc(query, **options):
    return Doc(query=query, choices=["17", "230", "4"], gold_index=1, **options)


def test_lighteval_loads_the_file():
    model = load_model(config())
    assert type(model).__name__ == "KimiModel"
    assert (model.model.dtype, model.max_length) == ("f32", 512)
    (response,) = model.greedy_until([doc(PAIRS.format("owl"), generation_size=8)])
    assert response.text == ["230"]
    model.cleanup()


def test_choices(model):
    asked = [PAIRS.format(a) for a in ("owl", "bear")]
    responses = adapter.KimiModel(config(), model).loglikelihood([doc(q) for q in asked])
    for query, response in zip(asked, responses, strict=True):
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": query}])
        want = [model.score(ids, choice) for choice in ("17", "230", "4")]
        assert response.logprobs == pytest.approx([w[0] for w in want], abs=1e-4)
        assert response.argmax_logits_eq_gold == [w[1] for w in want]


def test_plain_text_and_stops(model):
    plain = adapter.KimiModel(config(NAME + "&chat=0"), model)
    docs = [
        doc("Once upon a time", generation_size=40, stop_sequences=["."]),
        doc("The dog", generation_size=5),
        doc("Once upon a time", generation_size=40, stop_sequences=["."]),
    ]
    texts = [response.text for response in plain.greedy_until(docs)]
    first = model.generate("Once upon a time", max_new_tokens=40, stop=["."]).text
    assert texts == [[first], [model.generate("The dog", max_new_tokens=5).text], [first]]
    (whole,) = plain.loglikelihood_rolling([doc("The dog barked.")])
    want = model.logprobs([model.tokenizer.bos_id, *model.tokenizer.encode("The dog barked.")])
    assert sum(whole.logprobs) == pytest.approx(float(want.logprobs.sum()), abs=1e-3)


@pytest.mark.parametrize(
    "text,message",
    [
        ("chat=false", "chat: must be 0 or 1, got 'false'"),
        ("batch_invariant=yes", "batch_invariant: must be 0 or 1"),
        ("max_batch=-1", "max_batch: must be an integer, got '-1'"),
    ],
)
def test_wrong_options_after_the_question_mark(text, message):
    with pytest.raises(ValueError, match=message):
        adapter.KimiModel(config(f"small?{text}"))


def test_batch_invariance_is_a_switch():
    model = adapter.KimiModel(config(NAME + "&batch_invariant=1"))
    assert model.use_chat_template
    model.cleanup()


def test_generation_parameters(model):
    given = GenerationParameters(temperature=0.9, seed=3, max_new_tokens=6)
    asked = adapter.KimiModel(config(generation_parameters=given), model)
    (response,) = asked.greedy_until([doc(PAIRS.format("fox"), num_samples=3)])
    assert len(response.text) == 3 and all(len(ids) <= 6 for ids in response.output_tokens)
    given = GenerationParameters(early_stopping=True)
    asked = adapter.KimiModel(config(generation_parameters=given), model)
    with pytest.raises(ValueError, match="generation_parameters: .*got early_stopping"):
        asked.greedy_until([doc("x")])
    asked.cleanup()
    assert model.generate("x", max_new_tokens=1)  # the caller's stays open
