"""The command: what it prints where, and its exit codes."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

import kimi_linear as kl
from kimi_linear.testing import write_checkpoint

ROOT = os.path.dirname(os.path.dirname(kl.__file__))
ENV = {**os.environ, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("cli"), dtype="f32", seed=1))


@pytest.fixture(scope="module")
def model(path):
    with kl.load(path, device="cpu") as m:
        yield m


def command(*args):
    return [sys.executable, "-m", "kimi_linear", *map(str, args)]


def run(*args, stdin="", env=ENV):
    return subprocess.run(
        command(*args), input=stdin, capture_output=True, text=True, env=env, cwd="/",
        timeout=120,
    )  # fmt: skip


def test_generate_prints_the_text_and_nothing_else(path, model):
    want = model.generate("hello", max_new_tokens=12).text
    done = run("generate", "--model", path, "hello", "--max-new-tokens", 12)
    assert (done.returncode, done.stdout) == (0, want + "\n")
    assert "prompt" in done.stderr and "new 12" in done.stderr
    quiet = run("generate", "--model", path, "-", "--max-new-tokens", 12, "--no-stats",
                "--device", "cpu", stdin="hello")  # fmt: skip
    assert (quiet.stdout, quiet.stderr) == (want + "\n", "")


def test_generate_takes_the_sampling_options(path, model):
    options = dict(max_new_tokens=9, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01,
                   repetition_penalty=1.1, seed=5)  # fmt: skip
    want = model.generate("hello", stop=["a", "b"], ignore_eos=True, **options).text
    flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    done = run("generate", "hello", "--model", path, "--stop", "a", "--stop", "b",
               "--ignore-eos", *flags)  # fmt: skip
    assert done.stdout == want + "\n"


def test_generate_chat(path, model):
    want = model.chat([{"role": "user", "content": "hello"}], max_new_tokens=5).text
    done = run("generate", "--chat", "--model", path, "hello", "--max-new-tokens", 5)
    assert done.stdout == want + "\n"


def test_chat_keeps_the_conversation(path, model):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": "one"}]
    first = model.chat(messages, max_new_tokens=4).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
    second = model.chat(messages, max_new_tokens=4).text
    done = run("chat", "--model", path, "--max-new-tokens", 4, "--system", "Be brief.",
               "--no-stats", stdin="one\ntwo\n")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n")


def test_chat_reads_what_is_new(path):
    text = "a long message, " * 9
    done = run("chat", "--model", path, "--max-new-tokens", 4, stdin=f"{text}\n{text}\n")
    first, second = (line for line in done.stderr.splitlines() if line.startswith("prompt "))
    n = int(re.match(r"prompt (\d+) tokens", first)[1])
    assert "cached" not in first and n > 64
    assert f" tokens, {(n - 1) // 64 * 64} of them cached, in " in second


def test_score(path, model):
    ll, greedy = model.score("hello", " there")
    done = run("score", "--model", path, "hello", " there")
    line = f"{ll:.6f}\t{'greedy' if greedy else 'not greedy'}\n"
    assert done.stdout == line
    several = run("score", "--model", path, "hello", "x", " there")
    assert several.stdout.count("\n") == 2 and several.stdout.endswith(line)


def test_info_plan_bench(path):
    info = run("info")
    assert info.returncode == 0 and "compiler" in info.stdout and "cuda" in info.stdout
    assert "3 KDA" in run("info", "--model", path).stdout
    plan = run("plan", "--model", path, "--max-context", 128)
    assert "up to 128 tokens" in plan.stdout
    assert "of fp8, up to" in run("plan", "--model", path, "--kv-cache-dtype", "fp8").stdout
    bench = run("bench", "--model", path, "--prompt-tokens", 20, "--new-tokens", 5,
                "--repeat", 1, "--batch", 2)  # fmt: skip
    assert re.fullmatch(r"prefill \d+\.\d tok/s\tdecode \d+\.\d tok/s\n", bench.stdout)


def test_without_a_model_the_small_one_answers_and_says_so():
    done = run("generate", "--chat", "Remember these pairs: fox 17, owl 230. What is the value of owl?")
    assert done.stdout == "230\n"
    assert done.stderr.startswith("the small model inside the package")


@pytest.mark.parametrize(
    "args,code,message",
    [
        (["generate", "--model", "DIR"], 2, "prompt"),
        (["nonsense"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
        (["generate", "--model", "/nowhere", "x"], 2, "/nowhere is none"),
        (["generate", "--model", "PATH", ""], 2, "at least one token"),
        (["generate", "--model", "PATH", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "--model", "PATH", "x", "--top-p", "nan"], 2, "top_p"),
        (["generate", "--model", "PATH", "x", "--stop", ""], 2, "stop"),
        (["generate", "--model", "PATH", "x", "--device", "cuda:77"], 1, "cuda"),
        (["generate", "--model", "PATH", "x", "--dtype", "f16"], 2, "dtype"),
        (["generate", "--model", "PATH", "x", "--max-context", "9999"], 2, "max_context"),
        (["generate", "--model", "PATH", "x", "--cache-bytes", "1"], 1, "cache_bytes"),
        (["generate", "--chat", "--raw", "--model", "PATH", "x"], 2, "not allowed with"),
        (["plan", "--model", "BAD"], 2, "config.json"),
        (["bench", "--model", "PATH", "--batch", "0"], 2, "--batch"),
    ],
)
def test_an_error_is_one_line_and_a_code(path, tmp_path, args, code, message):
    (tmp_path / "config.json").write_text("{")
    places = {"PATH": path, "BAD": str(tmp_path)}
    done = run(*[places.get(a, a) for a in args])
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert message in last and "Traceback" not in done.stderr
    if args and not done.stderr.startswith("usage:"):
        assert len(done.stderr.strip().splitlines()) == 1
        assert last.startswith(f"kimi-linear {args[0]}: ")


def test_help_has_examples():
    assert run("--help").stdout.count("kimi-linear ") >= 7
    for name in ("generate", "chat", "score", "info", "plan", "bench"):
        done = run(name, "--help")
        assert (
            done.returncode == 0 and f"kimi-linear {name}" in done.stdout.split("example:")[1]
        )
    assert run("--version").stdout == f"kimi-linear {kl.__version__}\n"


def test_a_closed_pipe_is_quiet(path):
    args = ["generate", "--model", path, "hello", "--max-new-tokens", "3000", "--ignore-eos",
            "--no-stats", "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, cwd="/"
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(60), errors) == (0, b"")


def test_streams_that_are_closed(path, model):
    """What belongs to stderr does not come to stdout instead, and nothing ends in a traceback."""
    want = model.generate("hello", max_new_tokens=4).text + "\n"
    generate = " ".join(command("generate", "--model", path, "--max-new-tokens", 4))
    for words, code, stdout in (
        ("hello 2>&-", 0, want), ("hello >&-", 0, ""), ("- <&-", 2, ""),
    ):  # fmt: skip
        done = subprocess.run(
            f"{generate} {words}", shell=True, capture_output=True, text=True, env=ENV, cwd="/"
        )
        assert (done.returncode, done.stdout) == (code, stdout)
        assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_130(path):
    args = ["generate", "--model", path, "hello", "--max-new-tokens", "4000", "--ignore-eos"]
    with subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, cwd="/"
    ) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(60) == 130
        assert b"Traceback" not in errors


def test_a_terminal_gets_no_escape_sequences(path):
    """The model writes control characters now and then; only a pipe sees them raw."""
    args = ["generate", "--model", path, "hello", "--max-new-tokens", "400", "--ignore-eos",
            "--temperature", "2", "--seed", "1", "--no-stats"]  # fmt: skip
    raw = run(*args).stdout
    assert re.search(r"[\x00-\x08\x0e-\x1f]", raw)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(*args), stdout=theirs, stderr=subprocess.DEVNULL, env=ENV, cwd="/"
    ) as process:
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end has closed
                break
        assert process.wait(60) == 0
    os.close(ours)
    assert not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", shown)
    assert len(shown) > 100


def test_output_that_the_encoding_lacks(path):
    args = ["generate", "--model", path, "hello", "--max-new-tokens", "30", "--ignore-eos"]
    env = ENV | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = run(*args, env=env)
    assert done.returncode == 0 and done.stdout.isascii()
