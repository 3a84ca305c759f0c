"""A server that OpenAI's clients talk to: `kimi-linear serve`, or `app` in one of your own.

Needs Starlette, the command also uvicorn: pip install "kimi_linear[serve]". What is answered,
and how it differs from OpenAI's, is in README.md beside this file.
"""

from typing import TYPE_CHECKING

from .settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..engine import Engine
    from ..model import Model

__all__ = ["Settings", "app"]


def app(
    model: "Model", settings: Settings | None = None, *, engine: "Engine | None" = None
) -> "Starlette":
    """The ASGI application that serves a model.

    settings: limits, the name of the model, the key. engine: a `kimi_linear.Engine` over the
    model that stays the caller's; by default the application opens one while it runs.

    Raises TokenizerError for a model without a tokenizer, ImportError without Starlette.
    """
    try:
        from .application import build
    except ModuleNotFoundError as e:
        if e.name != "starlette":
            raise
        raise ImportError("serve: needs Starlette: pip install 'kimi_linear[serve]'") from None
    return build(model, settings or Settings(), engine)
