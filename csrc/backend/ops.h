/*
 * ops.h -- the mathematics of the model, one argument struct per operation.
 *
 * This header is the contract between the model runner above and the CPU and CUDA backends
 * below: formulas, shapes, dtypes, aliasing. Neither side may assume what is not written
 * here. kl_check_*() in ops_check.c enforces it once, above the backends, so that they can
 * trust their inputs; kl_cost_*() in ops_cost.c counts flops and bytes from the same structs.
 *
 * Axes   T tokens of a step, of all its sequences, packed without padding; N sequences;
 *        S slots of a state pool; D hidden; H heads; K key and V value channels of a head;
 *        C conv channels; W conv width; E experts; I an expert's inner width; P pages.
 * act    the activations' dtype, f32 or bf16; all `act` tensors of one call share it.
 * Arithmetic is f32 whatever the storage; a result is rounded once, where it is stored.
 *
 * Ragged batches: sequence n owns tokens cu_seqlens[n] .. cu_seqlens[n+1] - 1; an empty
 * sequence is legal and leaves its state alone. Integer arrays live where the tensors live, so
 * a check cannot read them: values out of range are the caller's fault, and both callers (the
 * runner and the binding) validate them.
 *
 * Strides: tensors are dense unless marked "rows strided": then the first axis may have any
 * stride and the others are dense. An output overlaps no other tensor of its call, unless its
 * line allows that.
 *
 * Determinism: an output element is accumulated in one fixed order that depends neither on
 * the number of threads, nor on T or N, nor on which other rows are in the call. CUDA promises
 * less: the same call twice has the same bits, and its order of sums may follow the shapes.
 */
#ifndef KL_BACKEND_OPS_H
#define KL_BACKEND_OPS_H

#include "backend/router_ahead.h"
#include "base/error.h"
#include "base/latents.h"
#include "base/tensor.h"
#include "base/weight.h"

#include <stdbool.h>

/* Every operation, in the order of the structs below. Whatever lists operations (the table of
 * a backend, the checks, the costs) is generated from this line.
 *     X(name)   struct kl_<name>, kl_check_<name>, kl_cost_<name>, table entry <name> */
#define KL_OPS(X)                                                                              \
    X(embedding)                                                                               \
    X(gather)                                                                                  \
    X(rms_norm)                                                                                \
    X(gated_rms_norm)                                                                          \
    X(linear)                                                                                  \
    X(linear_pair)                                                                             \
    X(mlp)                                                                                     \
    X(short_conv)                                                                              \
    X(kda_prefill)                                                                             \
    X(kda_decode)                                                                              \
    X(kda_mixer)                                                                               \
    X(mla_lay_out)                                                                             \
    X(mla_append)                                                                              \
    X(mla_prefill)                                                                             \
    X(mla_decode)                                                                              \
    X(moe_route)                                                                               \
    X(moe_experts)                                                                             \
    X(moe)                                                                                     \
    X(token_logprobs)                                                                          \
    X(sample)                                                                                  \
    X(pack_weight)                                                                             \
    X(fill_normal)

/* Scratch memory of one call, lent by the caller: at least the bytes that the backend's
 * <name>_workspace(be, args) asks for, 64-byte aligned. What it holds means nothing outside. */
typedef struct {
    void *data;
    size_t bytes;
} kl_workspace;

/* out[t, :] = table[ids[t], :]; zeros for an id of -1, which kl_sample draws where it cannot. The
 * first operation of a step, so it also sets memory that later ones need so: a router's sums, and
 * what is read as it arrives. Of both, address and bytes are multiples of KL_SUMS_ALIGNMENT. */
typedef struct {
    kl_workspace ws;
    kl_tensor ids;    /* [T] i32, in [-1, rows)                          */
    kl_weight table;  /* [rows, D], f32 or bf16, count 1                 */
    kl_tensor out;    /* [T, D] f32 or bf16                              */
    kl_tensor sums;   /* [bytes] u8, set to 0, or absent                 */
    kl_tensor blanks; /* [bytes] u8, set to 0xff: KL_BLANK; or absent    */
} kl_embedding;

