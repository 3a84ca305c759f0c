/*
 * recorder.h -- a backend that records, over the CPU's operations: it notes calls and makes them
 * again when asked. With `late` it does nothing before somebody waits, and reads the host's memory
 * only then: whoever has changed it meanwhile would be found out, as on a device.
 */
#ifndef KL_TESTS_RECORDER_H
#define KL_TESTS_RECORDER_H

#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "tiny_model.h"

enum { MAX_CALLS = 256, MAX_WORK = 8192 };

typedef struct call {
    kl_status (*run)(kl_backend *be, const struct call *c, kl_error *err);
    union {
#define KL_FIELD(op) kl_##op op;
        KL_OPS(KL_FIELD)
#undef KL_FIELD
    } args;
} call;

struct kl_recording {
    int n;
    call calls[MAX_CALLS];
};

struct kl_mark {
    int64_t end; /* of the work before it */
};

/* What has been enqueued and not been done: one of these. */
typedef struct {
    call operation;
    kl_recording *recording;
    void *dst; /* of a copy; src NULL: zeros */
    const void *src;
    size_t bytes;
} work;

static const kl_backend_vtbl *cpu;
static kl_recording *noting; /* NULL: calls are made */
static int n_made, n_freed, n_replayed, n_enqueued;
static bool fail_begin, fail_end;
static int fail_call;   /* the k-th call that would be noted fails; 0: none */
static int fail_replay; /* the k-th replay from now on; 0: none */

static bool late;
static work waiting[MAX_WORK];  /* a ring */
static int64_t n_asked, n_done; /* pieces of work so far */
static int n_overlapped;        /* replays that were asked for before the last one was done */

/* ---- work that waits ------------------------------------------------------------------- */

static kl_status do_work(kl_backend *be, const work *w, kl_error *err)
{
    if (w->recording != NULL) {
        for (int i = 0; i < w->recording->n; i++)
            KL_TRY(w->recording->calls[i].run(be, &w->recording->calls[i], err));
        return KL_OK;
    }
    if (w->operation.run != NULL) return w->operation.run(be, &w->operation, err);
    if (w->src == NULL) return cpu->zero(be, w->dst, w->bytes, err);
    return cpu->copy(be, w->dst, w->src, w->bytes, err);
}

static kl_status do_until(kl_backend *be, int64_t end, kl_error *err)
{
    while (n_done < end) KL_TRY(do_work(be, &waiting[n_done++ % MAX_WORK], err));
    return KL_OK;
}

static kl_status ask(kl_backend *be, const work *w, kl_error *err)
{
    if (!late) return do_work(be, w, err);
    if (n_asked - n_done == MAX_WORK) KL_TRY(do_until(be, n_done + 1, err));
    waiting[n_asked++ % MAX_WORK] = *w;
    return KL_OK;
}

/* Copies are not something that can be repeated: the host's memory has other contents by then. And
 * zeros would be a kernel of their own in each token, where an operation can clear memory besides. */
static kl_status ask_copy(kl_backend *be, void *dst, const void *src, size_t n, kl_error *err)
{
    EXPECT(noting == NULL);
    return n == 0 ? KL_OK : ask(be, &(work){.dst = dst, .src = src, .bytes = n}, err);
}

static kl_status ask_zero(kl_backend *be, void *dst, size_t n, kl_error *err)
{
    return ask_copy(be, dst, NULL, n, err);
}

static kl_status wait_all(kl_backend *be, kl_error *err)
{
    return do_until(be, n_asked, err);
}

static kl_status new_mark(kl_backend *be, kl_mark **out, kl_error *err)
{
    (void)be;
    *out = kl_calloc(1, sizeof **out);
    return *out == NULL ? kl_fail(err, KL_ERR_MEMORY, "no memory") : KL_OK;
}

static void free_mark(kl_backend *be, kl_mark *mark)
{
    (void)be;
    kl_free(mark);
}

