/*
 * ops_kda.c -- kda_prefill, kda_decode and short_conv: the operations with a recurrent state.
 */
#include "python/call.h"

#include <string.h>

/* What both forms of KDA take, in the order of the arguments of the two functions. */
typedef struct {
    PyObject *q, *k, *v, *g, *beta, *scale, *gate, *A_log, *dt_bias, *lower_bound, *normalize,
        *beta_logits;
} kda_arguments;

static int take_gate(kl_call *c, const kda_arguments *p, kl_kda *a)
{
    static const char *const gates[KL_N_GATES] = {"direct", "softplus", "bounded"};
    int gate;
    if (kl_parse_choice(c->op, "gate", p->gate, gates, KL_N_GATES, &gate) < 0 ||
        kl_arg_opt(c, "A_log", p->A_log, KL_SET(KL_F32), 1, KL_DENSE, &a->A_log) < 0 ||
        kl_arg_opt(c, "dt_bias", p->dt_bias, KL_SET(KL_F32), 2, KL_DENSE, &a->dt_bias) < 0 ||
        kl_parse_float(c->op, "lower_bound", p->lower_bound, &a->lower_bound) < 0 ||
        kl_parse_bool(c->op, "normalize", p->normalize, &a->normalize) < 0)
        return -1;
    a->gate = (kl_gate)gate;
    return kl_parse_bool(c->op, "beta_logits", p->beta_logits, &a->beta_logits);
}

static int take_kda(kl_call *c, const kda_arguments *p, kl_kda *a)
{
    if (kl_arg(c, "q", p->q, KL_FLOATS, 3, KL_ROWS, &a->q) < 0 ||
        kl_arg(c, "k", p->k, KL_FLOATS, 3, KL_ROWS, &a->k) < 0 ||
        kl_arg(c, "v", p->v, KL_FLOATS, 3, KL_ROWS, &a->v) < 0 ||
        kl_arg(c, "g", p->g, KL_FLOATS, 3, KL_ROWS, &a->g) < 0 ||
        kl_arg(c, "beta", p->beta, KL_FLOATS, 2, KL_ROWS, &a->beta) < 0 ||
        kl_arg_scale(c, p->scale, a->q.shape[2], &a->scale) < 0)
        return -1;
    return take_gate(c, p, a);
}

/* The final state: the caller's array or a new one, starting as initial_state or zeros. When
 * both are the same memory the state is updated in place. */
static int take_states(kl_call *c, PyObject *initial, PyObject *final, kl_kda *a, int *index)
{
    kl_tensor start = {0};
    const int64_t N = a->cu_seqlens.shape[0] - 1;
    const int64_t shape[4] = {N, a->v.shape[1], a->v.shape[2], a->q.shape[2]};
    if (kl_arg_opt(c, "initial_state", initial, KL_SET(KL_F32), 4, KL_DENSE, &start) < 0)
        return -1;
    for (int i = 0; initial != Py_None && i < 4; i++)
        if (start.shape[i] != shape[i]) {
            PyErr_Format(PyExc_ValueError,
                         "%s: initial_state.shape[%d] must be %lld (states are [N, H, V, K]), "
                         "got %lld",
                         c->op, i, (long long)shape[i], (long long)start.shape[i]);
            return -1;
        }
    if (kl_out(c, "final_state", final, KL_F32, 4, shape, "initial_state", &a->state, index) <
        0)
        return -1;
    if (initial != Py_None && start.data == a->state.data) return 0;
    return kl_call_fill(c, &a->state, &start);
}

/* Nothing where `every` is None. Rows of a new array that no sequence has are zeros. */
static int take_checkpoints(kl_call *c, PyObject *every, PyObject *given, kl_kda *a)
{
    int index; /* the tuple of all outputs is what is returned */
    if (every == Py_None && given == Py_None) return 0;
    if (kl_parse_int(c->op, "checkpoint_every", every, 1, INT32_MAX, &a->checkpoint_every) < 0)
        return -1;
    const int64_t shape[4] = {a->q.shape[0] / a->checkpoint_every, a->v.shape[1], a->v.shape[2],
                              a->q.shape[2]};
    if (kl_out(c, "checkpoints", given, KL_F32, 4, shape, NULL, &a->checkpoints, &index) < 0)
        return -1;
    const kl_tensor zeros = {0};
    return given == Py_None ? kl_call_fill(c, &a->checkpoints, &zeros) : 0;
}

