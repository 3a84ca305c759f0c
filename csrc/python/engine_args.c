/*
 * engine_args.c -- the arguments of Engine and Generation: dicts of numbers, ids, handles, files.
 */
#include "python/engine_object.h"

#include "base/memory.h"

#include <string.h>

const char *const kl_latents_names[KL_N_LATENTS] = {"auto", "fp8"};

/* ---- dicts ----------------------------------------------------------------------------- */

/* 1: *value is the entry (borrowed); 0: it is missing or None and may be; -1: exception. */
static int dict_get(const char *op, PyObject *dict, const char *key, bool optional,
                    PyObject **value)
{
    PyObject *name = PyUnicode_FromString(key);
    if (name == NULL) return -1;
    *value = PyDict_GetItemWithError(dict, name);
    Py_DECREF(name);
    if (*value != NULL && *value != Py_None) return 1;
    if (PyErr_Occurred()) return -1;
    if (optional) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s is missing", op, key);
    return -1;
}

int kl_dict_int(const char *op, PyObject *dict, const char *key, int64_t lo, int64_t hi,
                const int64_t *fallback, int64_t *out)
{
    PyObject *value;
    const int found = dict_get(op, dict, key, fallback != NULL, &value);
    if (found == 0) *out = *fallback;
    return found <= 0 ? found : kl_parse_int(op, key, value, lo, hi, out);
}

int kl_dict_float(const char *op, PyObject *dict, const char *key, const float *fallback,
                  float *out)
{
    PyObject *value;
    const int found = dict_get(op, dict, key, fallback != NULL, &value);
    if (found == 0) *out = *fallback;
    return found <= 0 ? found : kl_parse_float(op, key, value, out);
}

static int dict_bool(const char *op, PyObject *dict, const char *key, bool *out)
{
    PyObject *value;
    if (dict_get(op, dict, key, false, &value) < 0) return -1;
    return kl_parse_bool(op, key, value, out);
}

static int dict_choice(const char *op, PyObject *dict, const char *key,
                       const char *const *names, int n, int *out)
{
    PyObject *value;
    if (dict_get(op, dict, key, false, &value) < 0) return -1;
    return kl_parse_choice(op, key, value, names, n, out);
}

/* The first of them where the entry is missing. */
static int dict_latents(const char *op, PyObject *dict, kl_latents *out)
{
    static const char key[] = "kv_cache_dtype";
    PyObject *value;
    int latents = KL_LATENTS_ACT;
    const int found = dict_get(op, dict, key, true, &value);
    if (found < 0) return -1;
    if (found == 1 &&
        kl_parse_choice(op, key, value, kl_latents_names, KL_N_LATENTS, &latents) < 0)
        return -1;
    *out = (kl_latents)latents;
    return 0;
}

/* ---- configuration --------------------------------------------------------------------- */

/* One of two names for each layer. */
static int parse_layers(PyObject *dict, const char *key, const char *const names[2],
                        int64_t n_layers, uint8_t *out)
{
    PyObject *value, *list;
    Py_ssize_t n;
    int result = -1;
    if (dict_get("config", dict, key, false, &value) < 0) return -1;
    list = kl_parse_list("config", key, value, &n);
    if (list == NULL) return -1;
    if (n != n_layers || n > KL_MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "config: %s must have n_layers entries, got %zd", key,
                     n);
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        int which;
        if (kl_parse_choice("config", key, PyList_GetItem(list, i), names, 2, &which) < 0)
            goto done;
        out[i] = (uint8_t)which;
    }
    result = 0;
done:
    Py_DECREF(list);
    return result;
}

static int parse_choices(PyObject *dict, kl_config *out)
{
    static const char *const gates[] = {"softplus", "bounded"};
    static const char *const scores[] = {"sigmoid", "softmax"};
    static const char *const mixers[] = {"kda", "mla"};
    static const char *const ffns[] = {"dense", "moe"};
    int gate, score;
    if (dict_choice("config", dict, "gate", gates, 2, &gate) < 0 ||
        dict_choice("config", dict, "score", scores, 2, &score) < 0 ||
        parse_layers(dict, "mixer", mixers, out->n_layers, out->mixer) < 0 ||
        parse_layers(dict, "ffn", ffns, out->n_layers, out->ffn) < 0)
        return -1;
    out->gate = gate == 0 ? KL_GATE_SOFTPLUS : KL_GATE_BOUNDED;
    out->score = score == 0 ? KL_SCORE_SIGMOID : KL_SCORE_SOFTMAX;
    return 0;
}

/* Every field of kl_config by its name. Ranges are kl_config_check()'s business. */
int kl_parse_config(PyObject *dict, kl_config *out)
{
    memset(out, 0, sizeof *out);
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "config must be a dict, got %R", dict);
        return -1;
    }
