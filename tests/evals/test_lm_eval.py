"""lm-evaluation-harness on the small model: its own evaluation loop, commands and tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "needs lm-eval: pip install 'kimi_linear[lm-eval]'"
lm_eval = pytest.importorskip("lm_eval", reason=REASON)

import kimi_linear as kl  # noqa: E402
from kimi_linear.adapters.lm_eval import KimiLM  # noqa: E402
from kimi_linear.model import SMALL_MODEL  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

STORY = "Once upon a time, there was a lazy dog named Kate. Kate wanted a"
PAIRS = "Remember these pairs: fox 17, owl 230, bear 4. What is the value of {}?"


@pytest.fixture(scope="module")
def model():
    with kl.load(device="cpu", dtype="f32", max_context=1024, max_batch=4) as m:
        yield m


@pytest.fixture
def lm(model):
    return KimiLM(model=model)


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i, ("test", i, 1)) for i, a in enumerate(arguments)]


def joint_ids(model, context, continuation):
    """lm-eval's split: the pair is encoded as one text."""
    whole = model.tokenizer.encode(context + continuation)
    n = len(model.tokenizer.encode(context))
    return whole[:n], whole[n:]


def test_likelihoods_are_the_models(model, lm):
    pairs = [(STORY, " smart"), ("A dog", " barked."), (STORY, " cake."), ("", "Once upon")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), got in zip(pairs, found, strict=True):
        ids = joint_ids(model, context, continuation)
        ids = (
            ids if context else ([model.tokenizer.bos_id], model.tokenizer.encode(continuation))
        )
        assert got == pytest.approx(model.score(*ids), abs=1e-4)


def test_trailing_spaces_go_to_the_continuation(lm):
    first, second = requests("loglikelihood", (STORY + " ", "smart"), (STORY, " smart"))
    assert lm.loglikelihood([first]) == lm.loglikelihood([second])


def test_a_context_too_long_loses_its_left(model, caplog):
    short = KimiLM(model=model, max_length=64)
    context, continuation = STORY * 10, " smart cake"
    (got,) = short.loglikelihood(requests("loglikelihood", (context, continuation)))
    first, rest = joint_ids(model, context, continuation)
    assert got == pytest.approx(model.score(first[-(65 - len(rest)) :], rest), abs=1e-4)
    assert "cut on its left" in caplog.text
    with pytest.raises(ValueError, match=r"at most 64 tokens \(max_length\), has"):
        short.loglikelihood(requests("loglikelihood", ("a", STORY * 10)))


def test_rolling_has_lm_evals_windows(model):
    lm = KimiLM(model=model, max_length=50)
    texts = [STORY, STORY * 6, ""]
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)))
    for text, total in zip(texts, got, strict=True):
        windows = get_rolling_token_windows(lm.tok_encode(text), lm.prefix_token_id, 50, 1)
        parts = [model.score(*make_disjoint_window(w))[0] for w in windows]
        assert total == pytest.approx(sum(parts), abs=1e-3)


def test_transformers_says_the_same(lm):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate and peft")
    pytest.importorskip("peft", reason="lm-eval's hf model needs accelerate and peft")
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=str(SMALL_MODEL), dtype="float32", device="cpu", batch_size=4)
    pairs = [(STORY, " smart cake"), (STORY, " loud noise"), (PAIRS.format("owl"), " 230")]
    asked = requests("loglikelihood", *pairs)
    for ours, theirs, pair in zip(
        lm.loglikelihood(asked), hf.loglikelihood(asked), pairs, strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4 * len(lm.tok_encode(pair[1])))
        assert ours[1] == theirs[1]
    kwargs = {"until": ["."], "max_gen_toks": 24}
    asked = requests("generate_until", (STORY, kwargs))
    assert lm.generate_until(asked) == hf.generate_until(asked)


