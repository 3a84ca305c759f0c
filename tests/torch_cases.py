"""Small calls of every operation on torch tensors, and how to bring them to a device."""

import torch
from kimi_linear import ops
from kimi_linear.reference import pack_latents

T, H, K, V, RANK, ROPE, NOPE, E, D, I = 21, 2, 8, 12, 16, 4, 8, 5, 10, 6


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


generator = torch.Generator().manual_seed(3)
CU = torch.tensor([0, 5, 5, T])
KDA = dict(
    q=rand(T, H, K), k=torch.nn.functional.normalize(rand(T, H, K), dim=-1), v=rand(T, H, V),
    g=-rand(T, H, K).abs(), beta=rand(T, H).sigmoid(),
)  # fmt: skip
STATE = rand(4, H, V, K)
LATENT, W_KV_B = rand(T, RANK + ROPE), rand(H, NOPE + V, RANK)
MLA_Q = rand(T, H, NOPE + ROPE)
W1, W3, W2 = rand(E, I, D), rand(E, I, D), rand(E, D, I)
IDS = torch.randint(0, E, (T, 3), generator=generator, dtype=torch.int32)
X = rand(T, D)

CASES = {
    "kda_prefill": ((*KDA.values(),), {}),
    "kda_prefill ragged": (
        (*KDA.values(),),
        dict(cu_seqlens=CU, initial_state=STATE[:3], gate="softplus", A_log=rand(H),
             dt_bias=rand(H, K), normalize=True, beta_logits=True, scale=0.5),
    ),
    "kda_decode": ((*(t[:4] for t in KDA.values()), STATE.clone()), {}),
    "kda_decode slots": (
        (*(t[:2] for t in KDA.values()), STATE.clone()),
        dict(slots=torch.tensor([3, 0])),
    ),
    "short_conv": ((X, rand(D, 4)), {}),
    "short_conv ragged": ((X, rand(D, 4)), dict(cu_seqlens=CU, activation=None)),
    "gated_rms_norm": ((rand(T, H, V), rand(T, H, V), rand(V)), dict(eps=1e-6)),
    "rms_norm": ((X, rand(D)), dict(eps=1e-5)),
    "rms_norm residual": ((X, rand(D)), dict(eps=1e-5, residual=rand(T, D))),
    "mla_prefill": ((MLA_Q, LATENT, W_KV_B), {}),
    "mla_prefill ragged": ((MLA_Q, LATENT, W_KV_B), dict(cu_seqlens=CU)),
    "mla_prefill past": (
        (MLA_Q, LATENT, W_KV_B),
        dict(cu_seqlens=CU, past=[rand(70, RANK + ROPE), None, rand(3, RANK + ROPE)]),
    ),
    "mla_prefill one past": ((MLA_Q, LATENT, W_KV_B), dict(past=rand(3, RANK + ROPE))),
    "mla_decode": (
        (MLA_Q[:2], rand(3, 64, RANK + ROPE), torch.tensor([[0, 2], [1, -1]]),
         torch.tensor([65, 3], dtype=torch.int32), W_KV_B), {},
    ),
    "moe_route": ((rand(T, E), rand(E)), dict(top_k=2, scaling=2.5)),
    "moe_route no bias": ((rand(T, E), None), dict(top_k=1, scaling=1.0, score="softmax")),
    "moe_experts": ((X, IDS, rand(T, 3), W1, W3, W2), {}),
    "moe_experts shared": (
        (X, IDS, rand(T, 3), W1, W3, W2), dict(shared=(W1[0], W3[0], W2[0])),
    ),
    "linear": ((X, rand(7, D)), {}),
    "linear of three axes": ((X.view(3, 7, D), rand(7, D)), {}),
    "linear bfloat16": ((X.bfloat16(), rand(7, D)), {}),
    "token_logprobs": ((X, rand(9, D), torch.arange(T) % 10 - 1), {}),
    "token_logprobs top": ((X, rand(9, D), torch.arange(T) % 10 - 1), dict(top=3)),
}  # fmt: skip


def half(*shape):
    return rand(*shape, dtype=torch.bfloat16)


# Of the widths, dtype and alignment that a GPU's tensor cores are used for; two heads.
WIDE_W = half(2, 256, 512) / 23
WIDE_EXPERTS = (half(4, 128, 256) / 16, half(4, 128, 256) / 16, half(4, 256, 128) / 11)
CASES |= {
    "kda_prefill wide": (
        (half(80, 2, 128), half(80, 2, 128), half(80, 2, 128), half(80, 2, 128), half(80, 2)),
        dict(cu_seqlens=torch.tensor([0, 70, 80]), gate="softplus", A_log=rand(2),
             dt_bias=rand(2, 128), normalize=True, beta_logits=True),
    ),
    "kda_prefill wide 160": (
        (half(80, 2, 128), half(80, 2, 128), half(80, 2, 160), -rand(80, 2, 128).abs(),
         half(80, 2)),
        dict(cu_seqlens=torch.tensor([0, 33, 33, 34, 80]), normalize=True, beta_logits=True),
    ),
    "mla_prefill wide": (
        (half(80, 2, 192), half(80, 576), WIDE_W), dict(past=half(70, 576)),
    ),
    "mla_decode wide": (
        (half(2, 2, 192), half(4, 64, 576), torch.tensor([[0, 2], [1, -1]]),
         torch.tensor([65, 3]), WIDE_W), {},
    ),
    "linear wide one": ((half(1, 256), half(320, 256)), {}),
    "linear wide some": ((half(9, 256), half(320, 256)), {}),
    "linear wide many": ((half(200, 256), half(320, 256)), {}),
    "moe_experts wide": (
        (half(3, 256), torch.tensor([[0, 1], [3, 1], [2, 0]]), rand(3, 2), *WIDE_EXPERTS), {},
    ),
    "moe_experts wide many": (
        (half(90, 256), torch.arange(180).view(90, 2) % 4, rand(90, 2), *WIDE_EXPERTS),
        dict(shared=tuple(w[0] for w in WIDE_EXPERTS)),
    ),
    "token_logprobs wide": ((half(70, 256), half(1000, 256) / 16, torch.arange(70)), {}),
}  # fmt: skip


