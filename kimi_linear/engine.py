"""Many requests on one model at once, from any thread or event loop."""

import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING, Any, Unpack

from ._files import quote
from ._held import engine_of
from ._prompts import prompt_rows
from ._sampling import SamplingOptions
from ._worker import Wakes, Worker
from .results import Chunk, Completion

if TYPE_CHECKING:
    from ._generation import Row
    from .model import Model


@dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and what it has done since it began."""

    running: int  # requests with a sequence
    waiting: int  # requests before them
    done: int  # requests that ended, however they did
    prompt_tokens: int  # read
    new_tokens: int
    tokens_per_s: float  # new tokens, over the last ten seconds
    sequences: int  # of the model, those of states and other calls too
    pages_used: int  # of latents, 64 tokens each; the model's, as well
    pages: int  # that there are


class Engine:
    """Requests that come at any time and run together on a model, each with its own sampling.

        with kl.Engine(model) as engine:
            request = engine.submit("Once upon a time", max_new_tokens=50)
            for chunk in request: ...          # or: async for chunk in request
            completion = request.result()      # or: await request

    A thread of the engine's own runs the steps: it feeds a token for each request that is
    generating and gives the rest of the step to prompts. Requests are admitted in the order of
    their submission, each as soon as one of the model's `max_batch` sequences and the memory of
    its longest outcome are free; a short prompt shares the steps of a long one before it. The
    tokens of a request are those of `Model.generate`, whatever runs beside it (to the bit on a
    CPU, on CUDA with `batch_invariant=True`), and what befalls one, such as logits that are not
    finite or a logits processor that raises, ends that one alone.

    Other calls on the model take turns with the steps; those that need a sequence of their own
    raise OutOfMemory while requests have all of them. Nor does the engine wait for sequences
    and pages that states and streams hold: a request that they stop while nothing else runs
    fails with OutOfMemory.

    max_waiting: how many requests may wait before `submit` raises EngineFull; None: any number.

    The thread ends with `close`, when the interpreter exits, or when nobody refers to the
    engine or one of its requests any more; requests under way are cancelled then. It does not
    survive os.fork: in the child, calls raise RuntimeError, and the model must not be used.
    """

    def __init__(self, model: "Model", *, max_waiting: int | None = None) -> None:
        if max_waiting is not None and (
            isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0
        ):
            raise ValueError(f"max_waiting: must be None or >= 0, got {quote(max_waiting)}")
        self._model = model
        self._worker = Worker(engine_of(model), model.plan.max_batch, max_waiting)
        weakref.finalize(self, self._worker.stop).atexit = False  # there the worker sees to it

    def submit(self, prompt: Any, **sampling: Unpack[SamplingOptions]) -> "Request":
        """Ask for the continuation of one prompt; arguments of `Model.generate` but `progress`.

        Returns at once, from any thread. With a seed the tokens are those of `Model.generate`
        with it. Logits processors run in the engine's thread, while others wait.

        Raises ValueError or TypeError naming the argument, EngineFull where max_waiting
        requests wait already, ValueError after close().
        """
        rows, is_batch = self._rows(prompt, sampling)
        if is_batch:
            raise ValueError("prompt: submit takes one prompt, got a list; use generate")
        return self._submit(rows[0], wait=False)

    def generate(
        self, prompt: Any, **sampling: Unpack[SamplingOptions]
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts, beside whatever else runs.

        Arguments but `progress`, and results, are those of `Model.generate`. Waits for the
        answers, and where
        max_waiting is reached also for a place. If one fails, or at Ctrl-C, the others are
        cancelled.
        """
        rows, is_batch = self._rows(prompt, sampling)
        requests: list[Request] = []
        try:
            for row in rows:
                requests.append(self._submit(row, wait=True))
            completions = [request.result() for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return completions if is_batch else completions[0]

    def _rows(self, prompt: Any, sampling: SamplingOptions) -> "tuple[list[Row], bool]":
        model = self._model
        model._open_engine()
        checked = model._check_sampling(**sampling)
        rows, is_batch = prompt_rows(prompt, model._get_tokenizer, model.config.vocab_size)
        return model._rows(rows, checked), is_batch

    def _submit(self, row: "Row", *, wait: bool) -> "Request":
        request = Request(self, row)
        self._worker.submit(request, wait=wait)
        return request

    def stats(self) -> EngineStats:
        """As of the last step; waits for nothing."""
        return EngineStats(**self._worker.stats())

    def close(self, cancel: bool = True) -> None:
        """End the thread; further calls do nothing. The model stays open.

        cancel: end the requests under way, with finish_reason "cancelled"; False waits until
        they are done. A callback of the engine's thread, or of another call on the model, may call this,
        and does not wait.
        """
        self._worker.stop(cancel=cancel)
        self._worker.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._worker.forked:
            return "<kimi_linear.Engine of the parent process>"
        stats = self.stats()
        closed = " closed" if self._worker.stopping else ""
        return f"<kimi_linear.Engine {stats.running} running, {stats.waiting} waiting{closed}>"


class Request:
    """A prompt that an engine continues; `Engine.submit` makes one. For any number of threads.

    Iterating gives each Chunk as it comes, from the first one, in every loop anew; `async for`
    does so in an event loop. `result()` and `await request` give the Completion. An error of
    the request is raised by each of them, by a loop after its chunks. Leaving a loop cancels
    nothing; a task that is cancelled while it awaits the request cancels it.
    """

    def __init__(self, engine: Engine, row: "Row") -> None:
        self._engine, self._row = engine, row  # a request under way keeps its engine alive
        self._news = Condition()
        self._chunks: list[Chunk] = []
        self._over = False
        self._n_waiting = 0  # loops in threads
        self._sleepers: list[tuple[Any, Any]] = []  # (loop, asyncio.Future)
        self._future: Future[Completion] = Future()
        self._future.set_running_or_notify_cancel()

    # ---- for the worker ------------------------------------------------------------------

    def _tell(self, chunk: Chunk | None, wakes: Wakes) -> None:
        """A token, or None: no more will come."""
        with self._news:
            if chunk is None:
                self._over = True
            else:
                self._chunks.append(chunk)
            if self._n_waiting:
                self._news.notify_all()
            sleepers, self._sleepers = self._sleepers, []
        for loop, future in sleepers:
            wakes.setdefault(loop, []).append(future)

    def _settle(self, wakes: Wakes) -> None:
        """The row is done; callbacks of others run here."""
        completion = None
        if self._row.error is None:
            try:
                completion = self._row.completion()
            except Exception as e:
                self._row.error = e
        if completion is None:
            self._future.set_exception(self._row.error)
        else:
            self._future.set_result(completion)
        self._tell(None, wakes)

    # ---- for callers ---------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Completion:
        """The answer; raises what ended the request, TimeoutError after `timeout` seconds.

        A request that was cancelled has what came until then, and finish_reason "cancelled".
        """
        self._check_wait()
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What ended the request, None for an answer; waits as `result` does."""
        self._check_wait()
        return self._future.exception(timeout)

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self._future.done()

    def cancel(self) -> bool:
        """End the request after the step that runs now; False if it is done."""
        return self._engine._worker.cancel(self)

    def add_done_callback(self, fn: "Callable[[Request], object]") -> None:
        """Call fn(request) when it is done: in the engine's thread, or at once where it is."""

        def call(_: Any) -> None:
            try:
                fn(self)
            except Exception:
                raise  # which the future logs
            except BaseException as e:
                raise RuntimeError(f"request: a callback raised {type(e).__name__}") from e

        self._future.add_done_callback(call)

    def _check_wait(self) -> None:
        if not self._future.done():
            self._engine._worker.check_wait()

    def __iter__(self) -> Iterator[Chunk]:
        n = 0
        while True:
            self._check_wait()
            with self._news:
                self._n_waiting += 1
                try:
                    self._news.wait_for(lambda n=n: len(self._chunks) > n or self._over)
                finally:
                    self._n_waiting -= 1
                new = self._chunks[n:]
            if not new:
                break
            n += len(new)
            yield from new
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        import asyncio

        n = 0
        while True:
            with self._news:
                new, over = self._chunks[n:], self._over
                if not new and not over:
                    loop = asyncio.get_running_loop()
                    news = loop.create_future()
                    self._sleepers.append((loop, news))
            for chunk in new:
                yield chunk
            n += len(new)
            if not new:
                if over:
                    break
                self._check_wait()
                await news
        self._raise_error()

    def _raise_error(self) -> None:
        if self._row.error is not None:
            raise self._row.error

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._answer().__await__()

    async def _answer(self) -> Completion:
        import asyncio

        self._check_wait()
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __repr__(self) -> str:
        state = "done" if self.done() else f"{len(self._chunks)} tokens so far"
        return f"<kimi_linear.Request {len(self._row.prompt_ids)} prompt tokens, {state}>"
