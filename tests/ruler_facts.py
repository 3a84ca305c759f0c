"""What does not depend on the seed in a sample of RULER, and solvers that search for the answers.

`python tests/ruler_facts.py FOLDER` makes evals/ruler_upstream.json from the samples of
NVIDIA/RULER's own scripts: FOLDER/LENGTH/TASK/validation.jsonl, fifty of each, written by its
prepare.py with a word between white space as the token, the files of `write_files` in
synthetic/json, and `_sources.sentences` in place of NLTK's sent_tokenize.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from kimi_linear.evals import ruler
from kimi_linear.evals._ruler_niah import NOISE
from kimi_linear.evals._sources import Haystack

GOLDEN = Path(__file__).parent / "evals" / "ruler_upstream.json"
MASKS = {
    r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}": "<uuid>",
    r"\b\d{7}\b": "<number>",
    r"\b\d{5}\b": "<value>",
    r"\b[A-Z]{5}\b": "<name>",
    r"\b(?!VAR\b)[A-Z]{3}\b": "<short name>",
}


def word_count(text, opening):
    """A counter of tokens that costs nothing and that upstream's code can be given too."""
    return len((text + opening).split())


def write_files(folder):
    """Essays, SQuAD and HotpotQA by upstream's names."""
    words = Haystack(None).words(60_000)
    articles = [
        {"paragraphs": [
            {"context": f"doc {a} {p} " + " ".join(words[(a * 7 + p) * 30 :][: 60 + a % 5]), "qas": [
                {"id": f"{a}{p}", "question": f"q{a}.{p}?", "is_impossible": False,
                 "answers": [{"text": f"doc {a} {p}"}, {"text": "doc"}]},
                {"id": f"x{a}{p}", "question": "no?", "is_impossible": True, "answers": [],
                 "plausible_answers": []},
            ]} for p in range(4)
        ]} for a in range(30)
    ]  # fmt: skip
    items = [
        {"question": f"who is {i}?", "answer": f"Name{i}x", "context": [
            [f"T{i}.{k}", ["One. ", " ".join(words[(i * 11 + k) * 13 :][:50])
                           + (f" Name{i}x two." if k == 3 else " Two.")]] for k in range(10)
        ]} for i in range(60)
    ]  # fmt: skip
    for name, value in (("PaulGrahamEssays", {"text": " ".join(words)}),
                        ("squad", {"data": articles}), ("hotpotqa", items)):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(value))
    return {"haystack": folder / "PaulGrahamEssays.json", "squad": folder / "squad.json",
            "hotpot": folder / "hotpotqa.json"}  # fmt: skip


def masked(text):
    for pattern, name in MASKS.items():
        text = re.sub(pattern, name, text)
    return text


# ---- facts -------------------------------------------------------------------------------


def facts(task, text, opening, answers):
    """(what is the same in every sample, how many units it has)."""
    kind = "niah" if task.startswith("niah") else task[:2]
    shape, size = FACTS[kind](task, text, answers)
    query = re.search(r" for (.*) mentioned", opening)
    opening = opening.replace(query[1], "<query>") if query else masked(opening)
    return {**shape, "opening": opening, "answers": len(answers)}, size


def _niah(task, text, answers):
    lines = text.split("\n")
    hidden = re.findall(r"One of the special magic (\w+) for (.+?) is: (\S+)\.", text)
    query = re.search(r" for (.*) mentioned", lines[-1])[1]
    asked = query.replace(", and ", ", ").split(", ")
    kinds = {(t, _kind(key), _kind(value)) for t, key, value in hidden}
    shape = {
        "first": lines[0],
        "last": lines[-1].replace(query, "<query>"),
        "queries": len(asked),
        "kinds": sorted(map(list, kinds)),
        "answers in order": answers == [v for name in asked for _, k, v in hidden if k == name],
    }
    if "needle" in ruler.TASKS[task].haystack:  # distractors are needles
        return shape, len(hidden)
    noise = ruler.TASKS[task].haystack == "noise"
    size = text.count(NOISE) if noise else len(text.split())
    return {**shape, "needles": len(hidden)}, size


def _kind(text):
    """What a key or a value is: word-like ones may have capitals or figures in them."""
    return name if (name := masked(text)) in ("<uuid>", "<number>") else "<word>"


