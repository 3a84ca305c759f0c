/*
 * engine_state.c -- sequences: life, copies to work on, images, handing back.
 */
#include "python/engine_object.h"

#include "base/memory.h"

/* ---- life ------------------------------------------------------------------------------ */

static PyObject *seq_result(PyObject *op, kl_status status, kl_seq seq, const kl_error *err)
{
    kl_engine_leave((EngineObject *)op);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), err);
    return PyLong_FromUnsignedLongLong(seq);
}

PyObject *kl_engine_py_seq_new(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq = 0;
    kl_error err = {KL_OK, ""};
    if (kl_engine_enter(self) < 0) return NULL;
    const kl_status status = kl_seq_new(self->engine, &seq, &err);
    return seq_result(op, status, seq, &err);
}

PyObject *kl_engine_py_seq_fork(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq, fork = 0;
    kl_error err = {KL_OK, ""};
    if (kl_parse_seq("seq_fork", arg, &seq) < 0 || kl_engine_enter(self) < 0) return NULL;
    const kl_status status = kl_seq_fork(self->engine, seq, &fork, &err);
    return seq_result(op, status, fork, &err);
}

PyObject *kl_engine_py_seq_length(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq;
    int64_t length = 0;
    kl_error err = {KL_OK, ""};
    if (kl_parse_seq("seq_length", arg, &seq) < 0 || kl_engine_enter(self) < 0) return NULL;
    const kl_status status = kl_seq_length(self->engine, seq, &length, &err);
    return seq_result(op, status, (kl_seq)length, &err);
}

PyObject *kl_engine_py_seq_release(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq;
    kl_error err = {KL_OK, ""};
    if (kl_parse_seq("seq_release", arg, &seq) < 0 || kl_engine_enter(self) < 0) return NULL;
    const kl_status status = kl_seq_release(self->engine, seq, &err);
    kl_engine_leave(self);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    Py_RETURN_NONE;
}

/* ---- copies and images ----------------------------------------------------------------- */

PyObject *kl_engine_py_draft(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq, draft = 0;
    int64_t n;
    kl_error err = {KL_OK, ""};
    if (kl_parse_count("seq_draft", nargs, 2) < 0 ||
        kl_parse_seq("seq_draft", args[0], &seq) < 0 ||
        kl_parse_int("seq_draft", "n_tokens", args[1], 0, INT64_MAX, &n) < 0 ||
        kl_engine_enter(self) < 0)
        return NULL;
    const kl_status status = kl_seq_draft(self->engine, seq, n, &draft, &err);
    return seq_result(op, status, draft == seq ? 0 : draft, &err);
}

PyObject *kl_engine_py_restore(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq = 0;
    int64_t length;
    kl_error err = {KL_OK, ""};
    if (kl_parse_int("seq_restore", "length", arg, 0, INT64_MAX, &length) < 0 ||
        kl_engine_enter(self) < 0)
        return NULL;
    const kl_status status = kl_seq_restore(self->engine, length, &seq, &err);
    return seq_result(op, status, seq, &err);
}

PyObject *kl_engine_py_pages(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq;
    int64_t pages, shared;
    kl_error err = {KL_OK, ""};
    if (kl_parse_seq("seq_pages", arg, &seq) < 0 || kl_engine_enter(self) < 0) return NULL;
    const kl_status status = kl_seq_pages(self->engine, seq, &pages, &shared, &err);
    kl_engine_leave(self);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    return Py_BuildValue("(LL)", (long long)pages, (long long)shared);
}

PyObject *kl_engine_py_image_bytes(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    int64_t length;
    /* A file may claim any length; the product must not wrap. */
    if (kl_parse_int("image_bytes", "length", arg, 0, INT64_C(1) << 40, &length) < 0 ||
        kl_engine_enter(self) < 0)
        return NULL;
    const uint64_t bytes = kl_seq_image_bytes(self->engine, length);
    kl_engine_leave(self);
    return PyLong_FromUnsignedLongLong(bytes);
}

/* Between the image and a buffer, without the GIL. */
static PyObject *copy_image(EngineObject *self, const char *op, PyObject *const *args,
                            Py_ssize_t nargs, bool write)
{
    kl_seq seq;
    int64_t offset;
    Py_buffer view;
    kl_error err = {KL_OK, ""};
    kl_status status;
    if (kl_parse_count(op, nargs, 3) < 0 || kl_parse_seq(op, args[0], &seq) < 0 ||
        kl_parse_int(op, "offset", args[1], 0, INT64_MAX, &offset) < 0 ||
        PyObject_GetBuffer(args[2], &view, write ? PyBUF_SIMPLE : PyBUF_WRITABLE) < 0)
        return NULL;
    if (kl_engine_enter(self) < 0) {
        PyBuffer_Release(&view);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS if (write) status = kl_seq_write_image(
        self->engine, seq, (uint64_t)offset, view.buf, (size_t)view.len, &err);
    else status = kl_seq_read_image(self->engine, seq, (uint64_t)offset, view.buf,
                                    (size_t)view.len, &err);
    Py_END_ALLOW_THREADS kl_engine_leave(self);
    PyBuffer_Release(&view);
    if (status != KL_OK) return kl_raise(kl_module_of_instance((PyObject *)self), &err);
    Py_RETURN_NONE;
}

PyObject *kl_engine_py_read_image(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return copy_image((EngineObject *)op, "seq_read_image", args, nargs, false);
}

PyObject *kl_engine_py_write_image(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    return copy_image((EngineObject *)op, "seq_write_image", args, nargs, true);
}

/* Keep a handle until the lock is free. One for each slot is enough: of two handles of a slot, the
 * smaller is of a sequence that was released before. */
static void keep_dropped(EngineObject *self, kl_seq seq)
{
    int64_t i = 0;
    while (i < self->n_dropped && (uint32_t)self->dropped[i] != (uint32_t)seq) i++;
    if (i == self->n_dropped) self->dropped[self->n_dropped++] = 0;
    if (seq > self->dropped[i]) self->dropped[i] = seq;
}

void kl_engine_drop_seq(EngineObject *self, kl_seq seq)
{
    if ((uint32_t)seq - 1 < (uint32_t)self->max_dropped) keep_dropped(self, seq);
    kl_engine_sweep(self);
}
