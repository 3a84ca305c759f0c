"""Inputs of KDA as its gates make them, and the float64 truth about them, in torch on any device.

The truth is the recurrence in chunks: what a chunk asks of the state and leaves in it comes from
products of many chunks at once, and only the state goes from chunk to chunk. In float64 that is
the recurrence to rounding (tests/reference/test_kda_truth.py), and a million tokens take seconds.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

K = V = 128
BF16 = torch.bfloat16
CHUNK = 32
CHUNKS_AT_ONCE = 256  # times heads; 1 MB of pairs of tokens each


@dataclasses.dataclass
class Inputs:
    """The arguments of one call. cu holds the borders of the sequences, state [N, H, V, K] what
    they start from (zeros if None)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    cu: torch.Tensor
    options: dict[str, Any]  # scale, gate, A_log, dt_bias, normalize, beta_logits
    state: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return self.cu.diff().tolist()


def borders(lengths: list[int], device: str) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(device)


def softplus_gate(H: int, device: str) -> dict[str, torch.Tensor]:
    """A_log and dt_bias as training starts: from long memory to little in one head."""
    dt = torch.empty(H, K, device=device).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return {"A_log": torch.empty(H, device=device).uniform_(1, 16).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt))}  # fmt: skip


def raw_inputs(
    lengths: list[int], H: int, device: str, *, g_dtype: torch.dtype = BF16
) -> Inputs:
    """As the model has them: q, k and v are slices of one matrix, the gate takes what a product
    left, norms and the sigmoid of beta belong to the call."""
    T = sum(lengths)
    wide = torch.randn(T, 3 * H * K, device=device).to(BF16)
    q, k, v = (x.view(T, H, K) for x in wide.split(H * K, dim=1))
    g = (torch.randn(T, H, K, device=device) * 0.5).to(g_dtype)
    beta = torch.randn(T, H, device=device).to(BF16)
    options = {"gate": "softplus", "normalize": True, "beta_logits": True}
    return Inputs(
        q, k, v, g, beta, borders(lengths, device), options | softplus_gate(H, device)
    )


def weak_inputs(T: int, H: int, device: str) -> Inputs:
    """As the model has them, with next to no decay and small writes: an error stays."""
    x = raw_inputs([T], H, device)
    x.g = (torch.randn(T, H, K, device=device) * 0.5 - 12).to(BF16)
    x.beta = (torch.randn(T, H, device=device) * 0.5 - 7).to(BF16)
    x.options |= {"A_log": torch.zeros(H, device=device), "dt_bias": None}
    return x


def log_decays(profile: str, T: int, H: int, device: str) -> torch.Tensor:
    """[T, H, K] float32, by the profiles of tests/profiles.py."""
    if profile == "init":
        gate, r = softplus_gate(H, device), torch.randn(T, H, K, device=device) * 0.5
        return -gate["A_log"].exp()[:, None] * F.softplus(r + gate["dt_bias"])
    r = torch.rand(T, H, K, device=device)
    if profile == "bounded":
        return -5 * torch.sigmoid(torch.randn(T, H, K, device=device))
    if profile == "mixed":  # one channel in eight remembers, the rest forget at once
        r[:, :, ::8] *= 1e-4
        return -3 * r
    if profile == "slow":
        return -2e-4 * r
    if profile == "strong":  # 192 nats in 16 tokens
        return -12 - r
    raise ValueError(profile)


def direct_inputs(profile: str, lengths: list[int], H: int, device: str) -> Inputs:
    """Log-decays given, q and k of unit length, beta in (0, 1)."""
    T = sum(lengths)
    q, k = (F.normalize(torch.randn(T, H, K, device=device), dim=-1).to(BF16) for _ in "qk")
    v = torch.randn(T, H, V, device=device).to(BF16)
    beta = torch.sigmoid(torch.randn(T, H, device=device))
    g = log_decays(profile, T, H, device)
    return Inputs(q, k, v, g, beta, borders(lengths, device), {})


