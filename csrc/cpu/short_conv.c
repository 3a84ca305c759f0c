/*
 * short_conv.c -- the depthwise causal convolution on the CPU. Formula: backend/ops.h;
 * arithmetic: simd/rows.h.
 *
 * A task is a sequence and a strip of channels. The states are written after all outputs, as
 * copies of the raw inputs: a state's new window may overlap its old one.
 */
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

#include <string.h>

typedef struct {
    const kl_short_conv *a;
    const kl_rows_kernels *kernels;
    int64_t strips;
} conv_call;

static kl_conv_strip strip_of(const kl_short_conv *a, int64_t n, int64_t first)
{
    const int32_t *cu = a->cu_seqlens.data, *slots = a->slots.data;
    const int64_t C = a->weight.shape[0], W = a->weight.shape[1];
    const size_t bytes = kl_dtype_bytes(a->x.dtype);
    const int64_t slot = kl_tensor_absent(&a->slots) ? n : slots[n];
    return (kl_conv_strip){
        .x = (char *)a->x.data + (size_t)(cu[n] * a->x.stride[0] + first) * bytes,
        .out = (char *)a->out.data + (size_t)(cu[n] * a->out.stride[0] + first) * bytes,
        .state = (char *)a->state.data + (size_t)((slot * C + first) * (W - 1)) * bytes,
        .weight = (const float *)a->weight.data + first * W,
        .x_stride = a->x.stride[0],
        .out_stride = a->out.stride[0],
        .tokens = cu[n + 1] - cu[n],
        .channels = C - first < KL_CONV_STRIP ? C - first : KL_CONV_STRIP,
        .width = W,
        .dtype = a->x.dtype,
        .silu = a->silu,
    };
}

/* Shift the windows of a strip: element j of the new one is `tokens` further than the old j.
 * What is read lies at j or behind it, so the order of j is safe. */
static void advance(const kl_conv_strip *s)
{
    const size_t bytes = kl_dtype_bytes(s->dtype);
    const int64_t H = s->width - 1;
    for (int64_t c = 0; c < s->channels; c++) {
        char *window = (char *)s->state + (size_t)(c * H) * bytes;
        for (int64_t j = 0; j < H; j++) {
            const int64_t t = s->tokens - H + j; /* < 0: still in the old window */
            const char *from = t < 0
                                   ? window + (size_t)(j + s->tokens) * bytes
                                   : (const char *)s->x + (size_t)(t * s->x_stride + c) * bytes;
            memmove(window + (size_t)j * bytes, from, bytes);
        }
    }
}

static void conv_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const conv_call *call = ctx;
    const int64_t n = task / call->strips, first = task % call->strips * KL_CONV_STRIP;
    const kl_conv_strip s = strip_of(call->a, n, first);
    if (s.tokens == 0) return;
    call->kernels->conv(&s);
    advance(&s);
}

kl_status kl_cpu_short_conv(kl_backend *be, const kl_short_conv *a, kl_error *err)
{
    (void)err;
    kl_cpu *cpu = (kl_cpu *)be;
    const int64_t C = a->weight.shape[0], N = a->cu_seqlens.shape[0] - 1;
    conv_call call = {a, &cpu->kernels->rows, (C + KL_CONV_STRIP - 1) / KL_CONV_STRIP};
    const int64_t tasks = N * call.strips;
    if (a->x.shape[0] * C > KL_ROWS_TASK) {
        kl_pool_run(cpu->pool, tasks, conv_task, &call);
        return KL_OK;
    }
    for (int64_t task = 0; task < tasks; task++) conv_task(&call, task, 0);
    return KL_OK;
}
