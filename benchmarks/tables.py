"""The tables of the READMEs, made from results/*.jsonl.

    python benchmarks/tables.py             # writes them
    python benchmarks/tables.py --check     # fails where a README says something else

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Of several lines about the same
case on the same device the last one counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
READMES = (
    HERE.parent / "README.md",
    HERE / "README.md",
    HERE.parent / "kimi_linear" / "adapters" / "README.md",
)
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)
OPS = ("linear", "moe_experts", "moe_route", "kda_decode", "mla_prefill", "mla_decode",
       "short_conv", "rms_norm", "gated_rms_norm", "token_logprobs", "quantize")  # fmt: skip
Line = dict[str, Any]


def lines(bench: str) -> list[Line]:
    """The last line of every case, in the order of their first ones. Ratios are of all rivals that
    its commit has met in that case, each on a run of its own."""
    file = HERE / "results" / f"{bench}.jsonl"
    found: dict[str, Line] = {}
    for text in file.read_text().splitlines() if file.exists() else ():
        line = json.loads(text)
        key = json.dumps([line["device"], line["case"]], sort_keys=True)
        before = found.get(key, line)
        if before["commit"] == line["commit"] and isinstance(line.get("ratio"), dict):
            line["ratio"] = before["ratio"] | line["ratio"]
        found[key] = line
    return list(found.values())


def on_gpu(line: Line) -> bool:
    return line["device"].startswith("NVIDIA")


def short(device: str) -> str:
    return " ".join(word for word in device.split() if word not in ("NVIDIA", "80GB", "HBM3"))


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    shown = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in shown)


def number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def percent(x: float | None) -> str:
    return "" if x is None else f" ({100 * x:.0f} %)"


# ---- the tables ------------------------------------------------------------------------------


def model_lines(bench: str) -> list[Line]:
    """GPU lines of the 48B shape."""
    return [
        line for line in lines(bench) if on_gpu(line) and line["case"].get("model") == "48b"
    ]


def who(line: Line) -> str:
    """Device, storage, and what makes a line another than this package's usual."""
    case = line["case"]
    parts = [short(line["device"]), case["dtype"], case.get("engine", "")]
    parts += ["batch-invariant"] if case.get("batch_invariant") else []
    parts += ["skewed router"] if case.get("router") == "skewed" else []
    parts += ["8-bit latents"] if case.get("kv_cache_dtype") == "fp8" else []
    return ", ".join(filter(None, parts))


def by_gpu(bench: str, head: list[str], cases: list[tuple], show: Callable[[Line], str]) -> str:
    """A row for each GPU and storage, a column for each case; empty where nobody measured it."""
    keys, rows = ("tokens", "context", "batch"), []
    found = {(who(x), *(x["case"].get(k) for k in keys)): x for x in model_lines(bench)}
    for name in dict.fromkeys(key[0] for key in found):
        cells = [found.get((name, *case)) for case in cases]
        if any(cells):
            rows.append([name, *("" if x is None else show(x) + percent(x.get("share"))
                                 for x in cells)])  # fmt: skip
    return table(["GPU, weights", *head], rows)


def milliseconds(line: Line) -> str:
    return f"{number(line['ms_per_token'])} ms"


def decode() -> str:
    contexts = (0, 1024, 8192, 131072, 1024000)
    cases = [(None, context, 1) for context in contexts]
    return by_gpu("decode", ["no context", "1K", "8K", "128K", "1M"], cases, milliseconds)


def batches() -> str:
    sizes = [(context, batch) for context in (1024, 8192) for batch in (8, 32, 64, 256)]
    head = [f"{batch} x {context // 1024}K" for context, batch in sizes]
    return by_gpu("decode", head, [(None, *size) for size in sizes], milliseconds)


