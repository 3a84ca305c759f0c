"""The whole model with random weights made on the device: prefill, decode, memory, first calls.

    python benchmarks/bench_model.py --device cuda --shape 48b --dtype bf16
    python benchmarks/bench_model.py --device cuda --shape 48b --dtype int8 --only decode8k,prefill8k
    python benchmarks/bench_model.py --device cuda --kv-cache-dtype fp8 --only decode128k,decode1m
    python benchmarks/bench_model.py --device cuda --shape wide5 --only long     # a million tokens
    python benchmarks/bench_model.py --device cuda --shape 48b --only memory --max-context 1048576
    python benchmarks/bench_model.py --device cuda --shape 48b --only logprobs128k --router-skew 500
    python benchmarks/bench_model.py --device cuda --shape 48b --only steps,steps-b8 --router-skew 500
    python benchmarks/bench_model.py --shape small --no-write                    # seconds, anywhere

A prompt's time is that of `generate(prompt, max_new_tokens=1)`: what a caller waits for a first
token. A token's time is the median over blocks of 16 decode steps, 200 and a few in all, each the
wall time of what `generate` does, after every row has its context and its first tokens. Contexts
past 256K tokens together are not read for time's sake: latents of a short prompt, over and over, are
put in their place (`made_context`), in sequences of the caller's, whose steps never run ahead.
Floors come from model_floor.py and the rates that were measured on the device (common.py).
bench_step.py looks at the kernels of a decode case, too.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import model_floor
import numpy as np
import step_logits
from common import Results, rates
from common import arguments as common_arguments
from kimi_linear import _backends, _device
from kimi_linear._device import KV_CACHE_DTYPES
from kimi_linear._generation import Call, Past, Row
from kimi_linear._held import HeldSequence
from kimi_linear._sampling import Sampling, check_sampling
from kimi_linear.reference import log_softmax
from kimi_linear.testing import random_model
from random_checkpoint import SHAPES, shape

import kimi_linear as kl

TAIL = 128  # tokens whose log-probabilities are compared with those of single steps
STEPWISE = 0.03  # of their spread: twice what bf16 costs transformers' logits (parity.py)
STEPS, PIECE = 64, 22  # tokens that are fed one at a time; in pieces with a prompt's kernels
# How much further steps may be from the one call than its own kernels are in pieces, by the median
# of the tokens: where rounding decides between two ways, a single one can be far off. Each distance
# is that of two paths with rounding errors of their own: were these alike, both would be the same.
# A prompt's kernels round quantised weights to bf16, a step's do not, which leaves the steps no
# more than these have. Past 2 steps would have an error of their own that is larger than what
# rounding does to both.
FURTHER = 2
SAME = 1e-3  # of log-probabilities from the same logits: sums of a vocabulary in float32
SKEWED = 200  # from here on every token has the same experts
BLOCK = 16  # decode steps of a measured block: what generate() runs in a call of the core
KI = 1024
MOST_READ = 256 * KI  # tokens of context of all rows: more are made, not read
SOURCES, SOURCE_TOKENS = 8, 256  # prompts that made contexts are made of


@dataclass(frozen=True)
class Case:
    """A measurement: `tokens` of prompt for each of `batch` sequences."""

    name: str
    kind: str  # "calls", "prefill", "decode", "long", "logprobs", "memory", "steps"
    tokens: int = 0
    batch: int = 1
    made: bool = False  # the contexts are made, not read

    @property
    def sequences(self) -> int:
        """Those alive at once; the rows of "steps" are forks of one that stays."""
        return self.batch + (self.kind == "steps")


def decode_case(name: str, tokens: int = 0, batch: int = 1) -> Case:
    return Case(name, "decode", tokens, batch, made=tokens * batch > MOST_READ)


CASES = [  # the order of a run: what matters most comes first, up to LAST_UNNAMED
    Case("memory", "memory"),
    Case("calls", "calls", KI),
    decode_case("decode8k", 8 * KI),
    Case("prefill8k", "prefill", 8 * KI),
    decode_case("decode0"),
    decode_case("decode1k", KI),
    Case("prefill1k", "prefill", KI),
    decode_case("decode8k-b8", 8 * KI, 8),
    Case("prefill32k", "prefill", 32 * KI),
    decode_case("decode128k", 128 * KI),
    Case("prefill128k", "prefill", 128 * KI),
    decode_case("decode8k-b64", 8 * KI, 64),
    decode_case("decode1m", 1000 * KI),
    decode_case("decode8k-b32", 8 * KI, 32),
    decode_case("decode8k-b256", 8 * KI, 256),
    *(decode_case(f"decode1k-b{batch}", KI, batch) for batch in (8, 32, 64, 256)),
    Case("long", "long", 1_000_000),
    Case("logprobs128k", "logprobs", 128 * KI),
    Case("steps", "steps", 250),  # no whole chunks of KDA: what goes on there begins one
    Case("steps-b8", "steps", 250, 8),
]
LAST_UNNAMED = "decode8k-b64"  # later ones run where --only asks for them
SMALLER = 64  # the shape "small" divides prompts by this


class Bench:
    """One model, and the lines about it."""

    def __init__(self, options: argparse.Namespace, cases: list[Case]) -> None:
        self.start, self.options, self.cases = time.perf_counter(), options, cases
        if options.step_tokens:
            with_step_tokens(options.step_tokens)
        self.config = shape(options.shape)
        self.results = Results(options, options.device)
        self.rates = rates(self.results.device)
        self.case = {"model": options.shape, "dtype": options.dtype, "weights": "random"}
        self.router = "skewed" if options.router_skew >= SKEWED else "balanced"
        if options.batch_invariant:
            self.case["batch_invariant"] = True
        if options.kv_cache_dtype != "auto":
            self.case["kv_cache_dtype"] = options.kv_cache_dtype
        self.random = np.random.default_rng(0)
        self.failed = False
        self.model = self.construct()

    # ---- the model -----------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        """max_context, max_batch and cache_bytes that hold the largest case and no more."""
        options = self.options
        how = {n: getattr(options, n) for n in ("device", "dtype", "kv_cache_dtype")}
        longest = max([64, *(c.tokens for c in self.cases)])
        plan = kl.plan(self.config, max_context=longest, max_batch=1, **how)
        self.step_tokens = plan.step_tokens
        batch = max(c.sequences for c in self.cases)
        context = max(c.tokens + self.new_tokens(c) for c in self.cases)
        context = options.max_context or context
        pages = max(c.sequences * (c.tokens + self.new_tokens(c) + 64) for c in self.cases)
        kept = max(2, -(-batch // 4))  # states that a plan keeps for prompts that begin alike
        cache = (batch + kept) * plan.kda_state_per_sequence
        cache += max(pages, context + 64) * plan.mla_page_per_token
        return dict(max_context=context, max_batch=batch, cache_bytes=cache + (1 << 20))

    def new_tokens(self, case: Case) -> int:
        """Those that are measured, and what early rows of a batch get while others are read."""
        if case.kind not in ("decode", "long"):
            return BLOCK + STEPS * (case.kind == "steps")
        # The tokens of the rows that are done with theirs leave a little less room in a step.
        steps = -(-case.tokens // self.step_tokens) + 1
        waiting = case.batch * steps if case.batch > 1 and not case.made else 0
        return waiting + case.batch + 2 * BLOCK * (self.options.blocks + 2)

    def construct(self) -> kl.Model:
        options = self.options
        how = dict(device=options.device, batch_invariant=options.batch_invariant)
        with random_model(dtype=options.dtype, max_context=64, **how) as tiny:
            tiny.generate([1, 2, 3], max_new_tokens=3, progress=False)  # libraries and contexts
        sizes = self.sizes()
        before, start = self.free_bytes(), time.perf_counter()
        how |= {n: getattr(options, n) for n in ("dtype", "kv_cache_dtype", "router_skew")}
        model = random_model(self.config, **how, **sizes)
        model.logits([1])
        seconds = time.perf_counter() - start
        self.told(f"{model.plan.line()}, made in {seconds:.1f} s")
        expected = model_floor.weight_bytes(self.config, options.dtype)
        if abs(model.plan.weights / expected - 1) > 0.01:
            sys.exit(f"weights: {model.plan.weights} planned, model_floor.py says {expected:.0f}")
        self.sizes_made, self.seconds_made, self.free_before = sizes, seconds, before
        self.used_bytes = before - self.free_bytes()
        return model

    def free_bytes(self) -> int:
        return _backends.shared(self.options.device).info()["free_bytes"]

    def told(self, text: str) -> None:
        print(f"# {time.perf_counter() - self.start:6.1f} s  {text}", file=sys.stderr, flush=True)

    def ids(self, n: int) -> np.ndarray:
        return self.random.integers(3, self.config.vocab_size - 300, n).astype(np.int32)

    def seconds(self, fn: Callable[[], object]) -> float:
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start

    # ---- cases ---------------------------------------------------------------------------

    def run(self) -> None:
        for case in self.cases:
            if time.perf_counter() - self.start > self.options.seconds:
                self.told(f"{case.name}: no time left")
                continue
            try:
                getattr(self, case.kind)(case)
            except (kl.KimiLinearError, ValueError) as e:  # the other cases are worth having
                self.failed = True
                self.told(f"{case.name} failed: {type(e).__name__}: {e}")
        if self.options.device == "cuda":
            self.given_back()

    def calls(self, case: Case) -> None:
        """Whether anything is compiled or tuned on the way: the second call against the tenth."""
        prompts = [self.ids(case.tokens) for _ in range(10)]
        ms = [1e3 * self.seconds(lambda p=p: self.generate(p, 16)) for p in prompts]
        self.results.add("calls", self.case | {"tokens": case.tokens, "new_tokens": 16},
                         first_ms=ms[0], second_ms=ms[1], tenth_ms=ms[9], ms=ms)  # fmt: skip

    def generate(self, prompt: np.ndarray, n: int) -> object:
        return self.model.generate(prompt, max_new_tokens=n, ignore_eos=True, progress=False)

    def prefill(self, case: Case) -> None:
        self.generate(self.ids(min(case.tokens, 2 * self.step_tokens)), 1)
        times = [self.seconds(lambda: self.generate(self.ids(case.tokens), 1))
                 for _ in range(3 if case.tokens <= 32 * KI else 1)]  # fmt: skip
        self.add_prefill(case.tokens, statistics.median(times), len(times))

    def add_prefill(self, tokens: int, seconds: float, runs: int) -> None:
        extra = {}
        if self.rates:
            floor = model_floor.prefill_floor(
                self.rates, self.config, self.options.dtype, tokens
            )
            extra = {"floor_tok_s": tokens / floor, "share": floor / seconds}
        self.results.add("prefill", self.case | {"tokens": tokens}, tok_s=tokens / seconds,
                         first_token_ms=1e3 * seconds, step_tokens=self.step_tokens, runs=runs,
                         **extra)  # fmt: skip

    def decode(self, case: Case) -> float:
        """Returns the seconds until every row had its context."""
        sampling = check_sampling(self.config.vocab_size, (), ignore_eos=True,
                                  max_new_tokens=self.new_tokens(case))  # fmt: skip
        start, held = time.perf_counter(), []
        if case.made:
            held = self.made(case)
            rows = [self.continued(h, case.tokens, sampling, i) for i, h in enumerate(held)]
        else:
            prompts = [self.ids(max(case.tokens, 1)) for _ in range(case.batch)]
            rows = self.model._rows(prompts, sampling)
        # What generate() does, a step at a time.
        run = self.model._run(rows)
        try:
            begun: set[int] = set()
            while len(begun) < case.batch:
                begun |= {row.id for row, _ in run.step(1, None)}
            read_s = time.perf_counter() - start
            self.tokens(run, case, BLOCK)
            blocks = [self.tokens(run, case, BLOCK) for _ in range(self.options.blocks)]
            self.add_decode(case, blocks, read_s)
            self.look(run, case)
        finally:
            run.close()
            for h in held:
                h.release()
        return read_s

    def look(self, run, case: Case) -> None:  # noqa: ANN001
        """What else is measured of a case's steps: nothing here."""

    def tokens(self, run, case: Case, n: int) -> float:  # noqa: ANN001
        """Seconds a step: n steps of each row, or a few more; a call brings a limited number of
        tokens, not always whole steps."""
        tokens, start = 0, time.perf_counter()
        while tokens < n * case.batch:
            found = len(run.step(BLOCK, None))
            if found == 0:
                raise ValueError(f"{tokens} tokens and no more, {n * case.batch} asked for")
            tokens += found
        return (time.perf_counter() - start) * case.batch / tokens

    def continued(self, held: HeldSequence, tokens: int, sampling: Sampling, index: int) -> Row:
        """A row that goes on from a sequence of so many tokens."""
        past = Past(held.seq, np.empty(tokens, np.int32), in_place=True)
        return Row(self.ids(1), sampling, Call(self.model.plan, None, past), index)

    def made(self, case: Case) -> list[HeldSequence]:
        """Sequences with states and latents of short prompts, the latents over and over."""
        engine, sources = self.model._open_engine(), []
        for _ in range(min(case.batch, SOURCES)):
            with self.model.state() as state:
                held = state.feed(self.ids(SOURCE_TOKENS))._get()
                image = np.empty(engine.image_bytes(SOURCE_TOKENS), np.uint8)
                engine.seq_read_image(held.sequence.seq, 0, image)
                sources.append(image)
        made = []
        for i in range(case.batch):
            held = HeldSequence(engine, engine.seq_restore, (case.tokens,))
            made.append(held)
            self.write(held, sources[i % len(sources)], case.tokens)
        return made

    def write(self, held: HeldSequence, source: np.ndarray, tokens: int) -> None:
        engine, (_, n_mla) = held.engine, model_floor.layers(self.config)
        states = engine.image_bytes(0)
        rows = source[states:].reshape(n_mla, -1)  # the latents of a layer
        engine.seq_write_image(held.seq, 0, source[:states])
        row = rows.shape[1] // SOURCE_TOKENS
        piece = 64 * SOURCE_TOKENS
        for layer in range(n_mla):
            many = np.tile(rows[layer], 64)
            for first in range(0, tokens, piece):
                n = min(piece, tokens - first)
                at = states + (layer * tokens + first) * row
                engine.seq_write_image(held.seq, at, many[: n * row])

    def decode_line(self, case: Case) -> dict:
        made = {"made_context": True} if case.made else {}
        return self.case | {"context": case.tokens, "batch": case.batch,
                            "router": self.router} | made  # fmt: skip

    def step_of(self, case: Case) -> model_floor.Step:
        skewed = self.router == "skewed"
        return model_floor.Step(
            self.config, self.options.dtype, case.batch, case.tokens, skewed,
            self.options.kv_cache_dtype,
        )  # fmt: skip

    def add_decode(self, case: Case, blocks: list[float], read_s: float) -> None:
        median, nbytes = statistics.median(blocks), self.step_of(case).bytes()
        extra = {}
        if self.rates:
            floor = nbytes / self.rates[0]
            extra = {"floor_ms": 1e3 * floor, "share": floor / median}
        self.results.add(
            "decode", self.decode_line(case),
            ms_per_token=1e3 * median, **extra, tok_s=case.batch / median,
            mean_ms=1e3 * statistics.mean(blocks), best_ms=1e3 * min(blocks),
            worst_ms=1e3 * max(blocks), blocks=len(blocks), mbytes_per_step=nbytes / 1e6,
            context_s=read_s,
        )  # fmt: skip

    def long(self, case: Case) -> None:
        """A context of a million tokens, read for real and continued."""
        self.add_prefill(case.tokens, self.decode(case), 1)

    def logprobs(self, case: Case) -> None:
        """Log-probabilities of a long text: what they take beyond the plan, and how far those of
        its end are from what single steps say. With random weights and a balanced router rounding
        alone gives many a token another expert, so only a skewed one's are held to anything."""
        ids = self.ids(case.tokens)
        self.model.logprobs(ids[: 2 * self.step_tokens], top=5)
        before, looks = self.taken(), []

        def look(*_progress: int) -> None:
            looks.append([now - then for now, then in zip(self.taken(), before, strict=True)])

        start = time.perf_counter()
        found = self.model.logprobs(ids, top=5, progress=look)
        seconds = time.perf_counter() - start
        device_bytes, host_bytes = map(max, zip(*looks, strict=True))
        difference = found.logprobs[-TAIL:] - self.stepwise(ids)
        rms = float(np.sqrt(np.mean(difference**2)) / found.logprobs[-TAIL:].std())
        self.results.add(
            "logprobs", self.case | {"tokens": case.tokens, "top": 5, "router": self.router},
            seconds=seconds, tok_s=case.tokens / seconds, extra_device_bytes=device_bytes,
            extra_host_bytes=host_bytes, workspace_bytes=self.model.plan.workspace,
            stepwise_rms=rms,
        )  # fmt: skip
        self.failed |= device_bytes >= 1e9 or host_bytes >= 1e9
        self.failed |= self.router == "skewed" and not rms < STEPWISE

    def taken(self) -> tuple[int, int]:
        """Bytes that are not to be had on the device, and those of this process on the host."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        device = 0 if self.options.device == "cpu" else -self.free_bytes()
        return device, pages * os.sysconf("SC_PAGE_SIZE")

    def stepwise(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of the last TAIL tokens, each fed by a step of its own."""
        found = []
        with self.model.state().feed(ids[:-TAIL]) as state:
            for token in ids[-TAIL:]:
                found.append(log_softmax(state.logits().astype(np.float64))[token])
                state.feed([int(token)])
        return np.array(found)

    def steps(self, case: Case) -> None:
        """How far the logits of steps of a token (of each row) are from those of a prompt's kernels,
        which read the same tokens in one call, and how far these are from themselves in pieces.
        Recorded steps draw the tokens; enqueued ones, whose logits cross the host, must agree with
        them. With random weights only a skewed router's distance is held to anything."""
        engine = self.model._open_engine()
        with self.model.state().feed(self.ids(case.tokens)) as state:
            first = [[int(i)] for i in self.ids(case.batch)]
            drawn = state.generate(
                first, max_new_tokens=STEPS, ignore_eos=True, logprobs=0, progress=False
            )
            fed = [f + c.token_ids[:-1] for f, c in zip(first, drawn, strict=True)]
            seq = state._get().sequence.seq
            steps = step_logits.in_steps(engine, seq, fed)
            pieces = np.stack([step_logits.in_pieces(engine, seq, row, PIECE) for row in fed])
            texts = [[*state.token_ids, *row] for row in fed]
            whole = np.stack([step_logits.at_once(engine, text)[-STEPS:] for text in texts])
        recorded = max(map(step_logits.of_recorded, steps, drawn))
        far, usual = (step_logits.distance(z, whole) for z in (steps, pieces))
        self.results.add(
            "step_logits", self.case | {"context": case.tokens, "batch": case.batch,
                                        "router": self.router, "steps": STEPS},
            of_steps=far, of_pieces=usual, recorded=recorded,
        )  # fmt: skip
        self.failed |= not recorded < SAME
        if self.router == "skewed" and self.options.shape != "small":
            self.failed |= not far["median"] <= FURTHER * usual["median"]

    def memory(self, _case: Case) -> None:
        """Construction, and what it took against its plan."""
        plan = self.model.plan
        made = self.case | {"bytes": plan.weights, "storage": "made on the device"}
        self.results.add("load", made, seconds=self.seconds_made)
        self.results.add("memory", self.case | self.sizes_made, plan_bytes=plan.total,
                         used_bytes=self.used_bytes, ratio=self.used_bytes / plan.total)  # fmt: skip

    def given_back(self) -> None:
        self.told(f"{self.free_bytes() / 2**30:.2f} GiB free after the run")
        self.model.close()
        before, now = self.free_before, self.free_bytes()
        self.told(f"{now / 2**30:.2f} GiB free after close(), {before / 2**30:.2f} before")


