"""Requests of the engine while a client waits: submitted together, cancelled together."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive, Scope, Send

from .errors import ApiError, explain

if TYPE_CHECKING:
    from ..engine import Request
    from ..results import Chunk, Completion, Stats
    from .answers import Answer
    from .metrics import Metrics

KEEP_ALIVE = 10.0  # seconds without an event after which a stream sends a comment: clients
# and proxies give up on a connection that stays silent through a long prompt

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: then ClientGone.

    The body has been read: all that `receive` can still say is that the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def cancelling(requests: "Sequence[Request]") -> Iterator[None]:
    """Cancels, on the way out, what is not done by then."""
    try:
        yield
    finally:
        for request in requests:
            request.cancel()


async def completions(requests: "Sequence[Request]") -> "list[Completion]":
    """All answers in order; the first failure cancels the others."""

    async def one(request: "Request") -> "Completion":
        return await request

    with cancelling(requests):
        found = await asyncio.gather(*map(one, requests))
    for completion in found:
        _check_ended(completion.finish_reason)
    return found


def _check_ended(finish: str | None) -> None:
    """Raise ApiError for an answer that was cancelled, and not for the client's sake."""
    if finish in (None, "cancelled"):
        raise ApiError(503, "the engine was closed before the answer's end")


# ---- streams -----------------------------------------------------------------------------


class EventStream:
    """An ASGI response: server-sent events of an answer, as its tokens come."""

    def __init__(
        self, answer: "Answer", requests: "Sequence[Request]", metrics: "Metrics"
    ) -> None:
        self._answer, self._requests, self._metrics = answer, requests, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with cancelling(self._requests):
            with suppress(ClientGone, OSError):  # OSError: gone while something was sent
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    await send(_body(event))
        except (OSError, asyncio.CancelledError):
            raise
        except Exception as e:
            await send(_body(_event(explain(e).body)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        answer = self._answer
        for i in range(len(self._requests)):
            if opening := answer.opening(i):
                yield _event(answer.piece([opening]))
        stats: dict[int, Stats] = {}
        async with aclosing(_chunks(self._requests)) as chunks:
            async for found in chunks:
                if found is None:
                    yield b": waiting\n\n"
                    continue
                i, chunk = found
                stats[i] = chunk.stats
                if choice := answer.step(i, chunk):
                    yield _event(answer.piece([choice]))
        usage = answer.usage([stats[i] for i in range(len(stats))])
        self._metrics.count(usage)
        if answer.job.include_usage:
            yield _event(answer.piece([], usage))
        yield b"data: [DONE]\n\n"


async def _chunks(
    requests: "Sequence[Request]",
) -> "AsyncGenerator[tuple[int, Chunk] | None, None]":
    """Chunks of all requests as they come, each with its request's number; None after a while
    of silence. Raises what a request raised."""
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()  # bounded by max_tokens
    pumps = [asyncio.create_task(_pump(i, r, queue)) for i, r in enumerate(requests)]
    n_running = len(pumps)
    try:
        while n_running:
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    i, found = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(found, BaseException):
                raise found
            if found is None:
                n_running -= 1
            else:
                yield i, found
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(i: int, request: "Request", queue: asyncio.Queue[tuple[int, Any]]) -> None:
    try:
        finish = None
        async for chunk in request:
            finish = chunk.finish_reason
            queue.put_nowait((i, chunk))
        _check_ended(finish)
        queue.put_nowait((i, None))
    except Exception as e:
        queue.put_nowait((i, e))


def _event(data: Any) -> bytes:
    return f"data: {dump(data)}\n\n".encode()


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


def dump(data: Any) -> str:
    """Compact JSON."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
