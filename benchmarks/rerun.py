"""The commands behind the GPU figures of the READMEs' tables, to make the figures again.

    python benchmarks/rerun.py                       # those of this GPU, oldest figures first
    python benchmarks/rerun.py --device-name H100    # those of another, which need not be here
    python benchmarks/rerun.py --device-name H100 --before 9da0831   # with figures of older code
    python benchmarks/rerun.py --run --only bench_kda --minutes 8

Lists the command of every line without which a table would say something else, once, with the
date and the commit of the newest of its lines, how many of them are shown, and the seconds until
the last of these was there (inf where lines do not say so). Commands run in this order, so that of
two that measure the same case the one that counted last counts last again. With --before the list
has only commands with a line whose commit lacks that one, or is not in the history, the fastest
first.
"""

import argparse
import math
import shlex
import subprocess
import sys
import time
from unittest.mock import patch

import tables
from common import device_name


def shown_tables() -> list[str]:
    """Names of the tables that a README has."""
    return [m[2] for readme in tables.READMES for m in tables.MARKED.finditer(readme.read_text())]


def readers(names: list[str]) -> dict[str, list[str]]:
    """Which of these tables read the lines of a benchmark."""
    found: dict[str, list[str]] = {}
    for name in names:
        with patch.object(tables, "lines", wraps=tables.lines) as read:
            tables.TABLES[name]()
        for bench in dict.fromkeys(call.args[0] for call in read.call_args_list):
            found.setdefault(bench, []).append(name)
    return found


def made(names: list[str]) -> list[str]:
    return [tables.TABLES[name]() for name in names]


def made_without(line: tables.Line, lines: list[tables.Line], names: list[str]) -> list[str]:
    """These tables without this line of a benchmark."""
    every, others = tables.lines, [x for x in lines if x is not line]

    def without(bench: str) -> list[tables.Line]:
        return others if bench == line["bench"] else every(bench)

    with patch.object(tables, "lines", without):
        return made(names)


def commands(device: str) -> dict[str, list[tables.Line]]:
    """Those of a device whose name has this word, with the lines that are shown, the newest last;
    first the command whose newest line is the oldest."""
    found: dict[str, list[tables.Line]] = {}
    for bench, names in readers(shown_tables()).items():
        lines, shown = tables.lines(bench), made(names)
        for line in lines:
            if device in line["device"] and made_without(line, lines, names) != shown:
                found.setdefault(line["command"], []).append(line)
    for lines in found.values():
        lines.sort(key=lambda line: line["date"])
    return dict(sorted(found.items(), key=lambda item: item[1][-1]["date"]))


def contains(commit: str, earlier: str) -> bool:
    """Whether the history of a commit has an earlier one, or it is that one."""
    command = ["git", "-C", tables.HERE, "merge-base", "--is-ancestor", earlier, commit]
    return subprocess.run(command, capture_output=True).returncode == 0


def before(
    chosen: dict[str, list[tables.Line]], commit: str
) -> dict[str, list[tables.Line]]:
    """Those with a line of code that lacks a commit."""
    if not contains(commit, commit):
        sys.exit(f"--before: no commit {commit}")
    measured = {line["commit"] for lines in chosen.values() for line in lines}
    older = {name for name in measured if not contains(name, commit)}
    return {c: lines for c, lines in chosen.items() if older & {x["commit"] for x in lines}}


def seconds(lines: list[tables.Line]) -> float:
    """Until the last of a command's lines was there; infinite where no line says so."""
    return max((x["after_s"] for x in lines if "after_s" in x), default=math.inf)


def run(commands: list[str], minutes: float) -> list[str]:
    """Run them until the time is up, when one that runs is stopped; what it has measured stays.
    Returns those that failed or were not run to their end."""
    end, failed = time.monotonic() + 60 * minutes, []
    for command in commands:
        start, how = time.monotonic(), "no time left"
        if start < end:
            print(f"# {command}", flush=True)
            program = [sys.executable, *shlex.split(command)[1:]]
            try:
                done = subprocess.run(program, cwd=tables.HERE.parent, timeout=end - start)
                how = f"exit status {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                how = "stopped"
        if how:
            failed.append(f"{how}: {command}")
        print(f"# {time.monotonic() - start:.0f} s {how}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-name", help="a word of the GPU's name (by default this GPU's)")
    parser.add_argument("--only", default="", help="commands that have one of these parts, commas")
    parser.add_argument("--before", metavar="COMMIT", help="only those with older figures")
    parser.add_argument("--run", action="store_true", help="run them, and go on where one fails")
    parser.add_argument("--minutes", type=float, default=1e6, help="for all of them together")
    options = parser.parse_args()
    device = options.device_name or device_name("cuda")
    parts = options.only.split(",")
    chosen = {c: lines for c, lines in commands(device).items() if any(p in c for p in parts)}
    listed = list(chosen)
    if options.before:
        chosen = before(chosen, options.before)
        listed = sorted(chosen, key=lambda c: seconds(chosen[c]))
    for command in listed:
        newest, took = chosen[command][-1], f"{seconds(chosen[command]):.0f} s"
        counted = f"{newest['commit']:8} {len(chosen[command]):3} {took:>6}"
        print(f"{newest['date']} {counted} {command}", flush=True)
    if options.run and (failed := run(list(chosen), options.minutes)):
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
