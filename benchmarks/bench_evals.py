"""Making RULER's samples: seconds and memory of the first one of each task, by length.

    python benchmarks/bench_evals.py                        # 256K and 1M tokens
    python benchmarks/bench_evals.py --lengths 65536 --tasks vt fwe
    python benchmarks/bench_evals.py --tokenizer DIR        # of a checkpoint, for its bytes a token

A first sample includes the search for its size. Each is made by a process of its own, whose
peak of memory is counted from what it held before. The two tasks that ask questions of files
get files of SQuAD's and HotpotQA's sizes, made here.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from common import Results, arguments
from kimi_linear import Tokenizer
from kimi_linear.evals import ruler
from kimi_linear.evals._sources import Haystack
from kimi_linear.evals.suite import Prompting, tokenizer_name
from kimi_linear.model import SMALL_MODEL

LIMIT = 60.0  # seconds that a sample of 1M tokens may take


def documents(folder: Path) -> dict[str, Path]:
    """Files like SQuAD's and HotpotQA's: 1,204 paragraphs of 130 words, 66,000 of 60."""
    words = Haystack(None).words(1204 * 130)
    texts = [" ".join(words[i : i + 130]) for i in range(0, len(words), 130)]
    articles = [
        {"paragraphs": [
            {"context": text, "qas": [{"question": "Who?", "is_impossible": False,
                                       "answers": [{"text": text[:20]}]}]}
            for text in texts[i : i + 34]
        ]} for i in range(0, len(texts), 34)
    ]  # fmt: skip
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    items = [
        {"question": "Who?", "answer": f"Title {i}", "context": [
            [f"Title {i} {j}", [" ".join(words[(i * 61 + j) % 100_000 :][:60])]] for j in range(10)
        ]} for i in range(6600)
    ]  # fmt: skip
    (folder / "hotpot.json").write_text(json.dumps(items))
    return {name: folder / f"{name}.json" for name in ("squad", "hotpot")}


def peak() -> int:
    """Bytes that this process has held at most. Not getrusage's: that begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def first_sample(task: str, length: int, directory: str, files: dict[str, Path]) -> dict:
    """Make a task's first sample and its token ids; what that took."""
    prompting = Prompting(Tokenizer.from_dir(directory), "prefill")
    before, start = peak(), time.perf_counter()
    (sample,) = ruler.samples(task, length, prompting.count, n=1, **files)
    ids = prompting.ids(sample.input, sample.opening)
    seconds = time.perf_counter() - start
    tokens = len(ids) + ruler.TASKS[task].max_new_tokens
    assert 0.8 * length < tokens <= length, (task, tokens)
    return {
        "seconds": seconds,
        "peak_bytes": peak() - before,
        "sample_tokens": tokens,
        "characters": len(sample.input),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 18, 1 << 20])
    parser.add_argument("--tasks", nargs="+", default=list(ruler.TASKS), metavar="TASK")
    parser.add_argument("--tokenizer", default=str(SMALL_MODEL), metavar="DIR")
    options = parser.parse_args()
    results = Results(options)
    tokenizer = tokenizer_name(Tokenizer.from_dir(options.tokenizer))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = documents(Path(folder))
        for task in options.tasks:
            for length in options.lengths:
                with context.Pool(1) as pool:
                    values = pool.apply(first_sample, (task, length, options.tokenizer, files))
                case = {"task": task, "tokens": length, "tokenizer": tokenizer}
                results.add(
                    "ruler_sample", case, **values, within_limit=values["seconds"] < LIMIT
                )


if __name__ == "__main__":
    main()
