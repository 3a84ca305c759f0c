/*
 * kda.h -- Kimi Delta Attention on one head, written in the words of vec_*.h; included by
 * variant_*.c only.
 *
 * Computes   kl_kda of backend/ops.h, in chunks of C = 16 tokens, or one token at a time
 * Shapes     C tokens, K key channels, V value channels
 * Layout     a state where it lies is [V, K], K contiguous. Chunks work on a transposed copy, in
 *            blocks of 2 VL columns, [pitch][2 VL]: lanes along V, so that a column never
 *            sees another one, however V is split
 * Precision  f32. No exponential but that of one token's log-decay: products of decays are
 *            built up multiplicatively, token by token, so nothing overflows, strong decay
 *            ends in an exact zero, and no row reads a later token
 * Roofline   3 K V multiply-adds a token and head for a state in cache: bound by the FMA
 *            units; one token at a time, 8 K V bytes: bound by memory
 *
 * With c_i = a_0 .. a_i (products over the chunk) and S0 the state on entry, transposed:
 *     u_i = b_i (v_i - (k_i c_i) S0) - sum over j < i of b_i <k_i, k_j a_j+1 .. a_i> u_j
 *     o_i = (scale q_i c_i) S0 + sum over j <= i of scale <q_i, k_j a_j+1 .. a_i> u_j
 *     S   = diag(c_last) S0 + sum over j of (k_j a_j+1 .. a_last) u_j
 */
#ifndef KL_CPU_SIMD_KDA_H
#define KL_CPU_SIMD_KDA_H

#include "cpu/kda_kernels.h"
#include "cpu/simd/act.h"
#include "cpu/simd/special.h"

#include <math.h>

#define KDA_C     KL_KDA_CHUNK
#define KDA_WIDTH (2 * VL) /* columns of a block: 2 vectors */

/* Rows of a register tile, 2 vectors each: 16 accumulators of AVX-512's 32 registers, 8 of
 * AVX2's 16, both enough to hide the latency of an FMA. Divides KDA_C and KL_KDA_PITCH. */
#define KDA_TILE (VL == 16 ? 8 : 4)

static inline float kda_get(const void *row, kl_dtype dtype, int64_t i)
{
    if (dtype == KL_BF16) return kl_bf16_to_f32(((const uint16_t *)row)[i]);
    return ((const float *)row)[i];
}

static inline void kda_put(void *row, kl_dtype dtype, int64_t i, float x)
{
    if (dtype == KL_BF16)
        ((uint16_t *)row)[i] = kl_f32_to_bf16(x);
    else
        ((float *)row)[i] = x;
}

/* A raw row of g to log-decays. One short loop for each function: a long chain
 * of dependent operations on each vector would leave the FMA units waiting. */
static inline void kda_gate(const kl_kda_head *h, const void *g, float *out)
{
    const bool biased = h->dt_bias != NULL && h->gate != KL_GATE_DIRECT;
    for (int64_t i = 0; i < h->pitch; i += VL) {
        const int n = v_left(i, h->K);
        vf z = v_load_act(g, h->g_dtype, i, n);
        if (biased) z = v_add(z, v_load_act(h->dt_bias, KL_F32, i, n));
        v_store(out + i, z);
    }
    const vf rate = v_set1(h->rate), minus_rate = v_set1(-h->rate);
    const vf bound = v_set1(h->lower_bound);
    if (h->gate == KL_GATE_SOFTPLUS) {
        float small[KL_KDA_MAX_K + KL_KDA_PITCH];
        for (int64_t i = 0; i < h->pitch; i += VL)
            v_store(small + i, v_exp(v_minus_abs(v_load(out + i))));
        for (int64_t i = 0; i < h->pitch; i += VL) { /* max(z, 0) + log(1 + e^-|z|) */
            const vf z = v_load(out + i), rest = v_log1p_unit(v_load(small + i));
            v_store(out + i, v_mul(minus_rate, v_add(v_max(z, v_zero()), rest)));
        }
    } else if (h->gate == KL_GATE_BOUNDED)
        for (int64_t i = 0; i < h->pitch; i += VL)
            v_store(out + i, v_mul(bound, v_sigmoid(v_mul(rate, v_load(out + i)))));
}

