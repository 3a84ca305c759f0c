/*
 * operation.h -- running operations of ops.h in the tests of this folder.
 */
#ifndef KL_TESTS_OPERATION_H
#define KL_TESTS_OPERATION_H

#include "test.h"

#include "backend/backend.h"
#include "base/memory.h"

#include <math.h>

static inline void poison(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = NAN;
}

/* Run an operation in a workspace of exactly its size, allocated for this call. */
#define RUN_OP(op, be, a)                                                                      \
    do {                                                                                       \
        kl_error err_;                                                                         \
        (a).ws.bytes = kl_workspace_##op((be), &(a));                                          \
        (a).ws.data = kl_aligned_alloc((a).ws.bytes);                                          \
        memset((a).ws.data, 0xff, (a).ws.bytes); /* NaN in floats */                           \
        const kl_status status_ = kl_run_##op((be), &(a), &err_);                              \
        EXPECT_TEXT(status_ == KL_OK ? "" : err_.message, "");                                 \
        kl_free((a).ws.data);                                                                  \
    } while (0)

#endif
