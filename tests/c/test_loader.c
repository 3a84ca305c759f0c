/*
 * test_loader.c -- loading on a device that runs its work as late as it may: the same weights,
 * whoever is slow; and no buffer, mark or work left behind by a load that was cancelled or
 * failed at any moment.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "tiny_model.h"

enum { MAX_WORK = 512 };

/* ---- a device that puts everything off ------------------------------------------------- */

typedef struct {
    void *dst;
    const void *src;
    size_t bytes;
    kl_pack_weight pack; /* where dst is NULL */
} work;

/* The CPU's own backend under another table. One at a time, so it may be static. */
static struct {
    kl_backend *be;
    const kl_backend_vtbl *cpu;
    kl_backend_vtbl vt;
    work queue[MAX_WORK];
    int64_t begun, ended;   /* of all work: enqueued, run */
    int64_t marks, buffers; /* there now */
    int64_t kept_marks, kept_buffers;
    int64_t calls, fails_at; /* calls that may fail; the one that does */
} lazy;

static kl_status may_fail(kl_error *err)
{
    if (++lazy.calls == lazy.fails_at) return kl_fail(err, KL_ERR_DEVICE, "lazy: broken");
    return KL_OK;
}

static kl_status run_until(int64_t end, kl_error *err)
{
    for (; lazy.ended < end; lazy.ended++) {
        const work *w = &lazy.queue[lazy.ended % MAX_WORK];
        if (w->dst != NULL)
            memcpy(w->dst, w->src, w->bytes);
        else
            KL_TRY(lazy.cpu->pack_weight(lazy.be, &w->pack, err));
    }
    return KL_OK;
}

static kl_status enqueue(work w, kl_error *err)
{
    KL_TRY(may_fail(err));
    if (lazy.begun - lazy.ended == MAX_WORK) KL_TRY(run_until(lazy.ended + 1, err));
    lazy.queue[lazy.begun++ % MAX_WORK] = w;
    return KL_OK;
}

static kl_status lazy_copy_in(kl_backend *be, void *dst, const void *src, size_t bytes,
                              kl_error *err)
{
    (void)be;
    return enqueue((work){.dst = dst, .src = src, .bytes = bytes}, err);
}

static kl_status lazy_pack(kl_backend *be, const kl_pack_weight *a, kl_error *err)
{
    (void)be;
    return enqueue((work){.pack = *a}, err);
}

static kl_status lazy_sync(kl_backend *be, kl_error *err)
{
    (void)be;
    return run_until(lazy.begun, err);
}

static kl_status lazy_alloc_host(kl_backend *be, size_t bytes, void **out, kl_error *err)
{
    KL_TRY(may_fail(err));
    lazy.buffers++;
    return lazy.cpu->alloc_host(be, bytes, out, err);
}

/* Work that still reads the memory would read this. */
static void lazy_free_host(kl_backend *be, void *ptr, size_t bytes)
{
    EXPECT(lazy.ended == lazy.begun);
    lazy.buffers--;
    memset(ptr, 0xff, bytes);
    lazy.cpu->free_host(be, ptr, bytes);
}

/* A mark is the number of what was enqueued before it. */
static kl_status lazy_new_mark(kl_backend *be, kl_mark **out, kl_error *err)
{
    (void)be;
    KL_TRY(may_fail(err));
    int64_t *mark = calloc(1, sizeof *mark);
    lazy.marks++;
    *out = (kl_mark *)mark;
    return KL_OK;
}

static void lazy_free_mark(kl_backend *be, kl_mark *mark)
{
    (void)be;
    lazy.marks--;
    free(mark);
}

static kl_status lazy_set_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)be;
    KL_TRY(may_fail(err));
    *(int64_t *)mark = lazy.begun;
    return KL_OK;
}

static kl_status lazy_wait_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)be;
    KL_TRY(may_fail(err));
    return run_until(*(int64_t *)mark, err);
}

static kl_backend *open_lazy(void)
{
    kl_backend *be = tiny_backend(2);
    memset(&lazy, 0, sizeof lazy);
    lazy.be = be;
    lazy.cpu = be->vt;
    lazy.vt = *be->vt;
    lazy.vt.copy_in = lazy_copy_in;
    lazy.vt.pack_weight = lazy_pack;
    lazy.vt.sync = lazy_sync;
    lazy.vt.alloc_host = lazy_alloc_host;
    lazy.vt.free_host = lazy_free_host;
    lazy.vt.new_mark = lazy_new_mark;
    lazy.vt.free_mark = lazy_free_mark;
    lazy.vt.set_mark = lazy_set_mark;
    lazy.vt.wait_mark = lazy_wait_mark;
    be->vt = &lazy.vt;
    return be;
}