/* out[n, :] = x[rows[n], :]. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;    /* [T, D] f32 or bf16                                */
    kl_tensor rows; /* [N] i32, in [0, T)                                */
    kl_tensor out;  /* [N, D] dtype of x                                 */
} kl_gather;

/*     r = residual + x     (stored back into residual; without one, r = x)
 *     out = r / sqrt(mean(r^2) + eps) * weight
 * With x absent, r = residual. out may be absent: then only the sum is done. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;        /* [T, D] act, rows strided, or absent           */
    kl_tensor residual; /* [T, D] f32 or act, rows strided, in and out, or absent */
    kl_tensor weight;   /* [D] f32                                       */
    kl_tensor out;      /* [T, D] act or absent; may be x itself         */
    float eps;
} kl_rms_norm;

/* KDA's output gate: out = x / sqrt(mean(x^2) + eps) * weight * sigmoid(z), over the last axis. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;      /* [T, H, D] act, rows strided                     */
    kl_tensor z;      /* [T, H, D] act, rows strided                     */
    kl_tensor weight; /* [D] f32, shared by the heads                    */
    kl_tensor out;    /* [T, H, D] act; may be x itself                  */
    float eps;
} kl_gated_rms_norm;

/* out = h w^T, h being x; a token step's norms and sums may be done around it:
 *     h = x / sqrt(mean(x^2) + norm_eps) * norm_weight, rounded to act   with a norm_weight
 *     residual += h w^T, rounded to act first                           instead of an out
 * These are the bits of rms_norm, linear and rms_norm's sum one after the other; on CUDA the mean
 * may have another order, and h w^T of a norm of a single token another than that of an x.
 * `peaks`, 8-byte aligned: what a draw asks of all logits, of KL_PEAK_OUTPUTS outputs in turn:
 *     m = the largest, NaN if one is;  s = sum of exp(out - m), 0 where m is no finite number */
typedef struct {
    kl_workspace ws;
    kl_tensor x;           /* [T, in] act, with a norm_weight f32 or act; rows strided */
    kl_weight w;           /* [out, in], count 1                         */
    kl_tensor out;         /* [T, out] f32 or act, rows strided; absent with a residual */
    kl_tensor norm_weight; /* [in] f32, or absent; as unsettled as w     */
    kl_tensor residual;    /* [T, out] f32, in and out, or absent        */
    kl_tensor peaks; /* [T, kl_peaks_of(out), 2] f32, m and s, with an out in f32; or absent */
    kl_dtype act;    /* of h, with a norm_weight; else x has it    */
    float norm_eps;  /* > 0 with a norm_weight                     */
    kl_router_ahead ahead; /* with a residual of one token; not in a linear_pair */
    bool arriving;         /* x is, without a norm: arrivals.h; not in a linear_pair */
} kl_linear;

#define KL_PEAK_OUTPUTS 16

static inline int64_t kl_peaks_of(int64_t outputs)
{
    return outputs / KL_PEAK_OUTPUTS + (outputs % KL_PEAK_OUTPUTS != 0);
}

/* Two linear maps of one act, neither of which reads the other's result: the results of two
 * calls of linear without peaks, whose workspaces go unused. */
typedef struct {
    kl_workspace ws;
    kl_linear first, second;
} kl_linear_pair;

/* The dense feed-forward layer: out = (silu(h w1^T) * (h w3^T)) w2^T, with the h and the
 * residual of linear. The inner product is rounded to act before w2. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;           /* [T, D] act, with a norm_weight f32 or act  */
    kl_weight w1, w3;      /* [I, D] gate and up                         */
    kl_weight w2;          /* [D, I] down                                */
    kl_tensor out;         /* [T, D] act; may not alias x; absent with a residual */
    kl_tensor norm_weight; /* [D] f32, or absent; as unsettled as w1     */
    kl_tensor residual;    /* [T, D] f32, in and out, or absent; may be x itself */
    kl_dtype act;          /* as in linear                               */
    float norm_eps;
} kl_mlp;

