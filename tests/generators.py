"""The small model's generators of conversations, from examples/small_model."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "small_model"))
try:
    import data
    import tasks
finally:
    sys.path.pop(0)

__all__ = ["data", "tasks"]
