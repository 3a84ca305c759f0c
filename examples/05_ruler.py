"""RULER: score against length, in a run that can be killed and taken up again.

    python examples/05_ruler.py [DIR [LENGTH ...]]

DIR is a checkpoint directory, with which all tasks are run, 20 samples each, up to the longest
LENGTH; without it the small model inside the package answers three samples of three tasks.
Started by torchrun, Slurm or mpirun, each process takes its share of the samples.
"""

import sys

import kimi_linear as kl

directory, *lengths = sys.argv[1:] or [None]
suite = kl.evals.ruler.Suite(
    tasks=None if directory else ["niah_single_1", "niah_multikey_1", "niah_multiquery"],
    lengths=[int(n) for n in lengths] or [512, 1024],
    samples=20 if directory else 3,
    prefix="prefill",  # chat format, the answer's beginning given; "raw" for a base model
)  # fmt: skip

with kl.load(directory, max_context=suite.max_context) as model:
    # Answers are in ruler-run/ as soon as they are given: the same call goes on from there.
    results = kl.evals.run(model, suite, "ruler-run", progress=True)
    print(results)

    print("\nwhere the needles stood, and what was said")
    for record in results.records[:6]:
        mark = "right" if record["score"] == 1 else "WRONG"
        depth, answer = record["depth"], record["answer"]
        print(f"  {record['id']:24} depth {depth:.0%}  {mark} {answer!r:.60}")

    print("\na task of one's own: two queries among six keys, in noise")
    mine = kl.evals.ruler.Niah("mine", "noise", n_keys=6, n_queries=2)
    suite = kl.evals.ruler.Suite(tasks=[mine], lengths=[512], samples=3)
    print(kl.evals.run(model, suite).rows[0])