/* Depthwise causal convolution over time, then an optional SiLU:
 *     y[t, c] = act( sum_j weight[c, j] * x[t - (W-1) + j, c] )
 * weight[c, W-1] multiplies the current token. Inputs before the call come from the state,
 * which holds the last W-1 raw inputs of its sequence, oldest first, and is updated in place. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;          /* [T, C] act, rows strided                    */
    kl_tensor weight;     /* [C, W] f32, W in 1 .. 8                     */
    kl_tensor state;      /* [S, C, W-1] act, in and out                 */
    kl_tensor slots;      /* [N] i32 in [0, S), distinct; absent: n -> n */
    kl_tensor cu_seqlens; /* [N+1] i32                                   */
    kl_tensor out;        /* [T, C] act; may not alias x                 */
    bool silu;
} kl_short_conv;

/* How the log-decay of a channel comes from g. */
typedef enum {
    KL_GATE_DIRECT,   /* g                                                        */
    KL_GATE_SOFTPLUS, /* -exp(A_log[h]) * softplus(g + dt_bias[h, k])              */
    KL_GATE_BOUNDED,  /* lower_bound * sigmoid(exp(A_log[h]) * (g + dt_bias[h, k])) */
    KL_N_GATES,
} kl_gate;

/* Kimi Delta Attention. Per head and token, with S [V, K] starting at state[slot]:
 *     a    = exp(gate(g))                   decay of each key channel, in (0, 1]
 *     q, k = q / sqrt(sum q^2 + 1e-6), ...  when `normalize`
 *     b    = sigmoid(beta)                  when `beta_logits`, else beta
 *     S   <- S diag(a)
 *     u    = b (v - S k)                    the part of v that S does not hold yet
 *     S   <- S + u k^T                      the delta rule
 *     o    = scale S q                      reads the updated state
 * State is [V, K] with K contiguous, f32, updated in place.
 *
 * Grouped heads: q and k may have Hk heads with H a multiple of Hk; value head h reads key head
 * h / (H / Hk). g, beta, A_log, dt_bias and the state belong to value heads.
 *
 * kda_decode: T = N, one token for each sequence, cu_seqlens absent. kda_prefill computes the
 * same function of any lengths; it may reorder the arithmetic within chunks that start at a
 * sequence's first token of the call, KL_KDA_CHUNK tokens each (64 on CUDA), and takes the order
 * of kda_decode for a chunk of a single token. On CUDA, unless the backend is batch-invariant, a
 * long sequence of few heads is computed by segments side by side, as many as the call leaves room
 * for, and f32 products make their states. An exponent is positive only where it is bounded and
 * its factor's partner makes up for it.
 *
 * Checkpoints, of kda_prefill: with E = checkpoint_every the state of sequence n after its first
 * (c + 1) E tokens of the call is stored in row cu_seqlens[n] / E + c, too. Rows are distinct and
 * below T / E; those that no sequence has are left alone. */
typedef struct {
    kl_workspace ws;
    kl_tensor q, k;           /* [T, Hk, K] act, rows strided                */
    kl_tensor v;              /* [T, H, V] act, rows strided                 */
    kl_tensor g;              /* [T, H, K] f32 or act, rows strided          */
    kl_tensor beta;           /* [T, H] f32 or act, rows strided             */
    kl_tensor state;          /* [S, H, V, K] f32, in and out                */
    kl_tensor slots;          /* [N] i32 in [0, S), distinct; absent: n -> n */
    kl_tensor cu_seqlens;     /* [N+1] i32; absent in kda_decode             */
    kl_tensor A_log;          /* [H] f32; softplus; optional for bounded     */
    kl_tensor dt_bias;        /* [H, K] f32; optional                        */
    kl_tensor out;            /* [T, H, V] act                               */
    kl_tensor checkpoints;    /* [T / E, H, V, K] f32, out, or absent       */
    int64_t checkpoint_every; /* E, a multiple of KL_KDA_CHECKPOINT      */
    kl_gate gate;
    float lower_bound; /* < 0, KL_GATE_BOUNDED only                      */
    float scale;
    bool normalize, beta_logits;
} kl_kda;
typedef kl_kda kl_kda_prefill;
typedef kl_kda kl_kda_decode;

