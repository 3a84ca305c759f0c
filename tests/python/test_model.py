"""The model as users drive it. Whether its numbers are right is told in tests/model; here: that
every call means what it says, that batches, streams and threads change nothing."""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import _device
from kimi_linear._sampling import row_seed
from kimi_linear.checkpoint import Checkpoint
from kimi_linear.testing import (
    random_model,
    random_tensor,
    tiny_config,
    write_checkpoint,
    write_safetensors,
)

CONFIG = tiny_config()
CPU = {"device": "cpu"}
PROMPTS = ["The tokens of a file", "a", [5, 6, 7] * 40, [{"role": "user", "content": "hello"}]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, dtype="f32", seed=1)


@pytest.fixture(scope="module")
def model(path):
    with kl.load(path, **CPU) as m:
        yield m


@pytest.fixture(autouse=True)
def nothing_is_left_behind(model):
    yield
    if model._engine is not None:
        assert model._engine.usage() == (0, 0), "sequences or pages are still held"


def ids_of(model, prompt):
    return model.generate(prompt, max_new_tokens=0).prompt_token_ids


# ---- loading -----------------------------------------------------------------------------


def test_files_and_styles_do_not_change_the_bits(path, model, tmp_path):
    want = model.logits([1, 2, 3], last=False)
    assert want.shape == (3, 320) and np.isfinite(want).all() and want.std() > 0.1
    for i, options in enumerate([{"style": "native"}, {"n_files": 4}]):
        other = write_checkpoint(tmp_path / str(i), CONFIG, dtype="f32", seed=1, **options)
        with kl.load(other, **CPU) as m:
            assert np.array_equal(m.logits([1, 2, 3], last=False), want)


@pytest.mark.parametrize("dtype,bound", [("bf16", 0.05), ("int8", 0.1), ("int4", 1.0)])
def test_narrower_weights_stay_near(tmp_path, dtype, bound):
    """All experts are chosen, so that no choice flips; four layers amplify an error about 6
    times, and an unrelated model is 1.4 away."""
    config = tiny_config(num_experts=2, num_experts_per_token=2)
    path = write_checkpoint(tmp_path, config, dtype="f32", seed=1)
    ids = list(range(50))
    with kl.load(path, **CPU) as wide, kl.load(path, dtype=dtype, **CPU) as narrow:
        assert (wide.dtype, narrow.dtype) == ("f32", dtype)
        assert narrow.plan.weights < wide.plan.weights
        want, got = (m.logits(ids, last=False) for m in (wide, narrow))
    assert 0 < np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < bound


def test_auto_keeps_the_checkpoints_dtype(path, tmp_path):
    with kl.load(path, **CPU) as m:
        assert m.dtype == "f32"
    with kl.load(write_checkpoint(tmp_path, CONFIG, dtype="bf16"), **CPU) as m:
        assert m.dtype == "bf16"


def test_auto_takes_the_widest_that_fits_and_says_so(path, monkeypatch):
    real = _device._core.plan

    def little_memory(backend, config, options):
        problem = "plan: too big" if options["format"] in ("f32", "bf16") else None
        return real(backend, config, options) | {"problem": problem}

    monkeypatch.setattr(_device._core, "plan", little_memory)
    with pytest.warns(UserWarning, match="stored as int8: f32 does not fit"):
        assert kl.plan(path, **CPU).dtype == "int8"
    with pytest.raises(kl.OutOfMemory, match="plan: too big"):
        kl.load(path, dtype="bf16", **CPU)