def steps() -> str:
    """Of the kernels of a step: how long they take together, and what they lose."""
    head = ["GPU, weights", "batch x context", "kernels", "us", "nothing runs",
            "beyond its bytes"]  # fmt: skip
    return table(head, (
        [who(line), f"{line['case']['batch']} x {line['case']['context']:,}",
         f"{line['launches']}", number(line["us"]),
         f"{number(line['gap_us'])} us{percent(line['gap_share'])}",
         f"{number(line['over_us'])} us{percent(line['over_share'])}"]
        for line in model_lines("step") if "places" in line
    ))  # fmt: skip


def kernels() -> str:
    """The places of a step of one sequence at 1K, of the last line of each device and storage."""
    head = ["GPU, weights", "place", "kernels", "us each", "MB", "of the bandwidth",
            "gap before", "beyond its bytes"]  # fmt: skip
    rows = []
    for line in model_lines("step"):
        case = line["case"]
        if (case["batch"], case["context"], who(line).count(",")) != (1, 1024, 1):
            continue
        for r in line["places"]:
            rows.append([
                who(line), r["place"], f"{r['launches']}", number(r["us_each"]),
                number(r["bytes"] / 1e6), percent(r.get("share")).strip(" ()"),
                f"{number(r['gap_us'])} us", f"{number(r.get('over_us', 0))} us",
            ])  # fmt: skip
    return table(head, rows)


def prefill() -> str:
    sizes = (1024, 8192, 32768, 131072)
    head = [f"{n // 1024}K tokens" for n in sizes]
    cases = [(n, None, None) for n in sizes]
    return by_gpu("prefill", head, cases, lambda x: f"{number(x['tok_s'])} tok/s")


def load() -> str:
    head = ["GPU, weights", "checkpoint", "`kl.load`", "first token after the process began"]
    rows = []
    for line in lines("load"):
        if on_gpu(line) and "first_token_s" in line:
            size = f"{line['case']['bytes'] / 1e9:.1f} GB in {line['case']['storage']}"
            rows.append([f"{short(line['device'])}, {line['case']['dtype']}", size,
                         f"{number(line['seconds'])} s", f"{number(line['first_token_s'])} s"])  # fmt: skip
    return table(head, rows)


def cpu() -> str:
    head = ["on a CPU", "this package", "transformers", "ratio"]
    rows = []
    for bench, value, unit in (("prefill", "tok_s", "tok/s"), ("decode", "ms_per_token", "ms")):
        for line in lines(bench):
            if on_gpu(line) or "transformers" not in line.get("rivals", {}):
                continue
            case = line["case"]
            what = f"{case['tokens']} tokens" if bench == "prefill" else "a token"
            rows.append([f"{bench}, {what}, {case['model']}, {case['dtype']}",
                         f"{number(line[value])} {unit}",
                         f"{number(line['rivals']['transformers'])} {unit}",
                         f"{line['ratio']:.1f}"])  # fmt: skip
    return table(head, rows)


def ops() -> str:
    head = ["operation", "case", "us", "GB/s", "TFLOP/s", "of the roofline", "rival's time / ours"]
    rows = []
    for op in OPS:
        for line in filter(on_gpu, lines(op)):
            case = {k: v for k, v in line["case"].items() if k not in ("dtype", "gate", "fused")}
            ratio = line.get("ratio") or {}
            rows.append([
                f"{op}, {short(line['device'])}",
                ", ".join(f"{v}" if k in ("which", "format", "shape") else f"{k} {v}"
                          for k, v in case.items()),
                number(line["us"]), number(line["gb_s"]), number(line["tflop_s"]),
                percent(line.get("share")).strip(" ()"),
                ", ".join(f"{number(v)} {k}" for k, v in ratio.items()),
            ])  # fmt: skip
    return table(head, rows)


def kda() -> str:
    head = ["GPU", "T x heads", "gate", "us", "of the byte floor", "rival's time / ours",
            "error of o, state"]  # fmt: skip
    rows = []
    for line in lines("kda_prefill"):
        case = line["case"]
        if not on_gpu(line) or "profile" not in case:
            continue
        size = f"{case['T']} x {case['H']}"
        errors = line["error"]
        rows.append([
            short(line["device"]), size if case["N"] == 1 else f"{size}, {case['N']} sequences",
            f"{case['profile']}, {case['g']}", number(line["us"]),
            percent(line.get("share")).strip(" ()"),
            ", ".join(f"{number(v)} {k}" for k, v in line["ratio"].items()),
            f"{100 * errors['o']:.2f} %, {100 * errors['state']:.2f} %",
        ])  # fmt: skip
    return table(head, rows)


