"""`load` and `plan` as users call them: what they take, what they say, what they refuse."""

import json
import os
import re
import shutil
import signal
import sys
import warnings

import numpy as np
import pytest
from small_models import CONFIG, CPU, model, nothing_is_left_behind, path  # noqa: F401
from variants import DEVICES

import kimi_linear as kl
from kimi_linear import _device
from kimi_linear.checkpoint import Checkpoint
from kimi_linear.testing import (
    random_model,
    random_tensor,
    tiny_config,
    write_checkpoint,
    write_safetensors,
)


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


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_million_tokens_of_the_48b_shape_cost(device):
    """Counted here: 20 states of 32 heads with the last three q, k and v, 7 layers of latents."""
    config = kl.KimiLinearConfig.kimi_linear_48b()
    plan = kl.plan(config, device=device, dtype="bf16", max_context=1 << 20, max_batch=1)
    state = 20 * (32 * 128 * 128 * 4 + 3 * 3 * 32 * 128 * 2)
    latents = (1 << 20) * 7 * (512 + 64) * 2
    assert latents == 8_455_716_864 <= plan.mla_pages  # more where there is room for prefixes
    assert plan.of_sequence(1 << 20) == latents + state
    assert 49.1e9 < config.parameter_count() < 49.2e9
    assert 0 < plan.weights - 2 * config.parameter_count() < 50e6  # some are kept in f32
    assert 106.7e9 < plan.weights + latents + state < plan.total
    assert plan.fits or plan.total > 0.9 * plan.free


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
        ({"device": "cuda:"}, "device"),
        ({"device": "cuda:²"}, "device"),
        ({"device": "cpu:0"}, "device"),
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