def test_plan_says_what_load_takes(path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = kl.plan(path, **CPU)
    skip = {"free"}
    for name in plan.__dataclass_fields__:
        if name not in skip:
            assert getattr(plan, name) == getattr(model.plan, name), name
    parts = plan.weights + plan.kda_states + plan.snapshots + plan.mla_pages + plan.workspace
    assert parts <= plan.total <= parts + 4096
    assert kl.plan(CONFIG, **CPU).total < plan.total  # bf16 where nothing says otherwise


def test_a_plan_of_8_bit_latents():
    config = kl.KimiLinearConfig.kimi_linear_48b()
    wide, narrow = (kl.plan(config, kv_cache_dtype=k, **CPU) for k in ("auto", "fp8"))
    assert (wide.kv_cache_dtype, narrow.kv_cache_dtype) == ("bf16", "fp8")
    assert (wide.of_pages(1), narrow.of_pages(1)) == (64 * 7 * 1152, 64 * 7 * 656)
    assert "of fp8" in str(narrow) and wide.kda_states == narrow.kda_states


def test_limits_are_taken(path):
    with kl.load(path, max_context=100, max_batch=2, **CPU) as m:
        assert (m.plan.max_context, m.plan.max_batch) == (100, 2)
        answers = m.generate([[1]] * 5, max_new_tokens=3, ignore_eos=True)
        assert [len(a.token_ids) for a in answers] == [3] * 5
        c = m.generate(list(range(98)), max_new_tokens=50, ignore_eos=True)
        assert (len(c.token_ids), c.finish_reason) == (2, "length")


def test_progress_of_loading(path):
    calls = []
    kl.load(path, progress=lambda done, total: calls.append((done, total)), **CPU).close()
    total = calls[-1][1]
    assert calls[-1] == (total, total) and total > 0
    assert [d for d, _ in calls] == sorted(d for d, _ in calls)
    kl.load(path, progress=False, **CPU).close()
    with pytest.raises(TypeError, match="progress"):
        kl.load(path, progress="yes", **CPU)


def test_bars_only_where_somebody_looks(path, capfd, monkeypatch):
    pytest.importorskip("tqdm")
    with kl.load(path, **CPU) as m:
        m.generate([1] * 300, max_new_tokens=1)
    assert capfd.readouterr().err == ""
    with kl.load(path, progress=True, **CPU) as m:
        shown = capfd.readouterr().err
        assert "weights" in shown and "free on cpu" in shown
        m.generate([1] * 300, max_new_tokens=1, progress=True)
        assert "prompt" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ModuleNotFoundError, match="needs tqdm"):
        kl.load(path, progress=True, **CPU)


def test_progress_of_a_prompt(model):
    calls = []
    model.generate(
        [[1] * 900, [2] * 700], max_new_tokens=1, progress=lambda *c: calls.append(c)
    )
    done = [d for d, _ in calls]
    assert done == sorted(done) and calls[-1] == (1600, 1600)


def test_ctrl_c_while_loading(path):
    with pytest.raises(KeyboardInterrupt):
        kl.load(path, progress=lambda *c: os.kill(os.getpid(), signal.SIGINT), **CPU)
    kl.load(path, **CPU).close()


def test_an_error_in_the_progress_callback_stops_the_load(path):
    def fail(done, total):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        kl.load(path, progress=fail, **CPU)


def test_a_directory_that_changes_under_the_load(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    file = copy / "model.safetensors"

    def touch(done, total):
        os.utime(file, ns=(1, 1))

    with pytest.raises(kl.WeightsError, match="must not change while loading"):
        kl.load(copy, progress=touch, **CPU)


def write_tensors(path, change):
    """The tiny checkpoint with `change` applied to {name: shape}."""
    shapes = dict(CONFIG.tensor_shapes())
    change(shapes)
    rng = np.random.default_rng(0)
    tensors = [(name, random_tensor(name, shape, rng)) for name, shape in shapes.items()]
    path.mkdir(exist_ok=True)
    write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return path


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight",
     "model.layers.2.block_sparse_moe.experts.7.w2.weight", "model.layers.1.self_attn.A_log",
     "model.layers.3.self_attn.kv_b_proj.weight"],
)  # fmt: skip
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, name):
    with pytest.raises(kl.WeightsError, match=name.replace(".", r"\.")):
        kl.load(write_tensors(tmp_path, lambda s: s.pop(name)), **CPU)

    def misshape(shapes):
        shapes[name] = (*shapes[name][:-1], shapes[name][-1] + 1)

    if not name.endswith("A_log"):  # whose padding is legal
        with pytest.raises(kl.WeightsError, match=name.replace(".", r"\.")):
            kl.load(write_tensors(tmp_path, misshape), **CPU)


def test_unused_tensors_are_noted(tmp_path):
    directory = write_tensors(tmp_path, lambda s: s.update({"model.extra": (3,)}))
    with kl.load(directory, **CPU) as m:
        assert "1 tensors of the checkpoint are not used" in m.info()


@pytest.mark.parametrize(
    "argument,error,message",
    [
        (3, TypeError, "path: must be a directory"),
        ("/nowhere/at/all", FileNotFoundError, "/nowhere/at/all is none"),
        ("./nowhere", FileNotFoundError, "is none"),
    ],
)
def test_bad_paths(argument, error, message):
    with pytest.raises(error, match=message):
        kl.load(argument)


