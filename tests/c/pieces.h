/*
 * pieces.h -- operations that stand for several others: run whole and in pieces, to be compared.
 */
#ifndef KL_TESTS_PIECES_H
#define KL_TESTS_PIECES_H

#include "both_backends.h"

typedef void (*run_fn)(kl_backend *be, void *call);

/* A copy in memory of the backend's. */
static inline void *sent(kl_backend *be, const void *from, size_t bytes)
{
    kl_error err;
    void *to = NULL;
    EXPECT(be->vt->alloc(be, bytes, &to, &err) == KL_OK);
    EXPECT(be->vt->copy_in(be, to, from, bytes, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    return to;
}

/* Memory of the backend's for what one piece hands to the next. To compute-sanitizer it is written,
 * which does not see all that cuBLASLt writes. */
static inline void *poisoned(kl_backend *be, size_t bytes)
{
    void *const here = memset(kl_malloc(bytes + 1), 0xff, bytes + 1);
    void *const there = sent(be, here, bytes);
    kl_free(here);
    return there;
}

/* Run an operation over memory of the backend's, in workspace of its own, poisoned. */
#define RUN_THERE(op, be, a)                                                                   \
    do {                                                                                       \
        kl_error failure_ = {KL_OK, ""};                                                       \
        (a)->ws.bytes = kl_workspace_##op((be), (a));                                          \
        (a)->ws.data = poisoned((be), (a)->ws.bytes);                                          \
        const kl_status status_ = kl_run_##op((be), (a), &failure_);                           \
        EXPECT_TEXT(status_ == KL_OK ? "" : failure_.message, "");                             \
        EXPECT((be)->vt->sync((be), &failure_) == KL_OK);                                      \
        (be)->vt->free((be), (a)->ws.data, (a)->ws.bytes);                                     \
    } while (0)

static inline void pair_whole(kl_backend *be, void *call)
{
    kl_linear_pair *const a = call;
    RUN_THERE(linear_pair, be, a);
}

static inline void pair_pieces(kl_backend *be, void *call)
{
    kl_linear_pair *const a = call;
    RUN_THERE(linear, be, &a->first);
    RUN_THERE(linear, be, &a->second);
}

static inline void *back(kl_backend *be, const part *q, const void *there)
{
    kl_error err;
    void *const on_device = *(void *const *)((const char *)there + q->at);
    void *const host = kl_malloc(q->bytes);
    EXPECT(be->vt->copy_out(be, host, on_device, q->bytes, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    be->vt->free(be, on_device, q->bytes);
    return host;
}

/* The call of `bytes` bytes, whole and in pieces, each on a copy of its memory: all that comes
 * back is equal, to the bit. */
static inline void same_bits(kl_backend *be, const parts *p, const void *call, size_t bytes,
                             run_fn whole, run_fn pieces, const char *name)
{
    void *const copies[] = {memcpy(kl_malloc(bytes), call, bytes),
                            memcpy(kl_malloc(bytes), call, bytes)};
    kl_backend *const other = cuda;
    cuda = be; /* to_device() means this one */
    for (int i = 0; i < 2; i++) to_device(p, call, copies[i]);
    cuda = other;
    whole(be, copies[0]);
    pieces(be, copies[1]);
    for (int i = 0; i < p->n; i++) {
        void *const a = back(be, &p->parts[i], copies[0]);
        void *const b = back(be, &p->parts[i], copies[1]);
        if (memcmp(a, b, p->parts[i].bytes) != 0) {
            printf("  %s on %s: part %d differs, by %.3g\n", name, be->vt->name, i,
                   difference(&p->parts[i], a, b));
            EXPECT(!"equal bits");
        }
        kl_free(a);
        kl_free(b);
    }
    kl_free(copies[0]);
    kl_free(copies[1]);
}

#endif
