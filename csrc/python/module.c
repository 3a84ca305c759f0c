/*
 * module.c -- the extension module kimi_linear._core: its state, its types, its functions.
 *
 * Multi-phase initialisation and heap types; nothing outside the module's state changes. Making
 * the module imports nothing, starts no thread and touches no device: NumPy is imported by the
 * first call that returns or takes one of its arrays.
 */
#include "python/engine_object.h"

#include "base/memory.h"
#include "cpu/kernels.h"

/* One GIL-free core is shared by a process, so a second interpreter would find the module's
 * promises (one lock an engine, one pool a backend) kept by another one's objects. */
static int refuse_subinterpreters(void)
{
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0) return 0;
    PyErr_SetString(PyExc_ImportError,
                    "kimi_linear: only the main interpreter can import this package");
    return -1;
}

static int intern_names(kl_module *m)
{
#define KL_INTERN(name)                                                                        \
    m->names.name = PyUnicode_InternFromString(#name);                                         \
    if (m->names.name == NULL) return -1;
    KL_NAMES(KL_INTERN)
#undef KL_INTERN
    return 0;
}

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
    return type;
}

static int add_types(PyObject *module, kl_module *m)
{
    const struct {
        PyTypeObject **type;
        PyType_Spec *spec;
    } types[] = {
        {&m->array_type, &kl_array_spec},           {&m->backend_type, &kl_backend_spec},
        {&m->weight_type, &kl_weight_spec},         {&m->engine_type, &kl_engine_spec},
        {&m->generation_type, &kl_generation_spec}, {&m->sequence_type, &kl_sequence_spec},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        *types[i].type = add_type(module, types[i].spec);
        if (*types[i].type == NULL) return -1;
    }
    return kl_array_type_init(m);
}

static int module_exec(PyObject *module)
{
    kl_module *m = kl_module_of(module);
    if (refuse_subinterpreters() < 0 || intern_names(m) < 0 || kl_errors_init(module, m) < 0 ||
        add_types(module, m) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "ABI", KL_BACKEND_ABI) < 0 ||
        PyModule_AddIntConstant(module, "PAGE_TOKENS", KL_PAGE_TOKENS) < 0 ||
        PyModule_AddIntConstant(module, "MAX_GUESSES", KL_MAX_GUESSES) < 0)
        return -1;
#ifdef KL_FAULT_INJECTION
    return PyModule_AddObjectRef(module, "FAULT_INJECTION", Py_True);
#else
    return PyModule_AddObjectRef(module, "FAULT_INJECTION", Py_False);
#endif
}

/* Visit or clear everything the state owns. */
#define KL_STATE(X, m)                                                                         \
    X((m)->array_type);                                                                        \
    X((m)->backend_type);                                                                      \
    X((m)->weight_type);                                                                       \
    X((m)->engine_type);                                                                       \
    X((m)->generation_type);                                                                   \
    X((m)->sequence_type);                                                                     \
    X((m)->KimiLinearError)

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    kl_module *m = kl_module_of(module);
    KL_STATE(Py_VISIT, m);
#define KL_VISIT(name, builtin, doc) Py_VISIT(m->name);
    KL_EXCEPTIONS(KL_VISIT)
#undef KL_VISIT
    return 0;
}

