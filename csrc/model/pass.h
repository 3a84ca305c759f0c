/*
 * pass.h -- one walk of a step's tokens through the model.
 *
 * A pass lays its buffers out in an arena and calls operations on them. With an arena that only
 * measures it calls none: then it is dry, and arena.peak says what the same pass would need. So
 * the planner runs the very code that a step runs, and the two cannot disagree.
 *
 * Axes: T tokens, N sequences, B pages of the longest of them, R rows whose next-token
 * distribution is wanted.
 */
#ifndef KL_MODEL_PASS_H
#define KL_MODEL_PASS_H

#include "base/arena.h"
#include "model/cache.h"
#include "model/weights.h"

#define KL_MAX_TOP 256

typedef struct {
    int64_t T, N, B, R;
    bool decode;                          /* one token for each sequence */
    bool logits, targets, sampling, seen; /* what is wanted of the R rows */
    int top;
} kl_pass_shape;

/* The integers of a step: one block on the host and its copy on the device, in this order. */
typedef struct {
    kl_tensor ids;        /* [T]    */
    kl_tensor cu_seqlens; /* [N+1]  */
    kl_tensor slots;      /* [N]    */
    kl_tensor lengths;    /* [N]    */
    kl_tensor table;      /* [N, B] */
    kl_tensor rows;       /* [R]    */
    kl_tensor targets;    /* [R]    */
} kl_pass_ints;

typedef struct {
    kl_backend *be;
    const kl_config *config;
    const kl_weights *weights;
    const kl_cache *cache;
    kl_dtype act;
    int64_t row_block; /* rows of logits held at a time */
    kl_arena arena;    /* base NULL: dry */

    kl_pass_shape shape;
    const kl_step *step; /* where results go; NULL when dry */
    kl_pass_ints ints;
    kl_tensor x; /* [T, D] f32, the residual stream           */
    kl_tensor h; /* [T, D] act, what a layer reads            */
    kl_tensor y; /* [T, D] act, what it adds to x, not yet added */
} kl_pass;

/* Lay out the integers in a block (NULL measures) and return its bytes. */
size_t kl_pass_layout_ints(kl_pass_ints *out, const kl_pass_shape *shape, void *block);

/* Run everything: embedding, layers, head. `host_ints`: the filled host block. Results are on
 * their way to the step's arrays: the caller waits with sync(). */
kl_status kl_pass_run(kl_pass *p, const kl_pass_shape *shape, const kl_step *step,
                      const void *host_ints, kl_error *err);

/* Sample from R rows of logits of the host's. */
kl_status kl_pass_sample_logits(kl_pass *p, const kl_pass_shape *shape, const kl_step *step,
                                const float *logits, kl_error *err);

/* ---- for the layers -------------------------------------------------------------------- */

static inline bool kl_pass_dry(const kl_pass *p)
{
    return p->arena.base == NULL;
}

/* A dense buffer that lives until the arena is rewound. */
kl_tensor kl_pass_take(kl_pass *p, kl_dtype dtype, int64_t rows, int64_t cols);

/* Columns [first, first + cols) of a [T, n] buffer. */
static inline kl_tensor kl_columns(const kl_tensor *t, int64_t first, int64_t cols)
{
    kl_tensor v = *t;
    v.data =
        t->data == NULL ? NULL : (char *)t->data + (size_t)first * kl_dtype_bytes(t->dtype);
    v.shape[1] = cols;
    return v;
}

/* A [T, H * K] view, rows strided, as [T, H, K]. */
static inline kl_tensor kl_heads(kl_tensor t, int64_t H, int64_t K)
{
    t.ndim = 3;
    t.shape[1] = H;
    t.shape[2] = K;
    t.stride[1] = K;
    t.stride[2] = 1;
    return t;
}

/* kl_pass_<op>: take the workspace, run the operation unless dry, give the workspace back. */
#define KL_DECLARE(op) kl_status kl_pass_##op(kl_pass *p, kl_##op *a, kl_error *err);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

/* out = x w^T into a new buffer. */
kl_status kl_pass_project(kl_pass *p, kl_tensor x, const kl_weight *w, kl_dtype dtype,
                          kl_tensor *out, kl_error *err);

/* A layer's part: y = f(h). `index` counts the layers of its kind. */
kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err);
kl_status kl_mla_layer(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_error *err);
kl_status kl_dense_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err);
kl_status kl_moe_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err);

/* What is wanted of rows of x. */
kl_status kl_head(kl_pass *p, kl_error *err);
kl_status kl_head_sample(kl_pass *p, kl_tensor logits, kl_error *err);

#endif