/* A row of q or k to f32, times `scale`, after dividing it by its norm if that is asked for. */
static inline void kda_direction(const kl_kda_head *h, const void *raw, float scale, float *out)
{
    vf squares = v_zero();
    for (int64_t i = 0; i < h->pitch; i += VL) {
        const vf x = v_load_act(raw, h->act, i, v_left(i, h->K));
        squares = v_fma(x, x, squares);
        v_store(out + i, x);
    }
    if (h->normalize) scale /= sqrtf(v_sum(squares) + 1e-6f);
    for (int64_t i = 0; i < h->pitch; i += VL)
        v_store(out + i, v_mul(v_load(out + i), v_set1(scale)));
}

static void kda_token(const kl_kda_head *h, const void *q, const void *k, const void *g,
                      const kl_kda_token *t)
{
    kda_direction(h, q, h->scale, t->q);
    kda_direction(h, k, 1.0f, t->k);
    kda_gate(h, g, t->log_decay);
    for (int64_t i = 0; i < h->pitch; i += VL)
        v_store(t->decay + i, v_exp(v_load(t->log_decay + i)));
}

static void kda_decay(const float *log_decay, int64_t n, const kl_kda_decay *d)
{
    const vf near = v_set1(-0.35f); /* where v_expm1_near() is good */
    for (int64_t i = 0; i < n; i += VL) {
        const vf x = v_load(log_decay + i), distance = v_minus_abs(x);
        v_store(d->keep + i, v_select_lt(near, distance, v_set1(1.0f), v_zero()));
        v_store(d->change + i, v_select_lt(near, distance, v_expm1_near(x), v_exp(x)));
    }
}

/* Age the keys of tokens j and j + 1 by one token, and take their products with q and k of it.
 * Two keys at a time share the loads of the token's rows. */
static inline void kda_age_two(const float *q, const float *k, const float *a, float *kg,
                               int64_t pitch, float *with_k, float *with_q)
{
    vf k0 = v_zero(), k1 = v_zero(), q0 = v_zero(), q1 = v_zero();
    for (int64_t i = 0; i < pitch; i += VL) {
        const vf ai = v_load(a + i), ki = v_load(k + i), qi = v_load(q + i);
        const vf p0 = v_mul(v_load(kg + i), ai), p1 = v_mul(v_load(kg + pitch + i), ai);
        v_store(kg + i, p0);
        v_store(kg + pitch + i, p1);
        k0 = v_fma(ki, p0, k0);
        k1 = v_fma(ki, p1, k1);
        q0 = v_fma(qi, p0, q0);
        q1 = v_fma(qi, p1, q1);
    }
    with_k[0] = v_sum(k0), with_k[1] = v_sum(k1);
    with_q[0] = v_sum(q0), with_q[1] = v_sum(q1);
}

/* Rows of token i: its key, young; k c and q c; <q, k>. c is aged first. */
static inline float kda_enter(const float *q, const float *k, const float *a, float *c,
                              float *kg, float *xk, float *xq, int64_t pitch)
{
    vf qk = v_zero();
    for (int64_t i = 0; i < pitch; i += VL) {
        const vf ki = v_load(k + i), qi = v_load(q + i);
        const vf ci = v_mul(v_load(c + i), v_load(a + i));
        v_store(c + i, ci);
        v_store(kg + i, ki);
        v_store(xk + i, v_mul(ki, ci));
        v_store(xq + i, v_mul(qi, ci));
        qk = v_fma(qi, ki, qk);
    }
    return v_sum(qk);
}

