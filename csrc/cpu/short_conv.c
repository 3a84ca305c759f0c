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
    int64_t channels, strips; /* of a strip; of a sequence */
} conv_call;

static kl_conv_strip strip_of(const conv_call *call, int64_t n, int64_t first)
{
    const kl_short_conv *a = call->a;
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
        .channels = C - first < call->channels ? C - first : call->channels,
        .width = W,
        .dtype = a->x.dtype,
        .silu = a->silu,
    };
}

/* Shift the windows of a strip: element j of the new one is `tokens` further than the old j.
 * What is read lies at j or behind it, so the order of j is safe. `bytes` of an element is a
 * constant of each call, and a copy then a plain move. */
static inline __attribute__((always_inline)) void shift_windows(const kl_conv_strip *s,
                                                                size_t bytes)
{
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

static void advance(const kl_conv_strip *s)
{
    if (s->dtype == KL_BF16)
        shift_windows(s, sizeof(uint16_t));
    else
        shift_windows(s, sizeof(float));
}

static void conv_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const conv_call *call = ctx;
    const int64_t n = task / call->strips, first = task % call->strips * call->channels;
    const kl_conv_strip s = strip_of(call, n, first);
    if (s.tokens == 0) return;
    call->kernels->conv(&s);
    advance(&s);
}

/* Wide strips read memory in long pieces; narrower ones where threads would go without. */
static int64_t strip_channels(int64_t C, int64_t N, int threads)
{
    int64_t channels = KL_CONV_STRIP;
    while (channels > 128 && (C + channels - 1) / channels * N < 2 * (int64_t)threads)
        channels /= 2;
    return channels;
}

kl_status kl_cpu_short_conv(kl_backend *be, const kl_short_conv *a, kl_error *err)
{
    (void)err;
    kl_cpu *cpu = (kl_cpu *)be;
    const int64_t C = a->weight.shape[0], N = a->cu_seqlens.shape[0] - 1;
    /* Turning a channel's taps and window costs about as much as eight tokens of it. */
    const bool alone = (a->x.shape[0] + 8 * N) * C <= KL_ROWS_TASK;
    conv_call call = {.a = a, .kernels = &cpu->kernels->rows};
    call.channels = strip_channels(C, N, alone ? 1 : kl_pool_size(cpu->pool));
    call.strips = (C + call.channels - 1) / call.channels;
    if (!alone) {
        kl_pool_run(cpu->pool, N * call.strips, conv_task, &call);
        return KL_OK;
    }
    for (int64_t task = 0; task < N * call.strips; task++) conv_task(&call, task, 0);
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(short_conv)
