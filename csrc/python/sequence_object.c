/*
 * sequence_object.c -- kimi_linear._core.HeldSequence: the owner of a sequence.
 *
 * It calls what makes the sequence and keeps the handle, without Python code between the two: a
 * signal there would leave a sequence that nobody knows. Nor does Python code give it back.
 */
#include "python/engine_object.h"

typedef struct {
    PyObject_HEAD
    EngineObject *engine; /* strong */
    kl_seq seq;           /* 0: nothing to give back */
} SequenceObject;

static PyObject *sequence_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const kl_module *m = PyType_GetModuleState(type);
    PyObject *engine, *make, *make_args;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "HeldSequence: takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!OO!:HeldSequence", m->engine_type, &engine, &make,
                          &PyTuple_Type, &make_args))
        return NULL;
    SequenceObject *self =
        (SequenceObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) return NULL;
    self->engine = (EngineObject *)Py_NewRef(engine);
    PyObject *seq = PyObject_CallObject(make, make_args);
    if (seq == NULL || kl_parse_seq("HeldSequence", seq, &self->seq) < 0) Py_CLEAR(self);
    Py_XDECREF(seq);
    return (PyObject *)self;
}

static void sequence_dealloc(PyObject *op)
{
    SequenceObject *self = (SequenceObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    kl_engine_drop_seq(self->engine, self->seq);
    Py_DECREF((PyObject *)self->engine);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyObject *sequence_release(PyObject *op, PyObject *Py_UNUSED(none))
{
    SequenceObject *self = (SequenceObject *)op;
    kl_engine_drop_seq(self->engine, self->seq);
    Py_RETURN_NONE;
}

static PyObject *sequence_enter(PyObject *op, PyObject *Py_UNUSED(none))
{
    return Py_NewRef(op);
}

static PyObject *sequence_exit(PyObject *op, PyObject *Py_UNUSED(args))
{
    return sequence_release(op, NULL);
}

static PyObject *sequence_engine(PyObject *op, void *Py_UNUSED(closure))
{
    return Py_NewRef((PyObject *)((SequenceObject *)op)->engine);
}

static PyObject *sequence_seq(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((SequenceObject *)op)->seq);
}

static PyMethodDef sequence_methods[] = {
    {"release", sequence_release, METH_NOARGS,
     "release($self, /)\n--\n\n"
     "Give it back now, where a traceback may refer to this object for long."},
    {"__enter__", sequence_enter, METH_NOARGS, "__enter__($self, /)\n--\n\n"},
    {"__exit__", sequence_exit, METH_VARARGS,
     "__exit__($self, type, value, traceback, /)\n--\n\n"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef sequence_getset[] = {
    {"engine", sequence_engine, NULL, "whose it is", NULL},
    {"seq", sequence_seq, NULL, "its handle, 0: there is none", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot sequence_slots[] = {
    {Py_tp_new, sequence_new},
    {Py_tp_dealloc, sequence_dealloc},
    {Py_tp_methods, sequence_methods},
    {Py_tp_getset, sequence_getset},
    {Py_tp_doc, "HeldSequence(engine, make, args, /)\n--\n\n"
                "Owns the sequence of the handle that make(*args) returns."},
    {0, NULL},
};

PyType_Spec kl_sequence_spec = {
    .name = "kimi_linear._core.HeldSequence",
    .basicsize = sizeof(SequenceObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = sequence_slots,
};
