"""What a server refuses and what fails, in OpenAI's words and numbers."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from ..errors import EngineFull, KimiLinearError, OutOfMemory

log = logging.getLogger("kimi_linear.serve")


class ApiError(Exception):
    """An answer that is an error: status, message, the parameter at fault, OpenAI's code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that clients know."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """What goes to the client. JSON in ASCII: a message may quote half a surrogate."""
        headers: Mapping[str, str] = {}
        if self.status in (429, 503):
            headers = {"retry-after": "1"}
        elif self.status in (408, 413):  # the rest of the body is not read
            headers = {"connection": "close"}
        elif self.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return Response(json.dumps(self.body), self.status, headers, "application/json")


def refused(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, message, param=param, code=code)


@contextmanager
def naming(param: str, argument: str | None = None) -> Iterator[None]:
    """Turns ValueError and TypeError of a check into a 400 that names `param`.

    argument: what the check calls it; its messages begin with that.
    """
    try:
        yield
    except (ValueError, TypeError) as e:
        message = str(e).removeprefix(f"{argument or param}: ")
        raise refused(param, f"{param}: {message}") from None


def explain(error: BaseException) -> ApiError:
    """What the client is told; what it is not told goes to the log."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EngineFull):
        return ApiError(429, message, code="engine_full")
    if isinstance(error, OutOfMemory):
        return ApiError(503, message, code="out_of_memory")
    if isinstance(error, KimiLinearError):
        return ApiError(500, message)
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")