/* The state's decay over the chunk, from the f32 sum of its log-decays: rounded once a chunk. */
static inline void kda_total_decay(const kl_kda_token *t, const kl_kda_chunk *c)
{
    float *sum = c->decay.change;
    for (int64_t i = 0; i < c->pitch; i += VL) {
        vf s = v_zero();
        for (int64_t r = 0; r < c->rows; r++)
            s = v_add(s, v_load(t->log_decay + r * c->pitch + i));
        v_store(sum + i, s);
    }
    kda_decay(sum, c->pitch, &c->decay);
}

static void kda_chunk(const kl_kda_token *t, kl_kda_chunk *c)
{
    const int64_t pitch = c->pitch;
    kda_total_decay(t, c);
    float decayed[KL_KDA_MAX_K + KL_KDA_PITCH];
    for (int64_t i = 0; i < pitch; i++) decayed[i] = 1.0f;

    for (int64_t i = 0; i < c->rows; i++) {
        const float *q = t->q + i * pitch, *k = t->k + i * pitch, *a = t->decay + i * pitch;
        /* An odd row ages one key too many: its own, which kda_enter() then writes. */
        for (int64_t j = 0; j < i; j += 2)
            kda_age_two(q, k, a, c->kg + j * pitch, pitch, &c->solve[i][j], &c->mix[i][j]);
        for (int64_t j = 0; j < i; j++) c->solve[i][j] *= -c->beta[i];
        c->mix[i][i] = kda_enter(q, k, a, decayed, c->kg + i * pitch, c->x + i * pitch,
                                 c->x + (KDA_C + i) * pitch, pitch);
    }
}

/* VL columns of a block from the first n rows of a state; zero beyond them and beyond K. */
static inline void kda_turn_in(const float *state, int64_t K, int64_t pitch, int n,
                               float *block)
{
    vf tile[VL];
    for (int64_t i = 0; i < pitch; i += VL) {
        const int left = v_left(i, K);
        for (int j = 0; j < VL; j++)
            tile[j] = j < n ? v_load_act(state + j * K, KL_F32, i, left) : v_zero();
        v_transpose(tile);
        for (int j = 0; j < VL; j++) v_store(block + (i + j) * KDA_WIDTH, tile[j]);
    }
}

static inline void kda_turn_out(const float *block, int64_t K, int n, float *state)
{
    vf tile[VL];
    for (int64_t i = 0; i < K; i += VL) {
        for (int j = 0; j < VL; j++) tile[j] = v_load(block + (i + j) * KDA_WIDTH);
        v_transpose(tile);
        for (int j = 0; j < n; j++)
            v_store_act(state + j * K, KL_F32, i, tile[j], v_left(i, K));
    }
}

static void kda_load(const float *state, int64_t K, int64_t pitch, int n, float *block)
{
    kda_turn_in(state, K, pitch, v_left(0, n), block);
    kda_turn_in(n > VL ? state + VL * K : state, K, pitch, v_left(VL, n), block + VL);
}

static void kda_store(const float *block, int64_t K, int n, float *state)
{
    kda_turn_out(block, K, v_left(0, n), state);
    if (n > VL) kda_turn_out(block + VL, K, n - VL, state + VL * K);
}

/* out[r] = x[r] S0 for KDA_TILE rows, summed in the order of K. */
static inline void kda_read_tile(const float *x, int64_t pitch, const float *block, int64_t K,
                                 float *out)
{
    vf acc[KDA_TILE][2];
    for (int r = 0; r < KDA_TILE; r++) acc[r][0] = acc[r][1] = v_zero();
    for (int64_t i = 0; i < K; i++) {
        const vf s0 = v_load(block + i * KDA_WIDTH), s1 = v_load(block + i * KDA_WIDTH + VL);
#pragma GCC unroll 8
        for (int r = 0; r < KDA_TILE; r++) {
            const vf xr = v_set1(x[r * pitch + i]);
            acc[r][0] = v_fma(xr, s0, acc[r][0]);
            acc[r][1] = v_fma(xr, s1, acc[r][1]);
        }
    }
    for (int r = 0; r < KDA_TILE; r++) {
        v_store(out + r * KDA_WIDTH, acc[r][0]);
        v_store(out + r * KDA_WIDTH + VL, acc[r][1]);
    }
}

