"""MRCR: give back the i-th of several like answers of a long conversation.

    python examples/06_mrcr.py                       # the small model, conversations made here
    python examples/06_mrcr.py --model DIR --data 2needle.parquet 4needle.parquet 8needle.parquet
    torchrun --nproc-per-node 8 examples/06_mrcr.py --model DIR --lengths 8192 131072

--data are OpenAI's files (parquet or jsonl) or Google's (CSV), which you download; without them
conversations are made here (mrcr-synth). Killed, the same command goes on; started by torchrun,
Slurm or mpirun, each process takes a GPU of its own and its share.
"""

import argparse

import kimi_linear as kl

parser = argparse.ArgumentParser()
parser.add_argument("--model", metavar="DIR", help="a checkpoint; default: the small model")
parser.add_argument("--data", nargs="+", metavar="FILE")
parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="ends of the bins")
parser.add_argument("--samples", type=int, default=20, help="of each number of needles")
parser.add_argument("--out", default="mrcr-run", metavar="DIR")
args = parser.parse_args()

mrcr = kl.evals.mrcr
lengths = args.lengths or [8192, 32768, 131072]
if args.data:
    suite = mrcr.Suite(args.data, lengths=lengths, samples=args.samples)
elif args.model:
    suite = mrcr.Synth(lengths=lengths, samples=args.samples)
else:  # short texts like those that the small model was trained on
    suite = mrcr.Synth(lengths=[768], samples=4, needles=[2, 4], questions=2, n_sentences=1)

device = kl.evals.local_device()
with kl.load(args.model, device=device, max_context=suite.max_context) as model:
    results = kl.evals.run(model, suite, args.out, progress=True)

# The floor is the score of an answer taken at random among those to the same request: a model
# near it finds the group, and does not count.
print(kl.evals.report(results))

print("\nthe worst answer")
record = min(results.records, key=lambda r: r["score"])
print("  asked for", repr(record["references"][0])[:90])
print("  got      ", repr(record["answer"])[:90])

print("\nthe graders differ: OpenAI's wants the code first, Google's takes the last one")
code, text = "aB3dE6gH9jK2", "A poem about the fox."
for answer in (code + text, f"Sure: {code} {text}", text):
    openai = mrcr.grade_openai(answer, code + text, code)
    print(f"  {answer!r:48} {openai:.2f} {mrcr.grade_google(answer, code + text):.2f}")
