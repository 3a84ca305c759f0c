/*
 * threads.h -- a pool of worker threads for one backend.
 *
 * kl_pool_run() calls fn(ctx, task, worker) once for each task in 0 .. n_tasks-1, the calling
 * thread taking part as worker 0, and returns when all have ended. Tasks are handed out
 * dynamically, so a task must compute its own results alone: then the results do not depend
 * on the number of threads or on their timing. `worker` (< kl_pool_size) picks scratch memory.
 *
 * One run at a time: concurrent callers wait for each other. Workers are started by the first
 * run that needs them, spin briefly between runs, then sleep. A child of fork() starts its own
 * at its first run. Running inside a task is not allowed.
 */
#ifndef KL_BASE_THREADS_H
#define KL_BASE_THREADS_H

#include "base/error.h"

#include <stdint.h>

typedef struct kl_pool kl_pool;
typedef void (*kl_task_fn)(void *ctx, int64_t task, int worker);

#define KL_MAX_THREADS 256

/* threads 0: KIMI_LINEAR_THREADS or OMP_NUM_THREADS as the caller resolved it; the pool itself
 * reads no environment. Starts no thread. */
kl_status kl_pool_new(int threads, kl_pool **out, kl_error *err);
void kl_pool_free(kl_pool *pool); /* NULL is fine; joins the workers */
int kl_pool_size(const kl_pool *pool);

/* Runs inline when there is one task or one thread. If a worker cannot be started, the run
 * goes on with those there are: same results. */
void kl_pool_run(kl_pool *pool, int64_t n_tasks, kl_task_fn fn, void *ctx);

/* CPUs this process may use: the smaller of its affinity mask and its cgroup quota, >= 1. */
int kl_available_cpus(void);

#endif
