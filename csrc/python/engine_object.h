/*
 * engine_object.h -- shared by the files of Engine and Generation.
 *
 * One lock an engine, held around every call of the core, and the GIL released within. A
 * Generation, or the owner of a sequence, can die in any thread while another one uses its
 * engine: what it held then waits in the engine until the lock is free.
 */
#ifndef KL_PYTHON_ENGINE_OBJECT_H
#define KL_PYTHON_ENGINE_OBJECT_H

#include "python/binding.h"
#include "python/convert.h"

#include "model/engine.h"

#include <sys/types.h>

/* The C part of a Generation. */
typedef struct kl_gen_node {
    kl_generation *g; /* NULL once its engine is closed */
    bool dead;        /* its Python object is gone      */
    struct kl_gen_node *next;
} kl_gen_node;

typedef struct kl_waiter kl_waiter;

typedef struct {
    PyObject_HEAD
    kl_device *dev;      /* one reference of ours, until it is closed */
    kl_engine *engine;   /* NULL: closed */
    unsigned long owner; /* the thread that holds the lock, 0: none; under the GIL */
    pid_t process;       /* which that is a thread of */
    kl_waiter *waiters;  /* for the lock, in the order they came; under the GIL */
    kl_gen_node *generations;
    kl_seq *dropped; /* [max_dropped], one a slot, whose owners are gone; under the GIL */
    int64_t n_dropped, max_dropped;
} EngineObject;

/* Take the lock; -1 with an exception when this thread holds it already (a callback calls its own
 * engine), when whoever holds it is a thread that did not come along with a fork, or when a signal
 * came while waiting. */
int kl_engine_lock(EngineObject *self);
/* Likewise, and refuse an engine that is closed. */
int kl_engine_enter(EngineObject *self);
void kl_engine_leave(EngineObject *self);
/* Free what waits for the lock now, or when whoever holds it leaves. */
void kl_engine_sweep(EngineObject *self);
/* Release a sequence so, for finalizers, which run in any thread at any time; a stale handle, or
 * 0, is fine. */
void kl_engine_drop_seq(EngineObject *self, kl_seq seq);
/* Free a Generation's C part so. */
void kl_engine_drop(EngineObject *self, kl_gen_node *node);

/* ---- calls that run for long ----------------------------------------------------------- */

/* What a call needs to come back to Python in between: for signals, for progress. */
typedef struct {
    PyThreadState *saved;            /* while the GIL is released */
    PyObject *progress;              /* callable or NULL */
    uint64_t done, total, told;      /* told: what progress was last called with */
    const kl_generation *generation; /* whose prompts progress counts, or NULL */
    int64_t last_ns;
    bool silent; /* nobody is told, and no signal comes to this thread */
    bool failed; /* an exception is pending */
} kl_caller;

/* progress callable, None, or False where the GIL need not be taken in between: an engine's thread
 * gets no signals, and threads with much Python to run would hold up its steps. -1 with TypeError
 * else. */
int kl_caller_init(kl_caller *c, const char *op, PyObject *progress);
/* Progress is that of a generation's prompts; what is done already was told by an earlier call. */
void kl_caller_follow(kl_caller *c, const kl_generation *g);
void kl_caller_release_gil(kl_caller *c);
void kl_caller_take_gil(kl_caller *c);
int kl_caller_poll(void *c);                                     /* a kl_poll_fn */
void kl_caller_progress(void *c, uint64_t done, uint64_t total); /* a kl_progress_fn */
/* After the call, with the GIL: 0, or -1 with the exception of `err` or of a callback. */
int kl_caller_finish(kl_caller *c, const kl_module *m, kl_status status, const kl_error *err);

/* ---- arguments ------------------------------------------------------------------------- */

/* Token ids from a list, a tuple, any sequence of ints, or an int32 or int64 array; freed with
 * kl_free(). The core checks their range. */
int kl_parse_ids(const kl_module *m, const char *op, const char *name, PyObject *o,
                 int32_t **out, int64_t *n);
int kl_parse_seq(const char *op, PyObject *o, kl_seq *out);
int kl_parse_config(PyObject *dict, kl_config *out);
int kl_parse_options(PyObject *dict, kl_engine_options *out);
/* (name, file, offset, bytes, "F32" | "BF16", shape). The name stays the tuple's. */
int kl_parse_source(PyObject *o, kl_source *out);
/* Freed with kl_free(). */
int kl_parse_fds(PyObject *o, int **out, int *n_fds);
/* A list or tuple of anything iterable (new reference), its length in *n. */
PyObject *kl_parse_list(const char *op, const char *name, PyObject *o, Py_ssize_t *n);

/* Fields of a dict; a missing one is an error unless a fallback is asked for. */
int kl_dict_int(const char *op, PyObject *dict, const char *key, int64_t lo, int64_t hi,
                const int64_t *fallback, int64_t *out);
int kl_dict_float(const char *op, PyObject *dict, const char *key, const float *fallback,
                  float *out);

PyObject *kl_plan_dict(const kl_plan *plan);

/* Methods of Engine in engine_kda.c, engine_prompts.c and engine_scores.c. */
PyObject *kl_engine_py_read_kda(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_write_kda(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_feed(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_logits(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_logprobs(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_hidden(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_step(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_score(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
/* In engine_state.c. */
PyObject *kl_engine_py_seq_new(PyObject *op, PyObject *none);
PyObject *kl_engine_py_seq_fork(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_seq_length(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_seq_release(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_draft(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_restore(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_pages(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_image_bytes(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_read_image(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *kl_engine_py_write_image(PyObject *op, PyObject *const *args, Py_ssize_t nargs);

/* In engine_prefix.c. */
PyObject *kl_engine_py_keep_prefixes(PyObject *op, PyObject *arg);
PyObject *kl_engine_py_clear_prefixes(PyObject *op, PyObject *none);
PyObject *kl_engine_py_prefix_stats(PyObject *op, PyObject *none);

PyObject *kl_generation_object_new(EngineObject *engine, PyObject *requests);

extern PyType_Spec kl_engine_spec, kl_generation_spec, kl_sequence_spec;
PyObject *kl_py_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

#endif
