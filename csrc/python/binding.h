/*
 * binding.h -- shared by the files of this folder, the only ones that know Python.
 *
 * A binding function does four things in this order: parse, borrow arrays, call the core
 * without the GIL, translate the error. It computes nothing.
 *
 * Everything keeps to Python's limited API, so that one build serves every Python >= 3.11.
 * The module's state is written while the module is made and only read afterwards.
 */
#ifndef KL_PYTHON_BINDING_H
#define KL_PYTHON_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "backend/backend.h"

#include <pthread.h>
#include <stdatomic.h>

/* The exceptions of spec/api.md section 5: X(name, the builtin it also is, docstring). */
#define KL_EXCEPTIONS(X)                                                                       \
    X(ConfigError, PyExc_ValueError, "A model's configuration is not one this package runs.")  \
    X(WeightsError, PyExc_ValueError,                                                          \
      "A checkpoint's tensors are missing, misshapen or malformed.")                           \
    X(TokenizerError, PyExc_ValueError, "Tokenizer files are missing or malformed.")           \
    X(DeviceError, PyExc_RuntimeError,                                                         \
      "A device is missing, has failed or lacks an operation.")                                \
    X(OutOfMemory, PyExc_MemoryError, "Memory of the host or of a device could not be had.")   \
    X(NumericalError, PyExc_ArithmeticError, "NaN or infinity where a finite number must be.")

/* Attribute names looked up on other people's objects. */
#define KL_NAMES(X)                                                                            \
    X(__dlpack__)                                                                              \
    X(__dlpack_device__)                                                                       \
    X(__dlpack_c_exchange_api__)                                                               \
    X(__c_dlpack_exchange_api__)                                                               \
    X(__array_namespace__)                                                                     \
    X(__module__)                                                                              \
    X(from_dlpack)                                                                             \
    X(max_version)                                                                             \
    X(requires_grad)                                                                           \
    X(stream)

typedef struct {
    PyTypeObject *array_type, *backend_type, *weight_type, *engine_type, *generation_type,
        *sequence_type;
    PyObject *KimiLinearError;
#define KL_FIELD(name, base, doc) PyObject *name;
    KL_EXCEPTIONS(KL_FIELD)
#undef KL_FIELD
    struct {
#define KL_FIELD(name) PyObject *name;
        KL_NAMES(KL_FIELD)
#undef KL_FIELD
    } names; /* interned */
} kl_module;

static inline kl_module *kl_module_of(PyObject *module)
{
    return PyModule_GetState(module);
}

/* The module's state from an instance of one of its types (none can be subclassed). */
static inline kl_module *kl_module_of_instance(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

/* ---- errors ---------------------------------------------------------------------------- */

int kl_errors_init(PyObject *module, kl_module *m);

/* The only place where a kl_error becomes an exception. Returns NULL. KL_ERR_CANCELLED keeps
 * the exception that a callback left pending, else it is KeyboardInterrupt. */
PyObject *kl_raise(const kl_module *m, const kl_error *err);
/* The exception of an error, not raised: a new reference. */
PyObject *kl_exception(const kl_module *m, const kl_error *err);

/* ---- scalar arguments ------------------------------------------------------------------ */

/* 0, or -1 with an exception that names the argument. */
int kl_parse_count(const char *op, Py_ssize_t given, Py_ssize_t wanted);
int kl_parse_float(const char *op, const char *name, PyObject *o, float *out);
int kl_parse_int(const char *op, const char *name, PyObject *o, int64_t lo, int64_t hi,
                 int64_t *out);
int kl_parse_bool(const char *op, const char *name, PyObject *o, bool *out);
/* Which of the `n` names `o` is. */
int kl_parse_choice(const char *op, const char *name, PyObject *o, const char *const *names,
                    int n, int *out);
/* Python's names of the weight formats, in the order of kl_weight_format. */
extern const char *const kl_format_names[KL_N_WEIGHT_FORMATS];
extern const char *const kl_latents_names[KL_N_LATENTS];

/* ---- devices --------------------------------------------------------------------------- */

/* An open backend, shared by the Backend object and by the memory that was taken from it, so
 * that memory can be given back by whichever thread drops it last, without an interpreter. */
typedef struct {
    atomic_int refs;
    kl_backend *be;
    int index; /* ordinal of the device */
    bool is_cpu;
    pthread_mutex_t lock; /* held from choosing the stream until the work is enqueued */
} kl_device;

kl_device *kl_device_ref(kl_device *dev);
void kl_device_unref(kl_device *dev); /* NULL is fine; the last one closes the backend */

/* The device of a Backend object, borrowed; NULL with TypeError for anything else. */
kl_device *kl_device_of(const kl_module *m, PyObject *backend);

/* ---- types and functions --------------------------------------------------------------- */

extern PyType_Spec kl_array_spec, kl_backend_spec, kl_weight_spec;

/* Add the class attribute through which others borrow our arrays in C. */
int kl_array_type_init(kl_module *m);

/* Every operation, in ops_*.c: X(name, signature after `backend`, summary). */
#define KL_PY_OPS(X)                                                                           \
    X(kda_prefill,                                                                             \
      "q, k, v, g, beta, scale, initial_state, cu_seqlens, gate, A_log, dt_bias, "             \
      "lower_bound, normalize, beta_logits, out, final_state, checkpoint_every, checkpoints, " \
      "stream",                                                                                \
      "-> (o, final_state), or (o, final_state, checkpoints)")                                 \
    X(kda_decode,                                                                              \
      "q, k, v, g, beta, state, slots, scale, gate, A_log, dt_bias, lower_bound, "             \
      "normalize, beta_logits, out, stream",                                                   \
      "-> o; state is updated in place")                                                       \
    X(short_conv, "x, weight, state, cu_seqlens, activation, out, stream", "-> (y, state)")    \
    X(gated_rms_norm, "x, z, weight, eps, out, stream", "-> y")                                \
    X(rms_norm, "x, weight, eps, residual, out, stream", "-> y, or (y, residual)")             \
    X(mla_prefill,                                                                             \
      "q, latent, w_kv_b, cu_seqlens, past, scale, kv_cache_dtype, out, stream", "-> o")       \
    X(mla_decode, "q, pages, block_table, lengths, w_kv_b, scale, rope, out, stream", "-> o")  \
    X(moe_route,                                                                               \
      "logits, bias, top_k, scaling, renormalize, score, groups, top_groups, stream",          \
      "-> (ids, weights)")                                                                     \
    X(moe_experts, "x, ids, weights, w1, w3, w2, shared, out, stream", "-> y")                 \
    X(linear, "x, w, out, stream", "-> y")                                                     \
    X(quantize, "w, dtype", "-> PackedWeight")                                                 \
    X(token_logprobs, "hidden, lm_head, targets, top, stream",                                 \
      "-> (logprobs, greedy) and, with top, (top_ids, top_logprobs)")                          \
    X(sample, "logits, params, seen, top",                                                     \
      "-> (ids, logprobs) and, with top, (top_ids, top_logprobs)")

#define KL_DECLARE(name, signature, summary)                                                   \
    PyObject *kl_py_##name(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
KL_PY_OPS(KL_DECLARE)
#undef KL_DECLARE

PyObject *kl_py_device_of(PyObject *module, PyObject *array);

#endif
