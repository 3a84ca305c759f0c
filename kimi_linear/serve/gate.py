"""Before every endpoint: who may ask, and how many at once."""

from collections.abc import MutableMapping
from hmac import compare_digest
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .._files import quote
from .errors import ApiError

if TYPE_CHECKING:
    from .metrics import Metrics
    from .settings import Settings


class Gate:
    """Middleware that refuses a foreign Host, a wrong key, and requests past the limit."""

    def __init__(self, app: ASGIApp, settings: "Settings", metrics: "Metrics") -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses[message["status"]] += 1
            await send(message)

        try:
            self._check(scope)
        except ApiError as e:
            await e.response()(scope, receive, send_counted)
            return
        self._metrics.running += 1
        try:
            await self._app(scope, receive, send_counted)
        finally:
            self._metrics.running -= 1

    def _check(self, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self._settings
        host = _name(headers.get("host", ""))
        if settings.hosts is not None and host not in settings.hosts:
            raise ApiError(
                403, f"Host: {quote(host)} is not served here", code="host_not_served"
            )
        if settings.api_key is not None and scope["path"] != "/health":
            given = headers.get("authorization", "")
            wanted = f"Bearer {settings.api_key}"
            if not compare_digest(given.encode(), wanted.encode()):
                message = "Authorization: must be Bearer and the key of this server"
                raise ApiError(401, message, code="invalid_api_key")
        # A full server still tells how it is.
        if scope["method"] == "POST" and self._metrics.running >= settings.max_requests:
            message = f"the server has {settings.max_requests} requests already; try again"
            raise ApiError(429, message, code="too_many_requests")


def _name(host: str) -> str:
    """A Host header without its port: a name, an address, or [an IPv6 address]."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