class Stored:
    """A weight that is quantised where a case runs."""

    def __init__(self, tensor, format):
        self.tensor, self.format = tensor, format


STEP = (half(1, 256), torch.tensor([[3, 1]]), rand(1, 2))  # a single token's experts

# Every way to multiply by a quantised weight. torch's operators take tensors alone: only kl.ops.
GPU_CASES = dict(CASES)
for _format in ("int8", "int4", "fp8"):
    _w = Stored(half(320, 256) / 16, _format)
    _experts = tuple(Stored(w, _format) for w in WIDE_EXPERTS)
    _shared = dict(shared=tuple(Stored(w[0], _format) for w in WIDE_EXPERTS))
    GPU_CASES |= {
        f"linear {_format}": ((X, Stored(rand(7, D), _format)), {}),
        f"linear {_format} one": ((half(1, 256), _w), {}),
        f"linear {_format} some": ((half(9, 256), _w), {}),
        f"linear {_format} many": ((half(200, 256), _w), {}),
        f"moe_experts {_format}": (
            (half(3, 256), torch.tensor([[0, 1], [3, 1], [2, 0]]), rand(3, 2), *_experts), _shared,
        ),
        f"moe_experts {_format} many": (
            (half(90, 256), torch.arange(180).view(90, 2) % 4, rand(90, 2), *_experts), _shared,
        ),
        f"moe_experts {_format} step": ((*STEP, *_experts), _shared),
        f"token_logprobs {_format}": ((half(70, 256), _w, torch.arange(70)), dict(top=2)),
    }  # fmt: skip


# What other kernels stand behind, by the number of rows, the widths or the length of the call.
GPU_CASES |= {
    "kda_prefill long": (  # by segments
        (half(3200, 1, 128), half(3200, 1, 128), half(3200, 1, 64), -rand(3200, 1, 128).abs(),
         half(3200, 1)),
        dict(cu_seqlens=torch.tensor([0, 3200]), normalize=True, beta_logits=True),
    ),
    "mla_decode wide one": (
        (half(1, 2, 192), half(4, 64, 576), torch.tensor([[3, 0, 2]]), torch.tensor([130]), WIDE_W),
        {},
    ),
    "mla_decode wide nine": (
        (half(9, 2, 192), half(9, 64, 576), torch.arange(9).view(9, 1), torch.arange(9) * 7 + 1,
         WIDE_W), {},
    ),
    "mla_decode wide packed": (
        (half(2, 2, 192), torch.from_numpy(pack_latents(rand(4, 64, 576), 512)),
         torch.tensor([[3, 0, 2], [1, -1, -1]]), torch.tensor([130, 5]), WIDE_W), dict(rope=64),
    ),
    "linear int8 wide step": ((half(1, 512), Stored(half(320, 512) / 23, "int8")), {}),
    "linear wide router": ((half(5, 256), rand(12, 256)), {}),
    "linear wide router one": ((half(1, 256), rand(12, 256)), {}),
    "moe_experts wide step": (
        (*STEP, *WIDE_EXPERTS), dict(shared=tuple(w[0] for w in WIDE_EXPERTS)),
    ),
    "moe_route wide": ((rand(3, 300), rand(300)), dict(top_k=8, scaling=2.5)),
    "moe_route groups": (
        (rand(T, 32), rand(32)), dict(top_k=4, scaling=1.0, groups=4, top_groups=2),
    ),
    "moe_experts wide pairs": (  # so many that several blocks plan them
        (half(2100, 256), torch.arange(4200).view(2100, 2) % 4, rand(2100, 2), *WIDE_EXPERTS), {},
    ),
    "rms_norm wide": ((half(3, 2304), rand(2304)), dict(eps=1e-5, residual=rand(3, 2304))),
    "rms_norm wider": ((half(2, 9001), rand(9001)), dict(eps=1e-5)),
    "gated_rms_norm wide": ((half(3, 2, 128), half(3, 2, 128), rand(128)), {}),
    "gated_rms_norm wider": ((half(2, 1, 1030), half(2, 1, 1030), rand(1030)), {}),
    "short_conv wide": ((half(40, 256), rand(256, 4)), dict(cu_seqlens=torch.tensor([0, 1, 40]))),
}  # fmt: skip


def mapped(value, change):
    """The same nest of lists, tuples and dicts with change(tensor) for each tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Stored):
        return ops.quantize(change(value.tensor), value.format)
    if isinstance(value, dict):
        return {name: mapped(v, change) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(v, change) for v in value)
    return value


def cloned(value):
    return mapped(value, torch.Tensor.clone)


def moved(value, device):
    """Copies on a device. Integers are int32 on a GPU."""

    def move(tensor):
        narrow = device != "cpu" and tensor.dtype == torch.int64
        return (tensor.int() if narrow else tensor.clone()).to(device)

    return mapped(value, move)


def case_on(name, device):
    """(operation, arguments, options)."""
    args, options = GPU_CASES[name]
    return name.split()[0], moved(args, device), moved(options, device)
