"""RULER: score against length, in a run that can be killed and taken up again.

    python examples/05_ruler.py                      # the small model, three tasks, seconds
    python examples/05_ruler.py --model DIR --lengths 4096 32768 131072 --samples 50
    torchrun --nproc-per-node 8 examples/05_ruler.py --model DIR

Answers are in the folder --out as soon as they are given: the same command goes on from there.
Started by torchrun, Slurm or mpirun, each process takes a GPU of its own and its share of the
samples; the last to end prints the whole table, and `kimi-linear eval report DIR` does later.
"""

import argparse

import kimi_linear as kl

parser = argparse.ArgumentParser()
parser.add_argument("--model", metavar="DIR", help="a checkpoint; default: the small model")
parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS")
parser.add_argument("--samples", type=int, help="of each task at each length")
parser.add_argument("--haystack", metavar="FILE", help="prose; default: a grammar's")
parser.add_argument("--squad", metavar="FILE", help="dev-v2.0.json, for qa_1")
parser.add_argument("--hotpot", metavar="FILE", help="hotpot_dev_distractor_v1.json, for qa_2")
parser.add_argument("--prefix", default="prefill", help="raw for a base model")
parser.add_argument("--out", default="ruler-run", metavar="DIR")
args = parser.parse_args()

suite = kl.evals.ruler.Suite(
    # The small model was trained on needles; all tasks whose files are given with a checkpoint.
    tasks=None if args.model else ["niah_single_1", "niah_multikey_1", "niah_multiquery"],
    lengths=args.lengths or ([4096, 32768, 131072] if args.model else [512, 1024]),
    samples=args.samples or (20 if args.model else 3),
    haystack=args.haystack,
    squad=args.squad,
    hotpot=args.hotpot,
    prefix=args.prefix,
)
device = kl.evals.local_device()
with kl.load(args.model, device=device, max_context=suite.max_context) as model:
    results = kl.evals.run(model, suite, args.out, progress=True)
print(kl.evals.report(results))

print("\nwhere the needles stood, and what was said")
for record in [r for r in results.records if "depth" in r][:6]:
    mark = "right" if record["score"] == 1 else "WRONG"
    depth, answer = record["depth"], record["answer"]
    print(f"  {record['id']:24} depth {depth:.0%}  {mark} {answer!r:.60}")
