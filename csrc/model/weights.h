/*
 * weights.h -- the weights of a model, and the one table that says what they are.
 *
 * kl_weights_visit() walks every matrix and vector of a model in a fixed order and reports two
 * things: what is stored (`store`: a kl_weight with its format and shape) and which tensors of
 * a checkpoint fill it (`part`: a name, a shape, and the rows it goes to). Planning, allocating,
 * binding, loading and randomising are five visitors of the same walk, so they cannot disagree.
 *
 * Vectors and the small tensors that the kernels want in f32 are kl_weights of one or more rows
 * in KL_W_F32; kl_vector_of() and kl_matrix_of() view them as tensors.
 */
#ifndef KL_MODEL_WEIGHTS_H
#define KL_MODEL_WEIGHTS_H

#include "backend/backend.h"
#include "base/arena.h"
#include "model/config.h"

/* H heads of K channels, D hidden, W conv width. */
typedef struct {
    kl_weight qkv;      /* [3HK, D], q | k | v rows                                    */
    kl_weight low;      /* [H + 2K, D], b | f_a | g_a rows; never quantised            */
    kl_weight conv;     /* [3HK, W] f32                                                */
    kl_weight f_b, g_b; /* [HK, K]                                               */
    kl_weight A_log;    /* [1, H] f32                                            */
    kl_weight dt_bias;  /* [1, HK] f32                                           */
    kl_weight o_norm;   /* [1, K] f32                                            */
    kl_weight o;        /* [D, HK]                                               */
} kl_kda_weights;

typedef struct {
    kl_weight q;       /* [H (nope + rope), D], or from the q_rank channels of q_a */
    kl_weight q_a;     /* [q_rank, D]; data NULL without a q_rank                  */
    kl_weight q_norm;  /* [1, q_rank] f32; the same                                */
    kl_weight kv_a;    /* [kv_rank + rope, D]                                      */
    kl_weight kv_norm; /* [1, kv_rank] f32                                         */
    kl_weight kv_b;    /* [H (nope + v), kv_rank] in act                           */
    kl_weight o;       /* [D, H v]                                                 */
} kl_mla_weights;

typedef struct {
    kl_weight w1, w3, w2; /* dense [I, D], [D, I]; moe [E, I, D], [E, D, I] */
    kl_weight router;     /* [E, D] f32                       */
    kl_weight bias;       /* [1, E] f32                       */
    kl_weight shared_w1, shared_w3, shared_w2; /* data NULL without shared experts */
} kl_ffn_weights;

typedef struct {
    kl_weight mixer_norm, ffn_norm; /* [1, D] f32 */
    kl_kda_weights kda;
    kl_mla_weights mla;
    kl_ffn_weights ffn;
} kl_layer_weights;

typedef struct {
    kl_weight embedding; /* [vocab, D] in act */
    kl_weight norm;      /* [1, D] f32        */
    kl_weight lm_head;   /* [vocab, D]; the embedding itself where they are tied */
    kl_layer_weights *layers;
    int64_t n_layers;
} kl_weights;

/* How the shape of a checkpoint's tensor is compared with what is expected. */
typedef enum {
    KL_SHAPE_EXACT,
    KL_SHAPE_CONV,     /* [C, 1, W] or [C, W]                                   */
    KL_SHAPE_COUNT,    /* any shape with that many elements                      */
    KL_SHAPE_AT_LEAST, /* any shape with at least that many; the first are taken */
} kl_shape_rule;

/* A tensor of the checkpoint: rows [row, row + rows) of matrix `index` of `dest`. */
typedef struct {
    const char *name, *alias; /* alias: a second name to look for, or NULL */
    kl_weight *dest;
    int64_t index, row, rows;
    kl_shape_rule rule;
    bool vector;      /* the checkpoint has one axis     */
    bool optional;    /* zeros where it is absent        */
    bool router_bias; /* what favours some experts       */
    float mean, std;  /* what kl_engine_randomize() draws */
} kl_part;

typedef struct {
    kl_status (*store)(void *ctx, kl_weight *dest, kl_error *err);    /* or NULL */
    kl_status (*part)(void *ctx, const kl_part *part, kl_error *err); /* or NULL */
    void *ctx;
} kl_weight_visitor;

/* `format` is that of the big matrices. Shapes are written into `w` on the way. The names of a
 * part live until the visitor returns. */
kl_status kl_weights_visit(kl_weights *w, const kl_config *config, kl_weight_format format,
                           const kl_weight_visitor *visitor, kl_error *err);

/* Give every weight its shape and, from `arena`, its memory. When the arena only measures, the
 * weights point at a placeholder: not to be read, but not absent either. */
kl_status kl_weights_layout(kl_weights *w, const kl_config *config, kl_weight_format format,
                            kl_arena *arena, kl_error *err);
kl_status kl_weights_new(int64_t n_layers, kl_weights *out, kl_error *err);
void kl_weights_free(kl_weights *w); /* the table of layers; the block is the engine's */

static inline kl_dtype kl_act_of(kl_weight_format format)
{
    return format == KL_W_F32 ? KL_F32 : KL_BF16;
}

/* An unquantised weight as a tensor. */
static inline kl_tensor kl_matrix_of(const kl_weight *w)
{
    return kl_tensor_2d(w->data, w->format == KL_W_F32 ? KL_F32 : KL_BF16, w->rows, w->cols);
}

static inline kl_tensor kl_vector_of(const kl_weight *w)
{
    return kl_tensor_1d(w->data, KL_F32, w->rows * w->cols);
}

#endif