static int module_clear(PyObject *module)
{
    kl_module *m = kl_module_of(module);
    KL_STATE(Py_CLEAR, m);
#define KL_CLEAR_EXCEPTION(name, builtin, doc) Py_CLEAR(m->name);
    KL_EXCEPTIONS(KL_CLEAR_EXCEPTION)
#undef KL_CLEAR_EXCEPTION
#define KL_CLEAR_NAME(name) Py_CLEAR(m->names.name);
    KL_NAMES(KL_CLEAR_NAME)
#undef KL_CLEAR_NAME
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

/* ---- functions ------------------------------------------------------------------------- */

/* Append `name` to `list` where this CPU has the feature. */
#define KL_FEATURE(list, name)                                                                 \
    if (__builtin_cpu_supports(name)) {                                                        \
        PyObject *text = PyUnicode_FromString(name);                                           \
        const int failed = text == NULL || PyList_Append(list, text) < 0;                      \
        Py_XDECREF(text);                                                                      \
        if (failed) goto fail;                                                                 \
    }

static PyObject *cpu_features(void)
{
    PyObject *list = PyList_New(0);
    if (list == NULL) return NULL;
#if defined(__x86_64__)
    KL_FEATURE(list, "avx2")
    KL_FEATURE(list, "fma")
    KL_FEATURE(list, "avx512f")
    KL_FEATURE(list, "avx512bw")
    KL_FEATURE(list, "avx512vl")
    KL_FEATURE(list, "avx512bf16")
    return list;
fail:
    Py_DECREF(list);
    return NULL;
#else
    return list;
#endif
}

/* What setup.py compiled with, and why it built no CUDA backend ("": it did). */
#ifndef KL_BUILD_FLAGS
#    define KL_BUILD_FLAGS ""
#endif
#ifndef KL_BUILD_NO_CUDA
#    define KL_BUILD_NO_CUDA ""
#endif

#if defined(__x86_64__)
#    define KL_VARIANTS "scalar", "avx2", "avx512", "avx512bf16"
#else
#    define KL_VARIANTS "scalar"
#endif

static PyObject *build_info(PyObject *module, PyObject *Py_UNUSED(none))
{
    static const char *const variants[] = {KL_VARIANTS};
    const int n_variants = (int)(sizeof variants / sizeof *variants);
    kl_module *m = kl_module_of(module);
    const kl_cpu_kernels *chosen = NULL;
    kl_error err = {KL_OK, ""};
    if (kl_cpu_kernels_choose(NULL, &chosen, &err) != KL_OK) return kl_raise(m, &err);

    PyObject *names = PyList_New(n_variants), *features = cpu_features(), *result = NULL;
    if (names == NULL || features == NULL) goto done;
    for (int i = 0; i < n_variants; i++) {
        PyObject *text = PyUnicode_FromString(variants[i]);
        if (text == NULL || PyList_SetItem(names, i, text) < 0) goto done;
    }
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    result = Py_BuildValue("{s:s,s:s,s:s,s:O,s:O,s:s,s:I}", "compiler", compiler, "flags",
                           KL_BUILD_FLAGS, "no_cuda", KL_BUILD_NO_CUDA, "cpu_variants", names,
                           "cpu_features", features, "cpu_variant", chosen->name, "backend_abi",
                           KL_BACKEND_ABI);
done:
    Py_XDECREF(names);
    Py_XDECREF(features);
    return result;
}

#ifdef KL_FAULT_INJECTION
static PyObject *fault_arm(PyObject *Py_UNUSED(module), PyObject *k)
{
    int64_t value;
    if (kl_parse_int("fault_arm", "k", k, 0, INT64_MAX, &value) < 0) return NULL;
    kl_fault_arm(value);
    Py_RETURN_NONE;
}

static PyObject *fault_count(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLongLong(kl_fault_count());
}
#endif

/* METH_FASTCALL functions have a type of their own; the table wants PyCFunction. */
#define KL_FASTCALL(function) (PyCFunction)(void (*)(void))(function)

static PyMethodDef module_methods[] = {
#define KL_METHOD(name, signature, summary)                                                    \
    {#name, KL_FASTCALL(kl_py_##name), METH_FASTCALL,                                          \
     #name "($module, backend, " signature ", /)\n--\n\n" summary},
    KL_PY_OPS(KL_METHOD)
#undef KL_METHOD
        {"plan", KL_FASTCALL(kl_py_plan), METH_FASTCALL,
         "plan($module, backend, config, options, /)\n--\n\nThe figures of kl_plan, nothing "
         "taken."},
    {"device_of", kl_py_device_of, METH_O,
     "device_of($module, array, /)\n--\n\n('cpu', 0) or ('cuda', n)."},
    {"build_info", build_info, METH_NOARGS,
     "build_info($module, /)\n--\n\ncompiler, flags, no_cuda (why not, or ''), cpu_variants, "
     "cpu_features, cpu_variant, backend_abi."},
#ifdef KL_FAULT_INJECTION
    {"fault_arm", fault_arm, METH_O,
     "fault_arm($module, k, /)\n--\n\nMake the k-th allocation from now on fail; 0: none."},
    {"fault_count", fault_count, METH_NOARGS,
     "fault_count($module, /)\n--\n\nAllocations since fault_arm()."},
#endif
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef module_def = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "kimi_linear._core",
    .m_doc = "The C core of kimi_linear.",
    .m_size = sizeof(kl_module),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void); /* for -Wmissing-prototypes */
PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