def test_a_hub_name_needs_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="needs? huggingface_hub"):
        kl.load("someone/some-model")


def test_an_existing_directory_is_never_a_hub_name(path, tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    shutil.copytree(path, tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    kl.load("some/model", **CPU).close()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"device": "tpu"}, "device"), ({"device": 0}, "device"),
        ({"device": "cuda:x"}, "device"),
        ({"device": "cpu:1"}, "device"), ({"dtype": "f16"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"dtype": "fp8", "device": "cpu"}, "'fp8' needs device='cuda'"),
        ({"dtype": "f32", "device": "cuda"}, "'f32' needs device='cpu'"),
        ({"max_context": 0}, "max_context"), ({"max_context": -1}, "max_context"),
        ({"max_context": 4097}, "max_context"), ({"max_context": 1.5}, "max_context"),
        ({"max_context": True}, "max_context"), ({"max_batch": 1 << 70}, "max_batch"),
        ({"cache_bytes": "1G"}, "cache_bytes"), ({"batch_invariant": 1}, "batch_invariant"),
        ({"kv_cache_dtype": "bf16"}, "kv_cache_dtype: must be 'auto' or 'fp8', got 'bf16'"),
        ({"kv_cache_dtype": None}, "kv_cache_dtype"),
        ({"kv_cache_dtype": np.array(["fp8", "auto"])}, "kv_cache_dtype"),
        ({"dtype": np.array(["bf16", "int8"])}, "dtype: must be one of"),
    ],
)  # fmt: skip
def test_bad_options_of_load_are_named(path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kl.load(path, **CPU | options)


def test_a_model_that_cannot_fit_says_the_figures():
    config = kl.KimiLinearConfig.kimi_linear_48b()
    plan = kl.plan(config, dtype="f32", **CPU)  # says what it would take
    assert not plan.fits and plan.total > plan.free
    assert "does not fit" in plan.line() and "does not fit" in str(plan)
    assert re.search("weights need .* MiB", plan.problem)
    with pytest.raises(kl.OutOfMemory, match="weights need .* MiB"):
        random_model(config, dtype="f32", **CPU)


# ---- generation --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "letter", "ids", "chat"])
def test_greedy_takes_the_most_likely_token(model, prompt):
    ids = ids_of(model, prompt)
    answer = model.generate(prompt, max_new_tokens=6, ignore_eos=True)
    for token in answer.token_ids:
        assert token == int(np.argmax(model.logits(ids)))
        ids = [*ids, token]
    assert answer.finish_reason == "length"
    assert answer.text == model.tokenizer.decode(answer.token_ids)


def test_a_row_in_a_batch_is_the_row_alone(model):
    batch = model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, logprobs=3)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        alone = model.generate(prompt, max_new_tokens=12, ignore_eos=True, logprobs=3)
        assert (row.token_ids, row.text, row.logprobs) == (
            alone.token_ids, alone.text, alone.logprobs)  # fmt: skip
        assert row.prompt_token_ids == alone.prompt_token_ids
    assert model.generate([PROMPTS[0]], max_new_tokens=1)[0].prompt_token_ids == ids_of(
        model, PROMPTS[0]
    )


def test_every_form_of_ids(model):
    want = model.generate([1, 2, 3], max_new_tokens=5).token_ids
    for form in ((1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8),
                 [np.int64(1), np.int32(2), 3]):  # fmt: skip
        assert model.generate(form, max_new_tokens=5).token_ids == want
    batch = model.generate(np.array([[1, 2, 3], [1, 2, 3]]), max_new_tokens=5)
    assert [c.token_ids for c in batch] == [want, want]


def test_filters_that_leave_one_token_are_greedy(model):
    want = model.generate("hello", max_new_tokens=10, ignore_eos=True).token_ids
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5}):
        options = {"temperature": 1.0, "seed": 3} | options
        got = model.generate("hello", max_new_tokens=10, ignore_eos=True, **options)
        assert got.token_ids == want, options


def test_seeds(model):
    def draw(prompts, seed):
        found = model.generate(
            prompts, max_new_tokens=12, temperature=1.5, seed=seed, ignore_eos=True
        )
        return [c.token_ids for c in found]

    three = draw(["hello"] * 3, 7)
    assert three == draw(["hello"] * 3, 7)
    assert draw(["hello"], 7) == three[:1]  # row 0 does not know of the others
    assert len({tuple(t) for t in three}) == 3
    assert draw(["hello"], 8) != three[:1]
    assert draw(["hello"], None) != draw(["hello"], None)
    assert draw(["hello"], (1 << 64) - 1)