/* What an engine keeps is noted once it is made; a load adds nothing to it. */
static void note_what_is_there(void)
{
    lazy.kept_marks = lazy.marks;
    lazy.kept_buffers = lazy.buffers;
}

static bool nothing_is_left(void)
{
    return lazy.marks == lazy.kept_marks && lazy.buffers == lazy.kept_buffers &&
           lazy.begun == lazy.ended;
}

/* ---- loading --------------------------------------------------------------------------- */

/* The embedding as f32 takes more than a piece, and the pieces many rounds of the buffers. */
static kl_config large_config(void)
{
    kl_config c = tiny_config;
    c.vocab_size = 90000;
    c.tied_embeddings = true;
    return c;
}

static kl_engine *new_engine(kl_backend *be, const kl_config *config, kl_weight_format format)
{
    kl_engine_options o = tiny_options;
    kl_engine *e = NULL;
    o.format = format;
    EXPECT(kl_engine_new(be, config, &o, &e, NULL) == KL_OK);
    memset(e->weight_block, 0, e->plan.weight_bytes); /* gaps too, so that blocks compare */
    note_what_is_there();
    return e;
}

static kl_status load(kl_engine *e, checkpoint *c, kl_poll_fn poll, void *ctx)
{
    int64_t unused;
    return kl_engine_load(e, &c->fd, 1, c->sources, c->n, &unused, NULL, poll, ctx, NULL);
}

static void a_late_device_gets_the_same_weights(void)
{
    static const kl_weight_format formats[] = {KL_W_F32, KL_W_BF16, KL_W_INT8, KL_W_INT4};
    const kl_config config = large_config();
    for (int bf16 = 0; bf16 < 2; bf16++) {
        static checkpoint c;
        tiny_checkpoint(&c, &config, bf16 != 0);
        for (int f = 0; f < 4; f++) {
            kl_backend *one = tiny_backend(1), *eight = tiny_backend(8), *late = open_lazy();
            kl_engine *a = new_engine(one, &config, formats[f]);
            kl_engine *b = new_engine(eight, &config, formats[f]);
            kl_engine *d = new_engine(late, &config, formats[f]);
            EXPECT(load(a, &c, NULL, NULL) == KL_OK && load(b, &c, NULL, NULL) == KL_OK);
            EXPECT(load(d, &c, NULL, NULL) == KL_OK);
            EXPECT(memcmp(a->weight_block, b->weight_block, a->plan.weight_bytes) == 0);
            EXPECT(memcmp(a->weight_block, d->weight_block, a->plan.weight_bytes) == 0);
            EXPECT(nothing_is_left());
            kl_engine_free(a);
            kl_engine_free(b);
            kl_engine_free(d);
            kl_backend_close(one);
            kl_backend_close(eight);
            kl_backend_close(late);
        }
        fclose(c.file);
    }
}

static int count_down(void *ctx)
{
    return --*(int64_t *)ctx <= 0;
}

static void cancelled_at_any_moment(void)
{
    static checkpoint c;
    kl_backend *be = open_lazy();
    kl_engine *e = new_engine(be, &tiny_config, KL_W_INT8);
    int64_t k = 0;
    kl_status status = KL_ERR_CANCELLED;
    tiny_checkpoint(&c, &tiny_config, true);
    while (status == KL_ERR_CANCELLED && k < 100000) {
        int64_t left = ++k;
        status = load(e, &c, count_down, &left);
        EXPECT(e->loaded == (status == KL_OK));
        EXPECT(nothing_is_left());
    }
    EXPECT(status == KL_OK && k > c.n); /* asked before every piece */
    kl_engine_free(e);
    kl_backend_close(be);
    fclose(c.file);
}

static void every_call_of_the_device_may_fail(void)
{
    static checkpoint c;
    kl_backend *be = open_lazy();
    kl_engine *e = new_engine(be, &tiny_config, KL_W_INT8);
    int64_t k = 0;
    kl_status status = KL_ERR_DEVICE;
    tiny_checkpoint(&c, &tiny_config, true);
    while (status == KL_ERR_DEVICE && k < 100000) {
        lazy.calls = 0;
        lazy.fails_at = ++k;
        status = load(e, &c, NULL, NULL);
        EXPECT(e->loaded == (status == KL_OK));
        EXPECT(nothing_is_left());
    }
    EXPECT(status == KL_OK && k > 3 * c.n); /* a copy or a conversion, a mark and a wait each */
    kl_engine_free(e);
    kl_backend_close(be);
    fclose(c.file);
}

int main(void)
{
    RUN(a_late_device_gets_the_same_weights);
    RUN(cancelled_at_any_moment);
    RUN(every_call_of_the_device_may_fail);
    return test_failures != 0;
}