static PyObject *run_kda_prefill(kl_call *c, PyObject *const *args)
{
    const kda_arguments p = {args[1], args[2],  args[3],  args[4],  args[5],  args[6],
                             args[9], args[10], args[11], args[12], args[13], args[14]};
    kl_kda_prefill a = {0};
    int o, s;
    if (KL_NEEDS(c, kda_prefill) < 0 || take_kda(c, &p, &a) < 0 ||
        kl_arg_cu_seqlens(c, args[8], a.q.shape[0], &a.cu_seqlens, NULL) < 0)
        return NULL;
    const int64_t shape[3] = {a.q.shape[0], a.v.shape[1], a.v.shape[2]};
    if (kl_out(c, "out", args[15], a.q.dtype, 3, shape, NULL, &a.out, &o) < 0 ||
        take_states(c, args[7], args[16], &a, &s) < 0 ||
        take_checkpoints(c, args[17], args[18], &a) < 0)
        return NULL;
    return kl_call_kda_prefill(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_kda_prefill(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "kda_prefill", args, nargs, 20, true, run_kda_prefill);
}

static PyObject *run_kda_decode(kl_call *c, PyObject *const *args)
{
    const kda_arguments p = {args[1], args[2],  args[3],  args[4],  args[5],  args[8],
                             args[9], args[10], args[11], args[12], args[13], args[14]};
    kl_kda_decode a = {0};
    int o;
    if (KL_NEEDS(c, kda_decode) < 0 || take_kda(c, &p, &a) < 0 ||
        kl_arg(c, "state", args[6], KL_SET(KL_F32), 4, KL_INPLACE, &a.state) < 0 ||
        kl_arg_slots(c, args[7], a.q.shape[0], a.state.shape[0], &a.slots) < 0)
        return NULL;
    const int64_t shape[3] = {a.q.shape[0], a.v.shape[1], a.v.shape[2]};
    if (kl_out(c, "out", args[15], a.q.dtype, 3, shape, NULL, &a.out, &o) < 0) return NULL;
    return kl_call_kda_decode(c, &a) < 0 ? NULL : kl_out_take(c, o);
}

PyObject *kl_py_kda_decode(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "kda_decode", args, nargs, 17, true, run_kda_decode);
}

/* activation: "silu" or None. */
static int take_activation(kl_call *c, PyObject *activation, bool *silu)
{
    static const char *const names[] = {"silu"};
    int which;
    *silu = activation != Py_None;
    return *silu ? kl_parse_choice(c->op, "activation", activation, names, 1, &which) : 0;
}

static PyObject *run_short_conv(kl_call *c, PyObject *const *args)
{
    kl_short_conv a = {0};
    kl_tensor start = {0};
    int y, s;
    if (KL_NEEDS(c, short_conv) < 0 ||
        kl_arg(c, "x", args[1], KL_FLOATS, 2, KL_ROWS, &a.x) < 0 ||
        kl_arg(c, "weight", args[2], KL_SET(KL_F32), 2, KL_DENSE, &a.weight) < 0 ||
        kl_arg_opt(c, "state", args[3], KL_SET(a.x.dtype), 3, KL_DENSE, &start) < 0 ||
        kl_arg_cu_seqlens(c, args[4], a.x.shape[0], &a.cu_seqlens, NULL) < 0 ||
        take_activation(c, args[5], &a.silu) < 0)
        return NULL;
    const int64_t N = a.cu_seqlens.shape[0] - 1, W = a.weight.shape[1];
    const int64_t shape[3] = {N, a.x.shape[1], W > 0 ? W - 1 : 0};
    for (int i = 0; args[3] != Py_None && i < 3; i++)
        if (start.shape[i] != shape[i]) {
            PyErr_Format(PyExc_ValueError,
                         "%s: state.shape[%d] must be %lld (states are [N, C, W-1]), got %lld",
                         c->op, i, (long long)shape[i], (long long)start.shape[i]);
            return NULL;
        }
    if (kl_out(c, "out", args[6], a.x.dtype, 2, a.x.shape, NULL, &a.out, &y) < 0 ||
        kl_out(c, "state", Py_None, a.x.dtype, 3, shape, NULL, &a.state, &s) < 0 ||
        kl_call_fill(c, &a.state, &start) < 0)
        return NULL;
    return kl_call_short_conv(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_short_conv(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "short_conv", args, nargs, 8, true, run_short_conv);
}