#define FIELD(name)                                                                            \
    {                                                                                          \
#        name, &out->name                                                                      \
    }
    const struct {
        const char *key;
        int64_t *value;
    } ints[] = {FIELD(vocab_size), FIELD(hidden_size),  FIELD(n_layers),   FIELD(max_length),
                FIELD(kda_heads),  FIELD(kda_head_dim), FIELD(conv_width), FIELD(mla_heads),
                FIELD(q_rank),     FIELD(kv_rank),      FIELD(nope_dim),   FIELD(rope_dim),
                FIELD(v_dim),      FIELD(dense_inner),  FIELD(n_experts),  FIELD(top_k),
                FIELD(moe_inner),  FIELD(n_shared),     FIELD(groups),     FIELD(top_groups)};
    const struct {
        const char *key;
        float *value;
    } floats[] = {FIELD(gate_lower_bound), FIELD(q_norm_eps), FIELD(kv_norm_eps),
                  FIELD(routed_scaling), FIELD(rms_eps)};
#undef FIELD
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
        if (kl_dict_int("config", dict, ints[i].key, INT64_MIN, INT64_MAX, NULL,
                        ints[i].value) < 0)
            return -1;
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        if (kl_dict_float("config", dict, floats[i].key, NULL, floats[i].value) < 0) return -1;
    if (dict_bool("config", dict, "renormalize", &out->renormalize) < 0 ||
        dict_bool("config", dict, "tied_embeddings", &out->tied_embeddings) < 0)
        return -1;
    return parse_choices(dict, out);
}

int kl_parse_options(PyObject *dict, kl_engine_options *out)
{
    const int64_t none = 0;
    int64_t cache_bytes, budget_bytes;
    int format;
    memset(out, 0, sizeof *out);
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "options must be a dict, got %R", dict);
        return -1;
    }
    if (dict_choice("options", dict, "format", kl_format_names, KL_N_WEIGHT_FORMATS, &format) <
            0 ||
        dict_latents("options", dict, &out->latents) < 0 ||
        kl_dict_int("options", dict, "max_context", 0, INT64_MAX, &none, &out->max_context) <
            0 ||
        kl_dict_int("options", dict, "max_batch", 0, INT64_MAX, &none, &out->max_batch) < 0 ||
        kl_dict_int("options", dict, "step_tokens", 0, INT64_MAX, &none, &out->step_tokens) <
            0 ||
        kl_dict_int("options", dict, "cache_bytes", 0, INT64_MAX, &none, &cache_bytes) < 0 ||
        kl_dict_int("options", dict, "budget_bytes", 0, INT64_MAX, &none, &budget_bytes) < 0)
        return -1;
    out->format = (kl_weight_format)format;
    out->cache_bytes = (size_t)cache_bytes;
    out->budget_bytes = (size_t)budget_bytes;
    return 0;
}

PyObject *kl_plan_dict(const kl_plan *p)
{
    kl_error problem = {KL_OK, ""};
    const bool fits = kl_plan_check(p, &problem) == KL_OK;
    return Py_BuildValue(
        "{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:L,s:L,s:L,s:L,s:L,s:K,s:K,s:s,s:z}", "weight_bytes",
        (unsigned long long)p->weight_bytes, "state_bytes", (unsigned long long)p->state_bytes,
        "snapshot_bytes", (unsigned long long)p->snapshot_bytes, "page_bytes",
        (unsigned long long)p->page_bytes, "scratch_bytes",
        (unsigned long long)p->scratch_bytes, "total_bytes", (unsigned long long)p->total_bytes,
        "free_bytes", (unsigned long long)p->free_bytes, "max_context",
        (long long)p->max_context, "max_batch", (long long)p->max_batch, "step_tokens",
        (long long)p->step_tokens, "n_pages", (long long)p->n_pages, "snapshot_slots",
        (long long)p->snapshot_slots, "state_bytes_per_sequence",
        (unsigned long long)p->state_bytes_per_sequence, "page_bytes_per_token",
        (unsigned long long)p->page_bytes_per_token, "kv_cache_dtype",
        kl_latents_names[p->latents], "problem", fits ? NULL : problem.message);
}

PyObject *kl_py_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const kl_module *m = kl_module_of(module);
    kl_config config;
    kl_engine_options options;
    kl_plan plan;
    kl_error err = {KL_OK, ""};
    kl_status status;
    if (kl_parse_count("plan", nargs, 3) < 0) return NULL;
    kl_device *dev = kl_device_of(m, args[0]);
    if (dev == NULL || kl_parse_config(args[1], &config) < 0 ||
        kl_parse_options(args[2], &options) < 0)
        return NULL;
    kl_device_ref(dev);
    Py_BEGIN_ALLOW_THREADS status = kl_plan_make(dev->be, &config, &options, &plan, &err);
    Py_END_ALLOW_THREADS kl_device_unref(dev);
    return status == KL_OK ? kl_plan_dict(&plan) : kl_raise(m, &err);
}

/* ---- ids and handles ------------------------------------------------------------------- */

