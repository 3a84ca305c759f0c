"""A checkpoint through lm-evaluation-harness, beside what it must equal.

    python benchmarks/harness.py [--model DIR] [--only loglikelihood ruler]
                                 [--samples 50] [--lengths 2048 4096] [--tasks niah_single_1 ...]

loglikelihood: 200 requests (stories cut in two, four ways to go on, of which one is the story's;
some without a context) and 20 whole texts, by the adapter and by lm-eval's `hf` model, which is
transformers, both in float32. ruler: lm-eval's own RULER tasks through the adapter, beside this
package's RULER, in the chat format with the answer begun; lm-eval's essays are not to be had
without a network, so both sides hide needles in the same English from a grammar, and sentences
are cut by the same rule. The error of a difference is that of two means of samples of one kind.
Needs lm-eval[ruler,hf]. Appends to results/harness.jsonl.
"""

import math
import random
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

from common import Results, arguments

import kimi_linear as kl
from kimi_linear.adapters.lm_eval import KimiLM
from kimi_linear.evals import ruler, run
from kimi_linear.evals._sources import Haystack, sentences
from kimi_linear.model import SMALL_MODEL

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "small_model"))
from tasks import HELD_OUT_SEED  # noqa: E402
from words import story  # noqa: E402

TASKS = {  # lm-eval's name: ours
    **{name: name for name in ruler.TASKS if name.startswith("niah")},
    "ruler_vt": "vt",
    "ruler_cwe": "cwe",
    "ruler_fwe": "fwe",
}


def request(kind, *texts):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, texts, 0, ("benchmark", 0, 1))


def pairs(n):
    """(context, continuation) of stories, four a context, and every tenth context is empty."""
    r = random.Random(HELD_OUT_SEED)
    for i in range(n // 4):
        text, *others = (story(r) for _ in range(4))
        cut = [m for m, c in enumerate(text) if c == " "]
        at, end = sorted(r.sample(cut[4:], 2))
        context = "" if i % 10 == 9 else text[:at]
        yield from (
            (context, t[at : end + 1] if t is text else t[:60]) for t in (text, *others)
        )


def loglikelihood(results, model_dir, n=200):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=16)
    ours = KimiLM(
        pretrained=model_dir, device="cpu", dtype="f32", max_length=4096,
        prefix_token_id=theirs.prefix_token_id,
    )  # fmt: skip
    texts = [pair[0] + pair[1] for pair in list(pairs(n))[::10]]
    for kind, requests in (
        ("loglikelihood", [request("loglikelihood", *pair) for pair in pairs(n)]),
        ("loglikelihood_rolling", [request("loglikelihood_rolling", t) for t in texts]),
    ):
        start = time.perf_counter()
        got = getattr(ours, kind)(requests, disable_tqdm=True)
        middle = time.perf_counter()
        want = getattr(theirs, kind)(requests, disable_tqdm=True)
        seconds, hf_seconds = middle - start, time.perf_counter() - middle
        if kind == "loglikelihood":
            same = sum(a[1] == b[1] for a, b in zip(got, want, strict=True))
            got, want = ([a[0] for a in x] for x in (got, want))
        else:
            same = None
        tokens = [len(ours.tok_encode(q.args[-1])) for q in requests]
        errors = [abs(a - b) / t for a, b, t in zip(got, want, tokens, strict=True)]
        results.add(
            "harness",
            {"model": model_dir.name, "dtype": "f32", "part": kind, "requests": len(requests)},
            tokens=sum(tokens), largest_difference_a_token=max(errors), same_greedy=same,
            seconds=seconds, hf_seconds=hf_seconds,
        )  # fmt: skip


def offline(haystack):
    """lm-eval's RULER without its downloads: our haystack and rule for sentences."""
    from lm_eval.tasks.ruler import prepare_niah

    upstream = prepare_niah.get_haystack

    def get_haystack(type_haystack):
        if type_haystack == "essay":
            return haystack.words(20_000)
        return upstream(type_haystack=type_haystack)

    prepare_niah.get_haystack, prepare_niah.sent_tokenize = get_haystack, sentences


def ruler_twice(results, model_dir, options):
    import lm_eval

    offline(Haystack(None))
    names = options.tasks or list(TASKS)
    with kl.load(model_dir, device="cpu", max_context=max(options.lengths) + 64) as model:
        for length in options.lengths:
            start = time.perf_counter()
            found = lm_eval.simple_evaluate(
                model=KimiLM(model=model), tasks=names, limit=options.samples,
                metadata={"tokenizer": str(model_dir), "max_seq_lengths": [length]},
                apply_chat_template=True, log_samples=True, bootstrap_iters=0,
            )["samples"]  # fmt: skip
            middle = time.perf_counter()
            suite = ruler.Suite(
                tasks=[TASKS[name] for name in names], lengths=[length], samples=options.samples
            )
            ours = run(model, suite)
            print(f"{middle - start:.0f} s and {time.perf_counter() - middle:.0f} s")
            for name in names:
                theirs = [sample[str(length)] for sample in found[name]]
                mine = [r["score"] for r in ours.records if r["task"] == TASKS[name]]
                error = stdev(theirs + mine) * math.sqrt(2 / options.samples)
                difference = fmean(theirs) - fmean(mine)
                case = {"model": model_dir.name, "dtype": model.dtype, "part": "ruler"}
                results.add(
                    "harness",
                    case | {"task": name, "tokens": length, "samples": options.samples},
                    lm_eval=fmean(theirs), ours=fmean(mine), error_of_difference=error,
                    in_errors=abs(difference) / error if error else 0.0,
                )  # fmt: skip


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", type=Path, default=SMALL_MODEL)
    parser.add_argument("--only", nargs="+", default=["loglikelihood", "ruler"])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    options = parser.parse_args()
    results = Results(options)
    if "loglikelihood" in options.only:
        loglikelihood(results, options.model)
    if "ruler" in options.only:
        ruler_twice(results, options.model, options)


if __name__ == "__main__":
    main()
