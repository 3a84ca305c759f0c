"""Clients that leave, limits, keys, and how the command ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest
import servers
from servers import CHAT, HTTP, LONG, STORY, client_of, events, post

import kimi_linear as kl
from kimi_linear import cli
from kimi_linear.serve import Settings, app
from kimi_linear.serve.command import _settings
from kimi_linear.serve.scoring import Scorer

# ---- clients that leave ------------------------------------------------------------------


def test_a_stream_that_nobody_reads_is_cancelled(client, served):
    stream = client.completions.create(model="small_model", prompt=STORY, stream=True, **LONG)
    next(iter(stream))
    assert servers.busy(served.engine) == 1
    stream.close()
    assert served.idle()


@pytest.mark.parametrize("extra", [{}, {"n": 20}, {"stream": True}], ids=str)
def test_a_client_that_hangs_up_is_not_answered(served, extra):
    """Running and waiting alike: the 20 answers are more than the sequences."""
    before = served.engine.stats().new_tokens
    body = dict(prompt=STORY, max_tokens=400, ignore_eos=True) | extra
    data = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        assert servers.eventually(lambda: servers.busy(served.engine) == body.get("n", 1))
    assert served.idle()
    assert served.engine.stats().new_tokens - before < 400 * body.get("n", 1)


def test_a_failure_cancels_the_answers_beside_it(model):
    class Fails(servers.Scripted):
        def submit(self, prompt, **sampling):
            self.prompts.append(prompt)
            options = {}
            if len(self.prompts) % 3 == 0:
                options = {"logits_processor": fail}
            return self._engine.submit(prompt, **sampling | options)

    def fail(ids, logits):
        raise kl.NumericalError("logits: are not finite")

    engine = Fails(model, [])
    with servers.serving(model, engine=engine) as s:
        body = dict(prompt=STORY, n=3, max_tokens=400, ignore_eos=True)
        got = post(s, **body)
        assert got.status_code == 500
        assert "not finite" in got.json()["error"]["message"]
        assert s.idle() and s.engine.stats().new_tokens < 2 * 400
        with client_of(s) as c, pytest.raises(openai.APIError, match="not finite"):
            list(
                c.completions.create(
                    model="small_model", prompt=STORY, n=3, stream=True, **LONG
                )
            )
        assert s.idle() and s.engine.stats().new_tokens < 2 * 2 * 400
    engine.close()


# ---- limits ------------------------------------------------------------------------------


def test_more_requests_than_allowed_are_told_to_come_back(model):
    with servers.serving(model, max_requests=1) as s, client_of(s) as c:
        stream = c.completions.create(model="small_model", prompt=STORY, stream=True, **LONG)
        next(iter(stream))
        got = post(s, prompt="x")
        assert got.status_code == 429 and got.headers["retry-after"]
        assert got.json()["error"]["type"] == "rate_limit_error"
        assert HTTP.get(f"{s.url}/health").status_code == 200
        assert "kimi_linear_requests 2\n" in HTTP.get(f"{s.url}/metrics").text
        stream.close()
        assert servers.eventually(lambda: post(s, prompt="x", max_tokens=1).status_code == 200)


def test_more_prompts_than_may_wait_are_told_to_come_back(model):
    with servers.serving(model, max_waiting=4) as s, client_of(s) as c:
        busy = c.completions.create(model="small_model", prompt=STORY, stream=True, n=8, **LONG)
        next(iter(busy))
        got = post(s, prompt=[STORY] * 6, max_tokens=400)
        assert got.status_code == 429 and got.headers["retry-after"]
        assert got.json()["error"]["type"] == "rate_limit_error"
        assert servers.eventually(lambda: servers.busy(s.engine) == 8)  # none was left behind
        busy.close()
        assert s.idle()
        assert post(s, prompt=STORY, max_tokens=1).status_code == 200
        got = post(s, prompt=[STORY] * 13)
        assert got.status_code == 400 and "at most 12 answers" in got.json()["error"]["message"]


def test_a_prompt_is_scored_though_answers_hold_all_sequences(model, monkeypatch):
    """It waits for one of them to end, and who comes later waits for it."""
    found_no_room, begun, answers = threading.Event(), [], {}
    read = Scorer._read

    async def spied(self, ids, top):
        try:
            found = await read(self, ids, top)
        except kl.errors.OutOfMemory:
            found_no_room.set()
            raise
        stats = s.engine.stats()
        begun.append(stats.done + stats.running + stats.waiting)
        return found

    def until_then(ids, logits):
        found_no_room.wait(0.02)  # of every token: the answers are there when the prompt comes

    def slowly(self, prompt, **sampling):
        return submit(self, prompt, logits_processor=until_then, **sampling)

    submit = kl.Engine.submit
    monkeypatch.setattr(kl.Engine, "submit", slowly)
    monkeypatch.setattr(Scorer, "_read", spied)

    def ask(name, **body):
        answers[name] = post(s, prompt=STORY, temperature=0, **body).json()["choices"][0]

    with servers.serving(model) as s, client_of(s) as c:
        options = LONG | {"max_tokens": 150}
        busy = c.completions.create(model="small_model", prompt=STORY, stream=True, n=8, **options)
        next(iter(busy))
        scores, more = dict(max_tokens=0, echo=True, logprobs=0), dict(max_tokens=1)
        first = threading.Thread(target=ask, args=("first",), kwargs=scores)
        first.start()
        assert found_no_room.wait(20)
        second = threading.Thread(target=ask, args=("later",), kwargs=more)
        second.start()
        assert sum(1 for _ in busy) > 20
        first.join()
        second.join()
    table = answers["first"]["logprobs"]["token_logprobs"]
    assert table[1:] == model.logprobs(STORY).logprobs.tolist()
    assert begun == [8]


def test_body_limit(model):
    with servers.serving(model, max_body_bytes=1000) as s:
        assert post(s, prompt="x" * 200, user="x" * 700, max_tokens=1).status_code == 200
        got = post(s, prompt="x" * 1000)
        assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
        chunks = (b"x" * 600 for _ in range(2))
        headers = {"content-type": "application/json"}
        got = HTTP.post(f"{s.url}/v1/completions", content=chunks, headers=headers)
        assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")


def test_max_tokens_limits(model):
    with servers.serving(model, max_tokens=8, default_max_tokens=6) as s:
        got = post(s, prompt="x", max_tokens=9)
        assert got.status_code == 400 and got.json()["error"]["param"] == "max_tokens"
        assert "at most 8" in got.json()["error"]["message"]
        for path, body, n in [
            ("/v1/completions", {"prompt": "x"}, 8),
            ("/v1/chat/completions", {"messages": CHAT}, 6),
            ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 8}, 8),
        ]:
            got = post(s, path, ignore_eos=True, **body).json()
            assert got["usage"]["completion_tokens"] == n
            assert got["choices"][0]["finish_reason"] == "length"


def test_key_and_host(model):
    with servers.serving(model, api_key="secret", hosts=("127.0.0.1",)) as s:
        assert HTTP.get(f"{s.url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"},
                        {"authorization": "Bearer sécret".encode()}):  # fmt: skip
            got = HTTP.get(f"{s.url}/v1/models", headers=headers)
            assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"authorization": "Bearer secret"}
        assert HTTP.get(f"{s.url}/v1/models", headers=right).status_code == 200
        rebound = right | {"host": "evil.example"}
        assert HTTP.get(f"{s.url}/v1/models", headers=rebound).status_code == 403
        with client_of(s).with_options(api_key="secret") as c:
            assert c.models.list().data[0].id == "small_model"


@pytest.mark.parametrize(
    "setting,error,message",
    [
        ({"max_requests": "8"}, ValueError, "max_requests: must be an integer of at least 1"),
        ({"default_max_tokens": None}, ValueError, "default_max_tokens: must be an integer"),
        ({"name": ""}, ValueError, "name: must have at least one character"),
        ({"api_key": ""}, ValueError, "api_key: must have at least one character"),
        ({"api_key": "clé"}, ValueError, "api_key: .* printable ASCII"),
        ({"api_key": "two\nlines"}, ValueError, "api_key: .* printable ASCII"),
        ({"hosts": "localhost"}, TypeError, "hosts: must be a tuple of names"),
    ],
)  # fmt: skip
def test_wrong_settings(setting, error, message):
    with pytest.raises(error, match=message):
        Settings(**setting)


def test_an_application_may_run_again(model):
    """In another event loop, too: nothing of the first run is left in it."""
    again = app(model)
    body = {"prompt": STORY, "echo": True, "logprobs": 0, "max_tokens": 0}

    async def run():
        transport = httpx.ASGITransport(again)
        async with again.router.lifespan_context(again):
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as c:
                return (await c.post("/v1/completions", json=body)).json()["choices"]

    assert asyncio.run(run()) == asyncio.run(run())


def test_a_silent_stream_says_that_it_lives(model, monkeypatch):
    monkeypatch.setattr("kimi_linear.serve.running.KEEP_ALIVE", 0.02)
    go = threading.Event()

    class Waits(servers.Scripted):
        def submit(self, prompt, **sampling):
            return self._engine.submit(prompt, logits_processor=wait, **sampling)

    def wait(ids, logits):
        go.wait(10)

    engine = Waits(model, [])
    with servers.serving(model, engine=engine) as s:
        body = dict(prompt=STORY, max_tokens=1, stream=True)
        with HTTP.stream("POST", f"{s.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting"
            go.set()
            assert len(events(lines)) == 1
    engine.close()


# ---- the command -------------------------------------------------------------------------


@pytest.fixture
def command():
    """Starts `kimi-linear serve` on a free port; (process, its address)."""
    started = []

    def start(*options):
        args = [sys.executable, "-m", "kimi_linear", "serve", "--port", "0", "--device", "cpu",
                "--dtype", "f32", "--max-context", "512", *options]  # fmt: skip
        env = {**os.environ, "KIMI_LINEAR_THREADS": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(args, stderr=pipe, stdout=pipe, text=True, env=env)
        started.append(process)
        lines = []
        while "/v1 is ready" not in (lines or [""])[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        return process, servers.Served(lines[-1].partition("/v1 ")[0], None)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_sigterm_lets_answers_end(command, model):
    process, s = command()
    with client_of(s) as client:
        stream = client.completions.create(
            model="small_model", prompt=STORY, stream=True, **LONG
        )
        first = next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGTERM)
        text = first + "".join(c.choices[0].text for c in stream)
    assert text == model.generate(STORY, max_new_tokens=400, ignore_eos=True).text
    assert process.wait(20) == 0
    assert process.stdout.read() == ""


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_prefix_cache_and_the_end_of_the_grace(command):
    process, s = command("--grace", "0", "--name", "tale")
    body = dict(prompt=STORY * 40, max_tokens=4, temperature=0, n=3)  # 160 tokens
    first, second = (post(s, **body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    assert (cached(first), cached(second)) == (0, 128)  # not of each of the three answers
    with client_of(s) as client:
        stream = client.completions.create(model="tale", prompt=STORY, stream=True, **LONG)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            assert sum(1 for _ in stream) < 0
    assert process.wait(20) == 130


def test_an_address_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port), "--model", "/nowhere"]) == 1
    assert f"port {port}" in capsys.readouterr().err
    assert cli.main(["serve", "--port", "70000"]) == 2
    assert "--port: must be in 0..65535" in capsys.readouterr().err


WRONG = [
    (["--max-waiting", "0"], 2, "max_waiting: must be an integer of at least 1"),
    (["--grace", "-1"], 2, "--grace: must be at least 0"),
    (["--api-key", "@/nowhere"], 2, "/nowhere"),
    (["--api-key", ""], 2, "api_key: must have at least one character"),
    (["--host", "999.1.1.1"], 2, "--host: must be an address of this machine"),
    (["--model", "/nowhere"], 2, "/nowhere"),
]


@pytest.mark.parametrize("options, code, words", WRONG, ids=lambda x: str(x)[:30])
def test_a_wrong_option(options, code, words, capsys):
    assert cli.main(["serve", "--port", "0", *options]) == code
    assert words in capsys.readouterr().err


def test_help_and_what_is_not_installed(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "curl http://127.0.0.1:8000/v1" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve"]) == 1
    assert "pip install 'kimi_linear[serve]'" in capsys.readouterr().err


def test_who_may_ask_is_told_by_the_address(capsys, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")

    def settings(*options):
        return _settings(cli._parser().parse_args(["serve", *options]))

    local = settings("--api-key", f"@{key}")
    assert local.api_key == "secret" and "localhost" in local.hosts
    assert settings("--host", "::1").hosts and settings("--host", "localhost").hosts
    assert settings("--host", "0.0.0.0", "--api-key", "x").hosts is None
    assert not capsys.readouterr().err
    assert settings("--host", "0.0.0.0").api_key is None
    assert "others can reach this server" in capsys.readouterr().err
