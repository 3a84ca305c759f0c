/*
 * parse.c -- scalar arguments of the operations.
 */
#include "python/binding.h"

#include <math.h>

int kl_parse_count(const char *op, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted) return 0;
    PyErr_Format(PyExc_TypeError, "%s: takes %zd positional arguments, got %zd", op, wanted,
                 given);
    return -1;
}

int kl_parse_float(const char *op, const char *name, PyObject *o, float *out)
{
    const double value = PyFloat_AsDouble(o);
    if (value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s: %s must be a number, got %R", op, name, o);
        return -1;
    }
    if (!isfinite((float)value)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be a finite float32, got %R", op, name, o);
        return -1;
    }
    *out = (float)value;
    return 0;
}

int kl_parse_int(const char *op, const char *name, PyObject *o, int64_t lo, int64_t hi,
                 int64_t *out)
{
    if (PyBool_Check(o) || !PyIndex_Check(o)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be an int, got %R", op, name, o);
        return -1;
    }
    PyObject *index = PyNumber_Index(o);
    if (index == NULL) return -1;
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (overflow != 0 || value < lo || value > hi) {
        PyErr_Format(PyExc_ValueError, "%s: %s must lie in [%lld, %lld], got %R", op, name,
                     (long long)lo, (long long)hi, o);
        return -1;
    }
    *out = value;
    return 0;
}

int kl_parse_bool(const char *op, const char *name, PyObject *o, bool *out)
{
    if (!PyBool_Check(o)) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be True or False, got %R", op, name, o);
        return -1;
    }
    *out = o == Py_True;
    return 0;
}

int kl_parse_choice(const char *op, const char *name, PyObject *o, const char *const *names,
                    int n, int *out)
{
    if (PyUnicode_Check(o)) {
        for (int i = 0; i < n; i++)
            if (PyUnicode_CompareWithASCIIString(o, names[i]) == 0) {
                *out = i;
                return 0;
            }
    }
    char list[128];
    size_t used = 0;
    for (int i = 0; i < n && used < sizeof list; i++) {
        const int wrote = PyOS_snprintf(list + used, sizeof list - used, "%s'%s'",
                                        i == 0 ? "" : ", ", names[i]);
        used += wrote < 0 ? sizeof list : (size_t)wrote;
    }
    PyErr_Format(PyUnicode_Check(o) ? PyExc_ValueError : PyExc_TypeError,
                 "%s: %s must be one of %s, got %R", op, name, list, o);
    return -1;
}
