"""Recall of a checkpoint by task and length: needles, i-th occurrence, pairs, stacks, variables.

    python benchmarks/recall.py [--model DIR] [--samples 200] [--lengths 1024 2048 4096 8192]
                                [--columns single "i-th of 4" ...] [--picture FILE.png]

Greedy answers to conversations of examples/small_model/tasks.py, from seeds never used in
training. An answer counts if every value asked for stands in it (those of EXACT must be the
same). Prints a table and a picture of recall against length, and appends to
results/recall.jsonl; --picture draws it with matplotlib. Without --model, the model inside the
package. Conversations of MQAR, stack and common words end at 85, 1,450 and 1,380 tokens.
"""

import random
import sys
from pathlib import Path

from common import Results, arguments

import kimi_linear as kl

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "small_model"))
from data import CHARS_PER_TOKEN  # noqa: E402
from tasks import HELD_OUT_SEED, TASKS  # noqa: E402

COLUMNS = {  # column: (generator, its options)
    "single": ("single", {"turns": 1}),
    "multikey 4": ("multikey", {"turns": 1}),
    "multivalue 4": ("multivalue", {"turns": 1}),
    "multiquery 4": ("multiquery", {"turns": 1}),
    "i-th of 4": ("mrcr", {"n": 4, "turns": 1}),
    "MQAR 16": ("mqar", {"n": 16, "queries": 1}),
    "stack": ("stack", {}),
    "variables": ("variables", {}),
    "common words": ("common_words", {}),
}
EXACT = ("mrcr", "stack", "variables", "common_words")
LONGEST_ANSWER = 320  # tokens; four uuids for four uuids take 240


def conversation(model, name, options, length, seed):
    """(messages, answer) of at most `length` tokens, as near to it as the generator comes."""
    size, longest, found = length * CHARS_PER_TOKEN, 0, None
    for _ in range(8):
        turns = TASKS[name](random.Random(seed), int(size), **options)
        messages = [
            {"role": "user" if role == "user" else "assistant", "content": text}
            for role, text in turns[:-1]
        ]
        n = len(model.tokenizer.apply_chat_template(messages))
        if longest < n <= length:
            longest, found = n, (messages, turns[-1][1])
        if 0.95 * length <= n <= length:
            break
        size *= min(0.98 * length / n, 2)
    if not found:
        raise SystemExit(f"{name}: no conversation fits {length} tokens")
    return found


def is_right(name, answer, text):
    if name in EXACT:
        return text == answer
    values = answer.rstrip(".").split(" are ")[-1].split(" is ")[-1]
    return all(v in text for v in values.replace(", and ", ", ").split(", "))


def recall(model, column, length, samples):
    name, options = COLUMNS[column]
    pairs = [conversation(model, name, options, length, HELD_OUT_SEED + i) for i in range(samples)]
    answers = model.generate([messages for messages, _ in pairs], max_new_tokens=LONGEST_ANSWER)
    right = (is_right(name, a, c.text) for (_, a), c in zip(pairs, answers, strict=True))
    return sum(right) / samples


BARS = " ▁▂▃▄▅▆▇█"


def picture(lengths, rows):
    """Recall against length in characters: a line a task, a bar a length."""
    for c in rows[0]:
        bars = "  ".join(BARS[round(row[c] * 8)] * 6 for row in rows)
        print(f"{c:>14}  {bars}")
    print(" " * 16 + "  ".join(f"{n:<6}" for n in lengths))


def draw(lengths, rows, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for c in rows[0]:
        axes.plot(lengths, [100 * row[c] for row in rows], marker="o", label=c)
    axes.set(xscale="log", xlabel="tokens", ylabel="recall, %", ylim=(0, 103))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=100, bbox_inches="tight")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--picture", metavar="FILE", help="draw recall against length")
    options = parser.parse_args()
    results, rows, table = Results(options), [], []
    longest = max(options.lengths) + LONGEST_ANSWER
    with kl.load(options.model, dtype=options.dtype, max_context=longest) as model:
        for length in options.lengths:
            row = {c: recall(model, c, length, options.samples) for c in options.columns}
            rows.append(row)
            case = {"model": options.model or "small", "dtype": model.dtype, "tokens": length}
            results.add("recall", case | {"samples": options.samples}, recall=row)
            table.append(f"| {length} | " + " | ".join(f"{100 * v:.0f} %" for v in row.values()) + " |")
    print("| tokens | " + " | ".join(options.columns) + " |")
    print("| --- |" + " --- |" * len(options.columns), *table, sep="\n")
    picture(options.lengths, rows)
    if options.picture:
        draw(options.lengths, rows, options.picture)


if __name__ == "__main__":
    main()
