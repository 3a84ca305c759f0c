/*
 * read_ahead.c -- see read_ahead.h.
 */
#include "base/read_ahead.h"

#include "base/memory.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* How the reading of one range went; range i has outcome i % window. */
typedef struct {
    int64_t range; /* that it is of; -1: none since the last release */
    kl_error err;  /* status KL_OK: all is there                     */
} outcome;

struct kl_read_ahead {
    const kl_file_range *ranges;
    int64_t n_ranges, window;
    outcome *outcomes;

    pthread_mutex_t lock;
    pthread_cond_t may_read, has_read;
    int64_t next;     /* the first range that nobody has begun      */
    int64_t released; /* the ranges below it have been used         */
    bool stop;

    int n_threads; /* that could be had */
    pthread_t threads[KL_MAX_READERS];
};

static kl_status read_range(const kl_file_range *range, kl_error *err)
{
    char *to = range->to;
    size_t left = range->bytes;
    uint64_t offset = range->offset;
    while (left > 0) {
        const ssize_t n = pread(range->fd, to, left, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return kl_fail(err, KL_ERR_IO, "read: %s: %s", range->name, strerror(errno));
        if (n == 0)
            return kl_fail(err, KL_ERR_IO,
                           "read: the file ends within %s, %zu bytes are missing (has it "
                           "changed?)",
                           range->name, left);
        to += n;
        offset += (uint64_t)n;
        left -= (size_t)n;
    }
    return KL_OK;
}

/* ---- the threads ----------------------------------------------------------------------- */

/* With the lock: the next range to read, once its place is free; -1 at the end. */
static int64_t begin_next(kl_read_ahead *r)
{
    while (!r->stop && r->next < r->n_ranges && r->next >= r->released + r->window)
        pthread_cond_wait(&r->may_read, &r->lock);
    return r->stop || r->next >= r->n_ranges ? -1 : r->next++;
}

static void *reader_main(void *arg)
{
    kl_read_ahead *r = arg;
    int64_t i;
    pthread_mutex_lock(&r->lock);
    while ((i = begin_next(r)) >= 0) {
        outcome *o = &r->outcomes[i % r->window];
        pthread_mutex_unlock(&r->lock);
        o->err.status = KL_OK;
        (void)read_range(&r->ranges[i], &o->err);
        pthread_mutex_lock(&r->lock);
        o->range = i;
        pthread_cond_signal(&r->has_read);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* They take no signals: those belong to the program's own threads. */
static void start_threads(kl_read_ahead *r, int threads)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (r->n_threads < threads &&
           pthread_create(&r->threads[r->n_threads], NULL, reader_main, r) == 0)
        r->n_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- the caller ------------------------------------------------------------------------ */

kl_status kl_read_ahead_new(const kl_file_range *ranges, int64_t n_ranges, int64_t window,
                            int threads, kl_read_ahead **out, kl_error *err)
{
    *out = NULL;
    if (window < 1 || threads < 1 || threads > KL_MAX_READERS)
        return kl_fail(err, KL_ERR_VALUE,
                       "read: needs a window and 1 .. %d threads, got %lld and %d",
                       KL_MAX_READERS, (long long)window, threads);
    kl_read_ahead *r = kl_calloc(1, sizeof *r);
    outcome *outcomes = kl_calloc((size_t)window, sizeof *outcomes);
    if (r == NULL || outcomes == NULL) {
        kl_free(r);
        kl_free(outcomes);
        return kl_fail(err, KL_ERR_MEMORY, "read: no memory for a window of %lld ranges",
                       (long long)window);
    }
    r->ranges = ranges, r->n_ranges = n_ranges;
    r->window = window, r->outcomes = outcomes;
    for (int64_t i = 0; i < window; i++) outcomes[i].range = -1;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->may_read, NULL);
    pthread_cond_init(&r->has_read, &attr);
    pthread_condattr_destroy(&attr);
    start_threads(r, threads);
    *out = r;
    return KL_OK;
}

static struct timespec time_in(int ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000L;
    if (t.tv_nsec >= 1000000000L) t.tv_sec++, t.tv_nsec -= 1000000000L;
    return t;
}

kl_status kl_read_ahead_wait(kl_read_ahead *r, int64_t i, int ms, bool *ready, kl_error *err)
{
    const struct timespec deadline = time_in(ms);
    const outcome *o = &r->outcomes[i % r->window];
    *ready = true;
    if (r->n_threads == 0) return read_range(&r->ranges[i], err);
    pthread_mutex_lock(&r->lock);
    for (int rc = 0; o->range != i && rc == 0;)
        rc = pthread_cond_timedwait(&r->has_read, &r->lock, &deadline);
    *ready = o->range == i;
    pthread_mutex_unlock(&r->lock);
    if (!*ready || o->err.status == KL_OK) return KL_OK;
    if (err != NULL) *err = o->err;
    return o->err.status;
}

void kl_read_ahead_release(kl_read_ahead *r, int64_t n)
{
    pthread_mutex_lock(&r->lock);
    for (; r->released < n; r->released++) {
        r->outcomes[r->released % r->window].range = -1;
        pthread_cond_signal(&r->may_read); /* a place for one of them */
    }
    pthread_mutex_unlock(&r->lock);
}

void kl_read_ahead_free(kl_read_ahead *r)
{
    if (r == NULL) return;
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    pthread_cond_broadcast(&r->may_read);
    pthread_mutex_unlock(&r->lock);
    for (int i = 0; i < r->n_threads; i++) pthread_join(r->threads[i], NULL);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->may_read);
    pthread_cond_destroy(&r->has_read);
    kl_free(r->outcomes);
    kl_free(r);
}
