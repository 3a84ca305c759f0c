/*
 * call.h -- one call of an operation: its borrowed arguments, its outputs, its memory.
 *
 *     static PyObject *run_linear(kl_call *c, PyObject *const *args)
 *         kl_arg(c, "x", args[1], KL_FLOATS, 2, KL_ROWS, &a.x) ...
 *         kl_out(c, "out", args[3], KL_F32, 2, shape, &a.out, &y) ...
 *         return kl_call_linear(c, &a) < 0 ? NULL : kl_out_take(c, y);
 *
 *     return kl_call_python(module, "linear", args, nargs, 5, true, run_linear);
 *
 * Functions return 0, or -1 with an exception that names the operation and the argument.
 * Everything borrowed or made belongs to the call and ends with it.
 */
#ifndef KL_PYTHON_CALL_H
#define KL_PYTHON_CALL_H

#include "python/convert.h"

/* Places for this many of each thing without an allocation; a list of pasts may need more. */
#define KL_CALL_INLINE        24
#define KL_CALL_OUTPUTS       4
#define KL_CALL_DEVICE_BLOCKS 8

/* Dtypes an argument may have, as a set. */
#define KL_SET(dtype) (1u << (dtype))
#define KL_FLOATS     (KL_SET(KL_F32) | KL_SET(KL_BF16))

/* What an argument's layout may be. Strided inputs are made dense by a copy on the CPU and are
 * refused on a GPU; what the operation writes to is never copied. */
typedef enum {
    KL_DENSE,
    KL_ROWS,    /* the first axis may have any positive stride */
    KL_INPLACE, /* written to: dense and writable              */
} kl_layout;

/* Where new outputs come from. */
typedef enum { KL_FROM_NUMPY, KL_FROM_EXCHANGE, KL_FROM_OTHER } kl_family;

typedef struct {
    const char *name;
    const char *lo, *hi; /* memory of the caller's that the operation touches */
    bool written;
    const char *may_be; /* name of the argument that it may coincide with */
} kl_span;

/* An output: the caller's own array, or a new one of its framework. */
typedef struct {
    PyObject *object;                  /* strong; given, NumPy's or our Array */
    DLManagedTensorVersioned *managed; /* or memory of the framework          */
    bool given;
} kl_output;

/* A temporary in the device's memory: the backend's, or the framework's. */
typedef struct {
    void *data;
    size_t bytes;
    DLManagedTensorVersioned *managed; /* the framework's, or NULL */
} kl_device_block;

/* Items that grow beyond the call's own memory when they must. */
typedef struct {
    void *items; /* kl_free() unless it is the inline part */
    size_t item_bytes;
    int n, room;
    bool on_heap;
} kl_table;

typedef struct {
    const kl_module *m;
    const char *op;
    kl_device *dev;
    PyObject *backend; /* strong: keeps dev open */
    bool stream_given;
    bool stream_is_current; /* of the framework, as it said itself */
    void *stream;           /* CUDA */

    kl_family family;
    PyObject *like;               /* the first array, strong               */
    const DLPackExchangeAPI *api; /* KL_FROM_EXCHANGE                      */
    PyObject *descr;              /* a NumPy bf16 descriptor seen, or NULL */

    kl_table arrays; /* kl_array                           */
    kl_table spans;  /* kl_span                            */
    kl_table blocks; /* void *, kl_free()d at the end      */
    int n_outputs, n_device_blocks;
    kl_output outputs[KL_CALL_OUTPUTS];
    kl_device_block device_blocks[KL_CALL_DEVICE_BLOCKS];

    kl_array first_arrays[KL_CALL_INLINE];
    kl_span first_spans[KL_CALL_INLINE];
    void *first_blocks[KL_CALL_INLINE];
} kl_call;

typedef PyObject *(*kl_run_fn)(kl_call *c, PyObject *const *args);

/* A call from its beginning to its end: `count` arguments, the first a backend; with `streams` the
 * last is a stream, None or an int. */
PyObject *kl_call_python(PyObject *module, const char *op, PyObject *const *args,
                         Py_ssize_t nargs, Py_ssize_t count, bool streams, kl_run_fn run);

/* Refuse early what the backend lacks: before anything is borrowed or copied for it. */
int kl_call_lacks(const kl_call *c);
#define KL_NEEDS(c, op) ((c)->dev->be->vt->op != NULL ? 0 : kl_call_lacks(c))

/* ---- arguments ------------------------------------------------------------------------- */

/* An array of `ndim` axes and a dtype of the set. */
int kl_arg(kl_call *c, const char *name, PyObject *o, unsigned dtypes, int ndim,
           kl_layout layout, kl_tensor *out);
