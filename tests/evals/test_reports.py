"""Reports: what stands beside published figures, what is said not to compare, what is drawn."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.evals import _published, plots, report, ruler
from kimi_linear.evals.results import Results

FULL = kl.KimiLinearConfig.kimi_linear_48b().parameter_count()
DEPTHS = [0.0, 0.05, 0.4, 0.95, 1.0]


def ruler_run(lengths=(4096, 131072), *, score=0.9, parameters=FULL, dtype="bf16", latents="bf16",
              tasks=None, temperature=1.0, samples=500, prefix="prefill", haystack="essays.json"):  # fmt: skip
    """A run of RULER that nobody ran: five records a cell stand for its samples."""
    tasks = list(ruler.TASKS) if tasks is None else tasks
    records = [
        {"task": t, "length": n, "score": score, "document": i, "answer": "a", "truncated": False,
         "references": ["a"] * (4 if t in ("niah_multivalue", "niah_multiquery") else 1),
         **({"depth": d} if t.startswith("niah") else {})}
        for n in lengths for t in tasks for i, d in enumerate(DEPTHS)
    ]  # fmt: skip
    settings = {
        "suite": "ruler",
        "tasks": {t: {"haystack": getattr(ruler.TASKS.get(t), "haystack", None)} for t in tasks},
        "left_out": [t for t in ruler.TASKS if t not in tasks],
        "samples": samples, "prefix": prefix, "haystack": haystack,
    }  # fmt: skip
    model = {"name": "kimi", "parameters": parameters, "dtype": dtype, "kv_cache_dtype": latents,
             "device": "cuda"}  # fmt: skip
    header = {"examples": len(records), "settings": settings, "tokenizer": "t", "model": model,
              "sampling": {"temperature": temperature}}  # fmt: skip
    return Results(header, records)


def other_run(suite, **settings):
    header = ruler_run().header
    records = [{"task": "a", "length": 131072, "score": 0.5, "document": 0, "answer": "a",
                "references": ["a"], "truncated": False, "best": "f", "needle": "f", "bleu": 0.9}]  # fmt: skip
    return Results({**header, "examples": 1, "settings": {"suite": suite, **settings}}, records)


# ---- figures -----------------------------------------------------------------------------


def test_published_figures():
    """Tables 5 and 9 of the Kimi Linear report."""
    scores = {(s, p.length): [] for s in _published.PUBLISHED for p in _published.PUBLISHED[s]}
    for suite, figures in _published.PUBLISHED.items():
        for p in figures:
            scores[suite, p.length].append(p.score)
    assert scores == {
        ("ruler", 131072): [95.4, 84.3, 81.3, 80.5, 78.8],
        ("ruler", 1048576): [94.8],
        ("mrcr", 131072): [29.6, 22.6, 23.9, 22.0],
        ("repoqa", 131072): [68.5, 63.0, 63.0, 66.5],
    }
    assert set(_published.PUBLISHED) == set(_published.UNSTATED) == set(_published.DIFFERENCES)


# ---- the report --------------------------------------------------------------------------


def test_a_run_like_the_published_one():
    """All thirteen tasks at 128K with the report's temperature: only what no run can have."""
    run = ruler_run()
    assert list(_published.differences(run)) == [
        "the essays: essays.json, upstream has Paul Graham's"
    ]
    text = report(run)
    assert text.startswith(str(run))
    lines = [line.split("  ") for line in text.splitlines()]
    rows = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert rows["ruler, means"] == ["4,096", "131,072", "1,048,576"]
    assert rows["this run"] == ["90.00 ±0.00", "90.00 ±0.00"]
    assert rows["Kimi Linear 48B-A3B Instruct (table 9)"] == ["95.4", "94.8"]
    assert rows["MLA, 1.4T tokens (table 5)"] == ["81.3"]
    for line in ("upstream's prompts, filling and scores", "all thirteen tasks", "a context of 131,072 tokens",
                 "temperature 1", "does not state: the number of samples"):  # fmt: skip
        assert line in text


@pytest.mark.parametrize(
    "options,said",
    [
        (
            {"parameters": 7_905_680},
            "the model: 7,905,680 parameters, published 49,122,681,728",
        ),
        ({"dtype": "int4"}, "the weights: stored as int4, the checkpoint's are bf16"),
        ({"latents": "fp8"}, "the latents: stored as fp8"),
        ({"lengths": [4096]}, "lengths: nothing is published for the run's"),
        ({"tasks": ["vt", "fwe"]}, "tasks: 2 of 13, without niah_single_1"),
        ({"tasks": [*ruler.TASKS, "mine"]}, "tasks: mine are not RULER's"),
        ({"haystack": "grammar"}, "the essays: grammar, upstream has Paul Graham's"),
        ({"samples": 20}, "samples: 20 of a task, upstream has 500"),
        ({"temperature": 0.0}, "temperature 0, published 1"),
    ],
)
def test_what_does_not_compare_is_said(options, said):
    found = [
        line for line in _published.differences(ruler_run(**options)) if line.startswith(said)
    ]
    assert len(found) == 1
    assert not any(line.startswith(said) for line in _published.differences(ruler_run()))
    assert found[0] in report(ruler_run(**options))


