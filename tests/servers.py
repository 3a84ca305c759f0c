"""Real servers for tests: uvicorn on a free port, in a thread of this process."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import uvicorn

import kimi_linear as kl
from kimi_linear.serve import Settings, app

STORY = "Once upon a time"
CHAT = [{"role": "user", "content": "Tell me a story."}]
HTTP = httpx.Client(timeout=60)
LONG = dict(max_tokens=400, extra_body={"ignore_eos": True}, temperature=0)


class Served:
    """Where a server is, and what it runs on."""

    def __init__(self, url, engine):
        self.url, self.engine = url, engine

    def idle(self, seconds=20.0):
        """Whether all sequences are given back within that time."""
        return eventually(lambda: busy(self.engine) == 0, seconds)


def busy(engine):
    stats = engine.stats()
    return stats.running + stats.waiting


def eventually(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def serving(model, *, engine=None, **settings):
    """A server of a model while the block runs. engine: else one of its own."""
    settings = Settings(**settings)
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = kl.Engine(model, max_waiting=settings.max_waiting)
            stack.callback(engine.close)
        bound = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        config = uvicorn.Config(app(model, settings, engine=engine), lifespan="on",
                                log_config=None, access_log=False,
                                timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert eventually(lambda: server.started or not thread.is_alive())
            assert server.started
            yield Served(f"http://127.0.0.1:{bound.getsockname()[1]}", engine)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


# ---- clients -----------------------------------------------------------------------------


def client_of(served, **options):
    url = f"{served.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, **options)


def post(served, path="/v1/completions", **body):
    return HTTP.post(served.url + path, json=body)


def events(lines):
    """The data of a stream's events; the last must say that it is done."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(d) for d in data[:-1]]


def streamed(served, path="/v1/completions", **body):
    url = served.url + path
    with HTTP.stream("POST", url, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())


# ---- models that say what they are told ----------------------------------------------------


class Follows:
    """A logits processor after which the model says what a script says."""

    def __init__(self, n_prompt, script):
        self.n_prompt, self.script = n_prompt, script

    def __call__(self, ids, logits):
        at = len(ids) - self.n_prompt
        logits[:] = -30.0
        logits[self.script[min(at, len(self.script) - 1)]] = 30.0


class Scripted:
    """An engine whose model says a given text; what it was asked is kept."""

    def __init__(self, model, script):
        self.script, self.prompts, self._engine = script, [], kl.Engine(model)

    def submit(self, prompt, **sampling):
        self.prompts.append(list(prompt))
        return self._engine.submit(
            prompt, logits_processor=Follows(len(prompt), self.script), **sampling
        )

    def stats(self):
        return self._engine.stats()

    def close(self):
        self._engine.close()
