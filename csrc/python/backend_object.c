/*
 * backend_object.c -- kimi_linear._core.Backend: one open device.
 */
#include "python/binding.h"

#include "base/memory.h"

#include <limits.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    kl_device *dev; /* one reference of ours */
} BackendObject;

kl_device *kl_device_ref(kl_device *dev)
{
    atomic_fetch_add_explicit(&dev->refs, 1, memory_order_relaxed);
    return dev;
}

void kl_device_unref(kl_device *dev)
{
    if (dev == NULL || atomic_fetch_sub_explicit(&dev->refs, 1, memory_order_acq_rel) != 1)
        return;
    kl_backend_close(dev->be);
    pthread_mutex_destroy(&dev->lock);
    kl_free(dev);
}

kl_device *kl_device_of(const kl_module *m, PyObject *backend)
{
    if (Py_TYPE(backend) != m->backend_type) {
        PyErr_Format(PyExc_TypeError, "backend must be a Backend, got %R", backend);
        return NULL;
    }
    return ((BackendObject *)backend)->dev;
}

static kl_status device_open(const char *name, const char *cuda_library,
                             const kl_backend_options *options, kl_device **out, kl_error *err)
{
    kl_device *dev = kl_calloc(1, sizeof *dev);
    if (dev == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "backend: no memory for %zu bytes", sizeof *dev);
    const kl_status status = kl_backend_open(name, cuda_library, options, &dev->be, err);
    if (status != KL_OK) {
        kl_free(dev);
        return status;
    }
    atomic_init(&dev->refs, 1);
    dev->index = options->device;
    dev->is_cpu = strcmp(dev->be->vt->name, "cpu") == 0;
    pthread_mutex_init(&dev->lock, NULL);
    *out = dev;
    return KL_OK;
}

static PyObject *backend_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const char *name, *variant, *cuda_library;
    kl_backend_options options = {0};
    int batch_invariant = 0;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Backend: takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "siizs|p:Backend", &name, &options.device, &options.threads,
                          &variant, &cuda_library, &batch_invariant))
        return NULL;
    if (options.device < 0 || options.threads < 0) {
        PyErr_Format(PyExc_ValueError,
                     "Backend: device and threads must be >= 0, got %d and %d", options.device,
                     options.threads);
        return NULL;
    }
    options.variant = variant;
    options.batch_invariant = batch_invariant != 0;

    BackendObject *self =
        (BackendObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) return NULL;
    kl_error err = {KL_OK, ""};
    kl_status status;
    Py_BEGIN_ALLOW_THREADS status = device_open(name, cuda_library, &options, &self->dev, &err);
    Py_END_ALLOW_THREADS if (status != KL_OK)
    {
        Py_DECREF(self);
        return kl_raise(PyType_GetModuleState(type), &err);
    }
    return (PyObject *)self;
}

static void backend_dealloc(PyObject *op)
{
    BackendObject *self = (BackendObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    Py_BEGIN_ALLOW_THREADS /* closing joins threads */
        kl_device_unref(self->dev);
    Py_END_ALLOW_THREADS((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type); /* heap types are owned by their instances */
}

static PyObject *backend_info(PyObject *op, PyObject *Py_UNUSED(none))
{
    kl_backend *be = ((BackendObject *)op)->dev->be;
    kl_backend_info info;
    kl_error err = {KL_OK, ""};
    kl_status status;
    memset(&info, 0, sizeof info);
    Py_BEGIN_ALLOW_THREADS status = be->vt->info(be, &info, &err);
    Py_END_ALLOW_THREADS if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    return Py_BuildValue("{s:s,s:s,s:s,s:K,s:K,s:i}", "backend", be->vt->name, "name",
                         info.name, "variant", info.variant, "total_bytes",
                         (unsigned long long)info.total_bytes, "free_bytes",
                         (unsigned long long)info.free_bytes, "threads", info.threads);
}

static PyMethodDef backend_methods[] = {
    {"info", backend_info, METH_NOARGS,
     "info($self, /)\n--\n\nName, variant, total and free bytes, threads."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot backend_slots[] = {
    {Py_tp_new, backend_new},
    {Py_tp_dealloc, backend_dealloc},
    {Py_tp_methods, backend_methods},
    {Py_tp_doc, "Backend(name, device, threads, variant, cuda_library, "
                "batch_invariant=False, /)\n--\n\n"
                "An open device. name: 'cpu' or 'cuda'."},
    {0, NULL},
};

PyType_Spec kl_backend_spec = {
    .name = "kimi_linear._core.Backend",
    .basicsize = sizeof(BackendObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = backend_slots,
};
