"""Calls of every operation of `kl.ops`, with arguments that are right."""

import numpy as np

rng = np.random.default_rng(5)
T, H, K, V, W, RANK, ROPE, NOPE, E, D, I, P = 23, 4, 8, 12, 4, 16, 4, 8, 6, 10, 7, 5
CU = np.array([0, 7, 7, 8, T])
N = 4


def f32(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


KDA = dict(q=unit(f32(T, H, K)), k=unit(f32(T, H, K)), v=f32(T, H, V),
           g=-np.abs(f32(T, H, K)), beta=sigmoid(f32(T, H)))  # fmt: skip
MLA = dict(q=f32(T, H, NOPE + ROPE), latent=f32(T, RANK + ROPE), w_kv_b=f32(H, NOPE + V, RANK))
PAST = [f32(70, RANK + ROPE), f32(1, RANK + ROPE), f32(64, RANK + ROPE), f32(3, RANK + ROPE)]
DECODE_MLA = dict(
    q=f32(3, H, NOPE + ROPE), pages=f32(P, 64, RANK + ROPE),
    block_table=np.array([[4, 1, -9], [2, 2**30, -1], [0, 3, 1]]),
    lengths=np.array([65, 64, 130]), w_kv_b=MLA["w_kv_b"],
)  # fmt: skip
EXPERTS = dict(
    x=f32(T, D), ids=rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :3],
    weights=f32(T, 3), w1=f32(E, I, D), w3=f32(E, I, D), w2=f32(E, D, I),
)  # fmt: skip

# name of the case -> (operation, arguments, options)
CASES = {
    "kda_prefill": ("kda_prefill", KDA, {}),
    "kda_prefill, all options": ("kda_prefill", KDA, dict(
        scale=0.7, cu_seqlens=CU, initial_state=f32(N, H, V, K), gate="softplus",
        A_log=f32(H), dt_bias=f32(H, K), normalize=True, beta_logits=True)),
    "kda_prefill, bounded": ("kda_prefill", KDA, dict(
        gate="bounded", lower_bound=-3.0, A_log=f32(H), dt_bias=f32(H, K))),
    "kda_prefill, grouped heads": ("kda_prefill", KDA | {
        "q": KDA["q"][:, :2], "k": KDA["k"][:, :2]}, {}),
    "kda_decode": ("kda_decode", {n: a[:3] for n, a in KDA.items()} | {
        "state": f32(6, H, V, K)}, dict(slots=np.array([5, 0, 2]))),
    "short_conv": ("short_conv", dict(x=f32(T, D), weight=f32(D, W)), {}),
    "short_conv, all options": ("short_conv", dict(x=f32(T, D), weight=f32(D, W)), dict(
        state=f32(N, D, W - 1), cu_seqlens=CU, activation=None)),
    "gated_rms_norm": ("gated_rms_norm", dict(
        x=f32(3, H, V), z=f32(3, H, V), weight=f32(V)), {}),
    "rms_norm": ("rms_norm", dict(x=f32(3, 2, V), weight=f32(V)), dict(eps=1e-3)),
    "rms_norm, residual": ("rms_norm", dict(x=f32(6, V), weight=f32(V)), dict(
        eps=1e-3, residual=f32(6, V))),
    "mla_prefill": ("mla_prefill", MLA, {}),
    "mla_prefill, all options": ("mla_prefill", MLA, dict(cu_seqlens=CU, past=PAST, scale=0.3)),
    "mla_prefill, one past": ("mla_prefill", MLA, dict(past=PAST[0])),
    "mla_decode": ("mla_decode", DECODE_MLA, dict(scale=0.2)),
    "moe_route": ("moe_route", dict(logits=f32(T, E), bias=f32(E)), dict(top_k=3, scaling=2.5)),
    "moe_route, all options": ("moe_route", dict(logits=f32(T, E), bias=f32(E)), dict(
        top_k=2, scaling=0.5, renormalize=False, score="softmax", groups=3, top_groups=2)),
    "moe_experts": ("moe_experts", EXPERTS, {}),
    "moe_experts, shared": ("moe_experts", EXPERTS, dict(
        shared=(f32(9, D), f32(9, D), f32(D, 9)))),
    "linear": ("linear", dict(x=f32(3, 2, D), w=f32(I, D)), {}),
    "token_logprobs": ("token_logprobs", dict(
        hidden=f32(T, D), lm_head=f32(50, D), targets=np.arange(T)), dict(top=4)),
}  # fmt: skip

ACTIVATIONS = {"q", "k", "v", "x", "z", "latent", "pages", "past", "hidden"}


def mapped(case, change):
    """The case with change(name, value) for each array in it, also in lists and tuples."""

    def each(name, value):
        if isinstance(value, list | tuple):
            return type(value)(each(name, v) for v in value)
        return change(name, value) if isinstance(value, np.ndarray) else value

    op, args, options = CASES[case]
    args = {n: each(n, a) for n, a in args.items()}
    return op, args, {n: each(n, a) for n, a in options.items()}


def call(module, op, args, options):
    return getattr(module, op)(*args.values(), **options)


def as_list(result):
    return list(result) if isinstance(result, tuple) else [result]


def copied(case):
    return mapped(case, lambda name, a: a.copy())


def strided(name, a):
    """The same values in every second element; a state is written to and stays as it is."""
    if name == "state":
        return a.copy()
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 77, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]