/* A KDA layer between the projections that read its input and the one that writes its output,
 * with the bits of these operations one after the other:
 *     g, z = linear(f_low, f_b) in f32, linear(g_low, g_b)
 *     q | k | v = short_conv(qkv), with SiLU
 *     o = kda_decode if `single`, else kda_prefill, of q, k, v, g, beta, normalised, with logits
 *     out = gated_rms_norm(o, z)
 * Heads are not grouped. What kl_weight says of `unsettled` goes for conv_weight, A_log, dt_bias
 * and norm_weight with f_b and g_b. `single`: every sequence has one token, so that cu_seqlens
 * counts up by one and N = T.
 *
 * `guesses`: of each sequence the first token is certain, the others are guesses of what follows
 * it. All are read one after the other, each with the bits of a single token; but states and
 * windows then have read the certain tokens alone. When it is known what was `drawn` after each
 * token, a second call with the same inputs and the `tokens` lets them read the guesses that were
 * right, tokens[t] == drawn[t - 1], up to the first of a sequence that was not; it leaves out as
 * it is. CUDA does so for K a multiple of 4 and V of 8, both up to 128, and W = 4. */
typedef struct {
    kl_workspace ws;
    kl_tensor qkv;         /* [T, C] act, rows strided; C = H (2 K + V)   */
    kl_tensor conv_weight; /* [C, W] f32, W in 1 .. 8                     */
    kl_tensor conv_state;  /* [S, C, W-1] act, in and out                 */
    kl_tensor f_low;       /* [T, R] act, rows strided                    */
    kl_weight f_b;         /* [H K, R], count 1                           */
    kl_tensor g_low;       /* [T, R'] act, rows strided                   */
    kl_weight g_b;         /* [H V, R'], count 1                          */
    kl_tensor beta;        /* [T, H] f32 or act, rows strided             */
    kl_tensor state;       /* [S, H, V, K] f32, in and out                */
    kl_tensor slots;       /* [N] i32 in [0, S), distinct; absent: n -> n */
    kl_tensor cu_seqlens;  /* [N+1] i32                                   */
    kl_tensor A_log;       /* [H] f32; softplus; optional for bounded     */
    kl_tensor dt_bias;     /* [H, K] f32; optional                        */
    kl_tensor norm_weight; /* [V] f32                                     */
    kl_tensor out;         /* [T, H, V] act                               */
    kl_tensor tokens;      /* [T] i32, with drawn                         */
    kl_tensor drawn;       /* [T] i32, or absent; guesses only            */
    kl_gate gate;
    float lower_bound, scale, eps;
    bool single, guesses, arriving; /* the inputs are: backend/arrivals.h */
} kl_kda_mixer;

/* Cutting a prefill at its multiples changes no bit; on CUDA at 64, where there are no segments. */
#define KL_KDA_CHUNK      16
#define KL_KDA_CHECKPOINT 64
#define KL_KDA_MAX_K      256

/* Tokens of an MLA page; also the block of the context that attention reads at a time. */
#define KL_PAGE_TOKENS 64

/* Up to so many new tokens within a page are cheaper absorbed, even where larger tiles beside
 * them expand the page anyway; alone, by a factor of eight. */
#define KL_MLA_FEW_TOKENS 16

/* Lay contexts out in pages that no two sequences share. Sequence n has cu_past[n+1] - cu_past[n]
 * tokens before its new ones:
 *     lengths[n] = cu_past[n+1] - cu_past[n] + cu_seqlens[n+1] - cu_seqlens[n]
 *     block_table[n, b] = (cu_past[n] + cu_seqlens[n]) / 64 + n + b
 * so that every page is below (cu_past[N] + T) / 64 + N, which the host knows. */
