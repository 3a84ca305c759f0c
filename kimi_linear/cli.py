"""The command `kimi-linear`, and `python -m kimi_linear`.

Text goes to stdout, everything about it to stderr. Exit codes: 0, 1 for what failed while
running, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model
    from .results import Stats

_TERMINAL_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and LF
EXAMPLES = """examples:
  kimi-linear generate "Once upon a time"
  kimi-linear generate --model DIR --chat --temperature 0.7 "Is 123 a prime?"
  kimi-linear chat --model DIR --system "Answer in one sentence."
  kimi-linear score --model DIR "The capital of France is" " Paris"
  kimi-linear plan --model DIR --max-context 131072
  kimi-linear bench --model DIR --prompt-tokens 2048
  kimi-linear eval ruler --model DIR --lengths 4096 8192 --samples 20
  kimi-linear serve --model DIR --port 8000
  kimi-linear info
"""


_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ArithmeticError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _open_streams()
    args = _parser().parse_args(argv)
    try:
        return _run_command(args)
    except BrokenPipeError:  # the reader has gone (`| head`), which is no error
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _open_streams() -> None:
    """A stream that was closed (`2>&-`) is None in Python: print would take stdout for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _run_command(args: argparse.Namespace) -> int:
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        raise
    except (*_EXPECTED, ImportError) as e:
        # Wrong arguments and wrong files differ from what fails while running.
        message = " ".join(str(e).split()) or type(e).__name__
        print(f"kimi-linear {args.command}: {message}", file=sys.stderr)
        return 2 if isinstance(e, ValueError | TypeError | FileNotFoundError) else 1


# ---- arguments ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="kimi-linear",
        description="Run Kimi Linear models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kimi-linear {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    _add_score(commands)
    info = _add(commands, "info", info_command, "what is built in, and what a model is")
    _add_model(info)
    plan = _add(commands, "plan", plan_command, "the memory a model would take")
    _add_model(plan)
    _add_bench(commands)
    _add_eval(commands)
    _add_serve(commands)
    return parser


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    example = next(line for line in EXAMPLES.splitlines() if f"kimi-linear {name}" in line)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add(commands, "generate", generate_command, "continue a text")
    parser.add_argument("prompt", help='the text; "-" reads it from standard input')
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="the text is a user's message")
    kind.add_argument("--raw", action="store_true", help="the text is raw (the default)")
    _add_model(parser)
    _add_sampling(parser)
    parser.add_argument("--no-stats", action="store_true", help="no line about speed")


def _add_chat(commands: Any) -> None:
    parser = _add(commands, "chat", chat_command, "talk; an empty line or Ctrl-D ends it")
    parser.add_argument("--system", help="a system message to begin with")
    _add_model(parser)
    _add_sampling(parser)
    parser.add_argument("--no-stats", action="store_true", help="no line about speed")


def _add_score(commands: Any) -> None:
    parser = _add(commands, "score", score_command, "log p(continuation | context)")
    parser.add_argument("context")
    parser.add_argument("continuation", nargs="+", help="one, or several to compare")
    _add_model(parser)


def _add_bench(commands: Any) -> None:
    parser = _add(commands, "bench", bench_command, "tokens a second, on this machine")
    _add_model(parser)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="equal prompts")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="the best counts")


def _add_eval(commands: Any) -> None:
    from .evals import command

    parser = _add(commands, "eval", eval_command, "RULER, MRCR, RepoQA and others")
    command.add_suites(parser, _add_model)


def _add_serve(commands: Any) -> None:
    from .serve import command

    parser = _add(commands, "serve", serve_command, "a server that OpenAI's clients talk to")
    parser.epilog = command.EXAMPLES
    command.add_options(parser)
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    text = "checkpoint directory; without it, the small model inside the package"
    group.add_argument("--model", metavar="DIR", help=text)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", help="auto, f32, bf16, int8, int4 or fp8")
    group.add_argument("--max-context", type=int, metavar="N", help="tokens of a sequence")
    group.add_argument("--max-batch", type=int, metavar="N", help="sequences at once")
    group.add_argument("--cache-bytes", type=int, metavar="N", help="memory of their states")
    group.add_argument(
        "--kv-cache-dtype", default="auto", help="of latents: auto (as activations) or fp8"
    )
    text = "results do not depend on the batch, at some cost (on a CPU they never do)"
    group.add_argument("--batch-invariant", action="store_true", help=text)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0: off")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument("--ignore-eos", action="store_true")
    text = "tokens guessed at a time, from what repeats itself; the answer stays the same"
    group.add_argument("--speculate", type=int, default=0, metavar="N", help=text)


