/*
 * pass.h -- one walk of a step's tokens through the model.
 *
 * A pass lays its buffers out in an arena and calls operations on them. With an arena that only
 * measures it calls none: then it is dry, and arena.peak says what the same pass would need. So
 * the planner runs the very code that a step runs, and the two cannot disagree.
 *
 * A step has three parts. It sends one block of inputs, computes, and fetches one block of
 * outputs. The part between the copies consists of operations alone, whose pointers and shapes
 * follow from the shape of the pass: recording.h keeps it for steps of the same shape.
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

/* Up to so many tokens a weight streams by once for all of them, and the norm of the stream and
 * the sum into it belong to the products on either side; with more they are one walk of their
 * own. */
#define KL_FEW_TOKENS 16

typedef struct {
    int64_t T, N, B, R;
    bool decode;   /* one token for each sequence */
    bool all_rows; /* the R rows are the T tokens, in order */
    bool verify;   /* a token and guesses of the next ones: kl_step.taken */
    bool logits, targets, sampling, seen; /* what is wanted of the R rows */
    bool greedy;                          /* sampling: every temperature is 0 */
    int top;
} kl_pass_shape;

/* What a step tells the device: one block on the host and its copy there, in this order. */
typedef struct {
    kl_tensor ids;         /* [T]                                       */
    kl_tensor cu_seqlens;  /* [N+1]                                     */
    kl_tensor slots;       /* [N]                                       */
    kl_tensor lengths;     /* [N]                                       */
    kl_tensor table;       /* [N, B]                                    */
    kl_tensor rows;        /* [R]                                       */
    kl_tensor targets;     /* [R], or absent                            */
    kl_sampling *sampling; /* [R], or NULL                              */
    kl_tensor seen;        /* [R, ceil(vocab / 32)] bit sets, or absent */
} kl_pass_inputs;

/* What comes back of the rows that are sampled or have targets, in a block of its own. */
typedef struct {
    kl_tensor logprobs;     /* [R] f32, of the drawn or the targets  */
    kl_tensor top_ids;      /* [R, top] i32                          */
    kl_tensor top_logprobs; /* [R, top] f32                          */
    kl_tensor greedy;       /* [R] u8, of the targets                */
    kl_tensor ids;          /* [R] i32, drawn                        */
} kl_pass_outputs;

/* Where a part of a layer begins and ends: the fields of these names of kl_linear and of what else
 * has them. h and y, or with few tokens x at either end, which the part normalises and adds to. */
typedef struct {
    kl_tensor x, norm_weight; /* the weight absent: x is normalised */
    kl_tensor out, residual;  /* one of them absent                 */
} kl_ends;

typedef struct {
    kl_backend *be;
    const kl_config *config;
    const kl_weights *weights;
    const kl_cache *cache;
    kl_dtype act;
    int64_t row_block;     /* rows of logits held at a time */
    kl_mark *const *marks; /* [2], for the host to keep near the device; unused when dry */
    kl_arena arena;        /* base NULL: dry */

    kl_pass_shape shape;
    const kl_step *step; /* where logits and captures go, and the poll; NULL when dry */
    kl_pass_inputs in;
    kl_pass_outputs out;
    void *in_block, *out_block;
    size_t in_bytes, out_bytes;
    kl_tensor x;           /* [T, D] f32, the residual stream           */
    kl_tensor h;           /* [T, D] act, its norm; not with few tokens */
    kl_tensor y;           /* [T, D] act, what is to be added to it; likewise */
    kl_ends ends;          /* of the part of a layer that is under way  */
    char *sums;            /* of the layers to come, kl_moe_sums_bytes() each, or NULL */
    kl_router_ahead ahead; /* of the layer under way, or without sums */
    void *kept;            /* of a verify step: what the KDA layers read, kept_bytes each */
    size_t kept_bytes;
    kl_arrivals arrivals; /* of its KDA layers, each of which then has memory of its own for */
    char *arriving;       /* what passes between its operations, kl_kda_arriving_bytes() */
    kl_mla_arrivals mla_arrivals; /* the same of its MLA layers */
    char *mla_arriving;
} kl_pass;

