"""The ASGI application: routes, who may ask, how much at once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .._files import quote, strict_json
from ..engine import Engine
from ..engine import Request as EngineRequest
from . import fields
from .answers import Answer, ChatAnswer, CompletionAnswer
from .errors import ApiError, explain, naming, refused
from .gate import Gate
from .jobs import Job, chat_ids, chat_job, completion_job
from .metrics import Metrics
from .running import ClientGone, EventStream, completions, dump, unless_gone
from .scoring import Scorer

if TYPE_CHECKING:
    from ..model import Model
    from .settings import Settings

T = TypeVar("T")
BODY_SECONDS = 60.0  # for a client to send its body


def build(model: "Model", settings: "Settings", engine: Engine | None) -> Starlette:
    """The application; see `kimi_linear.serve.app`."""
    server = Server(model, settings, engine)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/metrics", server.metrics_page),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/tokenize", server.tokenize, methods=["POST"]),
            Route("/detokenize", server.detokenize, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, settings=settings, metrics=server.metrics)],
        exception_handlers={
            ApiError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_client_gone,
            ClientGone: _on_client_gone,
            Exception: _on_error,
        },
        lifespan=server.life,
    )


class Server:
    """The endpoints of one model."""

    _engine: Engine  # both while the application runs
    _scorer: Scorer

    def __init__(self, model: "Model", settings: "Settings", engine: Engine | None) -> None:
        self.model, self.settings = model, settings
        self.tokenizer = model.tokenizer
        self.name = settings.name or (
            model.path.resolve().name if model.path else "kimi-linear"
        )
        self.metrics = Metrics()
        self._given = engine
        self._fingerprint = f"{model.fingerprint[:16]}-{model.dtype}-{model.kv_cache_dtype}"
        self._created = int(time.time())

    @asynccontextmanager
    async def life(self, _app: Starlette) -> AsyncIterator[None]:
        """While the application runs: an engine, unless one was given."""
        given = self._given
        if given is None:
            self._engine = Engine(self.model, max_waiting=self.settings.max_waiting)
        else:
            self._engine = given
        self._scorer = Scorer(self.model)
        try:
            yield
        finally:
            self._scorer.close()
            if given is None:
                await run_in_threadpool(self._engine.close)

    # ---- answers -------------------------------------------------------------------------

    async def completions(self, request: Request) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, completion_job)

    async def chat(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat_job)

    async def _answer(
        self, request: Request, read_job: "Callable[[Model, Settings, Any], Job]"
    ) -> Any:
        job = await self._read(request, lambda body: read_job(self.model, self.settings, body))

        async def work() -> Any:
            answer = await self._new_answer(job)
            async with self._scorer.admission():
                requests = self._submit(job)
            if job.stream:
                return EventStream(answer, requests, self.metrics)
            found = await completions(requests)
            self.metrics.count(answer.usage([c.stats for c in found]))
            return await run_in_threadpool(lambda: json_response(answer.whole(found)))

        try:
            return await unless_gone(request.receive, work())
        except ClientGone:
            raise
        except Exception as e:
            raise explain(e) from None

    async def _new_answer(self, job: Job) -> Answer:
        args = job, self.tokenizer, self.name, self._fingerprint
        if job.is_chat:
            return ChatAnswer(*args)
        scores = None
        if job.echo and job.logprobs is not None:
            scores = [
                await self._scorer.logprobs(ids, job.logprobs, self._engine) for ids in job.rows
            ]
        return CompletionAnswer(*args, prompts=scores)

    def _submit(self, job: Job) -> list[EngineRequest]:
        """A request of the engine for each answer; all of them or none."""
        n, most = len(job.rows) * job.n, self.settings.max_waiting + self.model.plan.max_batch
        if n > most:
            message = (
                f"prompt: must ask for at most {most} answers on this server, asks for {n}"
            )
            raise refused("prompt", message)
        requests: list[EngineRequest] = []
        try:
            for row, ids in enumerate(job.rows):
                for choice in range(job.n):
                    request = self._engine.submit(ids, **job.options(row, choice))
                    requests.append(request)
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return requests

    # ---- the rest ------------------------------------------------------------------------

    async def health(self, _request: Request) -> Response:
        """GET /health: 200 while answers can be asked for."""
        return json_response({"status": "ok"})

    async def metrics_page(self, _request: Request) -> Response:
        """GET /metrics, as Prometheus reads it."""
        text = self.metrics.text(self._engine.stats())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_name(request.path_params["name"])
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "kimi_linear",
            "max_model_len": self.model.plan.max_context,
        }

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids of a text, or of messages with the chat template."""

        def read(body: Any) -> list[int]:
            found = fields.read(body, fields.TOKENIZE)
            if (found["prompt"] is None) == (found["messages"] is None):
                raise refused("prompt", "prompt: either prompt or messages must be given")
            if found["messages"] is not None:
                ids: list[int] = chat_ids(self.tokenizer, found).tolist()
                return ids
            with naming("prompt", "text"):
                return self.tokenizer.encode(found["prompt"])

        ids = await self._read(request, read)
        n = self.model.plan.max_context
        return json_response({"count": len(ids), "max_model_len": n, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of ids."""

        def read(body: Any) -> str:
            ids = fields.read(body, fields.DETOKENIZE)["tokens"]
            if not isinstance(ids, list):
                raise refused("tokens", f"tokens: must be a list, got {quote(ids)}")
            with naming("tokens"):
                return self.tokenizer.decode(ids)

        return json_response({"prompt": await self._read(request, read)})

    async def _read(self, request: Request, read: Callable[[Any], T]) -> T:
        """What `read` makes of the body; raises ApiError. Not in the event loop's thread: a
        prompt of a million tokens takes seconds."""
        data = await read_body(request, self.settings.max_body_bytes)

        def work() -> T:
            try:
                body = strict_json(data, "body", _BadJson)
                name = body.get("model") if isinstance(body, dict) else None
                if isinstance(name, str):
                    self._check_name(name)
                return read(body)
            except _BadJson as e:
                raise refused(None, str(e), "invalid_json") from None
            except RecursionError:
                raise refused(None, "body: nested too deeply", "invalid_json") from None

        return await run_in_threadpool(work)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"model: this server has {quote(self.name)}, not {quote(name)}"
            raise ApiError(404, message, param="model", code="model_not_found")


class _BadJson(ValueError):
    """A body that is no JSON."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request; raises ApiError past the limit of bytes or seconds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site cannot send unasked
        message = f"Content-Type: must be application/json, got {quote(kind)}"
        raise ApiError(415, message, code="unsupported_media_type")
    too_large = ApiError(413, f"body: must have at most {limit:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        message = f"body: must be sent within {BODY_SECONDS:g} seconds"
        raise ApiError(408, message, code="body_too_slow") from None
    return bytes(data)


def json_response(body: Any) -> Response:
    """A whole answer."""
    return Response(dump(body), media_type="application/json")


async def _on_http_error(request: Request, error: Any) -> Response:
    path = quote(request.url.path)
    message = {404: f"no such path: {path}", 405: f"{request.method}: not of {path}"}
    return ApiError(error.status_code, message.get(error.status_code, error.detail)).response()


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _on_error(_request: Request, error: Exception) -> Response:
    return explain(error).response()