_MODEL_OPTIONS = (
    "device", "dtype", "max_context", "max_batch", "cache_bytes", "kv_cache_dtype",
    "batch_invariant",
)  # fmt: skip
_SAMPLING_OPTIONS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "stop", "ignore_eos", "speculate",
)  # fmt: skip


def _options(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _load(args: argparse.Namespace) -> "Model":
    import kimi_linear as kl

    if args.model is None:
        print("the small model inside the package; --model DIR takes another", file=sys.stderr)
    return kl.load(args.model, **_options(args, _MODEL_OPTIONS))


# ---- commands ----------------------------------------------------------------------------


def generate_command(args: argparse.Namespace) -> None:
    """Stream one answer to stdout."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    prompt = [{"role": "user", "content": text}] if args.chat else text
    with _load(args) as model:
        _, stats = _print_stream(model, prompt, args)
    if not args.no_stats and stats is not None:
        print(stats, file=sys.stderr)


def _print_stream(
    model: "Model", prompt: Any, args: argparse.Namespace
) -> "tuple[str, Stats | None]":
    """Print an answer as it comes; returns its text and the last chunk's statistics."""
    parts, stats = [], None
    for chunk in model.stream(prompt, **_options(args, _SAMPLING_OPTIONS)):
        print(_printable(chunk.text), end="", flush=True)
        parts.append(chunk.text)
        stats = chunk.stats
    print(flush=True)
    return "".join(parts), stats


def _printable(text: str) -> str:
    """Text as stdout can show it: a model may write anything, escape sequences included, and
    only a pipe gets those."""
    encoding = sys.stdout.encoding or "utf-8"
    if sys.stdout.isatty():
        text = _TERMINAL_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    return text.encode(encoding, errors="replace").decode(encoding)


def chat_command(args: argparse.Namespace) -> None:
    """A conversation on the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with _load(args) as model:
        model.prefix_cache = True  # each turn rereads the conversation
        while (text := _ask()) is not None:
            messages.append({"role": "user", "content": text})
            try:
                answer, stats = _print_stream(model, messages, args)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
            if not args.no_stats and stats is not None:
                print(stats, file=sys.stderr)


def _ask() -> str | None:
    """The next message, None at the end."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing in input())
    try:
        text = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return text if text.strip() else None


def score_command(args: argparse.Namespace) -> None:
    """Print the log-likelihood of each continuation and whether it is the greedy one."""
    with _load(args) as model:
        found = model.score(args.context, args.continuation)
    for loglikelihood, is_greedy in found:
        print(f"{loglikelihood:.6f}\t{'greedy' if is_greedy else 'not greedy'}")


def info_command(args: argparse.Namespace) -> None:
    """Describe the installation, or a loaded model."""
    if args.model is None:
        from .about import describe

        print(describe())
        return
    with _load(args) as model:
        print(model.info())


def plan_command(args: argparse.Namespace) -> None:
    """Print the memory plan."""
    import kimi_linear as kl

    print(kl.plan(args.model, **_options(args, _MODEL_OPTIONS)))


def eval_command(args: argparse.Namespace) -> None:
    """Run a suite of evaluations and print its table."""
    from .evals import command

    command.run(args, _load)


def serve_command(args: argparse.Namespace) -> None:
    """Answer OpenAI's clients until SIGTERM or Ctrl-C."""
    from .serve import command

    command.run(args, _load)


def bench_command(args: argparse.Namespace) -> None:
    """Print prefill and decode rates: the best of --repeat runs, after one that warms up."""
    for name in ("prompt_tokens", "new_tokens", "batch", "repeat"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: must be at least 1, got {getattr(args, name)}")
    with _load(args) as model:
        n = model.config.vocab_size
        prompt = [[(7919 * i + row) % n for i in range(args.prompt_tokens)]
                  for row in range(args.batch)]  # fmt: skip
        runs = [_bench_once(model, prompt, args.new_tokens) for _ in range(args.repeat + 1)]
        print(model.info(), file=sys.stderr)
    prefill, decode = (max(rates) for rates in zip(*runs[1:], strict=True))
    print(f"prefill {prefill:.1f} tok/s\tdecode {decode:.1f} tok/s")


def _bench_once(model: "Model", prompt: Any, new_tokens: int) -> tuple[float, float]:
    answers = model.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
    assert isinstance(answers, list)
    stats = answers[0].stats  # a batch shares its times
    n = len(answers)
    return n * stats.prefill_rate, n * stats.decode_rate
