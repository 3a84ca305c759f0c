"""The small model in PyTorch, for training: the same function as the checkpoint it writes.

KDA runs in chunks of 64 tokens (UT transform, spec as in kimi_linear.reference.kda); decays are
clamped at e^-5 a token here so that a 16-token block stays within float32, which a trained gate
does not reach. Experts are computed densely: with so small experts one product over all of them,
its inner activations weighted by the router (zero for those not chosen), costs less than
gathering tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

CHUNK, BLOCK = 64, 16


def rms(x, weight, eps=1e-5):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def unit_lower_inverse(A):
    """(I + A)^-1 of strictly lower triangular A [.., 64, 64]: blocks of 16 by the finite series
    (I - A)(I + A^2)(I + A^4)(I + A^8), then merged in pairs; over 64 rows the series explodes."""
    n = A.shape[-1] // BLOCK
    blocks = A.unflatten(-1, (n, BLOCK)).unflatten(-3, (n, BLOCK)).transpose(-2, -3)
    L = torch.stack([blocks[..., i, i, :, :] for i in range(n)], -3)
    eye = torch.eye(BLOCK, device=A.device)
    L2 = L @ L
    L4 = L2 @ L2
    X = (eye - L) @ (eye + L2) @ (eye + L4) @ (eye + L4 @ L4)
    inv, size = [X[..., i, :, :] for i in range(n)], BLOCK
    while len(inv) > 1:
        merged = []
        for i in range(0, len(inv), 2):
            at = i * size
            low = A[..., at + size : at + 2 * size, at : at + size]
            cross = -inv[i + 1] @ low @ inv[i]
            top = torch.cat([inv[i], torch.zeros_like(cross)], -1)
            merged.append(torch.cat([top, torch.cat([cross, inv[i + 1]], -1)], -2))
        inv, size = merged, 2 * size
    return inv[0]


def kda_prepare(q, k, v, g, beta):
    """What does not depend on the state: U, W, M, q e^G, kg^T, e^(G of the chunk's end)."""
    B, H, T, K = q.shape
    V, N, R = v.shape[-1], T // CHUNK, CHUNK // BLOCK
    q, k, g = (x.reshape(B, H, N, CHUNK, K) for x in (q * K**-0.5, k, g.clamp(min=-5.0)))
    v, beta = v.reshape(B, H, N, CHUNK, V), beta.reshape(B, H, N, CHUNK, 1)
    G = g.cumsum(-2)
    anchor = torch.cat([torch.zeros_like(G[..., :1, :]), G[..., BLOCK - 1 : -1 : BLOCK, :]], -2)
    rise = (G.reshape(B, H, N, R, BLOCK, K) - anchor[..., None, :]).exp()
    fall = (anchor[..., None, :] - G[..., None, :, :]).clamp(max=80.0).exp()  # [.., R, CHUNK, K]
    cols = (k[..., None, :, :] * fall).transpose(-1, -2)
    A = ((k.reshape(B, H, N, R, BLOCK, K) * rise) @ cols).reshape(B, H, N, CHUNK, CHUNK)
    M = ((q.reshape(B, H, N, R, BLOCK, K) * rise) @ cols).reshape(B, H, N, CHUNK, CHUNK)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    A = torch.where(lower.tril(-1), A * beta, 0.0)
    M = torch.where(lower, M, 0.0)
    eG, last = G.exp(), G[..., -1:, :]
    UW = unit_lower_inverse(A) @ torch.cat([beta * v, beta * k * eG], -1)
    kg, decay = (k * (last - G).exp()).transpose(-1, -2), last.exp().transpose(-1, -2)
    return UW[..., :V], UW[..., V:], M, q * eG, kg, decay


def kda_chunked(q, k, v, g, beta):
    """q, k [B,H,T,K] unit norm; v [B,H,T,V]; g [B,H,T,K] log-decay; beta [B,H,T] -> [B,H,T,V]."""
    U, W, M, qe, kg, decay = kda_prepare(q, k, v, g, beta)
    S = torch.zeros(*U.shape[:2], q.shape[-1], v.shape[-1], device=q.device)
    states, news = [], []
    per_chunk = (x.unbind(2) for x in (U, W, kg, decay))
    for u, w, kgn, d in zip(*per_chunk, strict=True):
        new = torch.baddbmm(u.flatten(0, 1), w.flatten(0, 1), S.flatten(0, 1), alpha=-1).view_as(u)
        states.append(S)
        news.append(new)
        S = torch.baddbmm((S * d).flatten(0, 1), kgn.flatten(0, 1), new.flatten(0, 1)).view_as(S)
    O = qe @ torch.stack(states, 2) + M @ torch.stack(news, 2)
    return O.flatten(2, 3)


def fused_kernels():
    """KDA of the flash-linear-attention package (Triton), several times as fast. Of its tuning
    choices a few are tried: all of them take minutes."""
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.__init__

    def trimmed(self, fn, names, configs, *args, **kw):
        few = [c for c in configs if c.num_warps in (2, 4) and c.num_stages <= 3] or configs
        whole(self, fn, names, few[:: max(1, len(few) // 3)], *args, **kw)

    Autotuner.__init__ = trimmed
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.kda import chunk_kda

    def mix(p, f, b, z, m):
        B, T, _ = p.shape
        p, f, b, z = (t.bfloat16() for t in (p, f, b, z))
        y, _ = causal_conv1d(p, m.conv.bfloat16(), activation="silu")
        q, k, v = (t.reshape(B, T, m.H, m.K) for t in y.chunk(3, -1))
        o, _ = chunk_kda(q, k, v, f.view(B, T, m.H, m.K), b, use_qk_l2norm_in_kernel=True,
                         use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                         disable_recompute=True, A_log=m.A_log, dt_bias=m.dt_bias)  # fmt: skip
        o = rms_norm_gated(o, z.view(B, T, m.H, m.K), m.o_norm, None, "sigmoid", eps=1e-5)
        return o.flatten(2)

    KDA.mix = staticmethod(mix)


def kda_inputs(p, f, b, conv, A_log, dt_bias, H, K):
    """Projections p [B,T,3HK], f [B,T,HK], b [B,T,H] -> what kda_chunked takes."""
    B, T, _ = p.shape
    w, pad = conv.to(p.dtype), F.pad(p, (0, 0, 3, 0))
    y = F.silu(sum(pad[:, j : j + T] * w[:, j] for j in range(4)))

    def heads(t):
        return t.float().view(B, T, H, K).transpose(1, 2)

    q, k, v = (heads(t) for t in y.chunk(3, -1))
    q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    g = heads(F.softplus(f.float() + dt_bias)) * -A_log.exp()[:, None, None]
    return q, k, v, g, b.float().sigmoid().transpose(1, 2)


def kda_output(o, z, weight):
    """Gated RMS norm of o [B,H,T,V] with the gate's logits z [B,T,HV] -> [B,T,HV]."""
    o = o.transpose(1, 2)
    return (rms(o, weight) * z.float().reshape(o.shape).sigmoid()).flatten(2).to(z.dtype)


class KDA(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.H, self.K = c["hidden_size"], c["kda_heads"], c["kda_head_dim"]
        HK = self.H * self.K
        self.qkv = nn.Linear(D, 3 * HK, bias=False)
        self.conv = nn.Parameter(torch.randn(3 * HK, 4) * 0.3)
        self.f_a, self.f_b = nn.Linear(D, self.K, bias=False), nn.Linear(self.K, HK, bias=False)
        self.g_a, self.g_b = nn.Linear(D, self.K, bias=False), nn.Linear(self.K, HK, bias=False)
        self.b = nn.Linear(D, self.H, bias=False)
        self.o = nn.Linear(HK, D, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.K))
        self.A_log = nn.Parameter(torch.empty(self.H).uniform_(1, 16).log())
        dt = torch.empty(HK).uniform_(-6.9, -2.3).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))

    @staticmethod
    def mix(p, f, b, z, m):
        """From the projections to the input of the last one; m holds the small weights."""
        o = kda_chunked(*kda_inputs(p, f, b, m.conv, m.A_log, m.dt_bias, m.H, m.K))
        return kda_output(o, z, m.o_norm)

    def forward(self, x):
        p, f, b, z = self.qkv(x), self.f_b(self.f_a(x)), self.b(x), self.g_b(self.g_a(x))
        with torch.autocast(x.device.type, enabled=False):
            y = self.mix(p, f, b, z, self)
        return self.o(y)


class MLA(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.H, self.rank = c["hidden_size"], c["mla_heads"], c["kv_rank"]
        self.nope, self.rope, self.V = c["nope_dim"], c["rope_dim"], c["v_dim"]
        self.q = nn.Linear(D, self.H * (self.nope + self.rope), bias=False)
        self.kv_a = nn.Linear(D, self.rank + self.rope, bias=False)
        self.kv_norm = nn.Parameter(torch.ones(self.rank))
        self.kv_b = nn.Linear(self.rank, self.H * (self.nope + self.V), bias=False)
        self.o = nn.Linear(self.H * self.V, D, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.H, -1).transpose(1, 2)
        c, pe = self.kv_a(x).split([self.rank, self.rope], -1)
        kv = self.kv_b(rms(c, self.kv_norm.to(c.dtype), 1e-6)).view(B, T, self.H, -1).transpose(1, 2)
        k, v = kv.split([self.nope, self.V], -1)
        k = torch.cat([k, pe[:, None].expand(-1, self.H, -1, -1)], -1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(o.transpose(1, 2).reshape(B, T, -1))


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def expert_inner(x, s, chosen, scaling):
    """Inner activations of all experts, each weighted by its share for the token."""
    w = s * chosen
    w = w / (w.sum(-1, keepdim=True) + 1e-20) * scaling
    h = swiglu(x).unflatten(-1, (s.shape[-1], -1))
    return (h * w[..., None].to(h.dtype)).flatten(-2)


class Dense(nn.Module):
    def __init__(self, D, I):
        super().__init__()
        self.w13, self.w2 = nn.Linear(D, 2 * I, bias=False), nn.Linear(I, D, bias=False)

    def forward(self, x):
        return self.w2(swiglu(self.w13(x)))


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.E, self.I = c["hidden_size"], c["n_experts"], c["moe_inner"]
        self.top_k, self.scaling = c["top_k"], c["routed_scaling"]
        self.gate = nn.Linear(D, self.E, bias=False)
        self.experts, self.shared = Dense(D, self.E * self.I), Dense(D, self.I * c["n_shared"])
        self.register_buffer("bias", torch.zeros(self.E))
        self.register_buffer("load", torch.zeros(self.E), persistent=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            s = F.linear(x.float(), self.gate.weight).sigmoid()
        ids = (s + self.bias).topk(self.top_k, -1).indices
        chosen = torch.zeros_like(s).scatter(-1, ids, 1.0)
        if self.training:
            self.load += chosen.sum((0, 1)).detach()
        h = expert_inner(self.experts.w13(x), s, chosen, self.scaling)
        return self.experts.w2(h) + self.shared(x)

    @torch.no_grad()
    def balance(self, rate):
        """Nudge the choice bias of under-used experts up and of over-used ones down."""
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        D = c["hidden_size"]
        self.mixer = KDA(c) if c["mixer"][i] == "kda" else MLA(c)
        self.ffn = Dense(D, c["dense_inner"]) if c["ffn"][i] == "dense" else MoE(c)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x):
        x = x + self.mixer(rms(x, self.norm1).to(torch.bfloat16)).float()
        return x + self.ffn(rms(x, self.norm2).to(torch.bfloat16)).float()


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["n_layers"]))
        self.norm = nn.Parameter(torch.ones(c["hidden_size"]))
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        for layer in self.layers:  # start near the identity
            outs = [layer.mixer.o, layer.ffn.w2 if isinstance(layer.ffn, Dense) else layer.ffn.experts.w2]
            for o in outs:
                o.weight.data.mul_((2 * c["n_layers"]) ** -0.5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return rms(x, self.norm).to(torch.bfloat16)

    def checkpoint(self):
        """The published layout's tensors by name, float32 on the CPU."""
        return {name: t.detach().float().cpu().contiguous() for name, t in self._views()}

    def _views(self):
        """(name in the published layout, view of the parameter) of every tensor."""
        out = []

        def put(name, t):
            out.append((name, t))

        def dense(prefix, m, names=("gate_proj", "up_proj", "down_proj")):
            gate, up = m.w13.weight.chunk(2)
            for name, t in zip(names, (gate, up, m.w2.weight), strict=True):
                put(f"{prefix}.{name}.weight", t)

        put("model.embed_tokens.weight", self.embed.weight)
        put("model.norm.weight", self.norm)
        put("lm_head.weight", self.lm_head.weight)
        for i, layer in enumerate(self.layers):
            p, m, f = f"model.layers.{i}", layer.mixer, layer.ffn
            put(f"{p}.input_layernorm.weight", layer.norm1)
            put(f"{p}.post_attention_layernorm.weight", layer.norm2)
            a = f"{p}.self_attn"
            put(f"{a}.o_proj.weight", m.o.weight)
            if isinstance(m, KDA):
                for name, t, w in zip("qkv", m.qkv.weight.chunk(3), m.conv.chunk(3), strict=True):
                    put(f"{a}.{name}_proj.weight", t)
                    put(f"{a}.{name}_conv1d.weight", w[:, None, :])
                for name in ("f_a", "f_b", "g_a", "g_b", "b"):
                    put(f"{a}.{name}_proj.weight", getattr(m, name).weight)
                put(f"{a}.A_log", m.A_log.view(1, 1, -1, 1))
                put(f"{a}.dt_bias", m.dt_bias)
                put(f"{a}.o_norm.weight", m.o_norm)
            else:
                put(f"{a}.q_proj.weight", m.q.weight)
                put(f"{a}.kv_a_proj_with_mqa.weight", m.kv_a.weight)
                put(f"{a}.kv_a_layernorm.weight", m.kv_norm)
                put(f"{a}.kv_b_proj.weight", m.kv_b.weight)
            if isinstance(f, Dense):
                dense(f"{p}.mlp", f)
                continue
            b = f"{p}.block_sparse_moe"
            put(f"{b}.gate.weight", f.gate.weight)
            put(f"{b}.gate.e_score_correction_bias", f.bias)
            dense(f"{b}.shared_experts", f.shared)
            gate, up = f.experts.w13.weight.chunk(2)
            for e in range(f.E):
                rows = slice(e * f.I, (e + 1) * f.I)
                put(f"{b}.experts.{e}.w1.weight", gate[rows])
                put(f"{b}.experts.{e}.w3.weight", up[rows])
                put(f"{b}.experts.{e}.w2.weight", f.experts.w2.weight[:, rows])
        return out

    @torch.no_grad()
    def restore(self, tensors):
        """Take the tensors that checkpoint() gave: it names views of the parameters, so running
        it again over the parameters themselves says where each goes."""
        for name, view in self._views():
            view.copy_(torch.as_tensor(tensors[name]).reshape(view.shape))
