/*
 * test_threads.c -- the pool: every task once, at any size, in a fork, and with many callers.
 */
#include "test.h"

#include "base/memory.h"
#include "base/threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_TASKS 1000

/* ThreadSanitizer cannot follow threads started in a child of a fork; AddressSanitizer's shadow
 * is beyond any limit of the address space. */
#ifdef __SANITIZE_THREAD__
#    define TSAN 1
#else
#    define TSAN 0
#endif
#ifdef __SANITIZE_ADDRESS__
#    define ASAN 1
#else
#    define ASAN 0
#endif

typedef struct {
    _Atomic int runs[MAX_TASKS];
    _Atomic int bad_workers;
    int size;
    int64_t plain[MAX_TASKS]; /* not atomic: a race here is a missing edge of the pool */
} record;

static void note(void *ctx, int64_t task, int worker)
{
    record *r = ctx;
    atomic_fetch_add(&r->runs[task], 1);
    r->plain[task] += task + 1;
    if (worker < 0 || worker >= r->size) atomic_fetch_add(&r->bad_workers, 1);
}

static kl_pool *new_pool(int threads)
{
    kl_pool *pool = NULL;
    kl_error err = {KL_OK, ""};
    if (kl_pool_new(threads, &pool, &err) != KL_OK) printf("  %s\n", err.message);
    EXPECT(pool != NULL);
    return pool;
}

/* Tasks that ran other than `times` times, or whose plain sum is wrong. */
static int wrong_tasks(const record *r, int64_t n_tasks, int times)
{
    int wrong = atomic_load(&r->bad_workers);
    for (int64_t i = 0; i < MAX_TASKS; i++) {
        const int wanted = i < n_tasks ? times : 0;
        wrong += atomic_load(&r->runs[i]) != wanted || r->plain[i] != wanted * (i + 1);
    }
    return wrong;
}

static void every_task_runs_once(void)
{
    static const int sizes[] = {1, 2, 7};
    static const int64_t counts[] = {0, 1, 2, 6, 7, 8, 100, MAX_TASKS};
    for (int s = 0; s < 3; s++) {
        kl_pool *pool = new_pool(sizes[s]);
        EXPECT(kl_pool_size(pool) == sizes[s]);
        for (int c = 0; c < 8; c++) {
            record *r = calloc(1, sizeof *r);
            r->size = sizes[s];
            kl_pool_run(pool, counts[c], note, r);
            EXPECT(wrong_tasks(r, counts[c], 1) == 0);
            free(r);
        }
        kl_pool_free(pool);
    }
}

/* Results of one run must be visible to the next: plain[] is written without atomics. */
static void many_tiny_runs(void)
{
    enum { RUNS = 3000, TASKS = 5 };
    static const int sizes[] = {2, 7};
    for (int s = 0; s < 2; s++) {
        kl_pool *pool = new_pool(sizes[s]);
        record *r = calloc(1, sizeof *r);
        r->size = sizes[s];
        for (int i = 0; i < RUNS; i++) {
            kl_pool_run(pool, TASKS, note, r);
            if (i % 1000 == 999) usleep(2000); /* long enough for the workers to sleep */
        }
        EXPECT(wrong_tasks(r, TASKS, RUNS) == 0);
        free(r);
        kl_pool_free(pool);
    }
}

static void linger(void *ctx, int64_t task, int worker)
{
    note(ctx, task, worker);
    usleep(1000);
}

static void note_worker(void *ctx, int64_t task, int worker)
{
    (void)task;
    usleep(2000);
    atomic_fetch_or((_Atomic int *)ctx, 1 << worker);
}

static void workers_take_part(void)
{
    kl_pool *pool = new_pool(3);
    _Atomic int seen = 0;
    for (int i = 0; i < 50 && atomic_load(&seen) != 7; i++)
        kl_pool_run(pool, 30, note_worker, &seen);
    EXPECT(atomic_load(&seen) == 7);
    kl_pool_free(pool);
}

typedef struct {
    kl_pool *pool;
    record *record;
    int runs;
} caller;

static void *call_often(void *arg)
{
    const caller *c = arg;
    for (int i = 0; i < c->runs; i++) kl_pool_run(c->pool, 20, note, c->record);
    return NULL;
}

static void callers_wait_for_each_other(void)
{
    enum { CALLERS = 3, RUNS = 200 };
    kl_pool *pool = new_pool(2);
    pthread_t threads[CALLERS];
    caller callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (caller){pool, calloc(1, sizeof(record)), RUNS};
        callers[i].record->size = 2;
        pthread_create(&threads[i], NULL, call_often, &callers[i]);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        EXPECT(wrong_tasks(callers[i].record, 20, RUNS) == 0);
        free(callers[i].record);
    }
    kl_pool_free(pool);
}