static kl_status set_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)be, (void)err;
    mark->end = n_asked;
    return KL_OK;
}

static kl_status wait_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    return do_until(be, mark->end, err);
}

/* ---- operations and recordings --------------------------------------------------------- */

#define KL_DEFINE(op)                                                                          \
    static kl_status run_##op(kl_backend *be, const call *c, kl_error *err)                    \
    {                                                                                          \
        return cpu->op(be, &c->args.op, err);                                                  \
    }                                                                                          \
    static kl_status note_##op(kl_backend *be, const kl_##op *a, kl_error *err)                \
    {                                                                                          \
        if (noting == NULL) {                                                                  \
            n_enqueued++;                                                                      \
            work w = {.operation = {.run = run_##op}};                                         \
            w.operation.args.op = *a;                                                          \
            return ask(be, &w, err);                                                           \
        }                                                                                      \
        if (fail_call != 0 && noting->n + 1 == fail_call)                                      \
            return kl_fail(err, KL_ERR_DEVICE, "as the test asked");                           \
        EXPECT(noting->n < MAX_CALLS);                                                         \
        call *c = &noting->calls[noting->n++];                                                 \
        c->run = run_##op;                                                                     \
        c->args.op = *a;                                                                       \
        return KL_OK;                                                                          \
    }
KL_OPS(KL_DEFINE)
#undef KL_DEFINE

static kl_status record_begin(kl_backend *be, kl_error *err)
{
    (void)be;
    EXPECT(noting == NULL);
    if (fail_begin) return kl_fail(err, KL_ERR_DEVICE, "as the test asked");
    noting = kl_calloc(1, sizeof *noting);
    return noting == NULL ? kl_fail(err, KL_ERR_MEMORY, "no memory") : KL_OK;
}

static kl_status record_end(kl_backend *be, kl_recording **out, kl_error *err)
{
    (void)be;
    EXPECT(noting != NULL);
    *out = fail_end ? NULL : noting;
    n_made += !fail_end;
    if (fail_end) kl_free(noting);
    noting = NULL;
    return fail_end ? kl_fail(err, KL_ERR_DEVICE, "as the test asked") : KL_OK;
}

static bool replay_waits(void)
{
    for (int64_t i = n_done; i < n_asked; i++)
        if (waiting[i % MAX_WORK].recording != NULL) return true;
    return false;
}

static kl_status replay(kl_backend *be, kl_recording *r, kl_error *err)
{
    n_replayed++;
    n_overlapped += replay_waits();
    if (fail_replay > 0 && --fail_replay == 0)
        return kl_fail(err, KL_ERR_DEVICE, "as the test asked");
    return ask(be, &(work){.recording = r}, err);
}

static void free_recording(kl_backend *be, kl_recording *r)
{
    (void)be;
    n_freed++;
    for (int64_t i = n_done; i < n_asked; i++) EXPECT(waiting[i % MAX_WORK].recording != r);
    kl_free(r);
}

/* ---- the backend ----------------------------------------------------------------------- */

static kl_backend *open_recording(bool and_late)
{
    static kl_backend_vtbl table;
    kl_backend *be = tiny_backend(1);
    cpu = be->vt;
    table = *cpu;
#define KL_ENTRY(op) table.op = note_##op;
    KL_OPS(KL_ENTRY)
#undef KL_ENTRY
    table.sync = wait_all;
    table.zero = ask_zero;
    table.copy_in = table.copy_out = table.copy = ask_copy;
    table.new_mark = new_mark;
    table.free_mark = free_mark;
    table.set_mark = set_mark;
    table.wait_mark = wait_mark;
    table.record_begin = record_begin;
    table.record_end = record_end;
    table.replay = replay;
    table.free_recording = free_recording;
    be->vt = &table;
    late = and_late;
    n_made = n_freed = n_replayed = n_enqueued = n_overlapped = fail_call = fail_replay = 0;
    n_asked = n_done = 0;
    fail_begin = fail_end = false;
    return be;
}

#endif
