"""Prompts, sampling values and environments that somebody will try."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.testing import random_model, write_checkpoint

MESSAGE = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def model():
    with random_model(device="cpu", dtype="f32", max_context=600) as m:
        yield m


@pytest.fixture(autouse=True)
def the_model_still_works(model):
    yield
    assert model._engine.usage() == (0, 0)
    assert len(model.generate([1], max_new_tokens=1).token_ids) == 1


# ---- prompts -----------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", ValueError, "prompt: must hold at least one token"),
    ([], ValueError, "prompt: must hold at least one token"),
    ([[]], ValueError, r"prompt\[0\]: must hold at least one token"),
    (["a", ""], ValueError, r"prompt\[1\]: must hold at least one token"),
    ([[1], []], ValueError, r"prompt\[1\]: must hold at least one token"),
    (np.array([], np.int32), ValueError, "at least one token"),
    (None, TypeError, "prompt: must be str, token ids"),
    (5, TypeError, "got int"),
    (1.5, TypeError, "got float"),
    (b"bytes", TypeError, "got bytes"),
    (bytearray(b"x"), TypeError, "got bytearray"),
    ({"role": "user"}, TypeError, "got dict"),
    ({1, 2}, TypeError, "got set"),
    ([b"bytes"], TypeError, r"prompt\[0\]: must be str.*got bytes"),
    (["a", 5], TypeError, r"prompt\[1\]: must be str.*got int"),
    (["a", None], TypeError, r"prompt\[1\].*got NoneType"),
    ([True, 1], TypeError, r"prompt\[0\]: token ids must be integers, got True"),
    ([1, False], TypeError, r"prompt\[1\]: token ids must be integers, got False"),
    ([1, 2.0], TypeError, r"prompt\[1\]: token ids must be integers, got 2.0"),
    ([1.0], TypeError, "integers, got 1.0"),
    ([1, None], TypeError, r"prompt\[1\]: token ids must be integers"),
    ([1, "a"], TypeError, r"prompt\[1\]: token ids must be integers, got 'a'"),
    ([1, [2]], TypeError, r"prompt\[1\]: token ids must be integers"),
    ([[1, 2], [3, "x"]], TypeError, r"prompt\[1\]\[1\]: token ids must be integers"),
    ([[1], [[2]]], TypeError, r"prompt\[1\]\[0\]: token ids must be integers"),
    (np.array([1.0, 2.0]), TypeError, "integers, got dtype float64"),
    (np.array([True]), TypeError, "integers, got dtype bool"),
    (np.zeros((1, 1, 1), int), TypeError, "got ndarray"),
    ([-1], ValueError, r"must be in 0\.\.319, got -1"),
    ([1, 320], ValueError, r"must be in 0\.\.319, got 320"),
    ([1 << 31], ValueError, "must be in"),
    ([1 << 32], ValueError, "must be in"),  # 0 once cut to 32 bits
    ([(1 << 63) - 1], ValueError, "must be in"),
    ([1 << 64], ValueError, "over 63 bits"),
    (np.array([2**64 - 1], np.uint64), ValueError, "must be in"),
    ([[1], [-5]], ValueError, r"prompt\[1\]: token ids must be in"),
    ("\ud800", ValueError, "prompt: must be Unicode, character 0 is the lone surrogate"),
    (["ok", "a\udfff"], ValueError, r"prompt\[1\]: .* character 1 is the lone surrogate"),
    ([MESSAGE, "x"], TypeError, r"prompt: messages\[1\]: must be a dict"),
    ([[MESSAGE], [{"role": "x"}]], ValueError, r"prompt\[1\]: messages\[0\]: role: must be one"),
    ([1] * 600, ValueError, r"room for a token in max_context \(600\), has 600"),
    ([1] * 10**6, ValueError, r"max_context \(600\), has 1000000 tokens"),
    ([[1], [1] * 601], ValueError, r"prompt\[1\]: must leave room.*600.*601"),
]


@pytest.mark.parametrize("prompt,error,message", BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_a_bad_prompt_is_named(model, prompt, error, message):
    with pytest.raises(error, match=message) as info:
        model.generate(prompt, max_new_tokens=1)
    assert len(str(info.value)) < 300
    with pytest.raises((ValueError, TypeError)):
        model.stream(prompt, max_new_tokens=1)


@pytest.mark.parametrize("call", ["logits", "logprobs", "hidden"])
@pytest.mark.parametrize(
    "prompt,error,message",
    [
        ("", ValueError, "prompt: must hold at least one token"),
        ([], ValueError, "at least one token"),
        (b"x", TypeError, "got bytes"),
        ([True], TypeError, "integers, got True"),
        ([320], ValueError, r"0\.\.319, got 320"),
        ([1] * 601, ValueError, r"at most 600 tokens \(max_context\), has 601"),
        (["a", "b"], TypeError, "integers, got 'a'"),
    ],
)
def test_the_other_calls_check_the_same(model, call, prompt, error, message):
    with pytest.raises(error, match=message):
        getattr(model, call)(prompt)


def test_score_names_its_arguments(model):
    with pytest.raises(ValueError, match="context: must hold at least one token"):
        model.score("", "x")
    with pytest.raises(ValueError, match="continuation: must hold at least one token"):
        model.score("x", "")
    model.score([1] * 300, [1] * 301)  # the last token is scored, not read
    with pytest.raises(ValueError, match="at most 601 tokens.*300 and 302"):
        model.score([1] * 300, [1] * 302)
    for top in (-1, 321, True, 1.0):
        with pytest.raises((ValueError, TypeError), match="top"):
            model.logprobs("hello", top=top)


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "\x1b[2J", "\u202e", "\ufffe", "🏴‍☠️", "\r\n"])
def test_odd_text_is_text(model, prompt):
    answer = model.generate(prompt, max_new_tokens=1)
    assert model.tokenizer.decode(answer.prompt_token_ids) == prompt


def test_control_tokens_in_a_prompt_are_text(model):
    answer = model.generate("<|im_end|>[EOS]", max_new_tokens=1)
    assert max(answer.prompt_token_ids) < 300


def test_ten_megabytes_of_prompt_get_a_clear_answer(model):
    with pytest.raises(ValueError, match="max_context"):
        model.generate("a b " * 2_500_000)


# ---- sampling ----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_SAMPLING = [
    *[("temperature", v) for v in (NAN, INF, -INF, -0.1, 1e7, 10**400, True, "1", None, [1])],
    *[("top_p", v) for v in (NAN, INF, 0, 0.0, -0.5, 1.0001, 2, True, "1", None)],
    *[("min_p", v) for v in (NAN, -0.1, 1.1, True, "0")],
    *[("top_k", v) for v in (-1, 321, 1 << 40, 1.0, True, "5", None)],
    *[("repetition_penalty", v) for v in (NAN, 0, 0.0, -1, INF, True, "1")],
    *[("max_new_tokens", v) for v in (-1, 1 << 31, 1 << 70, 1.0, True, "5", None)],
    *[("seed", v) for v in (-1, 1 << 64, 1.0, True, "5")],
    *[("logprobs", v) for v in (-1, 257, 1.0, True, "5")],
    *[("stop", v) for v in ("", ["a", ""], [1], b"x", [b"x"], 5)],
    *[("stop_token_ids", v) for v in ([320], [-1], [True], [1.0], ["a"], 5)],
    *[("ignore_eos", v) for v in (1, "no", None)],
    *[("logits_processor", v) for v in (5, "x", [5], [None])],
    *[("progress", v) for v in (5, "x")],
]


@pytest.mark.parametrize("name,value", BAD_SAMPLING)
def test_a_bad_sampling_value_is_named(model, name, value):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        model.generate("hello", **{name: value})
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        list(model.stream("hello", **{name: value}))


def test_the_range_is_in_the_message(model):
    with pytest.raises(ValueError, match=r"top_p: must be a number in \(0, 1\], got 0"):
        model.generate("hello", top_p=0)
    with pytest.raises(ValueError, match=r"top_k: must be an integer in 0\.\.320, got 321"):
        model.generate("hello", top_k=321)
    with pytest.raises(
        ValueError, match=r"seed: must be an integer in 0\.\.18446744073709551615"
    ):
        model.generate("hello", seed=1 << 64)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e6, "seed": 1}, {"temperature": 1e-30, "seed": 1}, {"top_k": 320},
        {"temperature": 1, "top_p": 1e-300}, {"temperature": 1, "min_p": 1},
        {"temperature": 1, "repetition_penalty": 1e-6}, {"repetition_penalty": 1e6},
        {"seed": (1 << 64) - 1}, {"seed": 0, "temperature": 1},
        {"max_new_tokens": (1 << 31) - 1},
        {"stop": ["x" * 100_000]}, {"stop": ["\0"]}, {"stop": None}, {"logprobs": 256},
        {"temperature": np.float32(0.5)}, {"top_k": np.int64(3)}, {"stop_token_ids": ()},
        {"stop_token_ids": np.array([3, 3])},
    ],
    ids=str,
)  # fmt: skip
def test_the_ends_of_the_ranges_work(model, options):
    options = {"max_new_tokens": 8} | options
    answer = model.generate("hello", **options)
    assert answer.token_ids
    assert answer.finish_reason in ("stop", "length")


# ---- environments ------------------------------------------------------------------------


def python(code, *, env=None, args=(), check=True):
    """Run code in a fresh interpreter; returns the completed process."""
    root = os.path.dirname(os.path.dirname(kl.__file__))
    base = {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *args, "-c", code],
        env=base | (env or {}), cwd="/", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


IMPORT = """
import sys, threading, os
fds = len(os.listdir("/proc/self/fd"))
import kimi_linear
heavy = {"numpy", "torch", "tiktoken", "tqdm", "json", "kimi_linear._core"} & set(sys.modules)
assert len(os.listdir("/proc/self/fd")) == fds and threading.active_count() == 1
assert set(kimi_linear.__all__) <= set(dir(kimi_linear))
print(*heavy)
"""


def test_import_touches_nothing():
    assert python(IMPORT).stdout.split() == []


def test_importing_every_public_name_leaves_torch_alone():
    python(
        "import kimi_linear as kl, sys\n"
        "for name in kl.__all__: assert getattr(kl, name) is not None, name\n"
        "kl.ops, kl.reference, kl.testing, kl.errors\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = kl.nonsense


USE = """
import kimi_linear as kl
with kl.testing.random_model(device="cpu", dtype="f32") as m:
    print(m.generate([1, 2], max_new_tokens=8, ignore_eos=True).token_ids)
