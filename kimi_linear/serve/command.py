"""The subcommand `kimi-linear serve`."""

import argparse
import signal
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    from ..model import Model

EXAMPLES = """examples:
  kimi-linear serve
  kimi-linear serve --model DIR --port 8080 --name kimi --max-context 131072
  kimi-linear serve --model DIR --host 0.0.0.0 --api-key @key.txt --max-tokens 8192

  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 64}'

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of the model."""
    default = Settings()
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    text = "0 takes a free one (default: 8000)"
    group.add_argument("--port", type=int, default=8000, metavar="N", help=text)
    group.add_argument("--name", help="the model's name (default: its directory's)")
    text = "ask every client for it; @FILE reads it, where other users cannot see it"
    group.add_argument("--api-key", metavar="KEY", help=text)
    text = "read every prompt whole, without what earlier ones share with it"
    group.add_argument("--no-prefix-cache", action="store_true", help=text)
    text = "seconds that running answers get after SIGTERM or Ctrl-C (default: 30)"
    group.add_argument("--grace", type=int, default=30, metavar="N", help=text)
    group = parser.add_argument_group("limits of a request")
    text = "new tokens of an answer (default: the context)"
    group.add_argument("--max-tokens", type=int, metavar="N", help=text)
    _add_number(
        group, default, "default_max_tokens", "of a chat answer that asks for no number"
    )
    _add_number(group, default, "max_body_bytes", "of a request")
    group = parser.add_argument_group("limits of the server, past which it answers 429")
    _add_number(group, default, "max_requests", "HTTP requests at once")
    _add_number(group, default, "max_waiting", "prompts that wait for a sequence")


def _add_number(group: Any, default: Settings, name: str, text: str) -> None:
    value = getattr(default, name)
    option = f"--{name.replace('_', '-')}"
    text = f"{text} (default: {value})"
    group.add_argument(option, type=int, default=value, metavar="N", help=text)


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], "Model"]) -> None:
    """Serve a model until SIGTERM or Ctrl-C."""
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise ImportError("needs uvicorn: pip install 'kimi_linear[serve]'") from None
    from . import app

    settings = _settings(args)
    if args.grace < 0:
        raise ValueError(f"--grace: must be at least 0, got {args.grace}")
    with _bind(args.host, args.port) as bound, load(args) as model:
        model.prefix_cache = not args.no_prefix_cache
        config = uvicorn.Config(
            app(model, settings),
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=args.grace,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    print(_where(bound), file=sys.stderr, flush=True)

        server = Server(config)
        # uvicorn raises the signal that ended it again; the end was orderly, so nothing more.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server.run([bound])
        if not server.started:
            raise RuntimeError("the server did not start")


def _where(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 is ready; Ctrl-C ends it"


def _settings(args: argparse.Namespace) -> Settings:
    key = args.api_key
    if key is not None and key.startswith("@"):
        key = Path(key[1:]).read_text().strip()
    hosts = None
    if _is_local(args.host):
        hosts = ("localhost", "127.0.0.1", "[::1]", args.host)
    elif key is None:
        print(f"{args.host}: others can reach this server; --api-key KEY keeps them out",
              file=sys.stderr)  # fmt: skip
    return Settings(
        name=args.name,
        api_key=key,
        hosts=hosts,
        max_tokens=args.max_tokens,
        default_max_tokens=args.default_max_tokens,
        max_requests=args.max_requests,
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
    )


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, before the model is loaded: an address in use is told at once.
    It listens only when the model is there."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port: must be in 0..65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as e:
        message = f"--host: must be an address of this machine, got {host!r}: {e.strerror}"
        raise ValueError(message) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as e:
        bound.close()
        raise OSError(e.errno, f"{e.strerror}: {host}, port {port}") from None
    return bound
