/*
 * engine_prefix.c -- the prefixes that an engine keeps: on and off, counts, clearing.
 */
#include "python/engine_object.h"

PyObject *kl_engine_py_keep_prefixes(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    kl_error err = {KL_OK, ""};
    bool on;
    if (kl_parse_bool("keep_prefixes", "on", arg, &on) < 0 || kl_engine_enter(self) < 0)
        return NULL;
    const kl_status status = kl_engine_keep_prefixes(self->engine, on, &err);
    kl_engine_leave(self);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    Py_RETURN_NONE;
}

PyObject *kl_engine_py_clear_prefixes(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    if (kl_engine_enter(self) < 0) return NULL;
    kl_engine_clear_prefixes(self->engine);
    kl_engine_leave(self);
    Py_RETURN_NONE;
}

PyObject *kl_engine_py_prefix_stats(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    kl_prefix_stats s;
    if (kl_engine_enter(self) < 0) return NULL;
    kl_engine_prefix_stats(self->engine, &s);
    kl_engine_leave(self);
    return Py_BuildValue("{s:N,s:L,s:L,s:L,s:L,s:K}", "on", PyBool_FromLong(s.on), "hits",
                         (long long)s.hits, "cached_tokens", (long long)s.cached_tokens,
                         "evicted", (long long)s.evicted, "snapshots", (long long)s.snapshots,
                         "bytes", (unsigned long long)s.bytes);
}
