"""RULER's questions about documents: SQuAD and HotpotQA, from files that the user has.

Prompts and parameters are those of NVIDIA/RULER (Apache-2.0), scripts/data/synthetic/qa.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from ._ruler_task import Sample, Setting

_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not "
    "output any other words."
)
TEMPLATE = (
    f"{_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{_ASK}\n\n"
    "Question: {question}"
)
OPENING = " Answer:"


@dataclass(frozen=True)
class Question:
    """A question. gold: indices of the documents that answer it; related: of their article."""

    text: str
    answers: list[str]
    gold: list[int]
    related: list[int]


@dataclass(frozen=True)
class QA:
    """Sample i asks question i of a dataset among as many documents as fit.

    dataset: "squad" (dev-v2.0.json) or "hotpot" (hotpot_dev_distractor_v1.json).
    """

    name: str
    dataset: str
    max_new_tokens: int = 32
    match: str = "part"

    def maker(self, setting: Setting) -> "_Maker":
        files = {"squad": setting.squad, "hotpot": setting.hotpot}
        return _Maker(*self._read(files), setting)

    def size(self, files: Mapping[str, str | None]) -> int:
        """How many questions the dataset's file has."""
        return len(self._read(files)[0])

    def _read(self, files: Mapping[str, str | None]) -> tuple[list[Question], list[str]]:
        path = files[self.dataset]
        if path is None:
            raise ValueError(f"{self.name}: needs the file of its questions, {self.dataset}=")
        return read(self.dataset, path)


class _Maker:
    step = 10

    def __init__(
        self, questions: list[Question], documents: list[str], setting: Setting
    ) -> None:
        self._questions, self._documents, self._seed = questions, documents, setting.seed
        self.least = max(len(q.gold) for q in questions)

    def make(self, r: Random, units: int, index: int) -> Sample:
        question = self._questions[index]
        chosen = self._choose(r, question, units)
        Random(self._seed).shuffle(chosen)  # upstream has one order for all samples
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))
        text = TEMPLATE.format(context=context, question=question.text)
        return Sample(text, OPENING, question.answers)

    def _choose(self, r: Random, question: Question, n: int) -> list[str]:
        documents = self._documents
        if n >= len(documents):
            return (documents * -(-n // len(documents)))[:n]
        more = n - len(question.gold)
        if more <= len(question.related):
            chosen = question.gold + r.sample(question.related, more)
        else:
            taken = {*question.gold, *question.related}
            others = [i for i in range(len(documents)) if i not in taken]
            more -= len(question.related)
            chosen = question.gold + question.related + r.sample(others, min(more, len(others)))
        return [documents[i] for i in chosen]


@cache
def read(dataset: str, path: str) -> tuple[list[Question], list[str]]:
    """Questions that have answers, and all documents, each once and sorted."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        return _squad(data) if dataset == "squad" else _hotpot(data)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: must be {dataset}'s JSON, {e!r} in it") from None


def _squad(data: dict) -> tuple[list[Question], list[str]]:  # type: ignore[type-arg]
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({p["context"] for paragraphs in articles for p in paragraphs})
    index = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(
            qa["question"],
            [a["text"] for a in qa["answers"]],
            [index[p["context"]]],
            [index[q["context"]] for q in paragraphs if q["context"] != p["context"]],
        )
        for paragraphs in articles
        for p in paragraphs
        for qa in p["qas"]
        if not qa["is_impossible"]
    ]
    return questions, documents


def _hotpot(data: list) -> tuple[list[Question], list[str]]:  # type: ignore[type-arg]
    def paragraphs(item: dict) -> list[str]:  # type: ignore[type-arg]
        return [f"{title}\n{''.join(lines)}" for title, lines in item["context"]]

    documents = sorted({text for item in data for text in paragraphs(item)})
    index = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(d["question"], [d["answer"]], [index[t] for t in paragraphs(d)], [])
        for d in data
    ]
    return questions, documents