def with_step_tokens(n: int) -> None:
    """Plan for steps of so many tokens in place of the planner's choice: to try others."""
    core = _device.Options.core
    _device.Options.core = lambda self, dtype: core(self, dtype) | {"step_tokens": n}


def chosen(options: argparse.Namespace) -> list[Case]:
    names = [c.name for c in CASES]
    wanted = options.only.split(",") if options.only else names[: names.index(LAST_UNNAMED) + 1]
    if unknown := [n for n in wanted if n not in names]:
        sys.exit(f"--only: {unknown[0]} is none of {', '.join(names)}")
    cases = [c for c in CASES if c.name in wanted]
    if options.shape != "small":
        return cases
    return [replace(c, tokens=c.tokens // SMALLER) for c in cases]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of a model and of how long it is measured."""
    parser = common_arguments(description)
    parser.add_argument("--shape", default="48b", choices=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=list(model_floor.BITS))
    parser.add_argument("--seconds", type=float, default=300, help="begin no case after these")
    parser.add_argument("--blocks", type=int, default=13, help="of 16 decode steps, measured")
    parser.add_argument("--max-context", type=int, default=0, help="at least what cases need")
    parser.add_argument("--router-skew", type=float, default=1, help="random_model()'s")
    parser.add_argument("--batch-invariant", action="store_true", help="its cost")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    parser.add_argument("--step-tokens", type=int, default=0, help="in place of the planner's")
    return parser


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="cases, with commas: " + ", ".join(
        c.name for c in CASES))  # fmt: skip
    options = parser.parse_args()
    bench = Bench(options, chosen(options))
    bench.run()
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
