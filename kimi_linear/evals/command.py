"""The subcommand `kimi-linear eval`: options of each suite, and what they make."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .suite import PREFIXES

if TYPE_CHECKING:
    from ..model import Model
    from .results import Results
    from .suite import Suite

Add = Callable[[argparse.ArgumentParser], None]


def add_suites(parser: argparse.ArgumentParser, add_model: Add) -> None:
    """A subcommand for each suite, `merge`, and `report`. add_model: adds a model's options."""
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, (text, add) in SUITES.items():
        suite = suites.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(suite)
        _add_running(suite)
        add_model(suite)
    merge = suites.add_parser(
        "merge", help="join the shares of several processes, show the table"
    )
    merge.add_argument("out", metavar="DIR", help="the folder of the run")
    merge.add_argument("--partial", action="store_true", help="show what there is so far")
    report = suites.add_parser("report", help="runs side by side, and beside published figures")
    report.add_argument("out", nargs="+", metavar="DIR", help="folders of runs")
    text = "write scores-SUITE.png and needles-N.png there (needs matplotlib)"
    report.add_argument("--plots", metavar="FOLDER", help=text)


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], "Model"]) -> None:
    """Run a suite, merge one's shares, or compare runs; print the tables."""
    from . import merge
    from .runner import run as run_suite
    from .shards import local_device, shard_of

    if args.suite == "merge":
        print(merge(args.out, partial=args.partial))
        return
    if args.suite == "report":
        _report([merge(folder, partial=True) for folder in args.out], args.plots)
        return
    rank, world = _shard(args.shard) if args.shard else shard_of()
    suite: Suite = _make(args)
    if args.device == "auto" and not args.shard:
        args.device = local_device()
    if args.max_context is None:
        args.max_context = suite.max_context
    out = args.out or f"eval-{args.suite}"
    sampling = {k: v for k in ("temperature", "top_p") if (v := getattr(args, k)) is not None}
    with load(args) as model:
        results = run_suite(
            model,
            suite,
            out,
            rank=rank,
            world=world,
            batch=args.batch,
            repeats=args.repeats,
            progress=True,
            **sampling,
        )
    print(results)
    print(f"answers and results.json are in {out}", file=sys.stderr)
    if not results.complete:
        print(f"process {rank} of {world} is done; when all are: kimi-linear eval merge {out}",
              file=sys.stderr)  # fmt: skip


def _report(runs: "list[Results]", folder: str | None) -> None:
    """Print a report; draw what there is to draw, where a folder is given."""
    from . import report

    print(report(*runs))
    if folder is None:
        return
    from . import plots

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for suite in dict.fromkeys(run.header["settings"]["suite"] for run in runs):
        same = [run for run in runs if run.header["settings"]["suite"] == suite]
        pictures[f"scores-{suite}"] = plots.scores(*same)
    for i, run in enumerate(runs, 1):
        if plots.has_needles(run):
            pictures[f"needles-{i}"] = plots.needles(run)
    for name, picture in pictures.items():
        picture.savefig(path / f"{name}.png", dpi=150)
        print(path / f"{name}.png", file=sys.stderr)


def _make(args: argparse.Namespace) -> Any:
    from . import jsonkv, mrcr, repoqa, ruler

    makers = {
        "ruler": ruler.Suite,
        "mrcr": mrcr.Suite,
        "mrcr-synth": mrcr.Synth,
        "repoqa": repoqa.Suite,
        "jsonkv": jsonkv.Suite,
    }
    given = {k: v for k in OPTIONS if (v := getattr(args, k, None)) is not None}
    return makers[args.suite](**given)


def _shard(text: str) -> tuple[int, int]:
    from .shards import check_shard

    rank, slash, world = text.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal()):
        raise ValueError(f"--shard: must be RANK/WORLD, got {text!r:.60}")
    return check_shard(int(rank), int(world))


# ---- options -----------------------------------------------------------------------------


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    text = "folder of the answers; what is there goes on (default: eval-SUITE)"
    group.add_argument("--out", metavar="DIR", help=text)
    text = "this process's share (default: the launcher's variables)"
    group.add_argument("--shard", metavar="RANK/WORLD", help=text)
    group.add_argument("--batch", type=int, metavar="N", help="questions put to the model at once")
    group.add_argument("--temperature", type=float, metavar="T", help="default: greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    text = "draws of each answer, averaged (avg@K); needs --temperature"
    group.add_argument("--repeats", type=int, default=1, metavar="K", help=text)


def _add(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **OPTIONS[name])


def _add_ruler(parser: argparse.ArgumentParser) -> None:
    _add(parser, "tasks", "lengths", "samples", "seed", "prefix", "haystack", "squad", "hotpot",
         "words", "max_new_tokens")  # fmt: skip


def _add_mrcr(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", nargs="+", metavar="FILE", help="OpenAI's parquet or jsonl, or Google's csv"
    )
    _add(parser, "lengths", "samples", "prefix", "max_new_tokens")


def _add_synth(parser: argparse.ArgumentParser) -> None:
    _add(parser, "needles", "lengths", "samples", "questions", "seed", "texts", "n_sentences")


def _add_repoqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="FILE", help="repoqa-*.json or .json.gz")
    _add(parser, "languages", "lengths", "samples", "prefix", "max_new_tokens")


def _add_jsonkv(parser: argparse.ArgumentParser) -> None:
    _add(parser, "lengths", "samples", "questions", "seed", "prefix", "max_new_tokens")


def _numbers(text: str) -> dict[str, Any]:
    return {"type": int, "nargs": "+", "metavar": "N", "help": text}


def _number(text: str) -> dict[str, Any]:
    return {"type": int, "metavar": "N", "help": text}


def _file(text: str) -> dict[str, Any]:
    return {"metavar": "FILE", "help": text}


OPTIONS: dict[str, dict[str, Any]] = {
    "data": {},
    "tasks": {"nargs": "+", "metavar": "TASK", "help": "default: all whose files are given"},
    "languages": {"nargs": "+", "metavar": "NAME", "help": "default: all of the file's"},
    "lengths": _numbers("tokens, prompt and answer together"),
    "needles": _numbers("like answers in a conversation (default: 2 4 8)"),
    "samples": _number("of each task at each length"),
    "questions": _number("about each document"),
    "seed": _number("of the samples (default: 42)"),
    "max_new_tokens": _number("of an answer"),
    "prefix": {
        "choices": PREFIXES,
        "help": "raw text, chat with the answer's beginning, or chat without it",
    },
    "haystack": _file("prose to hide needles in (default: English from a grammar)"),
    "texts": _file("a book whose passages are the answers (default: a grammar's)"),
    "n_sentences": _number("of an answer from the grammar, after its opening (default: 8)"),
    "squad": _file("dev-v2.0.json, for qa_1"),
    "hotpot": _file("hotpot_dev_distractor_v1.json, for qa_2"),
    "words": _file("more words for cwe, one a line"),
}
SUITES: dict[str, tuple[str, Add]] = {
    "ruler": ("RULER's tasks: needles, variables, counting words, questions", _add_ruler),
    "mrcr": ("MRCR from the publishers' files", _add_mrcr),
    "mrcr-synth": ("conversations like MRCR's, made here", _add_synth),
    "repoqa": ("RepoQA's needle functions, from its file", _add_repoqa),
    "jsonkv": ("values looked up in a JSON object of uuids", _add_jsonkv),
}