PyObject *kl_parse_list(const char *op, const char *name, PyObject *o, Py_ssize_t *n)
{
    PyObject *list = NULL;
    if (!PyUnicode_Check(o) && !PyBytes_Check(o) && PySequence_Check(o))
        list = PySequence_List(o);
    else
        PyErr_Format(PyExc_TypeError, "%s: %s must be a sequence, got %R", op, name, o);
    if (list != NULL) *n = PyList_Size(list);
    return list;
}

static int parse_id(const char *op, const char *name, PyObject *o, Py_ssize_t i, int32_t *out)
{
    int64_t value;
    char entry[64];
    int overflow = 1;
    if (PyLong_CheckExact(o)) { /* a million of them should not each print their name */
        value = PyLong_AsLongLongAndOverflow(o, &overflow);
        *out = (int32_t)value;
        if (overflow == 0 && value >= INT32_MIN && value <= INT32_MAX) return 0;
    }
    PyOS_snprintf(entry, sizeof entry, "%s[%lld]", name, (long long)i);
    if (kl_parse_int(op, entry, o, INT32_MIN, INT32_MAX, &value) < 0) return -1;
    *out = (int32_t)value;
    return 0;
}

static int ids_of_list(const char *op, const char *name, PyObject *list, Py_ssize_t n,
                       int32_t **out)
{
    int32_t *ids = kl_calloc((size_t)n, sizeof *ids);
    if (ids == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (parse_id(op, name, PyList_GetItem(list, i), i, &ids[i]) < 0) {
            kl_free(ids);
            return -1;
        }
    *out = ids;
    return 0;
}

int kl_parse_ids(const kl_module *m, const char *op, const char *name, PyObject *o,
                 int32_t **out, int64_t *n)
{
    *out = NULL;
    const bool plain = PyList_Check(o) || PyTuple_Check(o) || PyRange_Check(o);
    const bool array =
        !plain && (PyObject_CheckBuffer(o) || PyObject_HasAttrString(o, "__dlpack__"));
    if (array) return kl_ids_copy(m, op, name, o, 1, INT32_MIN, INT32_MAX, out, n);
    Py_ssize_t count;
    PyObject *list = kl_parse_list(op, name, o, &count);
    if (list == NULL) return -1;
    const int result = ids_of_list(op, name, list, count, out);
    *n = count;
    Py_DECREF(list);
    return result;
}

int kl_parse_seq(const char *op, PyObject *o, kl_seq *out)
{
    int64_t value;
    if (kl_parse_int(op, "seq", o, 0, INT64_MAX, &value) < 0) return -1;
    *out = (kl_seq)value;
    return 0;
}

/* ---- files ----------------------------------------------------------------------------- */

int kl_parse_source(PyObject *o, kl_source *out)
{
    const char *dtype;
    unsigned long long offset, bytes;
    PyObject *shape, *list = NULL;
    Py_ssize_t n;
    int result = -1;
    if (!PyTuple_Check(o) || !PyArg_ParseTuple(o, "siKKsO:source", &out->name, &out->file,
                                               &offset, &bytes, &dtype, &shape)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "load: a source must be a tuple, got %R", o);
        return -1;
    }
    out->offset = offset;
    out->bytes = bytes;
    out->dtype = strcmp(dtype, "F32") == 0    ? KL_F32
                 : strcmp(dtype, "BF16") == 0 ? KL_BF16
                                              : KL_N_DTYPES;
    if (out->dtype == KL_N_DTYPES) {
        PyErr_Format(PyExc_ValueError, "load: dtype of %s must be F32 or BF16, got %s",
                     out->name, dtype);
        return -1;
    }
    list = kl_parse_list("load", "shape", shape, &n);
    if (list == NULL) return -1;
    if (n > KL_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "load: %s must have at most %d axes, got %zd", out->name,
                     KL_MAX_NDIM, n);
        goto done;
    }
    out->ndim = (int)n;
    for (Py_ssize_t i = 0; i < n; i++)
        if (kl_parse_int("load", "shape", PyList_GetItem(list, i), 0, INT64_MAX,
                         &out->shape[i]) < 0)
            goto done;
    result = 0;
done:
    Py_DECREF(list);
    return result;
}

int kl_parse_fds(PyObject *o, int **out, int *n_fds)
{
    Py_ssize_t n;
    PyObject *list = kl_parse_list("load", "fds", o, &n);
    if (list == NULL) return -1;
    int *fds = n > INT_MAX ? NULL : kl_calloc((size_t)n, sizeof *fds);
    int result = fds == NULL ? -1 : 0;
    if (fds == NULL) PyErr_NoMemory();
    for (Py_ssize_t i = 0; result == 0 && i < n; i++) {
        int64_t fd;
        result = kl_parse_int("load", "fds", PyList_GetItem(list, i), 0, INT_MAX, &fd);
        if (result == 0) fds[i] = (int)fd;
    }
    Py_DECREF(list);
    *out = fds;
    *n_fds = (int)n;
    return result;
}
