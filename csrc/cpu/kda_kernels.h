/*
 * kda_kernels.h -- the kernels of simd/kda.h, as each instruction set fills them in.
 *
 * All work on one head. Rows over K in scratch memory are f32, `pitch` floats apart, and zero
 * from K to pitch, so that loops over K need no tails there.
 */
#ifndef KL_CPU_KDA_KERNELS_H
#define KL_CPU_KDA_KERNELS_H

#include "backend/ops.h"

#define KL_KDA_PITCH 16 /* pitch is a multiple of this: the widest vector, any register tile */

/* What turns the raw rows of a head's tokens into f32. */
typedef struct {
    int64_t K, pitch;
    kl_dtype act, g_dtype; /* of q, k, v, out; of g */
    kl_gate gate;
    bool normalize;
    float scale;
    float rate; /* exp(A_log), or 1 */
    float lower_bound;
    const float *dt_bias; /* [K] or NULL */
} kl_kda_head;

/* One token after that. log_decay is <= 0 for a legal gate. */
typedef struct {
    float *q, *k; /* normalised if asked for; q times scale */
    float *log_decay, *decay;
} kl_kda_token;

/* How a state's channel decays: s <- keep * s + change * s. Near no decay keep is 1 and change
 * is expm1(log_decay), so that rounding does not act like a decay of its own over thousands of
 * tokens; else keep is 0 and change is exp(log_decay). */
typedef struct {
    float *keep, *change;
} kl_kda_decay;

/* What one step of the recurrence takes. */
typedef struct {
    kl_kda_token token;
    kl_kda_decay decay;
    float *k_decayed; /* decay * k */
    float beta;
} kl_kda_step;

/* A chunk of `rows` <= C = KL_KDA_CHUNK tokens, as simd/kda.h prepares it for the columns of
 * the state. c_i is the product of the decays of tokens 0 .. i. */
typedef struct {
    int64_t K, pitch, rows;
    kl_dtype act;
    float *x;  /* [2C][pitch]: rows i: k_i c_i; rows C + i: scale q_i c_i             */
    float *kg; /* [C][pitch]: k_j times the decays after token j                      */
    kl_kda_decay decay; /* of the whole chunk, [pitch] each                              */
    float beta[KL_KDA_CHUNK];
    float solve[KL_KDA_CHUNK][KL_KDA_CHUNK]; /* -beta_i <k_i, k_j decayed to i>, j < i    */
    float mix[KL_KDA_CHUNK][KL_KDA_CHUNK];   /* scale <q_i, k_j decayed to i>, j <= i     */
} kl_kda_chunk;

typedef struct {
    /* Raw rows of one token to f32. */
    void (*token)(const kl_kda_head *h, const void *q, const void *k, const void *g,
                  const kl_kda_token *t);

    /* `n` floats of log-decay to keep and change; n is a multiple of KL_KDA_PITCH;
     * log_decay may be d->change. */
    void (*decay)(const float *log_decay, int64_t n, const kl_kda_decay *d);

    /* Everything within a chunk that needs no state, from the tokens [rows][pitch] of t;
     * rows and beta of c are set by the caller. */
    void (*chunk)(const kl_kda_token *t, kl_kda_chunk *c);

    /* Columns of a state, transposed: block [pitch][2 * lanes], zero beyond K and n. */
    void (*load)(const float *state, int64_t K, int64_t pitch, int n, float *block);
    void (*store)(const float *block, int64_t K, int n, float *state);

    /* A chunk on n columns: out and block from v and block. */
    void (*columns)(const kl_kda_chunk *c, float *block, const void *v, int64_t v_stride,
                    void *out, int64_t out_stride, int n);

    /* One token on n rows of a state [n, K] where it lies. */
    void (*step)(const kl_kda_step *s, const kl_kda_head *h, const void *v, float *state,
                 void *out, int64_t n);
} kl_kda_kernels;

#endif