/* KDA_TILE rows of the state: the chunk's decay and its writes, summed apart so that a row is
 * rounded once a chunk. */
static inline void kda_write_tile(const kl_kda_chunk *c, int64_t i, const float *u,
                                  float *block)
{
    vf acc[KDA_TILE][2];
    for (int r = 0; r < KDA_TILE; r++) acc[r][0] = acc[r][1] = v_zero();
    for (int64_t j = 0; j < c->rows; j++) {
        const vf u0 = v_load(u + j * KDA_WIDTH), u1 = v_load(u + j * KDA_WIDTH + VL);
        const float *kg = c->kg + j * c->pitch + i;
#pragma GCC unroll 8
        for (int r = 0; r < KDA_TILE; r++) {
            const vf kr = v_set1(kg[r]);
            acc[r][0] = v_fma(kr, u0, acc[r][0]);
            acc[r][1] = v_fma(kr, u1, acc[r][1]);
        }
    }
    for (int r = 0; r < KDA_TILE; r++) {
        const vf keep = v_set1(c->decay.keep[i + r]), change = v_set1(c->decay.change[i + r]);
        float *row = block + (i + r) * KDA_WIDTH;
        for (int p = 0; p < KDA_WIDTH; p += VL) {
            const vf s = v_load(row + p);
            v_store(row + p, v_fma(keep, s, v_fma(change, s, acc[r][p / VL])));
        }
    }
}

/* u by forward substitution and out, row by row. read holds x S0; u_j of later rows is never
 * touched. The two vectors of a row go together: each alone waits for its own row before. */
static inline void kda_solve(const kl_kda_chunk *c, const float *read, const void *v,
                             int64_t v_stride, void *out, int64_t out_stride, int n, float *u)
{
    const size_t bytes = kl_dtype_bytes(c->act);
    const int left[2] = {v_left(0, n), v_left(VL, n)};
    for (int64_t i = 0; i < c->rows; i++) {
        const void *vi = (const char *)v + (size_t)(i * v_stride) * bytes;
        void *oi = (char *)out + (size_t)(i * out_stride) * bytes;
        const float *held = read + i * KDA_WIDTH, *seen = read + (KDA_C + i) * KDA_WIDTH;
        const vf beta = v_set1(c->beta[i]);
        vf w0 = v_mul(beta, v_sub(v_load_act(vi, c->act, 0, left[0]), v_load(held)));
        vf w1 = v_mul(beta, v_sub(v_load_act(vi, c->act, VL, left[1]), v_load(held + VL)));
        vf o0 = v_load(seen), o1 = v_load(seen + VL);
        for (int64_t j = 0; j < i; j++) {
            const vf u0 = v_load(u + j * KDA_WIDTH), u1 = v_load(u + j * KDA_WIDTH + VL);
            const vf solve = v_set1(c->solve[i][j]), mix = v_set1(c->mix[i][j]);
            w0 = v_fma(solve, u0, w0);
            w1 = v_fma(solve, u1, w1);
            o0 = v_fma(mix, u0, o0);
            o1 = v_fma(mix, u1, o1);
        }
        v_store(u + i * KDA_WIDTH, w0);
        v_store(u + i * KDA_WIDTH + VL, w1);
        const vf mix = v_set1(c->mix[i][i]);
        v_store_act(oi, c->act, 0, v_fma(mix, w0, o0), left[0]);
        v_store_act(oi, c->act, VL, v_fma(mix, w1, o1), left[1]);
    }
}

static void kda_columns(const kl_kda_chunk *c, float *block, const void *v, int64_t v_stride,
                        void *out, int64_t out_stride, int n)
{
    _Alignas(64) float read[2 * KDA_C * KDA_WIDTH], u[KDA_C * KDA_WIDTH];
    for (int64_t i = 0; i < c->rows; i += KDA_TILE) {
        const int64_t k = i, q = KDA_C + i;
        kda_read_tile(c->x + k * c->pitch, c->pitch, block, c->K, read + k * KDA_WIDTH);
        kda_read_tile(c->x + q * c->pitch, c->pitch, block, c->K, read + q * KDA_WIDTH);
    }
    kda_solve(c, read, v, v_stride, out, out_stride, n, u);
    for (int64_t i = 0; i < c->pitch; i += KDA_TILE) kda_write_tile(c, i, u, block);
}

