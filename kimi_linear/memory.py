"""What a model will take, computed before anything is taken."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from . import _core


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a model on a device, and the sizes that they follow from."""

    device: str
    dtype: str
    kv_cache_dtype: str  # of the latents: "f32", "bf16", "fp8"
    weights: int
    kda_states: int  # recurrent states and convolution windows of max_batch sequences
    snapshots: int  # the same of prefixes that the prefix cache keeps, see Model.prefix_cache
    mla_pages: int  # latents, shared by the sequences alive and those prefixes
    workspace: int
    total: int
    free: int  # on the device now
    max_context: int  # tokens of one sequence
    max_batch: int  # sequences alive at once
    snapshot_slots: int  # prefixes kept beside as many; more where fewer are alive
    step_tokens: int  # tokens of one step
    kda_state_per_sequence: int
    mla_page_per_token: int
    problem: str | None = None  # why `load` would raise OutOfMemory

    @property
    def fits(self) -> bool:
        """Whether `load` would find the memory."""
        return self.problem is None

    @classmethod
    def from_core(cls, device: str, dtype: str, core: Mapping[str, Any]) -> "MemoryPlan":
        """From the core's ``kl_plan`` (csrc/model/engine.h)."""
        latents = core["kv_cache_dtype"]
        if latents == "auto":
            latents = "f32" if dtype == "f32" else "bf16"
        return cls(
            device=device,
            dtype=dtype,
            kv_cache_dtype=latents,
            weights=core["weight_bytes"],
            kda_states=core["state_bytes"],
            snapshots=core["snapshot_bytes"],
            mla_pages=core["page_bytes"],
            workspace=core["scratch_bytes"],
            total=core["total_bytes"],
            free=core["free_bytes"],
            max_context=core["max_context"],
            max_batch=core["max_batch"],
            snapshot_slots=core["snapshot_slots"],
            step_tokens=core["step_tokens"],
            kda_state_per_sequence=core["state_bytes_per_sequence"],
            mla_page_per_token=core["page_bytes_per_token"],
            problem=core["problem"],
        )

    def of_sequence(self, n_tokens: int) -> int:
        """Bytes that a sequence of so many tokens occupies: its states and whole pages."""
        return self.kda_state_per_sequence + self.of_pages(-(-n_tokens // _core.PAGE_TOKENS))

    def of_fork(self, n_shared: int, n_tokens: int) -> int:
        """What a fork of a sequence of n_shared tokens adds when it holds n_tokens: full pages
        stay shared."""
        pages = n_shared // _core.PAGE_TOKENS
        return self.of_sequence(n_tokens) - self.of_pages(pages)

    def of_pages(self, n: int) -> int:
        """Bytes of n pages of latents, in all MLA layers."""
        return n * _core.PAGE_TOKENS * self.mla_page_per_token

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much) for a reader, in the order of a table."""
        return [
            ("device", f"{self.device}, {self.dtype} weights"),
            ("weights", gib(self.weights)),
            ("KDA states", f"{gib(self.kda_states)} for {self.max_batch} sequences"),
            ("snapshots", f"{gib(self.snapshots)} for {self.snapshot_slots} prefixes more"),
            (
                "MLA pages",
                f"{gib(self.mla_pages)} of {self.kv_cache_dtype}, up to {self.max_context:,} "
                f"tokens each",
            ),
            ("workspace", f"{gib(self.workspace)} for steps of {self.step_tokens:,} tokens"),
            ("total", f"{gib(self.total)} of {gib(self.free)} free{self._verdict()}"),
        ]

    def line(self) -> str:
        """All of it in a line, for a screen that waits."""
        return (
            f"{self.dtype} weights {gib(self.weights)}, states and pages "
            f"{gib(self.kda_states + self.snapshots + self.mla_pages)}, workspace "
            f"{gib(self.workspace)}: "
            f"{gib(self.total)} of {gib(self.free)} free on {self.device}{self._verdict()}"
        )

    def _verdict(self) -> str:
        return "" if self.fits else ": does not fit"

    def __str__(self) -> str:
        return "\n".join(f"{name:<12}{text}" for name, text in self.rows())

    def _repr_html_(self) -> str:
        return html_table(self.rows())


class Report(str):
    """Text that a terminal shows as it is and a notebook as a table."""

    rows: list[tuple[str, str]]

    def __new__(cls, rows: list[tuple[str, str]]) -> "Report":
        width = max(len(name) for name, _ in rows) + 2
        report = super().__new__(cls, "\n".join(f"{n:<{width}}{text}" for n, text in rows))
        report.rows = rows
        return report

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html_table(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return Report, (self.rows,)


def html_table(rows: list[tuple[str, str]]) -> str:
    """A two-column table; everything in it is escaped."""
    cells = "".join(f"<tr><th>{escape(n)}</th><td>{escape(text)}</td></tr>" for n, text in rows)
    return f"<table>{cells}</table>"


def gib(n: int) -> str:
    """Bytes for a reader: in GiB, or MiB where that is shorter."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.2f} MiB"