def published_inputs(
    cu: tuple[int, ...], H: int, K: int, scale: float | None, divisor: float, left_out: float,
    device: str,
) -> Inputs:  # fmt: skip
    """As a Published of tests/profiles.py says: values in (0, 1), a state to start from."""
    T = cu[-1]
    q, k = (F.normalize(torch.randn(T, H, K, device=device), dim=-1).to(BF16) for _ in "qk")
    v = torch.rand(T, H, K, device=device).to(BF16)
    g = F.logsigmoid(torch.randn(T, H, K, device=device)) / divisor
    g *= torch.rand(T, H, K, device=device) > left_out
    beta = torch.sigmoid(torch.randn(T, H, device=device)).to(BF16)
    state = torch.randn(len(cu) - 1, H, K, K, device=device)
    borders = torch.tensor(cu, dtype=torch.int32, device=device)
    return Inputs(q, k, v, g, beta, borders, {"scale": scale or K**-0.5}, state)


# ---- the truth -------------------------------------------------------------------------------


def exact(x: Inputs, tokens: slice, heads: list[int]) -> tuple[torch.Tensor, ...]:
    """q (scaled), k, v, log-decay, beta of some tokens and heads in float64, the gate applied."""
    q, k, v, g, beta = (t[tokens][:, heads].double() for t in (x.q, x.k, x.v, x.g, x.beta))
    if x.options.get("normalize"):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    if x.options.get("beta_logits"):
        beta = beta.sigmoid()
    if x.options.get("gate") == "softplus":
        if (bias := x.options.get("dt_bias")) is not None:
            g = g + bias[heads].double()
        g = -x.options["A_log"][heads].double().exp()[:, None] * F.softplus(g, threshold=500)
    return q * x.options.get("scale", K**-0.5), k, v, g, beta


def by_chunk(t: torch.Tensor) -> torch.Tensor:
    """[T, H, ...] -> [chunks, H, CHUNK, ...]; tokens that are not there decay and write nothing."""
    rest = -len(t) % CHUNK
    t = torch.cat([t, t.new_zeros(rest, *t.shape[1:])]) if rest else t
    return t.unflatten(0, (-1, CHUNK)).transpose(1, 2)


def run_chunks(S: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks in a row, from S [H, V, K]: (o [chunks, H, CHUNK, V], the state after them)."""
    q, k, v, g, beta = rows
    G = g.cumsum(2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).tril()[..., None]
    pairs = (G[:, :, :, None] - G[:, :, None]).masked_fill_(~later, -math.inf).exp_()
    pairs *= k[:, :, None]
    kk, qk = (pairs @ torch.stack([k, q], -1)).unbind(-1)  # [chunks, H, CHUNK, CHUNK]
    right = beta[..., None] * torch.cat([v, k * G.exp()], -1)
    solved = torch.linalg.solve_triangular(
        (beta[..., None] * kk).tril(-1), right, upper=False, unitriangular=True
    )
    Y, P = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    left, total = k * (G[:, :, -1:] - G).exp(), G[:, :, -1:].exp()
    states, U = (
        torch.empty(len(g), *S.shape, dtype=S.dtype, device=S.device),
        torch.empty_like(Y),
    )
    for c in range(len(g)):
        states[c] = S
        torch.baddbmm(Y[c], P[c], S.mT, alpha=-1, out=U[c])
        S = torch.baddbmm(S * total[c], U[c].mT, left[c])
    return (q * G.exp()) @ states.mT + qk @ U, S


def truth(x: Inputs, n: int, heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """o [tokens of sequence n, heads, V] and the state [heads, V, K] that its first one becomes, in
    float64."""
    first, end = x.cu[n : n + 2].tolist()
    S = torch.zeros(len(heads), V, K, dtype=torch.float64, device=x.q.device)
    if x.state is not None:
        S = x.state[n, heads].double()
    outputs, step = [], max(1, CHUNKS_AT_ONCE // len(heads)) * CHUNK
    for start in range(first, end, step):
        rows = exact(x, slice(start, min(end, start + step)), heads)
        o, S = run_chunks(S, *(by_chunk(t) for t in rows))
        outputs.append(o.transpose(1, 2).flatten(0, 1)[: len(rows[0])])
    return torch.cat(outputs), S


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS error; of anything that is not finite, NaN."""
    off = float((got.double() - want).norm() / want.norm())
    return off if math.isfinite(off) else math.nan