/* Lay out the inputs or outputs of a shape in a block (NULL measures) and return its bytes. */
size_t kl_pass_layout_inputs(kl_pass_inputs *in, const kl_pass_shape *shape, int64_t vocab,
                             void *block);
size_t kl_pass_layout_outputs(kl_pass_outputs *out, const kl_pass_shape *shape, void *block);

/* Whether the ids that such a step draws are those that the next one of its batch reads. Then its
 * blocks overlap in them on the device: the next step's inputs can be sent without ids before this
 * one has run, and it feeds itself. */
bool kl_pass_feeds_itself(const kl_pass_shape *shape);

/* Begin a step of this shape: both blocks, at the start of the arena. */
kl_status kl_pass_start(kl_pass *p, const kl_pass_shape *shape, kl_error *err);
/* Its parts. The copies are on their way when they return: the caller waits with sync() or a mark
 * before it touches the host's blocks again. follows: the ids are there already, see above. */
kl_status kl_pass_send(kl_pass *p, const void *inputs, bool follows, kl_error *err);
kl_status kl_pass_compute(kl_pass *p, kl_error *err); /* embedding, layers, head */
kl_status kl_pass_fetch(kl_pass *p, void *outputs, kl_error *err);

/* Instead of compute: sample from R rows of logits of the host's. */
kl_status kl_pass_sample_logits(kl_pass *p, const float *logits, kl_error *err);

/* KL_ERR_CANCELLED when the step's caller wants it to stop. */
kl_status kl_pass_poll(const kl_pass *p, kl_error *err);

/* ---- for the layers -------------------------------------------------------------------- */

static inline bool kl_pass_dry(const kl_pass *p)
{
    return p->arena.base == NULL;
}

/* A dense buffer that lives until the arena is rewound. */
kl_tensor kl_pass_take(kl_pass *p, kl_dtype dtype, int64_t rows, int64_t cols);

/* kl_pass_<op>: take the workspace, run the operation unless dry, give the workspace back. */
#define KL_DECLARE(op) kl_status kl_pass_##op(kl_pass *p, kl_##op *a, kl_error *err);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

/* out = x w^T of an x at the beginning of a part. */
kl_linear kl_pass_first_map(const kl_pass *p, const kl_weight *w, kl_tensor out);
/* What a part adds to the stream: x w^T. */
kl_linear kl_pass_last_map(const kl_pass *p, const kl_weight *w, kl_tensor x);

/* A layer's part, between p->ends. `index` counts the layers of its kind. */
kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err);
/* After the draws of a verify step: the states read the guesses that were right. */
kl_status kl_kda_advance(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err);
size_t kl_kda_kept_bytes(const kl_pass *p); /* of a layer, in a verify step of p's shape */
/* Find p->arrivals, those of a layer like this one, which p->ends lead to. */
kl_status kl_kda_find_arrivals(kl_pass *p, const kl_kda_weights *w, kl_error *err);
size_t kl_kda_arriving_bytes(const kl_pass *p);
kl_status kl_mla_find_arrivals(kl_pass *p, const kl_mla_weights *w, kl_error *err);
size_t kl_mla_arriving_bytes(const kl_pass *p, const kl_mla_weights *w);
kl_status kl_mla_layer(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_error *err);
kl_status kl_dense_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err);
kl_status kl_moe_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err);
/* Of the sums that its mixer's last map leaves for the experts' router; 0: it leaves none. */
size_t kl_moe_sums_bytes(const kl_pass *p, int64_t layer);

/* What is wanted of rows of x. */
kl_status kl_head(kl_pass *p, kl_error *err);
/* peaks: of kl_linear, or absent. */
kl_status kl_head_sample(kl_pass *p, kl_tensor logits, kl_tensor peaks, kl_error *err);

#endif
