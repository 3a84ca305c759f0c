"""What every test shares."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def use_the_installed_package() -> None:
    """`python -m pytest` puts the checkout first on the path, where the package may not have
    been built; then the one to test is the installed one."""
    others = [p for p in sys.path if Path(p).resolve() != ROOT]
    built_here = any((ROOT / "kimi_linear").glob("_core*.so"))
    if not built_here and any((Path(p) / "kimi_linear").is_dir() for p in others):
        sys.path[:] = others


def show_children_the_same() -> None:
    """Interpreters that tests start import this package too, not what their folder holds."""
    found = importlib.util.find_spec("kimi_linear")
    paths = [str(Path(found.origin).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONSAFEPATH"] = "1"


use_the_installed_package()
show_children_the_same()
