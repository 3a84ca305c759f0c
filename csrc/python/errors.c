/*
 * errors.c -- the package's exceptions, and the one translation from kl_error to them.
 */
#include "python/binding.h"

/* A subclass of KimiLinearError that is also the builtin which callers already catch. */
static PyObject *new_exception(PyObject *module, const char *name, const char *qualified,
                               const char *doc, PyObject *root, PyObject *builtin)
{
    PyObject *bases = root == NULL ? PyTuple_Pack(1, builtin) : PyTuple_Pack(2, root, builtin);
    if (bases == NULL) return NULL;
    PyObject *type = PyErr_NewExceptionWithDoc(qualified, doc, bases, NULL);
    Py_DECREF(bases);
    if (type != NULL && PyModule_AddObjectRef(module, name, type) < 0) Py_CLEAR(type);
    return type;
}

int kl_errors_init(PyObject *module, kl_module *m)
{
    m->KimiLinearError =
        new_exception(module, "KimiLinearError", "kimi_linear.errors.KimiLinearError",
                      "The root of this package's own exceptions.", NULL, PyExc_Exception);
    if (m->KimiLinearError == NULL) return -1;
#define KL_NEW(name, builtin, doc)                                                             \
    m->name = new_exception(module, #name, "kimi_linear.errors." #name, doc,                   \
                            m->KimiLinearError, builtin);                                      \
    if (m->name == NULL) return -1;
    KL_EXCEPTIONS(KL_NEW)
#undef KL_NEW
    return 0;
}

static PyObject *exception_of(const kl_module *m, kl_status status)
{
    switch (status) {
    case KL_ERR_VALUE:
        return PyExc_ValueError;
    case KL_ERR_TYPE:
        return PyExc_TypeError;
    case KL_ERR_MEMORY:
        return m->OutOfMemory;
    case KL_ERR_IO:
        return PyExc_OSError;
    case KL_ERR_CONFIG:
        return m->ConfigError;
    case KL_ERR_WEIGHTS:
        return m->WeightsError;
    case KL_ERR_NUMERICAL:
        return m->NumericalError;
    case KL_ERR_DEVICE:
    case KL_ERR_UNAVAILABLE:
        return m->DeviceError;
    case KL_ERR_CANCELLED:
        return PyExc_KeyboardInterrupt;
    case KL_OK:
        break;
    }
    return PyExc_SystemError; /* KL_OK: a bug of the caller's */
}

PyObject *kl_exception(const kl_module *m, const kl_error *err)
{
    return PyObject_CallFunction(exception_of(m, err->status), "s", err->message);
}

PyObject *kl_raise(const kl_module *m, const kl_error *err)
{
    if (err->status == KL_ERR_CANCELLED && PyErr_Occurred()) return NULL;
    PyErr_SetString(exception_of(m, err->status), err->message);
    return NULL;
}