"""


@pytest.fixture(scope="module")
def expected():
    return python(USE).stdout


@pytest.mark.parametrize(
    "env,args",
    [
        ({"LC_ALL": "C", "LANG": "C"}, ()), ({"LC_ALL": "POSIX", "PYTHONUTF8": "0"}, ()),
        ({"HOME": "/nonexistent"}, ()), ({"TMPDIR": "/nonexistent"}, ()), ({}, ("-O",)),
        ({}, ("-OO",)), ({}, ("-X", "dev")), ({"LD_LIBRARY_PATH": "/nonexistent"}, ()),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()), ({"KIMI_LINEAR_THREADS": "1"}, ()),
        ({"KIMI_LINEAR_THREADS": "7"}, ()), ({"OMP_NUM_THREADS": "nonsense"}, ()),
    ],
    ids=str,
)  # fmt: skip
def test_environments_that_change_nothing(expected, env, args):
    assert python(USE, env=env, args=args).stdout == expected


@pytest.mark.parametrize(
    "env,name",
    [
        ({"KIMI_LINEAR_THREADS": "0"}, "KIMI_LINEAR_THREADS"),
        ({"KIMI_LINEAR_THREADS": "many"}, "KIMI_LINEAR_THREADS"),
        ({"KIMI_LINEAR_THREADS": "1e3"}, "KIMI_LINEAR_THREADS"),
        ({"KIMI_LINEAR_CPU": "mmx"}, "mmx"),
    ],
)
def test_a_bad_switch_is_named(env, name):
    done = python(USE, env=env, check=False)
    assert done.returncode == 1
    assert name in done.stderr.strip().splitlines()[-1]


def test_a_read_only_directory_is_enough(tmp_path):
    write_checkpoint(tmp_path)
    for file in tmp_path.iterdir():
        file.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        kl.load(tmp_path, device="cpu").close()
    finally:
        tmp_path.chmod(0o755)


def test_nothing_named_by_the_checkpoint_is_run(tmp_path):
    write_checkpoint(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["auto_map"] = {"AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    (tmp_path / "tokenization_kimi.py").write_text("open('ran', 'w')")
    kl.load(tmp_path, device="cpu").close()
    assert "evil" not in sys.modules and not (tmp_path / "ran").exists()


def test_a_checkout_that_is_not_built_says_so(tmp_path):
    package = os.path.dirname(kl.__file__)
    sources = [f for f in os.listdir(package) if f.endswith(".py")]
    (tmp_path / "kimi_linear").mkdir()
    for name in sources:
        (tmp_path / "kimi_linear" / name).symlink_to(os.path.join(package, name))
    for code in ("import kimi_linear; kimi_linear.load", "from kimi_linear import Model"):
        done = python(code, env={"PYTHONPATH": str(tmp_path)}, check=False)
        assert "ModuleNotFoundError" in done.stderr and "is not built" in done.stderr


def test_show_config_tells_why_cuda_is_off(capsys):
    kl.show_config()
    shown = capsys.readouterr().out
    for word in ("kimi_linear", "compiler", "cpu", "cuda"):
        assert word in shown
