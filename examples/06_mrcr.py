"""MRCR: give back the i-th of several like answers of a long conversation.

    python examples/06_mrcr.py [DIR [FILE ...]]

FILEs are OpenAI's (2needle.parquet, ...) or Google's (CSV), which you download; without them
the conversations are made here, and without DIR the small model inside the package answers.
"""

import sys

import kimi_linear as kl

mrcr = kl.evals.mrcr
directory, *files = sys.argv[1:] or [None]
if files:
    suite = mrcr.Suite(files, lengths=[8192, 16384, 32768, 65536, 131072])
elif directory:
    suite = mrcr.Synth(lengths=[8192, 32768, 131072], samples=20)
else:  # short texts like those that the small model was trained on
    suite = mrcr.Synth(lengths=[768], samples=4, needles=[2, 4], questions=2, n_sentences=1)

with kl.load(directory, max_context=suite.max_context) as model:
    results = kl.evals.run(model, suite, "mrcr-run", progress=True)

# The floor is the score of an answer taken at random among those to the same request: a model
# near it finds the group, and does not count.
print(results)

print("\nan answer")
record = min(results.records, key=lambda r: r["score"])
print("  asked for", repr(record["references"][0])[:90])
print("  got      ", repr(record["answer"])[:90])

print("\nthe graders differ: OpenAI's wants the code first, Google's takes the last one")
code, text = "aB3dE6gH9jK2", "A poem about the fox."
for answer in (code + text, f"Sure: {code} {text}", text):
    openai = mrcr.grade_openai(answer, code + text, code)
    print(f"  {answer!r:48} {openai:.2f} {mrcr.grade_google(answer, code + text):.2f}")
