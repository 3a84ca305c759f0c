"""Log-probabilities of prompts, beside an engine that is answering."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..errors import OutOfMemory

if TYPE_CHECKING:
    import numpy as np

    from ..engine import Engine
    from ..model import Model
    from ..results import Logprobs

RETRY = 0.02  # seconds until memory is asked for again


class Scorer:
    """Reads prompts one at a time, since the model has one queue.

    A prompt needs a sequence and pages like an answer does. Where answers hold them all, no
    other is begun until the prompt has had its turn: those that run end, so it comes.
    """

    def __init__(self, model: "Model") -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(1, "kimi-linear-score")
        self._one = asyncio.Lock()
        self._admission = asyncio.Lock()

    @asynccontextmanager
    async def admission(self) -> AsyncIterator[None]:
        """Answers are begun inside."""
        async with self._admission:
            yield

    async def logprobs(self, ids: "np.ndarray", top: int, engine: "Engine") -> "Logprobs":
        """`Model.logprobs`; ends soon after it was cancelled."""
        async with self._one:
            try:
                return await self._read(ids, top)
            except OutOfMemory:
                pass
            async with self._admission:
                while True:
                    stats = engine.stats()
                    is_idle = stats.running + stats.waiting == 0
                    try:
                        return await self._read(ids, top)
                    except OutOfMemory:
                        if is_idle:
                            raise
                    await asyncio.sleep(RETRY)

    async def _read(self, ids: "np.ndarray", top: int) -> "Logprobs":
        is_cancelled = threading.Event()

        def check(_done: int, _total: int) -> None:
            if is_cancelled.is_set():
                raise InterruptedError

        def read() -> "Logprobs":
            return self._model.logprobs(ids, top=top, progress=check)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, read)
        finally:
            is_cancelled.set()

    def close(self) -> None:
        """Nothing more is begun."""
        self._pool.shutdown(cancel_futures=True)
