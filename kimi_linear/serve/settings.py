"""What a server allows."""

from dataclasses import dataclass

from .._files import quote


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of a server, the name of its model, and who may ask.

    name: of the model; by default that of its directory. api_key: asked of every request but
    /health. hosts: names in the Host header that are answered, None: all. A server that only
    this machine can reach should name itself here, else any web page open in a browser could
    point a name of its own at it. max_tokens: new tokens that an answer may ask for, None: the
    context. default_max_tokens: of a chat answer that asks for no number (a completion has 16
    then). max_requests: HTTP requests at once, more are refused with 429. max_waiting: prompts
    that wait for a sequence, more are refused with 429. max_body_bytes: of a request.
    """

    name: str | None = None
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    max_tokens: int | None = None
    default_max_tokens: int = 4096
    max_requests: int = 256
    max_waiting: int = 1024
    max_body_bytes: int = 1 << 25

    def __post_init__(self) -> None:
        for name in (
            "max_tokens",
            "default_max_tokens",
            "max_requests",
            "max_waiting",
            "max_body_bytes",
        ):
            value = getattr(self, name)
            if value is None and name == "max_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be an integer of at least 1, got {quote(value)}")
        for name in ("name", "api_key"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: must have at least one character, got ''")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable()):  # never told
            raise ValueError("api_key: must be printable ASCII, since a header carries it")
        if isinstance(self.hosts, str):  # every part of it would be served
            raise TypeError(f"hosts: must be a tuple of names, got {quote(self.hosts)}")
