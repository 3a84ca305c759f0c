"""Models of this package for others' evaluation harnesses.

lm-evaluation-harness, inspect-ai, lighteval, and the scripts of RULER and HELMET.

One module a harness, which imports it; importing this package imports nothing. README.md says
how each is run.
"""

import sys


def lm_eval_command() -> None:
    """kimi-linear-lm-eval: lm-eval's command line, with the model `kimi_linear` in it."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as e:
        if e.name != "lm_eval":
            raise
        sys.exit("kimi-linear-lm-eval: needs lm-eval (pip install 'kimi_linear[lm-eval]')")
    from . import lm_eval  # noqa: F401  registers the model

    cli_evaluate()