typedef struct {
    kl_workspace ws;
    kl_tensor cu_past;     /* [N+1] i32, or absent: nothing came before  */
    kl_tensor cu_seqlens;  /* [N+1] i32                                  */
    kl_tensor lengths;     /* [N] i32, out                               */
    kl_tensor block_table; /* [N, B] i32, out                            */
} kl_mla_lay_out;

/* Pages of latents, `pages` of the operations below, are [P, 64, rank+rope] act, or 8-bit ones:
 * u8 [P, 64, row_bytes] at a multiple of 16 bytes, rows as kl_latents_row_of(rank, rope) has
 * them. An operation on 8-bit pages has the result that it would have on pages of act which hold
 * what is read from them. */

/* Write the latents of new tokens into their sequences' pages:
 *     row = [ rms_norm(raw[:rank]) * norm_weight | raw[rank:] ]
 * (without a norm_weight the row is copied). Token i of sequence n goes to position
 * p = lengths[n] - count(n) + i, which is row p % 64 of page block_table[n, p / 64]. 8-bit pages
 * get the row as it is in act. */
typedef struct {
    kl_workspace ws;
    kl_tensor raw;         /* [T, rank+rope] act, rows strided           */
    kl_tensor norm_weight; /* [rank] f32, or absent                      */
    kl_tensor pages;       /* [P, 64, rank+rope] act or 8-bit, written   */
    kl_tensor block_table; /* [N, B] i32                                 */
    kl_tensor lengths;     /* [N] i32, context after these tokens        */
    kl_tensor cu_seqlens;  /* [N+1] i32; absent: a token each            */
    int64_t rank;          /* of 8-bit pages                             */
    float eps;
} kl_mla_append;

/* Multi-head latent attention without rotation, causal, over paged latents [c | k_pe]. Per
 * head, with w_kv_b[h] = [W_UK; W_UV] (nope rows, then V rows, of `rank` columns):
 *     plain     k = [W_UK c | k_pe],  v = W_UV c,  o = softmax(scale q k^T) v
 *     absorbed  q' = [W_UK^T q_nope | q_pe],  ctx = softmax(scale q' [c | k_pe]^T) c,  o = W_UV ctx
 * Token i of sequence n stands at position lengths[n] - count(n) + i and sees positions up to
 * its own. Rows of a page past a sequence's length are never read.
 *
 * mla_decode: T = N, one token each, cu_seqlens absent. With `raw` it first writes the tokens' own
 * latents, as mla_append does; in mla_prefill raw is absent. mla_prefill takes the arithmetic of
 * mla_decode for the tokens of a tile of at most KL_MLA_FEW_TOKENS, where tiles are a
 * sequence's new tokens cut at absolute positions that are multiples of KL_PAGE_TOKENS. */
typedef struct {
    kl_workspace ws;
    kl_tensor q;           /* [T, H, nope+rope] act, rows strided        */
    kl_tensor pages;       /* [P, 64, rank+rope] act, or 8-bit           */
    kl_tensor block_table; /* [N, B] i32                                 */
    kl_tensor lengths;     /* [N] i32, context including these tokens    */
    kl_tensor cu_seqlens;  /* [N+1] i32; absent in mla_decode            */
    kl_tensor w_kv_b;      /* [H, nope+V, rank] f32 or bf16              */
    kl_tensor raw;         /* [N, rank+rope] act, rows strided: into pages; or absent */
    kl_tensor norm_weight; /* [rank] f32, of raw; or absent              */
    kl_tensor out;         /* [T, H, V] act                              */
    kl_tensor blanks;      /* [bytes] u8, with arriving q and raw: arrivals.h; or absent */
    float norm_eps, scale;
    bool unsettled; /* w_kv_b is, as kl_weight says it */
} kl_mla;
typedef kl_mla kl_mla_prefill;
typedef kl_mla kl_mla_decode;

typedef enum { KL_SCORE_SIGMOID, KL_SCORE_SOFTMAX, KL_N_SCORES } kl_score;

