"""Draw the loss and the recall of a training log.

python curve.py RUN/log.jsonl ../../kimi_linear/small_model/training.png
"""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def series(lines, key):
    found = [(x["tokens"] / 1e6, x[key]) for x in lines if key in x]
    return [list(axis) for axis in zip(*found, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("out")
    a = parser.parse_args()
    lines = [json.loads(line) for line in open(a.log)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(*series(lines, "loss"), linewidth=1)
    left.set(xlabel="million tokens", ylabel="loss of the answers", ylim=(0, 2))
    for key in ("single", "multivalue", "mrcr4"):
        for n in (512, 1024, 4096):
            if any(f"{key}@{n}" in x for x in lines):
                right.plot(*series(lines, f"{key}@{n}"), marker=".", linewidth=1, label=f"{key}, {n}")
    right.set(xlabel="million tokens", ylabel="recall", ylim=(0, 1.03))
    right.legend(fontsize="x-small")
    figure.savefig(a.out, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