def _variables(task, text, answers):
    lines = masked(text).split("\n")
    return {"lines": [x for x in lines if x.strip() != NOISE]}, lines.count(NOISE)


def _common(task, text, answers):
    shape, size, lines = [], 0, []
    for line in text.split("\n"):
        if line.startswith("1. "):
            lines = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", line)
            counts = Counter(lines)
            shape.append(sorted(set(counts.values())))
            size = len(counts)
        else:
            shape.append(re.sub(r"(\d+\. .+? ?){10}$", "<ten words>", line))
    often = {w for w, _ in Counter(lines).most_common(10)}
    return {"lines": shape, "answers are the common": set(answers) == often}, size


def _frequent(task, text, answers):
    head, _, rest = text.partition("coded words. ")
    coded, _, tail = rest.partition("\n")
    counts = Counter(coded.split())
    shape = {
        "head": head, "tail": tail, "dots": counts["..."],
        "counts": sorted(counts.values(), reverse=True),
        "widths": sorted({len(w) for w in counts}),
        "answers in order": answers == [w for w, _ in counts.most_common(4)][1:],
    }  # fmt: skip
    return shape, len(coded.split())


def _questions(task, text, answers):
    blocks = re.split(r"Document (\d+):\n", text)
    question = re.compile(r"(q[\d.]+|who is \d+)\?$")
    gold = [i for i, b in enumerate(blocks[2::2]) if f"{answers[0]} " in b]
    shape = {
        "head": blocks[0],
        "tail": question.sub("<question>", blocks[-1].split("\n\n", 1)[1]),
        "numbered": blocks[1::2] == [str(i + 1) for i in range(len(blocks) // 2)],
        "one answers": len(gold) == 1,
    }
    return shape, len(blocks) // 2


FACTS = {"niah": _niah, "vt": _variables, "cw": _common, "fw": _frequent, "qa": _questions}


def summary(samples):
    """Shape of a task's samples, which all must have, and the commonest size."""
    found = [facts(*sample) for sample in samples]
    shapes = {json.dumps(shape) for shape, _ in found}
    assert len(shapes) == 1, shapes
    sizes = Counter(size for _, size in found)
    return {"shape": json.loads(shapes.pop()), "size": max(sizes, key=lambda n: (sizes[n], n))}


def _upstream(folder, length, task):
    for line in (folder / length / task / "validation.jsonl").open():
        sample = json.loads(line)
        yield task, sample["input"], sample["answer_prefix"], sample["outputs"]


# ---- solvers -----------------------------------------------------------------------------


def solve(task, text):
    """The answers of a question, from its text alone."""
    if task.startswith("niah"):
        names = re.search(r" for (.*) mentioned in", text.rsplit("\n", 1)[1])[1]
        names = names.replace(", and ", ", ").split(", ")
        hidden = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", text)
        return [value for name in names for key, value in hidden if key == name]
    if task == "vt":
        text = text[text.rindex("Memorize and track") :]  # after the solved example
        value = re.search(r"assigned the value (\d{5}) in", text)[1]
        found = re.search(rf"VAR (\w{{5}}) = {value}\b", text)
        chain = []
        while found:  # an assignment follows the one that it reads
            chain.append(found[1])
            text = text[found.end() :]
            found = re.search(rf"VAR (\w{{5}}) = VAR {chain[-1]} ?\n", text)
        return chain
    if task == "cwe":
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", text[text.rindex("Below is") :])
        return [word for word, _ in Counter(listed).most_common(10)]
    if task == "fwe":
        coded = text.split("coded words. ")[1].split("\nQuestion")[0].split()
        return [word for word, _ in Counter(coded).most_common(4)][1:]
    if question := re.search(r"who is (\d+)\?$", text):
        return re.findall(rf"Name{question[1]}x", text)
    article, paragraph = re.search(r"q(\d+)\.(\d+)\?$", text).groups()
    return re.findall(rf"doc {article} {paragraph}\b", text)


if __name__ == "__main__":
    golden = {
        length: {
            task: summary(_upstream(Path(sys.argv[1]), length, task)) for task in ruler.TASKS
        }
        for length in ("2048", "4096")
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
