/*
 * threads.c -- see threads.h.
 *
 * A run is announced through one 64-bit word, the gate: its upper half counts openings and
 * closings (odd: a run is open), its lower half the workers inside. A worker enters by adding 1
 * and stays if the value it got back was open; the caller closes the gate when the tasks have
 * run out and waits for those inside only. So a worker that sleeps, or that the system keeps
 * from running, delays nobody.
 */
#include "base/threads.h"

#include "base/cgroup.h"
#include "base/memory.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE    64
#define STEP    ((uint64_t)1 << 32) /* of the gate: one opening or closing */
#define SPIN_NS 50000               /* longer than the serial stretches between a step's runs */

typedef struct {
    kl_pool *pool;
    int index;
} worker;

struct kl_pool {
    /* Polled by all; what changes at another pace stands on lines of its own. */
    _Alignas(LINE) _Atomic uint64_t gate;
    _Alignas(LINE) _Atomic int64_t next; /* the first task not handed out */
    _Alignas(LINE) kl_task_fn fn;        /* written only while the gate is closed and empty */
    void *ctx;
    int64_t n_tasks;

    _Alignas(LINE) _Atomic int sleepers;
    _Atomic bool stop;
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;

    pthread_mutex_t run_lock;
    _Atomic int64_t owner; /* process that the workers belong to; negative: being changed */
    int size;              /* threads asked for, the caller's included */
    bool started, may_spin;
    int n_workers; /* threads that could be had */
    pthread_t threads[KL_MAX_THREADS];
    worker workers[KL_MAX_THREADS];
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool is_open(uint64_t gate)
{
    return (gate / STEP & 1) != 0;
}

/* ---- workers --------------------------------------------------------------------------- */

/* A run that this worker, last inside at opening `seen`, has not been in; or the end. */
static bool has_news(kl_pool *pool, uint64_t seen)
{
    const uint64_t gate = atomic_load(&pool->gate);
    return (is_open(gate) && gate / STEP != seen) || atomic_load(&pool->stop);
}

static void wait_for_news(kl_pool *pool, uint64_t seen)
{
    const int64_t deadline = pool->may_spin ? now_ns() + SPIN_NS : 0;
    while (pool->may_spin && now_ns() < deadline)
        for (int i = 0; i < 16; i++) {
            if (has_news(pool, seen)) return;
            relax();
        }
    /* The caller opens the gate, then reads sleepers; here the order is the other way about,
     * so one of the two sees the other. */
    pthread_mutex_lock(&pool->sleep_lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_news(pool, seen)) pthread_cond_wait(&pool->wake, &pool->sleep_lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->sleep_lock);
}

static void take_tasks(kl_pool *pool, int index)
{
    const kl_task_fn fn = pool->fn;
    void *const ctx = pool->ctx;
    const int64_t n_tasks = pool->n_tasks;
    for (;;) {
        const int64_t task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (task >= n_tasks) return;
        fn(ctx, task, index);
    }
}

static void *worker_main(void *arg)
{
    kl_pool *pool = ((worker *)arg)->pool;
    const int index = ((worker *)arg)->index;
    uint64_t seen = 0;
    for (;;) {
        wait_for_news(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        const uint64_t gate = atomic_fetch_add(&pool->gate, 1);
        if (is_open(gate)) {
            seen = gate / STEP;
            take_tasks(pool, index);
        }
        atomic_fetch_sub(&pool->gate, 1);
    }
}

/* Start what can be started; a run is complete with any number of workers. They take no
 * signals: those belong to the program's own threads. */
static void start_workers(kl_pool *pool)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < pool->size; i++) {
        worker *w = &pool->workers[pool->n_workers];
        *w = (worker){pool, pool->n_workers + 1};
        if (pthread_create(&pool->threads[pool->n_workers], NULL, worker_main, w) != 0) break;
        pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool->started = true;
}

/* ---- life ------------------------------------------------------------------------------ */

static void reset(kl_pool *pool)
{
    atomic_store(&pool->gate, 0);
    atomic_store(&pool->sleepers, 0);
    atomic_store(&pool->stop, false);
    pthread_mutex_init(&pool->sleep_lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_mutex_init(&pool->run_lock, NULL);
    pool->started = false;
    pool->n_workers = 0;
}

/* After a fork the child has a copy of the pool, perhaps in the middle of a run, and none of
 * its threads: forget them, locks and all. Threads of the child may get here together; the one
 * that changes the owner does it. */
static void adopt(kl_pool *pool)
{
    const int64_t self = getpid();
    int64_t owner = atomic_load(&pool->owner);
    while (owner != self) {
        if (owner != -self && atomic_compare_exchange_strong(&pool->owner, &owner, -self)) {
            reset(pool);
            atomic_store(&pool->owner, self);
        }
        owner = atomic_load(&pool->owner);
    }
}

kl_status kl_pool_new(int threads, kl_pool **out, kl_error *err)
{
    *out = NULL;
    if (threads < 0 || threads > KL_MAX_THREADS)
        return kl_fail(err, KL_ERR_VALUE, "threads: must be in 0 .. %d, got %d", KL_MAX_THREADS,
                       threads);
    const int cpus = kl_available_cpus();
    if (threads == 0) threads = cpus < KL_MAX_THREADS ? cpus : KL_MAX_THREADS;

    kl_pool *pool = kl_aligned_alloc(sizeof *pool);
    if (pool == NULL) return kl_fail(err, KL_ERR_MEMORY, "threads: no memory for a pool");
    memset(pool, 0, sizeof *pool);
    pool->size = threads;
    pool->may_spin = threads <= cpus; /* else a spinning thread keeps a working one waiting */
    reset(pool);
    atomic_store(&pool->owner, getpid());
    *out = pool;
    return KL_OK;
}

void kl_pool_free(kl_pool *pool)
{
    if (pool == NULL) return;
    adopt(pool);
    pthread_mutex_lock(&pool->sleep_lock);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
    for (int i = 0; i < pool->n_workers; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->run_lock);
    pthread_mutex_destroy(&pool->sleep_lock);
    pthread_cond_destroy(&pool->wake);
    kl_free(pool);
}

int kl_pool_size(const kl_pool *pool)
{
    return pool->size;
}

/* ---- runs ------------------------------------------------------------------------------ */

static void wake_sleepers(kl_pool *pool, int64_t wanted)
{
    if (atomic_load(&pool->sleepers) == 0) return;
    pthread_mutex_lock(&pool->sleep_lock);
    const int sleepers = atomic_load(&pool->sleepers);
    for (int i = 0; i < sleepers && i < wanted; i++) pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
}

static void wait_until_empty(kl_pool *pool)
{
    for (int spins = 0; (uint32_t)atomic_load(&pool->gate) != 0; spins++) {
        if (pool->may_spin && spins < 4096)
            relax();
        else
            sched_yield(); /* the worker we wait for may need this very CPU */
    }
}

void kl_pool_run(kl_pool *pool, int64_t n_tasks, kl_task_fn fn, void *ctx)
{
    if (n_tasks <= 1 || pool->size == 1) {
        for (int64_t i = 0; i < n_tasks; i++) fn(ctx, i, 0);
        return;
    }
    adopt(pool);
    pthread_mutex_lock(&pool->run_lock);
    if (!pool->started) start_workers(pool);
    pool->fn = fn, pool->ctx = ctx, pool->n_tasks = n_tasks;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_fetch_add(&pool->gate, STEP);
    wake_sleepers(pool, n_tasks - 1);
    take_tasks(pool, 0);
    atomic_fetch_add(&pool->gate, STEP);
    wait_until_empty(pool);
    pthread_mutex_unlock(&pool->run_lock);
}

int kl_available_cpus(void)
{
    cpu_set_t set;
    int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
    if (cpus < 1) cpus = (int)sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than the set holds */
    const int quota = kl_cgroup_cpus();
    if (quota > 0 && quota < cpus) cpus = quota;
    return cpus < 1 ? 1 : cpus;
}