/* The same; None leaves the tensor absent. */
int kl_arg_opt(kl_call *c, const char *name, PyObject *o, unsigned dtypes, int ndim,
               kl_layout layout, kl_tensor *out);
/* [..., D] as [rows, D]; shape and ndim are the argument's own. */
int kl_arg_rows(kl_call *c, const char *name, PyObject *o, kl_tensor *out, int64_t *shape,
                int *ndim);
/* A PackedWeight or a float array of `ndim` (2 or 3) axes. */
int kl_arg_weight(kl_call *c, const char *name, PyObject *o, int ndim, kl_weight *out);
/* A PackedWeight of f32 or bf16, or a float array of three axes. */
int kl_arg_weight_3d(kl_call *c, const char *name, PyObject *o, kl_tensor *out);
/* An integer array with values in [lo, hi]: of the host's, validated and copied to where the
 * tensors live; on a GPU already, int32 as it is, for reading it would wait for the device. */
int kl_arg_ids(kl_call *c, const char *name, PyObject *o, int ndim, int64_t lo, int64_t hi,
               kl_tensor *out);
/* cu_seqlens over T tokens: starts at 0, never falls, ends at T (not checked on a GPU); None:
 * one sequence. host, if wanted: the numbers, or NULL where they are on a GPU alone. */
int kl_arg_cu_seqlens(kl_call *c, PyObject *o, int64_t T, kl_tensor *out, const int32_t **host);
/* Slots of N sequences in a pool of S: distinct; None: absent. */
int kl_arg_slots(kl_call *c, PyObject *o, int64_t N, int64_t S, kl_tensor *out);
/* None, or a finite float; None gives size^-0.5. */
int kl_arg_scale(kl_call *c, PyObject *o, int64_t size, float *out);

static inline void *kl_managed_data(const DLManagedTensorVersioned *managed)
{
    return (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
}

/* Memory of kl_malloc's kind that ends with the call; keep() takes it even when it fails. */
int kl_call_keep(kl_call *c, void *block);
void *kl_call_malloc(kl_call *c, size_t bytes);
/* Memory of the device that ends with the call, or before. The framework's own where work goes
 * to its current stream: then nothing waits, and the call can be captured in a graph. */
int kl_call_alloc(kl_call *c, size_t bytes, void **out);
void kl_call_give_back(kl_call *c); /* the last of it */
/* An array of the framework's memory (KL_FROM_EXCHANGE). */
int kl_call_new_managed(kl_call *c, DLDataType dtype, int ndim, const int64_t *shape,
                        DLManagedTensorVersioned **out);

/* ---- outputs --------------------------------------------------------------------------- */

/* Use `given`, or make a new array when it is None. may_be: the argument whose memory it may
 * exactly be, or NULL. */
int kl_out(kl_call *c, const char *name, PyObject *given, kl_dtype dtype, int ndim,
           const int64_t *shape, const char *may_be, kl_tensor *view, int *index);
/* The same, but a given array may also be float32. */
int kl_out_or_f32(kl_call *c, const char *name, PyObject *given, kl_dtype dtype, int ndim,
                  const int64_t *shape, kl_tensor *view, int *index);
/* A new array of bools (bytes 0 and 1). */
int kl_out_bool(kl_call *c, int ndim, const int64_t *shape, kl_tensor *view, int *index);
/* The n best alternatives of each row, shape [rows, n]; nothing where n is 0. */
int kl_out_top(kl_call *c, const int64_t *shape, kl_tensor *ids, kl_tensor *logprobs);
/* The array (new reference), or NULL with an exception. */
PyObject *kl_out_take(kl_call *c, int index);
/* A tuple of the outputs 0 .. n-1. */
PyObject *kl_out_take_all(kl_call *c);

/* Whether an array is in the memory of the call's GPU: 1, 0, or -1. */
int kl_call_on_gpu(const kl_call *c, PyObject *o);
/* Replace dense host memory by a copy where the call's tensors live. */
int kl_call_send(kl_call *c, void **data, size_t bytes);

int kl_call_sync(kl_call *c); /* wait for the stream */

/* dst <- src (same shape; rows strided if it has two axes), or zeros where src is absent. */
int kl_call_fill(kl_call *c, const kl_tensor *dst, const kl_tensor *src);

/* ---- running --------------------------------------------------------------------------- */

/* kl_call_<op>: refuse overlaps, lend the workspace and run without the GIL. */
#define KL_DECLARE(op) int kl_call_##op(kl_call *c, kl_##op *a);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

/* The weight inside a PackedWeight and the device it is on, or NULL (no exception) for another
 * object. */
const kl_weight *kl_weight_of(const kl_module *m, PyObject *o, const kl_device **dev);

#endif
