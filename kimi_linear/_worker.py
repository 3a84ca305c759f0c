"""The thread of an engine: takes requests, runs steps, hands out what came."""

import atexit
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ._generation import Run, as_exception
from .errors import EngineFull

if TYPE_CHECKING:
    from ._core import Engine as CoreEngine
    from .engine import Request

WINDOW_S = 10.0  # over which the rate of new tokens is taken

Wakes = dict[Any, list[Any]]  # event loop -> asyncio.Futures of it that wait for news


class Worker:
    """What an engine's thread shares with its callers.

    `lock` is held for moments only, never during a step: so a caller waits for nobody. The run,
    and the requests that it has, belong to the thread alone.
    """

    def __init__(self, core: "CoreEngine", max_batch: int, max_waiting: int | None) -> None:
        self._core, self._max_batch, self._max_waiting = core, max_batch, max_waiting
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a finalizer may stop us in the middle of a call
        self._orders = threading.Condition(self._lock)
        self._places = threading.Condition(self._lock)
        self._arrived: deque[Request] = deque()  # not the run's yet
        self._unwanted: set[Request] = set()
        self._stop: str | None = None  # "finish" or "cancel"
        self._error: BaseException | None = None  # what ended the thread

        self._run = Run(core)
        self._requests: dict[int, Request] = {}  # by the row's id
        self._n_taken = self._done = 0  # requests that are the thread's, and that were
        self._usage = core.usage()
        self._pages = core.plan()["n_pages"]
        self._rate: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._base = dict.fromkeys(("prompt_done", "new_tokens"), 0.0)  # of runs that broke
        self._thread = threading.Thread(
            target=self._work, name="kimi_linear.Engine", daemon=True
        )
        atexit.register(self._at_exit)
        self._thread.start()

    # ---- for callers ---------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether no request is taken any more."""
        return self._stop is not None

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the thread's."""
        return os.getpid() != self._pid

    def submit(self, request: "Request", *, wait: bool) -> None:
        """wait: for a place where max_waiting is reached, in place of EngineFull."""
        self._check_process()
        with self._lock:
            self._check_open()
            if self._full() and not wait:
                raise EngineFull(
                    f"engine: {self._max_waiting} requests wait already (max_waiting)"
                )
            if self._full():
                self.check_wait()
            while self._full():
                self._places.wait()
                self._check_open()
            self._arrived.append(request)
            self._orders.notify()

    def cancel(self, request: "Request") -> bool:
        self._check_process()
        with self._lock:
            if request.done():
                return False
            self._unwanted.add(request)
            self._orders.notify()
            return True

    def stop(self, *, cancel: bool = True) -> None:
        """Take no more requests, and end the thread when those there are have ended."""
        if self.forked:
            return
        with self._lock:
            if self._stop != "cancel":
                self._stop = "cancel" if cancel else "finish"
            self._orders.notify()
            self._places.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread, unless it waits for this one."""
        if not self.forked and not self._waits_for_us():
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        self._check_process()
        with self._lock:
            core, now = self._run.stats, time.monotonic()
            self._forget_before(now - WINDOW_S)
            since, tokens = self._rate[0]  # at the window's beginning or before it
            seconds = min(max(now - since, 1e-3), WINDOW_S)
            new_tokens, running = self._new_tokens(), int(core["running"])
            return {
                "running": running,
                "waiting": max(self._n_taken + len(self._arrived) - running, 0),
                "done": self._done,
                "prompt_tokens": int(self._base["prompt_done"] + core["prompt_done"]),
                "new_tokens": new_tokens,
                "tokens_per_s": (new_tokens - tokens) / seconds,
                "sequences": self._usage[0],
                "pages_used": self._usage[1],
                "pages": self._pages,
            }

    def check_wait(self) -> None:
        """Refuse to wait where that would be for ever."""
        self._check_process()
        if self._waits_for_us():
            raise RuntimeError("engine: a callback of its model cannot wait for a request")

    def _waits_for_us(self) -> bool:
        """Whether this is a callback of the thread, or of a call that has the model until then."""
        return threading.current_thread() is self._thread or self._core.calls_back()

    def _check_process(self) -> None:
        if self.forked:
            raise RuntimeError("engine: its thread did not survive os.fork; make one here")

    def _check_open(self) -> None:
        if self._error is not None:
            raise ValueError(f"engine: it ended: {self._error}")
        if self.stopping:
            raise ValueError("engine: is closed")

    def _full(self) -> bool:
        """Where the last step left nobody waiting, all places are counted on."""
        if self._max_waiting is None:
            return False
        core = self._run.stats
        places = int(core["running"]) if core["waiting"] else self._max_batch
        return self._n_taken + len(self._arrived) - places >= self._max_waiting

    # ---- the thread ----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._take_orders():
                try:
                    self._step()
                except BaseException as e:  # the model was closed, memory ran out up here
                    self._begin_anew(as_exception(e))
        except Exception as e:
            self._error = e
        finally:
            self._end()

    def _take_orders(self) -> bool:
        """Requests in, unwanted ones out; waits where nothing is to do. False: the end."""
        with self._lock:
            while self._run.done and not (self._arrived or self._unwanted or self._stop):
                self._orders.wait()
            arrived, unwanted = list(self._arrived), self._unwanted
            self._arrived.clear()
            self._unwanted = set()
            self._n_taken += len(arrived)
            end = self._stop == "cancel"
        wakes: Wakes = {}
        if end:  # all at once: one by one they would be looked for in the queue
            self._run.close()
            unwanted = {*unwanted, *arrived, *self._requests.values()}
        for request in arrived:
            self._begin(request, unwanted, wakes)
        for request in unwanted:
            self._drop(request, wakes)
        _wake(wakes)
        if unwanted and not end:
            self._note(self._core.usage())
        return not (self._run.done and self._stop)

    def _begin(self, request: "Request", unwanted: "set[Request]", wakes: Wakes) -> None:
        row = request._row
        if request not in unwanted:
            try:
                self._run.submit(row)
                self._requests[row.id] = request
            except Exception as e:
                row.error = e
                self._settle(request, wakes)

    def _drop(self, request: "Request", wakes: Wakes) -> None:
        if request.done():
            return
        try:
            self._run.finish(request._row)
        except ValueError:  # the model is closed: nothing is held any more
            pass
        self._requests.pop(request._row.id, None)
        request._row.finish_reason = "cancelled"
        self._settle(request, wakes)

    def _step(self) -> None:
        wakes: Wakes = {}
        found = self._run.step(1, False)
        for row, chunk in found:
            if chunk is not None:
                self._requests[row.id]._tell(chunk, wakes)
        _wake(wakes)
        wakes.clear()
        for row in dict.fromkeys(row for row, _ in found):  # which may have several tokens
            if row.done:
                self._settle(self._requests.pop(row.id), wakes)
        _wake(wakes)
        self._note(self._core.usage())

    def _note(self, usage: tuple[int, int]) -> None:
        """What callers may see of a step."""
        with self._lock:
            self._usage = usage
            self._rate.append((time.monotonic(), self._new_tokens()))
            self._forget_before(self._rate[-1][0] - WINDOW_S)

    def _settle(self, request: "Request", wakes: Wakes) -> None:
        with self._lock:
            self._n_taken -= 1
            self._done += 1
            self._places.notify_all()
        request._settle(wakes)

    def _new_tokens(self) -> int:
        return int(self._base["new_tokens"] + self._run.stats["new_tokens"])

    def _forget_before(self, time_s: float) -> None:
        while len(self._rate) > 1 and self._rate[1][0] < time_s:
            self._rate.popleft()

    def _begin_anew(self, error: Exception) -> None:
        """The requests of a run that broke have failed; others may come."""
        self._fail_all(error)
        self._run.close()
        fresh = Run(self._core)
        with self._lock:
            for name in self._base:
                self._base[name] += self._run.stats[name]
            self._run = fresh

    def _fail_all(self, error: Exception) -> None:
        wakes: Wakes = {}
        requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request._row.error = error
            self._settle(request, wakes)
        _wake(wakes)

    def _end(self) -> None:
        with self._lock:
            self._stop = "cancel"
            error = self._error or ValueError("engine: is closed")
            self._n_taken += len(self._arrived)
            for request in self._arrived:
                self._requests[-id(request)] = request
            self._arrived.clear()
            self._places.notify_all()
        self._run.close()
        self._fail_all(error)
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        self.stop()
        self.join()


def _wake(wakes: Wakes) -> None:
    """One call an event loop, however many wait in it."""
    for loop, futures in wakes.items():
        try:
            loop.call_soon_threadsafe(_set_all, futures)
        except RuntimeError:  # the loop is closed: nobody waits there any more
            pass


def _set_all(futures: list[Any]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