def test_answers_in_order_with_their_own_arguments(model, lm):
    arguments = [
        (STORY, {"until": ["."], "max_gen_toks": 32}),
        (STORY, {"until": [], "max_new_tokens": 3}),
        ("The cat", {"until": ".", "max_gen_toks": 32, "do_sample": False, "temperature": 0.7}),
        (STORY, {"until": None, "do_sample": True, "temperature": 0.9, "seed": 1}),
    ] + [(f"{i} dogs", {"until": ["."], "max_gen_toks": 32}) for i in range(20)]
    got = lm.generate_until(requests("generate_until", *arguments))
    want = [
        model.generate(STORY, max_new_tokens=32, stop=["."]).text,
        model.generate(STORY, max_new_tokens=3).text,
        model.generate("The cat", max_new_tokens=32, stop=["."]).text,
        model.generate(STORY, temperature=0.9, seed=1 + 3).text,  # the fourth request
    ] + [model.generate(f"{i} dogs", max_new_tokens=32, stop=["."]).text for i in range(20)]
    assert got == want
    assert got[0] and "." not in got[0]


def test_arguments_that_mean_nothing_here_are_refused(lm):
    (one,) = requests("generate_until", (STORY, {"until": [], "num_beams": 4}))
    with pytest.raises(ValueError, match="generation_kwargs: .*got num_beams"):
        lm.generate_until([one])


def test_chats_are_the_tokenizers(model, lm):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PAIRS.format("owl")},
    ]
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == model.tokenizer.apply_chat_template(messages)
    begun = [*messages, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == text + "It is"
    assert "(user)" in lm.chat_template() and "sha256" in lm.tokenizer_name


def test_a_batch_size_that_is_none():
    with pytest.raises(ValueError, match="batch_size: must be a number or auto, got 'many'"):
        KimiLM(batch_size="many")


@pytest.mark.parametrize("given,alive", [(1, 0), ("auto:4", 0), (None, 0), ("3", 3)])
def test_what_the_command_passes_unasked(given, alive):
    """lm-eval's command hands on a first GPU and a batch of 1 where it was told nothing."""
    lm = KimiLM(device="cuda:0", batch_size=given, max_length=64)
    assert lm.batch_size == (alive or kl.plan(max_context=64).max_batch)
    assert lm.max_length == 64
    lm.model.close()


def pairs_task(name, **config):
    rows = [
        {"question": PAIRS.format(animal), "answer": value}
        for animal, value in (("fox", 17), ("owl", 230), ("bear", 4))
    ]

    def data(**_):
        import datasets

        return {"test": datasets.Dataset.from_list(rows)}

    return {
        "task": name,
        "custom_dataset": data,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        **config,
    }


def test_a_task_of_choices_and_one_of_answers(lm):
    choices = pairs_task(
        "choices",
        output_type="multiple_choice",
        doc_to_choice=["17", "230", "4"],
        doc_to_target="{{['17', '230', '4'].index(answer | string)}}",
        metric_list=[{"metric": "acc"}],
    )
    answers = pairs_task(
        "answers",
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match"}],
    )
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[choices, answers],
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert results["results"]["choices"]["acc,none"] == 1
    assert results["results"]["answers"]["exact_match,none"] == 1


def test_its_ruler(lm):
    pytest.importorskip("nltk", reason="lm-eval's RULER needs nltk")
    metadata = {"tokenizer": str(SMALL_MODEL), "max_seq_lengths": [512]}
    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["niah_single_1"],
        limit=4,
        apply_chat_template=True,
        bootstrap_iters=0,
        task_manager=TaskManager(
            include_path=folder, include_defaults=False, metadata=metadata
        ),
        log_samples=True,
    )
    assert sum(s["512"] for s in results["samples"]["niah_single_1"]) >= 3


def test_the_command(tmp_path):
    rows = [{"q": PAIRS.format("owl"), "a": "230"}, {"q": PAIRS.format("bear"), "a": "4"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recall.yaml").write_text(
        "task: recall\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: [], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    command = "from kimi_linear.adapters import lm_eval_command; lm_eval_command()"
    options = [
        "--model",
        "kimi_linear",
        "--model_args",
        f"pretrained={SMALL_MODEL},max_length=512",
    ]
    options += ["--tasks", "recall", "--include_path", str(tmp_path), "--apply_chat_template"]
    done = subprocess.run(
        [sys.executable, "-c", command, "run", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|recall|" in done.stdout and "|exact_match|↑  |    1|" in done.stdout