/* Choose the experts of each token:
 *     s = sigmoid(logits) or softmax(logits);  c = s + bias
 *     with groups > 1, only experts of the top_groups groups with the largest sum of their
 *     two best c may be chosen;  ids = the top_k largest c, best first, lower id on a tie
 *     weights = s[ids];  renormalize: / (their sum + 1e-20);  * scaling */
typedef struct {
    kl_workspace ws;
    kl_tensor logits;  /* [T, E] f32                                     */
    kl_tensor bias;    /* [E] f32, or absent                             */
    kl_tensor ids;     /* [T, top_k] i32, out                            */
    kl_tensor weights; /* [T, top_k] f32, out                            */
    kl_score score;
    int groups, top_groups; /* 1, 1: no grouping                         */
    float scaling;
    bool renormalize;
} kl_moe_route;

/* out = sum_j weights[t, j] * expert_{ids[t, j]}(x[t])  +  shared(x[t])
 * expert(x) = (silu(x w1^T) * (x w3^T)) w2^T, its inner product rounded to act. The sum is
 * taken in f32 in the order j = 0 .. top_k-1, then the shared expert, and rounded once. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;                               /* [T, D] act                 */
    kl_tensor ids;                             /* [T, top_k] i32 in [0, E)   */
    kl_tensor weights;                         /* [T, top_k] f32             */
    kl_weight w1, w3;                          /* [E, I, D] gate and up      */
    kl_weight w2;                              /* [E, D, I] down             */
    kl_weight shared_w1, shared_w3, shared_w2; /* [I', D], [D, I']; data NULL: none */
    kl_tensor out;                             /* [T, D] act, may not alias x */
} kl_moe_experts;

static inline bool kl_moe_has_shared(const kl_moe_experts *a)
{
    return a->shared_w1.data != NULL;
}

/* A layer of experts with its router, with the bits of these operations one after the other:
 *     h = rms_norm(x) with norm_weight and norm_eps, or x without a norm_weight
 *     logits = h router^T;  ids, weights = moe_route(logits, bias, ...)
 *     y = moe_experts(h, ids, weights, ...);  out = y, or residual += y
 * Logits are f32 whatever act is: two experts that almost tie must not be swapped by a rounding.
 * Out or a residual is given, and a residual may be x itself. On CUDA the mean may have another
 * order. With `sums` h and logits are those of backend/router_ahead.h. */
typedef struct {
    kl_workspace ws;
    kl_tensor x;                               /* [T, D] act, with a norm_weight f32 or act  */
    kl_tensor norm_weight;                     /* [D] f32, or absent; unsettled as the router */
    kl_weight router;                          /* [E, D], count 1                            */
    kl_tensor bias;                            /* [E] f32, or absent                         */
    kl_weight w1, w3;                          /* [E, I, D] gate and up                      */
    kl_weight w2;                              /* [E, D, I] down                             */
    kl_weight shared_w1, shared_w3, shared_w2; /* [I', D], [D, I']; data NULL: none */
    kl_tensor out;      /* [T, D] act, may not alias x; absent with a residual */
    kl_tensor residual; /* [T, D] f32, in and out, or absent             */
    kl_dtype act;       /* of h, with a norm_weight; else x has it       */
    kl_score score;
    int top_k, groups, top_groups; /* 1, 1: no grouping                  */
    float norm_eps;                /* > 0 with a norm_weight             */
    float scaling;
    bool renormalize;
    void *sums; /* NULL, or what a linear's `ahead` has left; with a norm_weight */
} kl_moe;

/* Log-probabilities of given next tokens, without a [T, rows] matrix:
 *     z = hidden lm_head^T;  logprobs[t] = z[targets[t]] - logsumexp(z)
 *     greedy[t] = 1 if targets[t] is the argmax (lowest id on a tie)
 *     top_ids, top_logprobs: the n largest, best first, lower id on a tie
 * A target of -1 asks for no log-probability: NaN is stored, greedy 0. */
