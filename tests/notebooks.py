"""Running a notebook's cells without Jupyter.

Jupyter's kernel, its client and what they need are fifty packages, 300 MB with matplotlib, and
three seconds to start; what the tests ask is whether the cells run in their order, and whether
what is stored below each is of the kind that it gives now.
"""

import ast
import contextlib
import io
import json

import matplotlib
from matplotlib import pyplot

matplotlib.use("agg")  # no display is asked for


def cells(path):
    """(source, outputs) of the code cells."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    return [
        ("".join(cell["source"]), cell["outputs"])
        for cell in book["cells"]
        if cell["cell_type"] == "code"
    ]


def stored_kinds(outputs):
    """What is stored below a cell: "text", "png" of a picture, "value" of another result."""
    found = set()
    for output in outputs:
        assert output["output_type"] != "error", output
        if output["output_type"] == "stream":
            found |= {"text"} if output["name"] == "stdout" else set()
        else:
            found.add("png" if "image/png" in output["data"] else "value")
    return found


def run_cell(source, namespace):
    """Execute a cell; returns the kinds of what it gives."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, found = io.StringIO(), set()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
            if hasattr(value, "_repr_png_"):
                assert value._repr_png_().startswith(b"\x89PNG")
                found.add("png")
            elif value is not None:
                found.add("value")
    for number in pyplot.get_fignums():
        pyplot.figure(number).savefig(io.BytesIO())
        found.add("png")
    pyplot.close("all")
    return found | ({"text"} if printed.getvalue() else set())
