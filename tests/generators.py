"""The small model's generators of conversations, from examples/small_model, and the benchmark that
asks it what it finds again."""

import sys

from conftest import ROOT

FOLDERS = [str(ROOT / "examples" / "small_model"), str(ROOT / "benchmarks")]

sys.path[:0] = FOLDERS
try:
    import data
    import recall
    import tasks
finally:
    del sys.path[: len(FOLDERS)]

__all__ = ["data", "recall", "tasks"]
