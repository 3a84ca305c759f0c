/*
 * check.h -- the vocabulary of ops_check_*.c: what a call must hold, written as tables.
 *
 * Messages name the operation, the argument, the rule and what came:
 *     kda_prefill: q.shape[2] must be 128, got 64
 */
#ifndef KL_BACKEND_CHECK_H
#define KL_BACKEND_CHECK_H

#include "backend/ops.h"

#define KL_DTYPE_BIT(dtype)   (1u << (dtype))
#define KL_FORMAT_BIT(format) (1u << (format))
#define KL_ANY_FLOAT          (KL_DTYPE_BIT(KL_F32) | KL_DTYPE_BIT(KL_BF16))
#define KL_ANY_FORMAT         (KL_FORMAT_BIT(KL_N_WEIGHT_FORMATS) - 1u)
#define KL_FLOAT_FORMATS      (KL_FORMAT_BIT(KL_W_F32) | KL_FORMAT_BIT(KL_W_BF16))

enum {
    KL_ROWS = 1,  /* the first axis may have any stride; else all must be dense        */
    KL_OPT = 2,   /* may be absent                                                     */
    KL_OUT = 4,   /* written: overlaps no other tensor of the table, but see `may_be`  */
    KL_EMPTY = 8, /* any axis may be 0; else only the first may                        */
};

typedef struct {
    const kl_tensor *t;
    const char *name;
    unsigned dtypes; /* set of KL_DTYPE_BIT */
    unsigned flags;
    int ndim;
    int64_t shape[KL_MAX_NDIM];
    const kl_tensor *may_be; /* the one tensor whose place an output may take */
} kl_rule;

/* Rank, dtype, shape, strides, presence, alignment of each tensor, then overlaps. List first
 * those whose shapes the others' rules are made from. */
kl_status kl_require_tensors(const char *op, const kl_rule *rules, size_t n, kl_error *err);

/* `name` is a stack of `count` matrices [rows, cols] in one of `formats`. */
kl_status kl_require_weight(const char *op, const char *name, const kl_weight *w, int64_t count,
                            int64_t rows, int64_t cols, unsigned formats, kl_error *err);

kl_status kl_require_range(const char *op, const char *name, int64_t value, int64_t low,
                           int64_t high, kl_error *err);
/* Of memory that is more than its tensor's elements, or no tensor: a multiple of so many bytes. */
kl_status kl_require_aligned(const char *op, const char *name, const void *data, size_t bytes,
                             kl_error *err);
/* What an operation reads as it arrives (backend/arrivals.h). */
kl_status kl_require_arriving(const char *op, const char *name, const kl_tensor *t,
                              kl_error *err);
kl_status kl_require_finite(const char *op, const char *name, double value, kl_error *err);
kl_status kl_require_positive(const char *op, const char *name, double value, kl_error *err);

/* The dtype set of a call's activations: that of `t`, if it is one of the two. */
static inline unsigned kl_act_bit(const kl_tensor *t)
{
    return t->dtype == KL_BF16 ? KL_DTYPE_BIT(KL_BF16) : KL_DTYPE_BIT(KL_F32);
}

#define KL_REQUIRE_TENSORS(op, rules, err)                                                     \
    KL_TRY(kl_require_tensors((op), (rules), sizeof(rules) / sizeof(rules)[0], (err)))

#endif
