"""Every example runs, in a few seconds, and is short."""

import os
import subprocess
import sys
from pathlib import Path

import notebooks
import pytest

import kimi_linear as kl

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


# Stands in for Ray Data, which the tests do not install: actors in turn, in one process.
RAY = """
from types import SimpleNamespace

class Dataset:
    def __init__(self, rows):
        self.rows = rows

    def map(self, fn, *, fn_constructor_args, compute, num_gpus, num_cpus):
        actors = [fn(*fn_constructor_args) for _ in range(compute.size)]
        return Dataset(actors[i % len(actors)](row) for i, row in enumerate(self.rows))

    def materialize(self):
        return Dataset(list(self.rows))

def from_items(items, *, override_num_blocks):
    return Dataset(items)

def ActorPoolStrategy(*, size):
    return SimpleNamespace(size=size)
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example(path, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    (tmp_path / "ray" / "data.py").write_text(RAY)
    root = os.path.dirname(os.path.dirname(kl.__file__))
    env = {**os.environ, "PYTHONPATH": f"{root}:{tmp_path}", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, path],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 5
    assert len(path.read_text().splitlines()) < 60


def test_a_script_in_two_shares(tmp_path):
    """As torchrun would start it; the second finds what the first has written."""
    root = os.path.dirname(os.path.dirname(kl.__file__))
    (path,) = (p for p in EXAMPLES if p.stem == "05_ruler")
    printed = []
    for rank in "01":
        env = {**os.environ, "PYTHONPATH": root, "PYTHONUTF8": "1", "WORLD_SIZE": "2",
               "RANK": rank, "LOCAL_RANK": rank}  # fmt: skip
        command = [sys.executable, path, "--samples", "2", "--lengths", "512"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "preliminary" in printed[0] and "ruler: 3 of 6 examples" in printed[0]
    assert "preliminary" not in printed[1] and "ruler: 6 of 6 examples" in printed[1]
    assert {"merged.jsonl", "results.json"} < {p.name for p in (tmp_path / "ruler-run").iterdir()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook(path, tmp_path, monkeypatch):
    """Every cell runs, with one sample where it has eight, and gives what is stored below it."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    sources = notebooks.cells(path)
    assert sum("SAMPLES = 8" in source for source, _ in sources) == 1
    for source, outputs in sources:
        given = notebooks.run_cell(source.replace("SAMPLES = 8", "SAMPLES = 1"), namespace)
        assert given == notebooks.stored_kinds(outputs), source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_names_no_machine(path):
    text = path.read_text()
    assert "site-packages" not in text and "/tmp/" not in text and "/home/" not in text
    assert len(text) < 1 << 19