def test_other_suites():
    openai = report(other_run("mrcr", data=["2needle.parquet sha256:0"]))
    assert "29.6" in openai and "before their correction of December 2025" in openai
    google = report(other_run("mrcr", data=["mrcr_v2.csv sha256:0"]))
    assert "Google's second version, published is of OpenAI's" in google
    code = report(other_run("repoqa", languages=["python", "rust"]))
    assert "68.5" in code and "functions in answers of rust are found by another rule" in code
    assert "nothing published compares" in report(other_run("mrcr-synth"))
    assert "table 5" not in report(other_run("mrcr-synth"))


def test_runs_side_by_side():
    text = report(ruler_run(score=0.9), ruler_run(score=0.8, dtype="int8", prefix="raw"))
    assert "run 1: kimi, bf16" in text and "run 2: kimi, int8" in text
    assert re.search(r"run 1: kimi, bf16 +90\.00 ±0\.00 +90\.00", text)
    assert re.search(r"run 2: kimi, int8 +80\.00 ±0\.00 +80\.00", text)
    assert "the runs differ in: prefix\n" in text
    assert "the runs differ" not in report(ruler_run(), ruler_run())
    assert "run 2: kimi, bf16, fp8 latents" in report(ruler_run(), ruler_run(latents="fp8"))
    with pytest.raises(ValueError, match="runs: must be at least one"):
        report()


def test_an_incomplete_run():
    run = ruler_run()
    part = Results({**run.header, "examples": 10**6}, run.records)
    assert "examples are missing" in list(_published.differences(part))


# ---- pictures ----------------------------------------------------------------------------


def errorbars(picture):
    (axes,) = picture.axes
    return {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}


def test_scores_are_drawn_where_they_are():
    drawn = errorbars(plots.scores(ruler_run(score=0.75)))
    assert drawn["mean"] == [[4096, 75], [131072, 75]]
    assert drawn["published: Kimi Linear 48B-A3B Instruct (table 9)"] == [
        [131072, 95.4], [1048576, 94.8],
    ]  # fmt: skip
    assert set(ruler.TASKS) < set(drawn) and len(drawn) == 13 + 1 + 5
    assert not [k for k in errorbars(plots.scores(ruler_run(), published=False)) if "publ" in k]
    two = errorbars(plots.scores(ruler_run(score=0.75), ruler_run([8192], score=0.5)))
    assert two["run 2: kimi, bf16"] == [[8192, 50]] and "vt" not in two


def test_a_length_has_its_name():
    picture = plots.scores(ruler_run([600, 4096]))
    labels = [t.get_text() for t in picture.axes[0].get_xticklabels()]
    assert labels == ["600", "4K", "128K", "1M"]


def test_the_heat_map_is_score_by_depth_and_length():
    run = ruler_run([1024, 2048])
    for r in run.records:  # wrong below 90 % in the longer context
        if r["length"] == 2048 and r.get("depth", 0) > 0.9:
            r["score"] = 0.0
    picture = plots.needles(run)
    grid = picture.axes[0].get_images()[0].get_array().filled(np.nan)
    want = np.full((10, 2), np.nan)
    want[0], want[4], want[9] = 90, 90, [90, 0]
    np.testing.assert_allclose(grid, want)
    # Six tasks have one answer; where four stand in the text, no depth is theirs.
    assert "n 60" in picture.axes[0].get_title(loc="left")
    single = plots.needles(run, "niah_multivalue", bins=4)
    assert single.axes[0].get_images()[0].get_array().shape == (4, 2)
    assert [t.get_text() for t in single.axes[0].get_yticklabels()] == [
        "0 %",
        "25 %",
        "50 %",
        "75 %",
    ]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: plots.scores(), "runs: must be of one suite, got none"),
        (lambda: plots.scores(ruler_run(), other_run("mrcr", data=[])), "must be of one suite"),
        (lambda: plots.needles(ruler_run(tasks=["vt"])), "one answer at a depth, has none"),
        (lambda: plots.needles(ruler_run(), "vt"), "of task 'vt' and a depth"),
        (lambda: plots.needles(ruler_run(), bins=0), "bins: must be at least 1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_notebook_sees_a_picture():
    assert plots.scores(ruler_run())._repr_png_().startswith(b"\x89PNG")
    assert math.isclose(plots.needles(ruler_run()).get_size_inches()[1], 4.6)


def test_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from kimi_linear import evals; evals.report, evals.run\n"
        "try: evals.plots\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "plots: need matplotlib (pip install 'kimi_linear[plots]')\n"


# ---- the command -------------------------------------------------------------------------


def test_the_command(tmp_path):
    for name, run in (("a", ruler_run()), ("b", ruler_run(score=0.5))):
        (tmp_path / name).mkdir()
        lines = [
            run.header,
            *({**r, "id": str(i), "index": i} for i, r in enumerate(run.records)),
        ]
        path = tmp_path / name / "shard-00000-of-00001.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [sys.executable, "-m", "kimi_linear", "eval", "report", "a", "b", "--plots", "pictures"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONUTF8": "1",
        "PYTHONPATH": os.path.dirname(os.path.dirname(kl.__file__))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "run 2: kimi, bf16" in done.stdout and "table 9" in done.stdout
    written = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert written == {"scores-ruler.png", "needles-1.png", "needles-2.png"}
    assert all(p.stat().st_size > 5000 for p in (tmp_path / "pictures").iterdir())
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"shard-00000-of-00001.jsonl"}