def parity() -> str:
    head = ["GPU", "model", "weights", "distance from float32", "transformers' bf16"]
    return table(head, (
        [short(line["device"]), f"{line['case']['model']}, {line['case']['tokens']} tokens",
         line["case"]["dtype"] + (", batch-invariant" if line["case"]["batch_invariant"] else ""),
         f"{line['error']:.2g}", f"{line['rivals']['transformers bf16']:.2g}"]
        for line in lines("parity") if on_gpu(line)
    ))  # fmt: skip


def step_logits() -> str:
    head = ["GPU, weights", "batch", "steps: median token (all)", "in pieces",
            "same most likely token: steps, in pieces"]  # fmt: skip

    def cells(line: Line) -> list[str]:
        both = [line["of_steps"], line["of_pieces"]]
        same = [f"{100 * x['same_greedy']:.0f} %" for x in both]
        return [*(f"{x['median']:.2g} ({x['rms']:.2g})" for x in both), ", ".join(same)]

    return table(head, (
        [who(line), f"{line['case']['batch']}", *cells(line)] for line in model_lines("step_logits")
    ))  # fmt: skip


def storage() -> str:
    found = {(x["case"]["matrix"], x["case"]["format"]): x for x in lines("quant_error")}
    formats = list(dict.fromkeys(key[1] for key in found))
    return table(["error of x w^T", *formats], (
        [matrix, *(f"{100 * found[matrix, f]['products']:.2f} %" for f in formats)]
        for matrix in dict.fromkeys(key[0] for key in found)
    ))  # fmt: skip


def likelihoods() -> str:
    head = ["requests", "tokens", "largest difference a token from lm-eval's `hf`"]
    return table(head, (
        [f"{line['case']['requests']} of {line['case']['part']}", f"{line['tokens']:,}",
         f"{line['largest_difference_a_token']:.1e}"]
        for line in lines("harness") if line["case"]["part"] != "ruler"
    ))  # fmt: skip


def harness() -> str:
    """Scores as lm-eval's tasks / ours, and their difference in its standard errors."""
    found = {
        (line["case"]["task"], line["case"]["tokens"]): line
        for line in lines("harness") if line["case"]["part"] == "ruler"
    }  # fmt: skip
    lengths = sorted({length for _, length in found})
    head = ["RULER: lm-eval's tasks / ours", *(f"{n:,} tokens" for n in lengths)]

    def cell(line: Line) -> str:
        scores = f"{100 * line['lm_eval']:.1f} / {100 * line['ours']:.1f} %"
        return f"{scores} ({line['in_errors']:.1f} errors)"

    return table(head, (
        [task, *(cell(found[task, n]) if (task, n) in found else "" for n in lengths)]
        for task in dict.fromkeys(task for task, _ in found)
    ))  # fmt: skip


TABLES = {
    f.__name__: f
    for f in (decode, batches, steps, kernels, prefill, load, cpu, ops, kda, parity, step_logits,
              storage, likelihoods, harness)
}


def filled(text: str) -> str:
    """A README with its tables made anew; those without a row go, their markers stay."""

    def one(match: re.Match) -> str:
        made = TABLES[match[2]]()
        return match[1] + (made if made.count("\n") > 2 else "") + match[3]

    return MARKED.sub(one, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a table is not current")
    options = parser.parse_args()
    for readme in READMES:
        text = readme.read_text()
        new = filled(text)
        if options.check and new != text:
            sys.exit(f"{readme.name}: run benchmarks/tables.py")
        if not options.check:
            readme.write_text(new)


if __name__ == "__main__":
    main()
