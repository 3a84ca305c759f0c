"""RULER's and HELMET's scripts call a model of this package in place of their own.

--upstream DIR names a folder with clones of both, RULER and HELMET; without it, scripts that
call as theirs do are run.
"""

import json
import random
import subprocess
import sys
import uuid

import kimi_linear as kl
import pytest
from kimi_linear.adapters import helmet, ruler
from kimi_linear.evals.ruler import samples
from kimi_linear.model import SMALL_MODEL

CALL_API = """
import argparse, json
from nemo.collections.asr.parts.utils.manifest_utils import read_manifest
parser = argparse.ArgumentParser()
for name in ("data_dir", "save_dir", "task", "server_type", "model_name_or_path"):
    parser.add_argument("--" + name)
parser.add_argument("--batch_size", type=int)
args = parser.parse_args()
from model_wrappers import HuggingFaceModel
llm = HuggingFaceModel(name_or_path=args.model_name_or_path, do_sample=True, repetition_penalty=1,
                       temperature=1e-6, top_k=32, top_p=1.0, stop=[], max_new_tokens=24)
data = read_manifest(f"{args.data_dir}/{args.task}/validation.jsonl")
texts = llm.process_batch(prompts=[d["input"] + d["answer_prefix"] for d in data])
with open(f"{args.save_dir}/{args.task}.jsonl", "w") as out:
    for d, text in zip(data, texts):
        out.write(json.dumps(d | {"pred": text["text"][0]}) + "\\n")
"""


@pytest.fixture(scope="module")
def model():
    with kl.load(device="cpu", max_context=1024) as m:
        yield m


def run(module, *arguments):
    command = [sys.executable, "-m", f"kimi_linear.adapters.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- RULER -------------------------------------------------------------------------------


def test_ruler_answers(model):
    llm = ruler.KimiModel(
        model=model, do_sample=False, temperature=1.0, top_k=32, top_p=1.0,
        repetition_penalty=1, stop=["."], max_new_tokens=24,
    )  # fmt: skip
    prompts = ["Once upon a time", "<|im_user|>user<|im_middle|>Hello<|im_end|>"]
    want = [
        model.generate(ids, max_new_tokens=24, stop=["."]).text
        for ids in (prompts[0], model.tokenizer.encode(prompts[1], allow_control=True))
    ]
    assert llm.process_batch(prompts=prompts) == [{"text": [text]} for text in want]
    assert llm(prompts[0]) == {"text": [want[0]]}


def test_rulers_script(model, tmp_path, pytestconfig):
    script = tmp_path / "call_api.py"
    script.write_text(CALL_API)
    if upstream := pytestconfig.getoption("upstream"):
        script = f"{upstream}/RULER/scripts/pred/call_api.py"
    folder = tmp_path / "data" / "niah_single_1"
    folder.mkdir(parents=True)
    count = lambda text, opening: len(model.tokenizer.encode(text + opening))
    made = list(samples("niah_single_1", 768, count, n=4))
    lines = [
        {"index": i, "input": s.input, "outputs": s.answers, "answer_prefix": s.opening}
        for i, s in enumerate(made)
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "out").mkdir()
    run(
        "ruler", script, "--server_type", "hf", "--model_name_or_path", SMALL_MODEL,
        "--data_dir", tmp_path / "data", "--save_dir", tmp_path / "out",
        "--task", "niah_single_1", "--batch_size", 4,
    )  # fmt: skip
    answers = (tmp_path / "out" / "niah_single_1.jsonl").read_text().splitlines()
    assert len(answers) == 4
    found = [a for a in map(json.loads, answers) if a["outputs"][0] in a["pred"]]
    assert upstream or len(found) >= 3  # upstream's default draws at temperature 1


# ---- HELMET ------------------------------------------------------------------------------

DATA = {
    "user_template": "{context}\n\n{question}",
    "prompt_template": "{context}\n{question}\nA:",
}
QUESTION = "What is the value of owl?"
PAIRS = "Remember these pairs: fox 17, owl 230, bear 4."


def test_helmet_answers(model):
    llm = helmet.KimiModel(
        model=model, max_length=1024, generation_max_length=8, do_sample=False,
        use_chat_template=True, stop_newline=True,
    )  # fmt: skip
    item = {"context": PAIRS, "question": QUESTION}
    ids = llm.prepare_inputs(item, DATA)
    messages = [{"role": "user", "content": f"{PAIRS}\n\n{QUESTION}"}]
    assert ids == model.tokenizer.apply_chat_template(messages)
    first, second = llm.generate_batch([ids, ids])
    assert first == second == llm.generate(prompt=messages[0]["content"])
    assert (first["output"], first["input_len"]) == ("230", len(ids))
    assert first["input_text"] == model.tokenizer.decode(ids) and first["output_len"] > 1
    with pytest.raises(ValueError, match="generation_min_length: must be 0, got 5"):
        helmet.KimiModel(model=model, generation_min_length=5)


@pytest.mark.parametrize("chat", [False, True])
def test_helmet_cuts_the_end_of_a_context(model, chat):
    llm = helmet.KimiModel(
        model=model, max_length=100, generation_max_length=20, use_chat_template=chat
    )
    item = {"context": "The début. " * 60, "question": QUESTION}
    ids = llm.prepare_inputs(item, DATA)
    assert 70 <= len(ids) <= 80
    text = model.tokenizer.decode(ids)
    assert ("The début. " * 60).startswith(item["context"]) and len(item["context"]) > 50
    assert item["context"] in text and QUESTION in text
    with pytest.raises(ValueError, match="max_length: the prompt must leave 20 of 100"):
        llm.prepare_inputs({"context": "The", "question": QUESTION * 30}, DATA)
    for new in (0, 100, 101):
        with pytest.raises(ValueError, match="generation_max_length: must be at least 1 and"):
            helmet.KimiModel(model=model, max_length=100, generation_max_length=new)


def test_helmets_script(tmp_path, pytestconfig):
    upstream = pytestconfig.getoption("upstream")
    if not upstream:
        pytest.skip("needs --upstream: its script imports what it needs beside")
    r = random.Random(0)
    values = {str(uuid.UUID(int=r.getrandbits(128))): f"{i}" for i in range(8)}
    key = list(values)[3]
    row = {"context": json.dumps(values), "question": key, "answer": values[key],
           "demos": [list(item) for item in list(values.items())[:2]], "num_kvs": 8}  # fmt: skip
    (tmp_path / "kv.jsonl").write_text(json.dumps(row) + "\n")
    run(
        "helmet", f"{upstream}/HELMET/eval.py", "--model_name_or_path", SMALL_MODEL,
        "--datasets", "json_kv", "--test_files", tmp_path / "kv.jsonl", "--demo_files", "",
        "--input_max_length", 1024, "--generation_max_length", 8, "--num_workers", 0,
        "--use_chat_template", True, "--no_cuda", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    (file,) = (tmp_path / "out").glob("json_kv*.json")
    assert json.loads(file.read_text())["data"][0]["output"]
