"""Every example runs, in a few seconds, and is short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_linear as kl

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example(path, tmp_path):
    root = os.path.dirname(os.path.dirname(kl.__file__))
    env = {**os.environ, "PYTHONPATH": root, "PYTHONUTF8": "1"}
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