#define KDA_STEP_ROWS 4 /* rows of a step at a time: they share the loads of k, q and decay */

/* Channels i .. i + n - 1 of `rows` rows: what they hold for k. */
static inline void kda_step_read(const kl_kda_step *s, const float *state, int64_t K, int rows,
                                 int64_t i, int n, vf *held)
{
    const vf k = v_load(s->k_decayed + i);
    for (int r = 0; r < rows; r++)
        held[r] = v_fma(v_load_act(state + r * K, KL_F32, i, n), k, held[r]);
}

/* The same channels: decayed and written, and what they hold for q then. */
static inline void kda_step_write(const kl_kda_step *s, float *state, int64_t K, int rows,
                                  int64_t i, int n, const vf *u, vf *o)
{
    const vf keep = v_load(s->decay.keep + i), change = v_load(s->decay.change + i);
    const vf k = v_load(s->token.k + i), q = v_load(s->token.q + i);
    for (int r = 0; r < rows; r++) {
        vf x = v_load_act(state + r * K, KL_F32, i, n);
        x = v_fma(keep, x, v_fma(change, x, v_mul(k, u[r])));
        v_store_act(state + r * K, KL_F32, i, x, n);
        o[r] = v_fma(x, q, o[r]);
    }
}

/* Rows of the state where it lies: lanes along K, then v_sum, whatever the number of rows. */
static inline __attribute__((always_inline)) void kda_step_rows(const kl_kda_step *s, int64_t K,
                                                                int rows, const float *v,
                                                                float *state, float *out)
{
    vf held[KDA_STEP_ROWS], u[KDA_STEP_ROWS], o[KDA_STEP_ROWS];
    for (int r = 0; r < rows; r++) held[r] = o[r] = v_zero();
    const int64_t whole = K - K % VL;
    for (int64_t i = 0; i < whole; i += VL) kda_step_read(s, state, K, rows, i, VL, held);
    if (whole < K) kda_step_read(s, state, K, rows, whole, (int)(K - whole), held);

    for (int r = 0; r < rows; r++) u[r] = v_set1(s->beta * (v[r] - v_sum(held[r])));
    for (int64_t i = 0; i < whole; i += VL) kda_step_write(s, state, K, rows, i, VL, u, o);
    if (whole < K) kda_step_write(s, state, K, rows, whole, (int)(K - whole), u, o);
    for (int r = 0; r < rows; r++) out[r] = v_sum(o[r]);
}

static void kda_step(const kl_kda_step *s, const kl_kda_head *h, const void *v, float *state,
                     void *out, int64_t n)
{
    for (int64_t j = 0; j < n; j += KDA_STEP_ROWS) {
        const int rows = n - j < KDA_STEP_ROWS ? (int)(n - j) : KDA_STEP_ROWS;
        float vj[KDA_STEP_ROWS], oj[KDA_STEP_ROWS];
        for (int r = 0; r < rows; r++) vj[r] = kda_get(v, h->act, j + r);
        if (rows == KDA_STEP_ROWS)
            kda_step_rows(s, h->K, KDA_STEP_ROWS, vj, state + j * h->K, oj);
        else
            for (int r = 0; r < rows; r++)
                kda_step_rows(s, h->K, 1, vj + r, state + (j + r) * h->K, oj + r);
        for (int r = 0; r < rows; r++) kda_put(out, h->act, j + r, oj[r]);
    }
}

#define KL_KDA_KERNELS                                                                         \
    {                                                                                          \
        .token = kda_token, .decay = kda_decay, .chunk = kda_chunk, .load = kda_load,          \
        .store = kda_store, .columns = kda_columns, .step = kda_step                           \
    }

#endif