def test_row_seeds_are_splitmix64():
    """First outputs of SplitMix64 started at 1234567, as published with the generator."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [row_seed(1234567, i) for i in range(3)] == [x >> 1 for x in published]


def test_samples_follow_the_distribution(model):
    logits = model.logits("hello").astype(np.float64) / 0.7
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 3000
    rows = model.generate(["hello"] * n, max_new_tokens=1, temperature=0.7, seed=0)
    counts = np.bincount([c.token_ids[0] for c in rows], minlength=len(p))
    big = p > 20 / n
    assert big.sum() > 5
    z = (counts[big] - n * p[big]) / np.sqrt(n * p[big] * (1 - p[big]))
    assert np.abs(z).max() < 5


def test_a_strong_penalty_leaves_no_repetition(model):
    ids = model.generate(
        [9], max_new_tokens=60, repetition_penalty=1e6, ignore_eos=True
    ).token_ids
    logits_can_be_negative = len(set(ids)) > 50
    assert logits_can_be_negative
    plain = model.generate([9], max_new_tokens=60, ignore_eos=True).token_ids
    assert len(set(ids)) >= len(set(plain))


def test_max_new_tokens(model):
    empty = model.generate("hello", max_new_tokens=0)
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", [], "length")
    mixed = model.generate(["hello", "x"], max_new_tokens=1)
    assert [len(c.token_ids) for c in mixed] == [1, 1]


def test_log_probabilities_of_new_tokens(model):
    answer = model.generate("hello", max_new_tokens=8, ignore_eos=True, logprobs=5)
    whole = model.logprobs(answer.prompt_token_ids + answer.token_ids, top=5)
    tail = len(answer.prompt_token_ids) - 1
    for i, token in enumerate(answer.logprobs):
        assert token.token_id == answer.token_ids[i] == token.top[0][0]
        assert token.logprob == pytest.approx(whole.logprobs[tail + i], abs=1e-4)
        assert [t for t, _ in token.top] == whole.top[0][tail + i].tolist()
        assert [p for _, p in token.top] == pytest.approx(whole.top[1][tail + i], abs=1e-4)
    assert model.generate("hello", max_new_tokens=2).logprobs is None
    only = model.generate("hello", max_new_tokens=2, logprobs=0).logprobs
    assert [t.top for t in only] == [(), ()]


# ---- where an answer ends ----------------------------------------------------------------


def script(model, ids):
    """A logits processor that makes the model say these ids, whatever it wants."""
    ids = list(ids)

    def process(so_far, logits):
        logits[:] = -50
        logits[ids[min(len(so_far) - process.n_prompt, len(ids) - 1)]] = 50

    process.n_prompt = 1
    return process


def say(model, text, **options):
    ids = model.tokenizer.encode(text, allow_control=True)
    options.setdefault("max_new_tokens", len(ids))
    return model.generate([0], logits_processor=script(model, ids), **options)


def test_stop_tokens_end_the_answer_and_have_no_text(model):
    for stop in ("<|im_end|>", "[EOS]", "[EOT]"):
        answer = say(model, f"hello{stop}more")
        assert (answer.text, answer.finish_reason) == ("hello", "stop")
        assert answer.token_ids[-1] == model.tokenizer.control_tokens[stop]
    answer = say(model, "hello<|im_end|>more", ignore_eos=True)
    assert (answer.text, answer.finish_reason) == ("hello<|im_end|>more", "length")
    answer = say(model, "1 2 3", ignore_eos=True, stop_token_ids=[ord("1")])
    assert (answer.text, answer.finish_reason) == ("", "stop")
    answer = say(model, "12<|im_end|>", stop_token_ids=[ord("2")])
    assert (answer.text, answer.finish_reason) == ("1", "stop")
    assert say(model, "1<|im_end|>2", stop_token_ids=[ord("2")]).text == "1"


@pytest.mark.parametrize(
    "said,stop,text,reason",
    [
        ("one two three", "two", "one ", "stop"),
        ("one two three", ["three", "two"], "one ", "stop"),
        ("one two three", ["four"], "one two three", "length"),
        ("one two tw", "two!", "one two tw", "length"),
        ("aab", "ab", "a", "stop"),
        ("xabcabd", "abd", "xabc", "stop"),
        ("stop", "stop", "", "stop"),
        ("日本語", "本", "日", "stop"),
        ("a\n\nb", "\n\n", "a", "stop"),
    ],
)
def test_stop_strings(model, said, stop, text, reason):
    answer = say(model, said, stop=stop)
    assert (answer.text, answer.finish_reason) == (text, reason)
    ids = model.tokenizer.encode(said)
    chunks = list(
        model.stream(
            [0], logits_processor=script(model, ids), max_new_tokens=len(ids), stop=stop
        )
    )
    assert "".join(c.text for c in chunks) == text
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [reason]


def test_a_stop_string_ends_its_own_row_only(model):
    n = len(model.tokenizer.encode("hello"))
    answers = model.generate(["hello", "a"], max_new_tokens=30, ignore_eos=True)
    cut = answers[0].text[3:5]
    stopped = model.generate(["hello", "a"], max_new_tokens=30, ignore_eos=True, stop=[cut])
    assert stopped[0].text == answers[0].text[: answers[0].text.index(cut)]
    assert stopped[0].finish_reason == "stop" and len(stopped[0].prompt_token_ids) == n
    assert stopped[1].token_ids == answers[1].token_ids or cut in answers[1].text


def test_stop_text_is_found_wherever_tokens_break():
    hypothesis = pytest.importorskip("hypothesis")
    from kimi_linear._text import TextBuilder
    from kimi_linear.testing import tiny_tokenizer

    st = hypothesis.strategies
    tokenizer = tiny_tokenizer()

    @hypothesis.settings(max_examples=400, deadline=None)
    @hypothesis.given(
        st.text("abé\n", max_size=30),
        st.lists(st.text("abé\n", min_size=1, max_size=4), max_size=3),
    )
    def check(text, stops):
        builder = TextBuilder(tokenizer, stops)
        shown = ""
        for token in text.encode():
            shown += builder.feed(token)
            if builder.stopped:
                break
        shown += builder.finish()
        ends = {len(text.encode()): text}  # the answer ends with the first stop completed
        for stop in stops:
            at = text.find(stop)
            if at >= 0:
                end = len(text[: at + len(stop)].encode())
                ends[end] = min(ends.get(end, text), text[:at], key=len)
        assert shown == builder.text == ends[min(ends)]

    check()


# ---- streams -----------------------------------------------------------------------------


def test_a_stream_says_what_generate_says(model):
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        whole = model.generate("hello", max_new_tokens=25, ignore_eos=True, **options)
        chunks = list(model.stream("hello", max_new_tokens=25, ignore_eos=True, **options))
        assert "".join(c.text for c in chunks) == whole.text
        assert [c.token_id for c in chunks] == whole.token_ids
        assert [c.stats.new_tokens for c in chunks] == list(range(1, 26))
        assert chunks[-1].finish_reason == whole.finish_reason == "length"
        assert all(c.finish_reason is None and c.logprob <= 0 for c in chunks[:-1])


def test_a_stream_gives_the_alternatives_that_generate_gives(model):
    whole = model.generate("hello", max_new_tokens=5, ignore_eos=True, logprobs=3)
    chunks = list(model.stream("hello", max_new_tokens=5, ignore_eos=True, logprobs=3))
    assert [c.top for c in chunks] == [t.top for t in whole.logprobs]
    assert all(len(c.top) == 3 for c in chunks)
    assert next(model.stream("hello", max_new_tokens=1)).top == ()


def test_leaving_a_stream_early_frees_its_sequence(model):
    stream = model.stream("hello", max_new_tokens=100, ignore_eos=True)
    next(stream)
    assert model._engine.usage()[0] == 1
    stream.close()
    assert model._engine.usage() == (0, 0)
    for _ in model.stream("hello", max_new_tokens=100, ignore_eos=True):
        break
    stream = None
    unused = model.stream("hello")  # never begun
    del unused


def test_a_stream_checks_its_arguments_at_the_call(model):
    with pytest.raises(ValueError, match="temperature"):
        model.stream("hello", temperature=-1)
    with pytest.raises(ValueError, match="one prompt"):
        model.stream(["hello", "x"])
    with pytest.raises(TypeError, match="temprature"):
        model.stream("hello", temprature=1)


def test_calls_inside_a_stream(model):
    want = model.generate("hello", max_new_tokens=5, ignore_eos=True).token_ids
    got = []
    for chunk in model.stream("hello", max_new_tokens=5, ignore_eos=True):
        got.append(chunk.token_id)
        model.logits("x")
        model.generate("y", max_new_tokens=2)
    assert got == want


# ---- processors --------------------------------------------------------------------------


def test_processors_see_ids_and_chain(model):
    seen = []

    def first(ids, logits):
        seen.append(ids.tolist())
        assert logits.shape == (320,) and logits.dtype == np.float32
        return np.where(np.arange(320) == 7, 0.0, -np.inf)

    def second(ids, logits):
        assert np.isinf(logits[6]) and logits[7] == 0
        return None  # in place, or not at all

    answer = model.generate([3, 4], max_new_tokens=3, logits_processor=[first, second])
    assert answer.token_ids == [7, 7, 7]
    assert seen == [[3, 4], [3, 4, 7], [3, 4, 7, 7]]


def test_an_identity_processor_changes_nothing(model):
    want = model.generate(PROMPTS, max_new_tokens=5, ignore_eos=True)
    got = model.generate(
        PROMPTS, max_new_tokens=5, ignore_eos=True, logits_processor=lambda ids, z: z.copy()
    )
    assert [c.token_ids for c in got] == [c.token_ids for c in want]


def test_a_processor_that_fails_leaves_the_model_usable(model):
    want = model.generate("hello", max_new_tokens=3).token_ids

    def fail(ids, logits):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        model.generate("hello", logits_processor=fail)
    with pytest.raises(ValueError, match=r"must return logits of shape \(320,\), got \(3,\)"):
        model.generate("hello", logits_processor=lambda ids, z: z[:3])
    for bad in (np.nan, -np.inf):
        with pytest.raises(kl.NumericalError, match="must be finite"):
            model.generate("hello", logits_processor=lambda ids, z, bad=bad: z * 0 + bad)
    assert model.generate("hello", max_new_tokens=3).token_ids == want


# ---- chat --------------------------------------------------------------------------------


def test_chat_is_the_template_and_generate(model):
    messages = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    ids = model.tokenizer.apply_chat_template(messages, tools=tools)
    answer = model.chat(messages, tools=tools, max_new_tokens=4)
    assert answer.prompt_token_ids == ids
    assert answer.token_ids == model.generate(ids, max_new_tokens=4).token_ids
    assert model.generate(messages, max_new_tokens=1).prompt_token_ids == (
        model.tokenizer.apply_chat_template(messages)
    )


def test_tool_calls_in_an_answer(model):
    said = ("ok<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
            '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
            "<|im_end|>")  # fmt: skip
    answer = say(model, said)
    assert answer.finish_reason == "stop"
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert answer.tool_calls == (
        {"id": "functions.add:0", "type": "function", "function": function},
    )


# ---- looking inside ----------------------------------------------------------------------


def log_softmax(z):
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_logprobs_are_the_softmax_of_the_logits(model):
    ids = list(range(40, 140))
    want = log_softmax(model.logits(ids, last=False))[:-1]
    found = model.logprobs(ids, top=4)
    assert found.token_ids == ids
    assert found.logprobs.dtype == np.float32 and found.greedy.dtype == bool
    assert np.abs(found.logprobs - want[np.arange(99), ids[1:]]).max() < 1e-4
    assert np.array_equal(found.greedy, want.argmax(-1) == ids[1:])
    order = np.argsort(-want, axis=-1, kind="stable")[:, :4]
    assert np.array_equal(found.top[0], order)
    assert np.abs(found.top[1] - np.take_along_axis(want, order, -1)).max() < 1e-4
    assert model.logprobs(ids).top is None


def test_a_single_token_has_no_logprob(model):
    found = model.logprobs([5], top=3)
    assert found.logprobs.shape == found.greedy.shape == (0,)
    assert found.top[0].shape == found.top[1].shape == (0, 3)


def test_score_is_the_sum_over_the_continuation(model):
    context, rest = [4, 5, 6], [7, 8]
    whole = model.logprobs(context + rest)
    ll, greedy = model.score(context, rest)
    assert ll == pytest.approx(float(whole.logprobs[2:].sum(dtype=np.float64)), abs=1e-6)
    assert isinstance(ll, float) and greedy is bool(whole.greedy[2:].all())
    best = model.generate(context, max_new_tokens=4, ignore_eos=True).token_ids
    assert model.score(context, best)[1] is True
    assert model.score("the ", "file") == model.score(
        model.tokenizer.encode("the "), model.tokenizer.encode("file")
    )


def test_hidden_gives_the_logits_through_norm_and_head(model, path):
    with Checkpoint(path) as checkpoint:

        def weight(name):
            entry = checkpoint.tensors[name]
            raw = os.pread(checkpoint.fds[entry.file], entry.nbytes, entry.offset)
            return np.frombuffer(raw, np.float32).reshape(entry.shape).astype(np.float64)

        norm, head = weight("model.norm.weight"), weight("lm_head.weight")
        embedding = weight("model.embed_tokens.weight")
    ids = list(range(30))
    hidden = model.hidden(ids)
    assert list(hidden) == [0, 2, 3]
    x = hidden[3].astype(np.float64)
    assert x.shape == (30, 64) and hidden[3].dtype == np.float32
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * norm
    want = model.logits(ids, last=False)
    assert np.abs(x @ head.T - want).max() < 1e-4 * np.abs(want).max()
    assert not np.allclose(hidden[0], embedding[ids])
    assert list(model.hidden(ids, layers=[1])) == [1]
    for layers in ([4], [-1], [True], ["x"]):
        with pytest.raises((ValueError, TypeError), match="layers"):
            model.hidden(ids, layers=layers)


def test_a_prompt_longer_than_a_step(model):
    ids = np.random.default_rng(0).integers(0, 300, 1300).tolist()
    assert model.plan.step_tokens < 1300
    whole = model.logits(ids, last=False)
    assert np.array_equal(model.logits(ids), whole[-1])
    want = log_softmax(whole)[np.arange(1299), ids[1:]]
    assert np.abs(model.logprobs(ids).logprobs - want).max() < 1e-3


# ---- a checkpoint without a tokenizer ----------------------------------------------------


def test_ids_work_and_text_says_why_not(path, model, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "tiktoken.model").unlink()
    with kl.load(copy, **CPU) as m:
        answer = m.generate([1, 2, 3], max_new_tokens=4)
        want = model.generate([1, 2, 3], max_new_tokens=4)
        assert (answer.token_ids, answer.text) == (want.token_ids, "")
        assert [c.text for c in m.stream([1], max_new_tokens=2)] == ["", ""]
        assert m.logits([1]).shape == (320,)
        for call in (
            lambda: m.generate("hello"),
            lambda: m.chat([{"role": "user", "content": "x"}]),
            lambda: m.generate([1], stop="x"),
            lambda: m.logprobs("hello"),
            lambda: m.tokenizer,
        ):
            with pytest.raises(kl.TokenizerError, match="has no tiktoken.model"):
                call()


# ---- interruptions, threads, life --------------------------------------------------------


def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_leaves_the_model_usable(model, no_gc_callbacks):
    want = model.generate("hello", max_new_tokens=3).token_ids
    rows = [[i] * 500 for i in range(100)]
    long = {"max_new_tokens": 3000, "ignore_eos": True}
    for call in (
        lambda: model.generate(rows, **long),
        lambda: list(model.stream([1], temperature=1.0, **long)),
        lambda: [model.logits(list(range(300)) * 13) for _ in range(100)],
    ):
        timer = interrupt_after(0.3)
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            call()
            time.sleep(5)  # the call was faster than the signal
        assert time.perf_counter() - start < 3
        timer.join()
        assert model._engine.usage() == (0, 0)
        assert model.generate("hello", max_new_tokens=3).token_ids == want


def test_ctrl_c_ends_a_wait_for_the_model(model, no_gc_callbacks):
    want = model.logprobs([1, 2, 3]).logprobs.tolist()
    held, go_on, got = threading.Event(), threading.Event(), []

    def hold(done, total):
        held.set()
        assert go_on.wait(20)

    def call(progress=False):
        got.append(model.logprobs([1, 2, 3], progress=progress).logprobs.tolist())

    threads = [threading.Thread(target=call, args=[hold])]
    threads[0].start()
    assert held.wait(20)
    threads += [threading.Thread(target=call) for _ in range(2)]  # they wait too
    threads[1].start()
    timer = interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        call()
    timer.join()
    threads[2].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert got == [want] * 3


def test_threads_share_a_model(model):
    want = [model.generate([i], max_new_tokens=20, ignore_eos=True).token_ids for i in range(6)]
    got, errors = {}, []

    def work(i):
        try:
            for _ in range(3):
                got[i] = model.generate([i], max_new_tokens=20, ignore_eos=True).token_ids
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert [got[i] for i in range(6)] == want


def test_close(path):
    with kl.load(path, **CPU) as m:
        stream = m.stream("hello", ignore_eos=True)
        next(stream)
    m.close()
    m.close()
    assert "closed" in repr(m)
    for call in (
        lambda: m.generate("x"), lambda: m.stream("x"), lambda: m.logits("x"),
        lambda: m.logprobs("x y"), lambda: m.hidden("x"), lambda: m.score("x", "y"),
        lambda: next(stream),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()
    assert m.config == CONFIG and m.tokenizer.vocab_size == 320


def test_closing_while_another_thread_generates(path):
    m = kl.load(path, **CPU)
    outcome = []

    def work():
        try:
            while True:
                m.generate([1], max_new_tokens=50, ignore_eos=True)
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    m.close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(outcome[0], ValueError) and "closed" in str(outcome[0])


def test_info_is_text_and_escaped_html(path, tmp_path):
    odd = shutil.copytree(path, tmp_path / "<b>&")
    with kl.load(odd, **CPU) as m:
        info = m.info()
        assert repr(info) == str(info)
        for word in ("3 KDA (softplus gate), 1 MLA", "f32 weights", "MLA pages", "319,774"):
            assert word in info
        for html in (info._repr_html_(), m._repr_html_()):
            assert "<b>" not in html and "&lt;b&gt;&amp;" in html
        assert "cpu f32" in repr(m)
    said = kl.Completion("<b>", [], [], "stop", None, kl.Stats(1, 0, 1, 0.1, 0.1, 1))
    assert "<b>" not in said._repr_html_() and str(said) == "<b>"


def test_random_models_repeat():
    with random_model(device="cpu", dtype="f32", seed=5) as a, \
         random_model(device="cpu", dtype="f32", seed=5) as b, \
         random_model(device="cpu", dtype="f32", seed=6) as c:  # fmt: skip
        x, y, z = (m.logits("hello") for m in (a, b, c))
    assert np.array_equal(x, y) and not np.array_equal(x, z)
    with random_model(device="cpu", dtype="f32", seed=5, router_skew=500) as skewed:
        assert not np.array_equal(x, skewed.logits("hello"))
    with pytest.raises(TypeError, match="no_such"):
        random_model(no_such=1)
    for skew in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"skew must be finite and >= 0, got {skew}"):
            random_model(device="cpu", dtype="f32", router_skew=skew)


def test_stats(model):
    answer = model.generate("hello", max_new_tokens=5, ignore_eos=True)
    stats = answer.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(answer.prompt_token_ids), 5)
    assert stats.cached_tokens == 0 and stats.prefill_s > 0 and stats.decode_s > 0
    plan = model.plan
    latents = 64 * plan.mla_page_per_token  # a page of 64 tokens holds them all
    assert stats.peak_bytes == plan.weights + plan.workspace + plan.kda_state_per_sequence + latents
    assert stats.peak_bytes < plan.total
    longer = model.generate([5] * 62, max_new_tokens=5, ignore_eos=True).stats
    assert longer.peak_bytes == stats.peak_bytes + latents
    assert "new 5" in str(stats)


# ---- memory ------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_memory_is_really_given_back(close):
    config = tiny_config(vocab_size=20_000, hidden_size=512)
    before = resident_bytes()
    m = random_model(config, device="cpu", dtype="f32", max_context=256, max_batch=1)
    assert m.plan.weights > 80e6
    m.logits([1, 2, 3])
    held = resident_bytes() - before
    assert 0.9 * m.plan.weights < held < 1.3 * m.plan.total
    if close:
        m.close()
    else:
        del m
    assert resident_bytes() - before < 0.1 * held


def test_weights_that_are_not_finite(tmp_path):
    """They load (a scan would read everything twice); no token comes of them."""
    path = write_tensors(tmp_path, lambda shapes: None)
    raw = bytearray((path / "model.safetensors").read_bytes())
    with Checkpoint(path) as checkpoint:
        norm = checkpoint.tensors["model.norm.weight"]
        raw[norm.offset : norm.offset + 4] = np.float32(np.nan).tobytes()
    (path / "model.safetensors").write_bytes(raw)
    with kl.load(path, **CPU) as m:
        for prompt in ([1, 2], [[1], [2, 3]]):
            with pytest.raises(kl.NumericalError, match="must be finite"):
                m.generate(prompt, max_new_tokens=3)
        assert np.isnan(m.logits([1])).all()
        assert m._engine.usage() == (0, 0)
