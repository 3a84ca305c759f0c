"""Fail the k-th allocation of the C core, for every k, while a model loads, generates and
keeps states.

    python fault_loop.py FOLDER        with _core built under -DKL_FAULT_INJECTION

Each failure must be a MemoryError and leave nothing behind; what follows it must work. Prints
the number of failures of each stage, so that a loop over nothing would show.
"""

import gc
import sys

import numpy as np

import kimi_linear as kl
from kimi_linear import _core, testing


def load(folder, max_batch=2):
    return kl.load(
        folder, device="cpu", dtype="int8", max_context=256, max_batch=max_batch, progress=False
    )


def use(model):
    out = model.generate(
        [[1, 2, 3], list(range(4, 90))], max_new_tokens=3, logprobs=2, repetition_penalty=1.3
    )
    pairs = [([5, 6, *range(70)], [7]), ([5, 6, *range(70)], [8]), ([5], [7, 8])]
    found = model.logprobs([5, 6, 7], top=2).logprobs.tolist()
    return [c.token_ids for c in out], found, model.score_pairs(pairs)


def share(model):
    """Prompts that begin alike, at once and again."""
    prompts = [[*range(4, 90), *range(k, 150)] for k in (20, 60, 90)]
    out = [model.generate(prompts[k:], max_new_tokens=1) for k in (0, 2)]
    return [c.token_ids for c in (*out[0], *out[1])]


def operations():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((20, 2, 8), np.float32) for _ in range(4))
    beta = np.full((20, 2), 0.5, np.float32)
    kl.ops.kda_prefill(q, k, v, -abs(g), beta, cu_seqlens=np.array([0, 7, 20]))
    packed = kl.ops.quantize(rng.standard_normal((9, 70), np.float32), "int4")
    kl.ops.linear(rng.standard_normal((3, 70), np.float32), packed)
    kl.ops.mla_prefill(q, rng.standard_normal((20, 10), np.float32),
                       rng.standard_normal((2, 12, 6), np.float32))  # fmt: skip


def keep(model, file):
    """A state fed, forked, continued in a batch, saved, loaded and scored."""
    with model.state() as s:
        s.feed(list(range(4, 90))).save(file)
        first = s.fork().generate([1, 2], max_new_tokens=2, repetition_penalty=1.2).token_ids
        s.generate(max_new_tokens=2)
        with kl.State.load(file, model) as t:
            rows = t.generate([[1, 2], [3]], max_new_tokens=2)
            return first, [r.token_ids for r in rows], t.score([5, 6]), s.token_ids


def serve(model):
    """Requests on an engine, one with alternatives and a penalty."""
    with kl.Engine(model) as engine:
        one = engine.submit([1, 2, 3], max_new_tokens=4, logprobs=3, repetition_penalty=1.3)
        rows = engine.generate([list(range(4, 90)), [7]], max_new_tokens=3)
        return one.result().token_ids, [r.token_ids for r in rows]


def fail_each(action, stage):
    """Run `action` with its k-th allocation failing, k = 1, 2, ..., until none fails."""
    k = 0
    while True:
        k += 1
        _core.fault_arm(k)
        try:
            action()
        except MemoryError:
            continue
        finally:
            reached = _core.fault_count()
            _core.fault_arm(0)
            gc.collect()
        assert reached < k, f"{stage}: allocation {k} failed and nobody noticed"
        print(f"{stage}: {k - 1} failures")
        return


def main():
    folder = sys.argv[1]
    testing.write_checkpoint(folder, testing.tiny_config(), seed=1, dtype="bf16")
    with load(folder) as model:
        want = use(model)

    def load_once():
        load(folder).close()

    fail_each(load_once, "load")
    fail_each(operations, "operations")
    with load(folder) as model:
        fail_each(lambda: use(model), "generate")
        assert use(model) == want, "the model no longer gives what it gave"
        want_shared = share(model)
        model.prefix_cache = True
        fail_each(lambda: share(model), "prefixes")
        assert share(model) == want_shared and model._engine.usage() == (0, 0)
        assert model.generate(list(range(4, 90)), max_new_tokens=1).stats.cached_tokens == 64
        model.clear_prefix_cache()
        assert model._engine.prefix_stats()["bytes"] == 0
    with load(folder, max_batch=4) as model:
        file = f"{folder}/s.klstate"
        want_kept = keep(model, file)
        fail_each(lambda: keep(model, file), "states")
        assert keep(model, file) == want_kept and model._engine.usage() == (0, 0)
    with load(folder) as model:
        want_served = serve(model)
        fail_each(lambda: serve(model), "engine")
        assert serve(model) == want_served and model._engine.usage() == (0, 0)


if __name__ == "__main__":
    main()