typedef struct {
    kl_workspace ws;
    kl_tensor hidden;       /* [T, D] act                                */
    kl_weight lm_head;      /* [rows, D]                                 */
    kl_tensor targets;      /* [T] i32 in [-1, rows)                     */
    kl_tensor logprobs;     /* [T] f32, out                              */
    kl_tensor greedy;       /* [T] u8, out                               */
    kl_tensor top_ids;      /* [T, n] i32, out, or absent (n <= 256)     */
    kl_tensor top_logprobs; /* [T, n] f32, out, or absent                */
} kl_token_logprobs;

/* What one row of kl_sample is drawn with. */
typedef struct {
    float temperature;        /* 0: argmax                               */
    int32_t top_k;            /* 0: all                                  */
    float top_p;              /* in (0, 1]                               */
    float min_p;              /* in [0, 1]                               */
    float repetition_penalty; /* > 0; 1: none                            */
    uint64_t seed;            /* of this row's own generator             */
    uint64_t position;        /* which draw of that generator            */
} kl_sampling;

/* Draw one token a row from logits:
 *     for ids seen: z > 0 ? z / penalty : z * penalty
 *     temperature 0: argmax, lowest id on a tie; else p = softmax(z / temperature),
 *     keep the top_k largest; then the smallest set whose mass is >= top_p; then those with
 *     p >= min_p * max p; draw by inverse CDF in order of falling p (lower id first on a tie)
 *     with one uniform from kl_rng(seed, position).
 * logprob is log softmax of the row's logits as given (before penalty and temperature). A row
 * with a NaN or no finite logit yields id -1. Peaks change no bit, other rows no greedy one's. */
typedef struct {
    kl_workspace ws;
    kl_tensor logits;            /* [N, rows] f32                        */
    kl_tensor peaks;             /* [N, kl_peaks_of(rows), 2] f32, kl_linear's; or absent */
    const kl_sampling *sampling; /* [N], where the tensors live          */
    kl_tensor seen;              /* [N, ceil(rows / 32)] i32 bit sets, or absent */
    kl_tensor ids;               /* [N] i32, out                         */
    kl_tensor logprobs;          /* [N] f32, out                         */
    kl_tensor top_ids;           /* [N, n] i32, out, or absent (n <= 256) */
    kl_tensor top_logprobs;      /* [N, n] f32, out, or absent           */
    bool greedy; /* every temperature is 0: known where the sampling is not read */
} kl_sample;

/* Store a matrix in a weight's format: rounding to bf16, or quantising each group with
 * scale = bf16(max|w| / qmax), q = clamp(round(w / scale)), qmax 127, 7 or 448. A scale of 0
 * gives q = 0. src and out have equal shape. A group that is not finite is refused by the CPU,
 * with its place; on CUDA, where nobody waits for the answer, its scale is NaN and so it reads
 * as NaN. */
typedef struct {
    kl_workspace ws;
    kl_tensor src; /* [rows, cols] f32 or bf16, rows strided             */
    kl_weight out; /* [rows, cols], count 1                              */
} kl_pack_weight;

/* out[i] = mean + std * z[i], for models made on the device. z[2p] and z[2p + 1] are a Box-Muller
 * pair of the four words r of kl_philox(seed, p), in double:
 *     u = ((r0 2^32 + r1) >> 11) 2^-53,  w = ((r2 2^32 + r3) >> 11) 2^-53
 *     radius = sqrt(-2 log(1 - u));  z = radius cos(2 pi w), radius sin(2 pi w)
 * The same numbers on every backend, to rounding. */
typedef struct {
    kl_workspace ws;
    kl_tensor out; /* f32 or bf16, dense, any shape                      */
    uint64_t seed;
    float mean, std;
} kl_fill_normal;

/* What an operation moves and computes at the least, for rooflines. */
typedef struct {
    double flops; /* 2 for a multiply-add */
    double bytes; /* each operand and result once, from and to memory */
} kl_cost;

#ifdef __cplusplus
extern "C" {
#endif

#define KL_DECLARE(name)                                                                       \
    kl_status kl_check_##name(const kl_##name *a, kl_error *err);                              \
    kl_cost kl_cost_##name(const kl_##name *a);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

#ifdef __cplusplus
}
#endif

#endif