static void concurrent_pools(void)
{
    kl_pool *a = new_pool(2), *b = new_pool(3);
    record *r = calloc(1, sizeof *r);
    caller other = {b, calloc(1, sizeof(record)), 300};
    pthread_t thread;
    r->size = 2, other.record->size = 3;
    pthread_create(&thread, NULL, call_often, &other);
    for (int i = 0; i < 300; i++) kl_pool_run(a, 20, note, r);
    pthread_join(thread, NULL);
    EXPECT(wrong_tasks(r, 20, 300) == 0 && wrong_tasks(other.record, 20, 300) == 0);
    free(r);
    free(other.record);
    kl_pool_free(a);
    kl_pool_free(b);
}

/* ---- forks ------------------------------------------------------------------------------ */

static int run_checked(kl_pool *pool)
{
    record *r = calloc(1, sizeof *r);
    r->size = kl_pool_size(pool);
    for (int i = 0; i < 50; i++) kl_pool_run(pool, 40, note, r);
    const int wrong = wrong_tasks(r, 40, 50);
    free(r);
    return wrong;
}

static int child_status(pid_t child)
{
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100;
}

/* A pool used by a parent, its child and its grandchild, and freed by each. */
static void nested_fork(void)
{
    kl_pool *pool = new_pool(3);
    EXPECT(run_checked(pool) == 0);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60); /* a deadlock must not hang the suite */
        int wrong = run_checked(pool);
        const pid_t grandchild = fork();
        if (grandchild == 0) {
            alarm(60);
            wrong = run_checked(pool);
            kl_pool_free(pool);
            _exit(wrong != 0);
        }
        wrong += child_status(grandchild) != 0;
        wrong += run_checked(pool);
        kl_pool_free(pool);
        _exit(wrong != 0);
    }
    EXPECT(child_status(child) == 0);
    EXPECT(run_checked(pool) == 0);
    kl_pool_free(pool);
}

static void *run_long(void *arg)
{
    const caller *c = arg;
    kl_pool_run(c->pool, 60, linger, c->record);
    return NULL;
}

/* Another thread is inside a run, and holds its lock, when this one forks. */
static void fork_in_the_middle_of_a_run(void)
{
    caller busy = {new_pool(2), calloc(1, sizeof(record)), 1};
    busy.record->size = 2;
    pthread_t thread;
    pthread_create(&thread, NULL, run_long, &busy);
    usleep(10000);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(run_checked(busy.pool) != 0);
    }
    EXPECT(child_status(child) == 0);
    pthread_join(thread, NULL);
    EXPECT(wrong_tasks(busy.record, 60, 1) == 0);
    kl_pool_free(busy.pool);
    free(busy.record);
}

/* In a child, so that the limit ends with it. Root is not bound by RLIMIT_NPROC, but the
 * address space binds everyone: no room for eight more stacks. */
static void goes_on_without_workers(void)
{
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const struct rlimit none = {0, 0};
        kl_pool *pool = new_pool(8);
        record *r = calloc(1, sizeof *r);
        r->size = 8;
        if (setrlimit(RLIMIT_AS, &none) != 0) _exit(2);
        kl_pool_run(pool, 40, note, r);
        _exit(wrong_tasks(r, 40, 1) != 0);
    }
    EXPECT(child_status(child) == 0);
}

/* ---- arguments -------------------------------------------------------------------------- */

static void refuses_bad_sizes(void)
{
    kl_pool *pool = NULL;
    kl_error err;
    EXPECT(kl_pool_new(-1, &pool, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "threads: must be in 0 .. 256, got -1");
    EXPECT(kl_pool_new(257, &pool, &err) == KL_ERR_VALUE && pool == NULL);
    kl_fault_arm(1);
    EXPECT(kl_pool_new(2, &pool, &err) == KL_ERR_MEMORY && pool == NULL);
    kl_fault_arm(0);
    EXPECT(kl_available_cpus() >= 1);
    EXPECT(kl_pool_new(0, &pool, &err) == KL_OK);
    EXPECT(kl_pool_size(pool) >= 1 && kl_pool_size(pool) <= KL_MAX_THREADS);
    kl_pool_free(pool);
    kl_pool_free(NULL);
}

int main(void)
{
    RUN(every_task_runs_once);
    RUN(many_tiny_runs);
    RUN(workers_take_part);
    RUN(callers_wait_for_each_other);
    RUN(concurrent_pools);
    RUN(refuses_bad_sizes);
    if (!TSAN) RUN(nested_fork);
    if (!TSAN) RUN(fork_in_the_middle_of_a_run);
    if (!TSAN && !ASAN) RUN(goes_on_without_workers);
    return test_failures != 0;
}
