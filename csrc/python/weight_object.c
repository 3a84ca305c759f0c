/*
 * weight_object.c -- kimi_linear._core.PackedWeight, and quantize() that makes one.
 */
#include "python/call.h"

#include "base/bf16.h"
#include "base/memory.h"

#include <math.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    kl_weight w;    /* data and scales are our own, in the device's memory */
    kl_device *dev; /* a reference of ours                              */
    bool stack;     /* three axes, even with one matrix         */
} WeightObject;

const char *const kl_format_names[KL_N_WEIGHT_FORMATS] = {"f32", "bf16", "int8", "int4", "fp8"};

const kl_weight *kl_weight_of(const kl_module *m, PyObject *o, const kl_device **dev)
{
    WeightObject *self = (WeightObject *)o;
    if (Py_TYPE(o) != m->weight_type) return NULL;
    *dev = self->dev;
    return &self->w;
}

/* CUDA reads scales by words of two, so beside the last of an odd number there is another. */
static size_t scale_room(const kl_weight *w)
{
    return kl_align_up(kl_weight_scale_bytes(w), 4);
}

static void weight_dealloc(PyObject *op)
{
    WeightObject *self = (WeightObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->dev != NULL) {
        kl_backend *be = self->dev->be;
        be->vt->free(be, self->w.data, kl_weight_data_bytes(&self->w));
        be->vt->free(be, self->w.scales, scale_room(&self->w));
        kl_device_unref(self->dev);
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* ---- quantize -------------------------------------------------------------------------- */

static WeightObject *weight_alloc(kl_call *c, kl_weight_format format, int64_t count,
                                  int64_t rows, int64_t cols)
{
    PyTypeObject *type = c->m->weight_type;
    WeightObject *self =
        (WeightObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) return NULL;
    /* In no format is a row longer than in float32 by more than one group. */
    self->w = (kl_weight){.format = format, .count = count, .rows = rows, .cols = cols};
    self->dev = kl_device_ref(c->dev);
    kl_backend *be = c->dev->be;
    kl_error err = {KL_OK, ""};
    const size_t scales = scale_room(&self->w);
    void *memory = NULL;
    kl_status status = be->vt->alloc(be, kl_weight_data_bytes(&self->w), &self->w.data, &err);
    if (status == KL_OK && scales != 0) status = be->vt->alloc(be, scales, &memory, &err);
    self->w.scales = memory;
    if (status != KL_OK) {
        kl_raise(c->m, &err);
        Py_DECREF(self);
        return NULL;
    }
    return self;
}

/* The matrices of a stack one by one: the operation packs one. */
static int pack_all(kl_call *c, const kl_tensor *src, const kl_weight *w)
{
    const size_t bytes = (size_t)(w->rows * w->cols) * kl_dtype_bytes(src->dtype);
    for (int64_t i = 0; i < w->count; i++) {
        kl_pack_weight a = {
            .src = kl_tensor_2d((char *)src->data + (size_t)i * bytes, src->dtype, w->rows,
                                w->cols),
            .out = kl_weight_slice(w, i, 0, w->rows),
        };
        if (kl_call_pack_weight(c, &a) < 0) return -1;
    }
    return 0;
}

static PyObject *run_quantize(kl_call *c, PyObject *const *args)
{
    kl_tensor src;
    int format, ndim = 0;
    kl_array probe;
    if (KL_NEEDS(c, pack_weight) < 0 ||
        kl_parse_choice(c->op, "dtype", args[2], kl_format_names, KL_N_WEIGHT_FORMATS,
                        &format) < 0 ||
        kl_array_borrow(c->m, c->op, "w", args[1], 1, &probe) < 0)
        return NULL;
    ndim = probe.ndim == 3 ? 3 : 2;
    kl_array_release(&probe);
    if (kl_arg(c, "w", args[1], KL_FLOATS, ndim, KL_DENSE, &src) < 0) return NULL;

    WeightObject *self = weight_alloc(c, (kl_weight_format)format, ndim == 3 ? src.shape[0] : 1,
                                      src.shape[ndim - 2], src.shape[ndim - 1]);
    if (self == NULL) return NULL;
    self->stack = ndim == 3;
    /* Later calls may come on any stream. */
    if (pack_all(c, &src, &self->w) < 0 || kl_call_sync(c) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

PyObject *kl_py_quantize(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "quantize", args, nargs, 3, false, run_quantize);
}

/* ---- attributes ------------------------------------------------------------------------ */

/* e4m3: a sign, four bits of exponent with bias 7, three of fraction; all ones is NaN. */
static float fp8_value(uint8_t bits)
{
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const float size = (bits & 127) == 127 ? NAN
                       : exponent == 0     ? ldexpf((float)fraction, -9)
                                           : ldexpf((float)(8 + fraction), exponent - 10);
    return bits >> 7 != 0 ? -size : size;
}

/* q of column `col` in a packed row. */
static float quant_at(const kl_weight *w, const void *row, int64_t col)
{
    if (w->format == KL_W_INT8) return ((const int8_t *)row)[col];
    if (w->format == KL_W_FP8) return fp8_value(((const uint8_t *)row)[col]);
    const int64_t in = col % KL_INT4_GROUP, half = KL_INT4_GROUP / 2;
    const uint8_t *group = (const uint8_t *)row + col / KL_INT4_GROUP * half;
    return (float)((in < half ? group[in] & 15 : group[in - half] >> 4) - 8);
}

static void dequantize_row(const kl_weight *w, int64_t row, float *out)
{
    const char *data = (char *)w->data + (size_t)row * kl_weight_row_bytes(w->format, w->cols);
    const int64_t groups = kl_weight_groups(w->format, w->cols);
    const int64_t group = kl_weight_group(w->format);
    for (int64_t i = 0; i < w->cols; i++) {
        if (w->format == KL_W_F32)
            out[i] = ((const float *)data)[i];
        else if (w->format == KL_W_BF16)
            out[i] = kl_bf16_to_f32(((const uint16_t *)data)[i]);
        else
            out[i] = quant_at(w, data, i) * kl_bf16_to_f32(w->scales[row * groups + i / group]);
    }
}

/* The weight in host memory, to be freed with kl_free(). */
static kl_status copy_to_host(const WeightObject *self, kl_weight *out, kl_error *err)
{
    kl_backend *be = self->dev->be;
    const size_t bytes = kl_weight_data_bytes(&self->w);
    const size_t scales = kl_weight_scale_bytes(&self->w);
    *out = self->w;
    out->data = kl_aligned_alloc(bytes);
    out->scales = scales == 0 ? NULL : kl_aligned_alloc(scales);
    if (out->data == NULL || (scales != 0 && out->scales == NULL))
        return kl_fail(err, KL_ERR_MEMORY, "dequantize: no memory for %zu bytes",
                       bytes + scales);
    pthread_mutex_lock(&self->dev->lock);
    kl_status status = be->vt->copy_out(be, out->data, self->w.data, bytes, err);
    if (status == KL_OK && scales != 0)
        status = be->vt->copy_out(be, out->scales, self->w.scales, scales, err);
    if (status == KL_OK) status = be->vt->sync(be, err);
    pthread_mutex_unlock(&self->dev->lock);
    return status;
}

static kl_status dequantize(const WeightObject *self, float *out, kl_error *err)
{
    kl_weight w;
    const kl_status status = copy_to_host(self, &w, err);
    for (int64_t row = 0; status == KL_OK && row < w.count * w.rows; row++)
        dequantize_row(&w, row, out + row * w.cols);
    kl_free(w.data);
    kl_free(w.scales);
    return status;
}

/* To look at what quantisation did; the operations read the packed form. */
static PyObject *weight_dequantize(PyObject *op, PyObject *Py_UNUSED(none))
{
    const WeightObject *self = (WeightObject *)op;
    const int64_t shape[3] = {self->w.count, self->w.rows, self->w.cols};
    kl_error err = {KL_OK, ""};
    kl_status status;
    void *data;
    PyObject *array = kl_numpy_empty(KL_F32, self->stack ? 3 : 2, shape + !self->stack, &data);
    if (array == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS status = dequantize(self, data, &err);
    Py_END_ALLOW_THREADS if (status == KL_OK) return array;
    Py_DECREF(array);
    return kl_raise(kl_module_of_instance(op), &err);
}

static PyObject *weight_shape(PyObject *op, void *Py_UNUSED(closure))
{
    const WeightObject *self = (WeightObject *)op;
    const long long count = self->w.count, rows = self->w.rows, cols = self->w.cols;
    return self->stack ? Py_BuildValue("(LLL)", count, rows, cols)
                       : Py_BuildValue("(LL)", rows, cols);
}

static PyObject *weight_format(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(kl_format_names[((WeightObject *)op)->w.format]);
}

static PyObject *weight_nbytes(PyObject *op, void *Py_UNUSED(closure))
{
    const kl_weight *w = &((WeightObject *)op)->w;
    return PyLong_FromSize_t(kl_weight_data_bytes(w) + kl_weight_scale_bytes(w));
}

static PyObject *weight_repr(PyObject *op)
{
    PyObject *shape = weight_shape(op, NULL);
    PyObject *text =
        shape == NULL ? NULL
                      : PyUnicode_FromFormat("PackedWeight(shape=%R, format='%s')", shape,
                                             kl_format_names[((WeightObject *)op)->w.format]);
    Py_XDECREF(shape);
    return text;
}

static PyGetSetDef weight_getset[] = {
    {"shape", weight_shape, NULL, "(out, in), or (count, out, in).", NULL},
    {"format", weight_format, NULL, "'f32', 'bf16', 'int8', 'int4' or 'fp8'.", NULL},
    {"nbytes", weight_nbytes, NULL, "Bytes of values and scales.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef weight_methods[] = {
    {"dequantize", weight_dequantize, METH_NOARGS,
     "dequantize($self, /)\n--\n\nThe matrix as a NumPy float32 array."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot weight_slots[] = {
    {Py_tp_dealloc, weight_dealloc},
    {Py_tp_methods, weight_methods},
    {Py_tp_getset, weight_getset},
    {Py_tp_repr, weight_repr},
    {Py_tp_doc, "A matrix [out, in], or a stack of them, in a weight format."},
    {0, NULL},
};

PyType_Spec kl_weight_spec = {
    .name = "kimi_linear._core.PackedWeight",
    .basicsize = sizeof(WeightObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = weight_slots,
};
