"""The model: load a checkpoint, continue text; inspection.py looks inside."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from . import _core
from ._device import Choice, check_options, choose, require_fit
from ._files import quote
from ._generation import Call, Past, Row, Run
from ._progress import Callback, Progress
from ._prompts import prompt_rows
from ._sampling import LogitsProcessor, Sampling, SamplingOptions, check_sampling
from .checkpoint import Checkpoint
from .config import KimiLinearConfig
from .errors import TokenizerError
from .inspection import Inspection
from .memory import MemoryPlan, Report, gib
from .results import Chunk, Completion
from .state import State
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

SMALL_MODEL = Path(__file__).parent / "small_model"  # what load() takes without a path
STEPS_PER_CALL = 16  # steps of a call into the core, where no one waits for each token


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_context: int | None = None,
    max_batch: int | None = None,
    cache_bytes: int | None = None,
    kv_cache_dtype: str = "auto",
    batch_invariant: bool = False,
    progress: bool | Callback | None = None,
) -> "Model":
    """Load a model.

    path: a directory with config.json, safetensors files and tiktoken.model, a Hub name where
    huggingface_hub is installed, or None: the small trained model inside the package
    (small_model/README.md says what it can do). device: "cpu", "cuda", "cuda:N", or "auto": CUDA
    where it works and the weights fit. dtype: storage of the big matrices, "bf16", "f32" (CPU),
    "int8", "int4", "fp8" (CUDA), or "auto": the checkpoint's, else the widest that fits.
    max_context: tokens of one sequence; max_batch: sequences alive at once, by default 8, on
    CUDA 32; cache_bytes: memory of their states and pages. Context and cache are chosen from what
    is free by default. kv_cache_dtype: storage of the latents that attention reads, "auto": as
    the activations, f32 for dtype "f32", else bf16; "fp8": 8 bits, a little more than half of
    bf16's memory, for long contexts (KDA states are f32 always). batch_invariant: results do not
    depend on the batch (always so on the CPU). progress: None, True, False or
    callable(done_bytes, total_bytes).

    Raises ConfigError, WeightsError or TokenizerError for a bad directory, OutOfMemory with the
    figures, DeviceError, OSError.
    """
    options = check_options(
        device, dtype, max_context, max_batch, cache_bytes, batch_invariant, kv_cache_dtype
    )
    reporter = Progress(progress, "weights", "B")
    with Checkpoint(_directory(path)) as checkpoint:
        sources = checkpoint.sources()
        tokenizer = _read_tokenizer(checkpoint)
        choice = require_fit(choose(checkpoint.config, checkpoint.dtype, options))
        if reporter.shows:
            print(choice.plan.line(), file=sys.stderr)
        engine = _core.Engine(
            choice.backend, checkpoint.config.to_core(), options.core(choice.dtype)
        )
        try:
            with reporter as callback:
                unused = engine.load(checkpoint.fds, sources, callback)
            checkpoint.check_unchanged()
        except BaseException:
            engine.close()
            raise
        notes = (f"{unused} tensors of the checkpoint are not used",) if unused else ()
        return Model(
            checkpoint.config,
            engine,
            choice,
            tokenizer,
            checkpoint.path,
            notes,
            checkpoint.fingerprint(),
        )


def plan(
    path: str | Path | KimiLinearConfig | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_context: int | None = None,
    max_batch: int | None = None,
    cache_bytes: int | None = None,
    kv_cache_dtype: str = "auto",
    batch_invariant: bool = False,
    progress: bool | Callback | None = None,
) -> MemoryPlan:
    """What `load` with the same arguments would take; nothing is loaded.

    path: also a KimiLinearConfig, such as KimiLinearConfig.kimi_linear_48b(). What does not fit
    is reported too: then `fits` of the plan is False and `load` would raise OutOfMemory. Other
    errors are those of `load`.
    """
    options = check_options(
        device, dtype, max_context, max_batch, cache_bytes, batch_invariant, kv_cache_dtype
    )
    if isinstance(path, KimiLinearConfig):
        return choose(path, "bf16", options).plan
    with Checkpoint(_directory(path)) as checkpoint:
        return choose(checkpoint.config, checkpoint.dtype, options).plan


def random(
    config: KimiLinearConfig,
    tokenizer: Tokenizer | None,
    *,
    seed: int,
    router_skew: float,
    **options: Any,
) -> "Model":
    """A model with random weights made on the device; see kimi_linear.testing."""
    names = ("device", "dtype", "max_context", "max_batch", "cache_bytes")
    checked = check_options(
        *(options.pop(n, "auto" if n[0] == "d" else None) for n in names),
        options.pop("batch_invariant", False),
        options.pop("kv_cache_dtype", "auto"),
    )
    if options:
        raise TypeError(f"random_model: unknown argument {quote(next(iter(options)))}")
    choice = require_fit(choose(config, "bf16", checked))
    engine = _core.Engine(choice.backend, config.to_core(), checked.core(choice.dtype))
    try:
        engine.randomize(seed, router_skew)
    except BaseException:
        engine.close()
        raise
    notes = ("weights are random",)
    return Model(config, engine, choice, tokenizer, None, notes, f"random, seed {seed}")


def _directory(path: str | Path | None) -> Path:
    if path is None:
        return SMALL_MODEL
    if not isinstance(path, str | Path):
        raise TypeError(f"path: must be a directory, got {quote(path)}")
    directory = Path(path)
    if directory.is_dir():
        return directory
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _hub_directory(path)
    raise FileNotFoundError(f"path: must be a directory with a checkpoint, {path} is none")


def _hub_directory(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"path: {name} is not a directory, and Hub names need huggingface_hub "
            f"(pip install huggingface_hub)"
        ) from None
    patterns = ["*.json", "*.safetensors", "tiktoken.model"]
    return Path(snapshot_download(name, allow_patterns=patterns))


def _read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    if not (checkpoint.path / "tiktoken.model").exists():
        return None
    return Tokenizer.from_dir(checkpoint.path, vocab_size=checkpoint.config.vocab_size)


class Model(Inspection):
    """A loaded model; `kimi_linear.load` makes one.

    config: KimiLinearConfig. device, dtype, kv_cache_dtype, plan: where it is, how the big
    matrices and the latents are stored, what memory it has. fingerprint: tells its weights from
    others in files of states. Calls from several threads are served one after the other; an
    Engine runs them together. After close() every call raises ValueError.
    """

    def __init__(
        self,
        config: KimiLinearConfig,
        engine: "_core.Engine",
        choice: Choice,
        tokenizer: Tokenizer | None,
        path: Path | None,
        notes: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = choice.dtype
        self.device = choice.plan.device
        self.plan = MemoryPlan.from_core(self.device, self.dtype, engine.plan())
        self.kv_cache_dtype = self.plan.kv_cache_dtype
        self.path = path
        self.fingerprint = fingerprint
        self._engine = engine
        self._kernels = choice.backend.info()
        self._tokenizer = tokenizer
        self._notes = (*config.notes, *choice.notes, *notes)
        stop = tokenizer.stop_ids if tokenizer else ()
        self._stop_ids = tuple(dict.fromkeys((*config.eos_token_ids, *stop)))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises TokenizerError where the checkpoint had no tiktoken.model."""
        if self._tokenizer is None:
            where = self.path or "this model"
            raise TokenizerError(f"{where}: has no tiktoken.model; pass token ids")
        return self._tokenizer

    # ---- generation ----------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        speculate: int = 0,
        progress: bool | Callback | None = None,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts.

        prompt: str (control tokens in it stay text), token ids, or chat messages (a list of
        dicts); or a list of such: results come in its order, rows keep their own lengths.
        max_new_tokens=256: fewer where max_context ends, then finish_reason is "length".
        temperature=0.0: 0 takes the most likely token, the lowest id on a tie. top_k=0 (off),
        top_p=1.0, min_p=0.0, repetition_penalty=1.0: filters, in this order, penalty first;
        top_p is a share of all tokens' mass, not of the top_k's (as transformers and vLLM have
        it). seed=None: fresh; row i of a batch draws from a generator of (seed, i). stop=():
        strings that end the answer and are not part of it. stop_token_ids=None: more ids that
        end it. ignore_eos=False: True leaves only those. logprobs=None: n reports each token's
        log-probability and the n best. logits_processor=None: callable(ids, logits) or a list,
        NumPy views, returns logits or changes them in place. speculate=0: n lets each step
        guess up to n more tokens (15 at most), where the last two stood in prompt or answer
        before, and keep those that it would have drawn: text that repeats itself comes faster,
        other text may come slower. The answer stays the same, however it is sampled: to the bit
        on the CPU, on CUDA with batch_invariant=True, else a near tie may fall the other way.
        progress: callable(done, total) over prompt tokens.

        Raises ValueError or TypeError naming the argument, NumericalError for logits that are
        not finite, KeyboardInterrupt: the model stays usable.
        """
        checked = self._check_sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            logits_processor=logits_processor,
            speculate=speculate,
        )
        rows, is_batch = prompt_rows(prompt, self._get_tokenizer, self.config.vocab_size)
        completions = self._complete(rows, checked, progress)
        return completions if is_batch else completions[0]

    def stream(
        self,
        prompt: Any,
        *,
        progress: bool | Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        """Continue one prompt token by token; arguments of `generate`.

        Arguments are checked at the call. Leaving the loop early frees the sequence, which no
        other call has meanwhile: raises OutOfMemory where `max_batch` of them are held.
        """
        checked = self._check_sampling(**sampling)
        rows, is_batch = prompt_rows(prompt, self._get_tokenizer, self.config.vocab_size)
        if is_batch:
            raise ValueError("prompt: stream takes one prompt, got a list; use generate")
        reporter = self._prompt_progress(progress, rows)
        return self._stream(self._run(self._rows(rows, checked)), reporter)

    def _stream(self, run: Run, reporter: Progress) -> Iterator[Chunk]:
        try:
            with reporter as callback:
                with self._calls:  # until it has its sequence
                    chunks = _step(run, 1, callback)
                yield from chunks
                while not run.done:
                    yield from _step(run, 1, callback)
        finally:
            run.close()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool | Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion:
        """Answer a conversation; `Completion.tool_calls` holds the calls made.

        messages, tools: see Tokenizer.apply_chat_template. The rest: as in `generate`.
        """
        ids = self.tokenizer.apply_chat_template(messages, tools=tools)
        completion = self.generate(ids, progress=progress, **sampling)
        assert isinstance(completion, Completion)
        return completion

    def state(self) -> State:
        """An empty sequence to feed, fork, continue and keep; see State.

        Raises OutOfMemory when max_batch sequences are alive.
        """
        with self._calls:
            return State._empty(self)

    # ---- the prefix cache ----------------------------------------------------------------

    @property
    def prefix_cache(self) -> bool:
        """Whether a prompt begins with what earlier ones, or others of its batch, have read.

        False at first. `generate`, `stream`, `chat` and `score` then read only what is new:
        multiples of 64 tokens are reused, and `Stats.cached_tokens` says how many. The answer is
        to the bit that of reading it all: on the CPU always, on CUDA with batch_invariant=True.
        What is kept lives in memory of the plan that no sequence needs, is given up for one that
        does, the least recently used first, and all of it when this is set to False. States do
        not take part. csrc/model/prefix.h has the rules.
        """
        return bool(self._open_engine().prefix_stats()["on"])

    @prefix_cache.setter
    def prefix_cache(self, on: bool) -> None:
        if not isinstance(on, bool):
            raise TypeError(f"prefix_cache: must be True or False, got {quote(on)}")
        self._open_engine().keep_prefixes(on)

    def clear_prefix_cache(self) -> None:
        """Give up what is kept, and go on as `prefix_cache` says."""
        self._open_engine().clear_prefixes()

    def _check_sampling(self, **sampling: Unpack[SamplingOptions]) -> Sampling:
        known = SamplingOptions.__annotations__
        if unknown := set(sampling) - set(known):
            raise TypeError(f"{min(unknown)}: must be one of {', '.join(known)}")
        return check_sampling(self.config.vocab_size, self._stop_ids, **sampling)

    def _complete(
        self,
        rows: "list[np.ndarray]",
        sampling: Sampling,
        progress: bool | Callback | None,
        past: Past | None = None,
    ) -> list[Completion]:
        begun = self._rows(rows, sampling, past)
        with self._turn(progress, rows) as callback:
            run = self._run(begun)
            try:
                while not run.done:
                    _step(run, 1 if sampling.stop else STEPS_PER_CALL, callback)
                return [row.completion() for row in begun]
            finally:
                run.close()

    def _rows(
        self, rows: "list[np.ndarray]", sampling: Sampling, past: Past | None = None
    ) -> list[Row]:
        """The rows of a call, ready to be submitted; raises ValueError where one has no room."""
        if sampling.stop:
            self._get_tokenizer()
        call = Call(self.plan, self._tokenizer, past)
        for i, ids in enumerate(rows):
            n = call.n_before + len(ids)
            if n >= self.plan.max_context and sampling.max_new_tokens > 0:
                label = f"prompt[{i}]" if len(rows) > 1 else "prompt"
                raise ValueError(
                    f"{label}: must leave room for a token in max_context "
                    f"({self.plan.max_context}), has {n} tokens"
                )
        return [Row(ids, sampling, call, i) for i, ids in enumerate(rows)]

    def _run(self, rows: list[Row]) -> Run:
        """The rows on their way, in a run of their own."""
        run = Run(self._open_engine())
        try:
            for row in rows:
                run.submit(row)
        except BaseException:
            run.close()
            raise
        return run

    # ---- what it is --------------------------------------------------------------------

    def info(self) -> Report:
        """Device, storage, kernels and memory; text, and a table in a notebook."""
        config, kernels = self.config, self._kernels
        kda = config.layer_types.count("linear_attention")
        gate = "softplus" if config.gate_lower_bound is None else "bounded"
        rows = [
            ("model", str(self.path or "random weights")),
            ("parameters", f"{config.parameter_count():,}"),
            ("layers", f"{kda} KDA ({gate} gate), {config.num_hidden_layers - kda} MLA"),
            (
                "kernels",
                f"{kernels['name']} {kernels['variant']}, {kernels['threads']} threads",
            ),
            ("tokenizer", repr(self._tokenizer) if self._tokenizer else "none: token ids only"),
            *self.plan.rows(),
            *self._usage(),
            *(("note", note) for note in self._notes),
        ]
        return Report(rows)

    def _usage(self) -> list[tuple[str, str]]:
        """What sequences hold now; pages that several share are counted once."""
        engine = self._engine
        if engine is None:
            return []
        sequences, pages = engine.usage()
        n_bytes = sequences * self.plan.kda_state_per_sequence + self.plan.of_pages(pages)
        used = [("in use", f"{gib(n_bytes)} by {sequences} sequences")]
        kept = engine.prefix_stats()
        if not kept["on"]:
            return [*used, ("prefixes", "not kept (prefix_cache)")]
        text = (
            f"{gib(kept['bytes'])} in {kept['snapshots']} snapshots, "
            f"{kept['hits']:,} prompts spared {kept['cached_tokens']:,} tokens"
        )
        return [*used, ("prefixes", text)]

    # ---- life ----------------------------------------------------------------------------

    def close(self) -> None:
        """Give the memory back; further calls do nothing."""
        engine = self._engine  # which another thread may close at the same time
        if engine is not None:
            engine.close()
            self._engine = None  # type: ignore[assignment]

    def _open_engine(self) -> "_core.Engine":
        engine = self._engine
        if engine is None:
            raise ValueError("model: is closed")
        return engine

    def _get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else gib(self.plan.total)
        return f"<kimi_linear.Model {self.path or 'random'} {self.device} {self.dtype} {state}>"

    def _repr_html_(self) -> str:
        return self.info()._repr_html_()


def _step(run: Run, max_steps: int, progress: Callback | None) -> list[Chunk]:
    """The new tokens of some steps; raises what ended a row."""
    chunks = []
    for row, chunk in run.step(max_steps, progress):
        if chunk is None:
            assert row.error is not None
            error, row.error = row.error, None
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame: what it holds would stay
        chunks.append(chunk)
    return chunks
