/*
 * checks.h -- what each operation refuses, and in which words.
 *
 * Every case starts from a call that is right, spoils one thing and expects one message. The
 * calls have unequal sizes throughout (K != V, H != Hk), so that no shape fits by chance.
 */
#ifndef KL_TESTS_CHECKS_H
#define KL_TESTS_CHECKS_H

#include "test.h"

#include "backend/ops.h"

#include <math.h>
#include <stdint.h>

enum { T = 5, N = 3, S = 4, D = 6, H = 4, HK = 2, K = 8, V = 10, C = 7, W = 4, E = 8, I = 12 };
enum { RANK = 9, ROPE = 3, NOPE = 5, P = 6, B = 2, TOP = 3, ROWS = 70 };

/* Memory that nobody reads: each tensor gets a piece of its own. */
static _Alignas(64) char memory[1 << 20];
static size_t used;
static const kl_tensor none;

static inline void *piece(size_t bytes)
{
    void *p = memory + used;
    used += (bytes + 63) / 64 * 64;
    return p;
}

static inline kl_tensor tensor(kl_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c,
                               int64_t d)
{
    const int64_t shape[] = {a, b, c, d};
    kl_tensor t = kl_tensor_dense(NULL, dtype, ndim, shape);
    t.data = piece((size_t)kl_tensor_size(&t) * kl_dtype_bytes(dtype));
    return t;
}

static inline kl_tensor f32(int ndim, int64_t a, int64_t b, int64_t c, int64_t d)
{
    return tensor(KL_F32, ndim, a, b, c, d);
}

static inline kl_tensor i32(int ndim, int64_t a, int64_t b)
{
    return tensor(KL_I32, ndim, a, b, 1, 1);
}

static inline kl_weight weight(kl_weight_format format, int64_t count, int64_t rows,
                               int64_t cols)
{
    kl_weight w = {.format = format, .count = count, .rows = rows, .cols = cols};
    w.data = piece(kl_weight_data_bytes(&w));
    if (kl_weight_groups(format, cols) != 0) w.scales = piece(kl_weight_scale_bytes(&w));
    return w;
}

/* Spoil a right call, expect a message, and put everything back. */
#define REFUSED(op, call, spoil, expected_status, text)                                        \
    do {                                                                                       \
        const __typeof__(call) good_ = (call);                                                 \
        kl_error err_ = {KL_OK, ""};                                                           \
        spoil;                                                                                 \
        EXPECT(kl_check_##op(&(call), &err_) == (expected_status));                            \
        EXPECT(err_.status == (expected_status));                                              \
        EXPECT_TEXT(err_.message, text);                                                       \
        (call) = good_;                                                                        \
    } while (0)
#define BAD_VALUE(op, call, spoil, text) REFUSED(op, call, spoil, KL_ERR_VALUE, text)
#define BAD_TYPE(op, call, spoil, text)  REFUSED(op, call, spoil, KL_ERR_TYPE, text)

#define ACCEPTED(op, call, change)                                                             \
    do {                                                                                       \
        const __typeof__(call) good_ = (call);                                                 \
        kl_error err_ = {KL_OK, ""};                                                           \
        change;                                                                                \
        EXPECT(kl_check_##op(&(call), &err_) == KL_OK);                                        \
        EXPECT_TEXT(err_.message, "");                                                         \
        const kl_cost cost_ = kl_cost_##op(&(call));                                           \
        EXPECT(isfinite(cost_.flops) && cost_.flops >= 0);                                     \
        EXPECT(isfinite(cost_.bytes) && cost_.bytes >= 0);                                     \
        (call) = good_;                                                                        \
    } while (0)

#define NOTHING ((void)0)

static inline kl_kda right_kda(int64_t tokens)
{
    return (kl_kda){.q = f32(3, tokens, HK, K, 1),
                    .k = f32(3, tokens, HK, K, 1),
                    .v = f32(3, tokens, H, V, 1),
                    .g = f32(3, tokens, H, K, 1),
                    .beta = f32(2, tokens, H, 1, 1),
                    .state = f32(4, S, H, V, K),
                    .slots = i32(1, N, 1),
                    .out = f32(3, tokens, H, V, 1),
                    .gate = KL_GATE_DIRECT,
                    .scale = 0.5f};
}

#endif
