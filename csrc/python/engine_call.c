/*
 * engine_call.c -- locks, signals and progress around calls that run for long.
 */
#include "python/engine_object.h"

#include "base/memory.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#define POLL_NS (INT64_C(20) * 1000 * 1000) /* how often a call takes the GIL at most */
#define WAIT_US 50000 /* how long a thread waits for the lock between looks at signals */

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- the engine's lock ----------------------------------------------------------------- */

/* A thread in the queue; all of it under the GIL but the wait for `turn`. */
struct kl_waiter {
    unsigned long thread;
    PyThread_type_lock turn; /* released by the thread that hands the engine on */
    kl_waiter *next;
};

static void join_queue(EngineObject *self, kl_waiter *w)
{
    kl_waiter **link = &self->waiters;
    while (*link != NULL) link = &(*link)->next;
    *link = w;
}

static void leave_queue(EngineObject *self, kl_waiter *w)
{
    kl_waiter **link = &self->waiters;
    while (*link != w) link = &(*link)->next;
    *link = w->next;
}

/* To the one that has waited longest: a thread that leaves and comes back at once, step after
 * step, would else have the engine again before those that wait for it wake up. */
static void hand_on(EngineObject *self)
{
    kl_waiter *w = self->waiters;
    self->owner = w != NULL ? w->thread : 0;
    if (w == NULL) return;
    self->waiters = w->next;
    PyThread_release_lock(w->turn);
}

/* -1 with an exception when a signal came meanwhile. */
static int wait_for_turn(EngineObject *self, kl_waiter *w)
{
    for (;;) {
        PyLockStatus got;
        Py_BEGIN_ALLOW_THREADS got = PyThread_acquire_lock_timed(w->turn, WAIT_US, 1);
        Py_END_ALLOW_THREADS if (got == PY_LOCK_ACQUIRED) return 0;
        if (PyErr_CheckSignals() == 0) continue;
        if (self->owner == w->thread) kl_engine_leave(self); /* it became ours meanwhile */
        else leave_queue(self, w);
        return -1;
    }
}

static int wait_in_queue(EngineObject *self)
{
    kl_waiter w = {PyThread_get_thread_ident(), PyThread_allocate_lock(), NULL};
    if (w.turn == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyThread_acquire_lock(w.turn, NOWAIT_LOCK);
    join_queue(self, &w);
    const int got = wait_for_turn(self, &w);
    PyThread_free_lock(w.turn);
    return got;
}

int kl_engine_lock(EngineObject *self)
{
    if (self->owner == PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError,
                        "engine: a callback cannot call the engine that called it");
        return -1;
    }
    if (self->owner != 0 && self->process != getpid()) {
        PyErr_SetString(PyExc_RuntimeError, "engine: a call of another thread did not survive "
                                            "os.fork; load the model in this process");
        return -1;
    }
    if (self->owner != 0) return wait_in_queue(self);
    self->owner = PyThread_get_thread_ident();
    self->process = getpid();
    return 0;
}

int kl_engine_enter(EngineObject *self)
{
    if (kl_engine_lock(self) < 0) return -1;
    if (self->engine != NULL) return 0;
    kl_engine_leave(self);
    PyErr_SetString(PyExc_ValueError, "engine: it is closed");
    return -1;
}

/* Free what died while the lock was held. */
static void sweep(EngineObject *self)
{
    kl_gen_node **link = &self->generations;
    while (*link != NULL) {
        kl_gen_node *node = *link;
        if (!node->dead) {
            link = &node->next;
            continue;
        }
        *link = node->next;
        kl_generation_free(node->g);
        kl_free(node);
    }
    kl_error ignored; /* its owner may have released it before */
    for (; self->n_dropped > 0 && self->engine != NULL; self->n_dropped--)
        (void)kl_seq_release(self->engine, self->dropped[self->n_dropped - 1], &ignored);
}

void kl_engine_leave(EngineObject *self)
{
    sweep(self);
    hand_on(self);
}

void kl_engine_sweep(EngineObject *self)
{
    if (self->owner != 0) return;
    self->owner = PyThread_get_thread_ident();
    kl_engine_leave(self);
}

void kl_engine_drop(EngineObject *self, kl_gen_node *node)
{
    node->dead = true;
    kl_engine_sweep(self);
}

/* ---- coming back to Python ------------------------------------------------------------- */

int kl_caller_init(kl_caller *c, const char *op, PyObject *progress)
{
    *c = (kl_caller){.last_ns = now_ns(), .silent = progress == Py_False};
    if (progress == Py_None || progress == Py_False) return 0;
    if (!PyCallable_Check(progress)) {
        PyErr_Format(PyExc_TypeError, "%s: progress must be callable, None or False, got %R",
                     op, progress);
        return -1;
    }
    c->progress = progress;
    return 0;
}

void kl_caller_release_gil(kl_caller *c)
{
    c->saved = PyEval_SaveThread();
}

void kl_caller_take_gil(kl_caller *c)
{
    PyEval_RestoreThread(c->saved);
}

static void count_prompts(kl_caller *c)
{
    if (c->generation == NULL) return;
    kl_generation_stats stats;
    kl_generation_get_stats(c->generation, &stats);
    c->done = (uint64_t)stats.prompt_done;
    c->total = (uint64_t)stats.prompt_tokens;
}

void kl_caller_follow(kl_caller *c, const kl_generation *g)
{
    c->generation = g;
    count_prompts(c);
    c->told = c->done;
}

/* With the GIL: call progress if there is news. */
static void tell(kl_caller *c)
{
    count_prompts(c);
    if (c->failed || c->progress == NULL || c->done == c->told) return;
    PyObject *result = PyObject_CallFunction(c->progress, "KK", (unsigned long long)c->done,
                                             (unsigned long long)c->total);
    c->told = c->done;
    c->failed = result == NULL;
    Py_XDECREF(result);
}

int kl_caller_poll(void *ctx)
{
    kl_caller *c = ctx;
    const int64_t now = now_ns();
    if (c->failed) return 1;
    if (c->silent || now - c->last_ns < POLL_NS) return 0;
    kl_caller_take_gil(c);
    c->failed = PyErr_CheckSignals() < 0;
    tell(c);
    kl_caller_release_gil(c);
    c->last_ns = now_ns(); /* what Python took is not counted */
    return c->failed;
}

void kl_caller_progress(void *ctx, uint64_t done, uint64_t total)
{
    kl_caller *c = ctx;
    c->done = done;
    c->total = total;
}

int kl_caller_finish(kl_caller *c, const kl_module *m, kl_status status, const kl_error *err)
{
    if (status == KL_OK) tell(c);
    if (c->failed) return -1; /* the callback's exception is pending */
    if (status == KL_OK) return 0;
    kl_raise(m, err);
    return -1;
}
