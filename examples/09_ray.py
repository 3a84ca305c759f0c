"""RULER on a cluster, by Ray Data: shares of a run as rows, a model in each actor.

    python examples/09_ray.py --model DIR --lengths 4096 131072 --gpus 8 --out /shared/ruler-run
    python examples/09_ray.py                  # two actors on this machine's CPUs, small model

Needs pip install "ray[data]" and, with several machines, a folder that all of them see. There
are more shares than actors, so that who is fast takes more of them; each is written as it goes,
so that after any failure the same command asks only what is missing.
"""

import argparse
import os

import kimi_linear as kl
import ray
import ray.data

parser = argparse.ArgumentParser()
parser.add_argument("--model", metavar="DIR", help="a checkpoint; default: the small model")
parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], metavar="TOKENS")
parser.add_argument("--samples", type=int, default=4, help="of each task at each length")
parser.add_argument("--gpus", type=int, default=0, help="actors, a GPU each; 0: two on CPUs")
parser.add_argument("--out", default="ruler-run", metavar="DIR")
args = parser.parse_args()

suite = kl.evals.ruler.Suite(
    tasks=None if args.model else ["niah_single_1", "niah_multikey_1"],
    lengths=args.lengths,
    samples=args.samples,
)


class Share:
    """An actor: loads the model once, then answers share after share."""

    def __init__(self, directory, suite, out):
        # Ray shows an actor the GPUs that it reserved, so "auto" is its own.
        self.model = kl.load(directory, max_context=suite.max_context)
        self.suite, self.out = suite, out

    def __call__(self, share):
        results = kl.evals.run(self.model, self.suite, self.out, progress=False, **share)
        return {**share, "examples": len(results.records)}


n_actors = args.gpus or 2
shares = [{"rank": i, "world": 4 * n_actors} for i in range(4 * n_actors)]
ray.data.from_items(shares, override_num_blocks=len(shares)).map(
    Share,
    fn_constructor_args=(args.model, suite, os.path.abspath(args.out)),
    compute=ray.data.ActorPoolStrategy(size=n_actors),
    num_gpus=1 if args.gpus else None,
    num_cpus=None if args.gpus else 1,
).materialize()
print(kl.evals.report(kl.evals.merge(args.out)))
