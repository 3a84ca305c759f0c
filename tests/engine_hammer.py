"""Threads and event loops at one engine for a while, doing whatever callers may do.

    python engine_hammer.py SECONDS [SEED]        # odd seeds: with the prefix cache

Every answer is compared with what the model gives alone. Run under ThreadSanitizer by
test_sanitized.py; five minutes by hand: tests/README.md. Prints what was done.
"""

import asyncio
import random
import sys
import threading
import time
from collections import Counter

import kimi_linear as kl
from kimi_linear import testing

LONGEST = 200  # max_context
N_KINDS = 12
LEAST = 50  # calls, however long a busy machine takes


def kinds():
    """Prompts and samplings: (prompt, arguments of generate)."""
    rng = random.Random(0)
    for i in range(N_KINDS):
        n = rng.choice([1, 5, 63, 64, 65, 130])
        options = dict(max_new_tokens=rng.randint(1, 12), seed=i, ignore_eos=True)
        if i % 3:
            options |= dict(temperature=1.0, top_p=0.9)
        if i % 4 == 1:
            options |= dict(repetition_penalty=1.2)
        if i % 4 == 2:
            options |= dict(logprobs=i)
        if i % 6 == 3:
            options |= dict(logits_processor=lambda ids, logits: logits * 0.5)
        yield [rng.randrange(256) for _ in range(n)], options


class Hammer:
    def __init__(self, model, seconds, seed):
        self.model, self.seed = model, seed
        self.kinds = list(kinds())
        self.want = [model.generate(p, **o).token_ids for p, o in self.kinds]
        self.logprobs = model.logprobs([1, 2, 3]).logprobs.tolist()
        self.engine = kl.Engine(model, max_waiting=40)
        self.end = time.monotonic() + seconds
        self.done = Counter()
        self.errors = []

    def submit(self, rng):
        i = rng.randrange(N_KINDS)
        prompt, options = self.kinds[i]
        while True:
            try:
                return i, self.engine.submit(prompt, **options)
            except kl.EngineFull:
                self.done["full"] += 1
                time.sleep(0.01)

    def check(self, i, token_ids, *, whole=True):
        want = self.want[i] if whole else self.want[i][: len(token_ids)]
        assert token_ids == want, (i, token_ids, want)

    # ---- what a thread may do ------------------------------------------------------------

    def result(self, rng):
        i, request = self.submit(rng)
        self.check(i, request.result(60).token_ids)

    def iterate(self, rng):
        i, request = self.submit(rng)
        self.check(i, [chunk.token_id for chunk in request])

    def cancel(self, rng):
        i, request = self.submit(rng)
        time.sleep(rng.random() * 0.02)
        request.cancel()
        answer = request.result(60)
        self.check(i, answer.token_ids, whole=answer.finish_reason != "cancelled")

    def callback(self, rng):
        i, request = self.submit(rng)
        called = threading.Event()
        request.add_done_callback(lambda r: (r.cancel(), called.set()))
        assert called.wait(60) and request.done()
        self.check(i, request.result().token_ids)

    def fail(self, rng):
        def process(ids, logits):
            if len(ids) > 3:
                raise LookupError("enough")

        request = self.engine.submit([1, 2], logits_processor=process, ignore_eos=True)
        assert isinstance(request.exception(60), LookupError)

    def batch(self, rng):
        prompt, options = self.kinds[0]
        for answer in self.engine.generate([prompt] * 3, **options):
            self.check(0, answer.token_ids)

    def several(self, rng):
        async def one():
            i, request = self.submit(rng)
            if rng.random() < 0.3:
                try:
                    await asyncio.wait_for(request, 0.005)
                except TimeoutError:
                    assert request.result(60).finish_reason in ("cancelled", "length")
                return
            self.check(i, [chunk.token_id async for chunk in request])
            self.check(i, (await request).token_ids)

        async def main():
            await asyncio.gather(*(one() for _ in range(4)))

        asyncio.run(main())

    def beside(self, rng):
        """Calls on the model between the steps."""
        try:
            assert self.model.logprobs([1, 2, 3]).logprobs.tolist() == self.logprobs
        except kl.OutOfMemory:  # requests have every sequence
            self.done["no sequence"] += 1

    def look(self, rng):
        stats = self.engine.stats()
        assert 0 <= stats.running <= self.model.plan.max_batch and stats.waiting >= 0
        repr(self.engine)

    # ---- the run -------------------------------------------------------------------------

    def work(self, number):
        rng = random.Random(self.seed * 1000 + number)
        actions = [self.result, self.iterate, self.cancel, self.callback, self.fail,
                   self.batch, self.several, self.beside, self.look]  # fmt: skip
        try:
            while not self.errors and (time.monotonic() < self.end or self.done.total() < LEAST):
                action = rng.choice(actions)
                action(rng)
                self.done[action.__name__] += 1
        except BaseException as e:
            self.errors.append(e)
            raise

    def run(self):
        self.model.prefix_cache = self.seed % 2 == 1
        threads = [threading.Thread(target=self.work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.engine.close()
        self.model.prefix_cache = False
        assert not self.errors, self.errors
        assert self.model._engine.usage() == (0, 0)


def main():
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    how = dict(device="cpu", dtype="f32", max_batch=7, max_context=LONGEST)
    with testing.random_model(testing.tiny_config(), **how) as model:
        hammer = Hammer(model, seconds, seed)
        hammer.run()
        print(dict(sorted(hammer.done.items())))


if __name__ == "__main__":
    main()
