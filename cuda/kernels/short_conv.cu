/*
 * short_conv.cu -- depthwise causal convolution over time, with its state.
 *
 * Computes     y[t, c] = act(sum_j weight[c, j] * x[t - (W-1) + j, c]); the state's window moves
 * Shapes       x, out [T, C]; weight [C, W]; state [S, C, W-1]; cu_seqlens [N+1]
 * Layout       rows of x may be strided, the rest is dense
 * Precision    f32 or bf16 in and out, f32 inside
 * Grid         a block for each run of RUN tokens of a sequence and each strip of channels; a
 *              thread has VEC channels, whose window it keeps in registers. Runs start at their
 *              sequence's first token, so the first one alone touches the state: it reads it,
 *              and writes the new one from the end of the sequence. Nobody has to wait.
 * Order        taps in rising order, whatever the run; kda_mixer.cuh and kda_prefill_convolve.cuh
 *              have the same arithmetic. Where kda_prefill convolves, a second kernel does what is
 *              left: windows and last tokens
 * Roofline     each element once each way: bf16, T = 8192, C = 12288 are 403 MB: memory-bound,
 *              134 us on an H100 (3.0 TB/s)
 * Measured     H200, bf16, T = 8192, C = 12288: 166 us (benchmarks/kda_fused.py, 2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/math.cuh"
#include "../device/warp.cuh"
#include "../device/wide.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int RUN = 16; /* tokens; the taps of a thread cost as much to read as four of them */
constexpr int MAX_WIDTH = 8;
static_assert(RUN >= MAX_WIDTH - 1, "only a sequence's first run may need its state");
constexpr int64_t MAX_BLOCKS_Y = 65535;

struct arguments {
    const void *x;
    const float *weight;
    void *state, *out;
    const int *slots, *cu_seqlens;
    int64_t x_stride, C, N;
    int W;
    bool silu;
};

/* Runs of sequence n are numbered from here on: it leaves room for len / RUN, rounded up, and
 * needs no look at the lengths before. */
__device__ int64_t first_run(const arguments &a, int64_t n)
{
    return a.cu_seqlens[n] / RUN + n;
}

/* The last sequence whose runs do not begin after `run`; a warp looks at 32 places at a time. */
__device__ int64_t find_sequence(const arguments &a, int64_t run)
{
    int64_t first = 0, count = a.N;
    while (count > 1) {
        const int64_t step = (count + WARP - 1) / WARP, at = lane_id() * step;
        const bool begun = at < count && first_run(a, first + at) <= run;
        const int64_t skipped = (__popc(__ballot_sync(ALL_LANES, begun)) - 1) * step;
        first += skipped;
        count = step < count - skipped ? step : count - skipped;
    }
    return first;
}

/* A thread's channels of one sequence. Fewer taps than WIDTH stand at the end; with VEC > 1 there
 * are as many. AHEAD: tokens asked for before the first is used. */
template <class A, int VEC, int WIDTH, int AHEAD> struct strip {
    static constexpr int PAST = WIDTH - 1;
    const A *x; /* of the sequence's first token */
    A *out, *state;
    int64_t x_stride, out_stride;
    int past; /* inputs that the state holds: W - 1 */
    float taps[WIDTH][VEC];
    float window[PAST + AHEAD][VEC]; /* inputs, oldest first; the next token's at PAST */

    /* Whether an entry of the window lies under one of the W taps: those before hold inputs that
     * the convolution has left behind, which may be NaN. */
    __device__ bool is_used(int j) const { return VEC > 1 || j >= PAST - past; }

    __device__ void read_taps(const float *weight)
    {
        const int W = past + 1;
        if constexpr (VEC > 1) {
            float flat[VEC * WIDTH];
            load_wide(weight, flat);
#pragma unroll
            for (int i = 0; i < VEC * WIDTH; i++) taps[i % WIDTH][i / WIDTH] = flat[i];
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; j++)
                taps[j][0] = j < WIDTH - W ? 0.0f : weight[j - (WIDTH - W)];
        }
    }

    __device__ void read_state()
    {
        if constexpr (VEC > 1) {
#pragma unroll
            for (int p = 0; p < PAST; p++) {
                float flat[VEC];
                load_wide(state + p * VEC, flat);
#pragma unroll
                for (int i = 0; i < VEC; i++)
                    window[(p * VEC + i) % PAST][(p * VEC + i) / PAST] = flat[i];
            }
        } else {
#pragma unroll
            for (int j = 0; j < PAST; j++)
                window[j][0] = is_used(j) ? to_float(state[j - (PAST - past)]) : 0.0f;
        }
    }

    __device__ void write_state() const
    {
        if constexpr (VEC > 1) {
#pragma unroll
            for (int p = 0; p < PAST; p++) {
                float flat[VEC];
#pragma unroll
                for (int i = 0; i < VEC; i++)
                    flat[i] = window[(p * VEC + i) % PAST][(p * VEC + i) / PAST];
                store_wide(state + p * VEC, flat);
            }
        } else {
#pragma unroll
            for (int j = 0; j < PAST; j++)
                if (is_used(j)) state[j - (PAST - past)] = from_float<A>(window[j][0]);
        }
    }

    /* The window before token t, which is RUN or later: all of it is in x. */
    __device__ void read_window(int64_t t)
    {
#pragma unroll
        for (int j = 0; j < PAST; j++) {
#pragma unroll
            for (int v = 0; v < VEC; v++) window[j][v] = 0;
            if (is_used(j)) load_wide(x + (t - PAST + j) * x_stride, window[j]);
        }
    }

    /* Token t, whose input is number i of those ahead. */
    __device__ void step(int i, int64_t t, bool with_silu)
    {
        float y[VEC];
#pragma unroll
        for (int v = 0; v < VEC; v++) {
            y[v] = 0;
#pragma unroll
            for (int j = 0; j < PAST; j++)
                if (is_used(j)) y[v] = fmaf(taps[j][v], window[i + j][v], y[v]);
            y[v] = fmaf(taps[PAST][v], window[i + PAST][v], y[v]);
            if (with_silu) y[v] = silu_for<A>(y[v]);
        }
        store_wide(out + t * out_stride, y);
    }

    /* N tokens from t on. */
    template <int N> __device__ void steps(int64_t t, bool with_silu)
    {
#pragma unroll
        for (int i = 0; i < N; i++) load_wide(x + (t + i) * x_stride, window[PAST + i]);
#pragma unroll
        for (int i = 0; i < N; i++) step(i, t + i, with_silu);
#pragma unroll
        for (int j = 0; j < PAST; j++)
#pragma unroll
            for (int v = 0; v < VEC; v++) window[j][v] = window[N + j][v];
    }

    __device__ void run(int64_t t, int64_t end, bool with_silu)
    {
        if constexpr (AHEAD > 1)
            for (; t + AHEAD <= end; t += AHEAD) steps<AHEAD>(t, with_silu);
        for (; t < end; t++) steps<1>(t, with_silu);
    }
};

template <int VEC> __device__ int64_t first_channel()
{
    return (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * VEC;
}

/* Channels from c on of sequence n, which begins with token `start`; the taps are there. */
template <class A, int VEC, int WIDTH, int AHEAD>
__device__ void open_strip(const arguments &a, int64_t n, int64_t start, int64_t c,
                           strip<A, VEC, WIDTH, AHEAD> &s)
{
    const int64_t slot = a.slots == nullptr ? n : a.slots[n];
    s.x = static_cast<const A *>(a.x) + start * a.x_stride + c;
    s.out = static_cast<A *>(a.out) + start * a.C + c;
    s.state = static_cast<A *>(a.state) + (slot * a.C + c) * (a.W - 1);
    s.x_stride = a.x_stride, s.out_stride = a.C;
    s.past = a.W - 1;
    s.read_taps(a.weight + c * a.W);
}

template <class A, int VEC, int WIDTH, int AHEAD>
__global__
__launch_bounds__(THREADS) void short_conv_kernel(__grid_constant__ const arguments a)
{
    const int64_t c = first_channel<VEC>();
    let_next_start();
    if (c < a.C) prefetch_line(a.weight + c * a.W);
    wait_for_inputs();
    const int64_t n = find_sequence(a, blockIdx.x);
    const int64_t start = a.cu_seqlens[n], length = a.cu_seqlens[n + 1] - start;
    const int64_t first = (blockIdx.x - first_run(a, n)) * RUN;
    if (c >= a.C || first >= length) return;

    strip<A, VEC, WIDTH, AHEAD> s;
    open_strip(a, n, start, c, s);
    if (first == 0)
        s.read_state();
    else
        s.read_window(first);
    s.run(first, first + RUN < length ? first + RUN : length, a.silu);
    if (first != 0) return;
    if (length > RUN) s.read_window(length); /* else it has come there by itself */
    s.write_state();
}

/* Of each sequence the last token, or all of a run or less, and the window: a block a sequence and
 * strip. */
template <class A, int VEC, int WIDTH>
__global__
__launch_bounds__(THREADS) void short_conv_ends_kernel(__grid_constant__ const arguments a)
{
    const int64_t c = first_channel<VEC>(), n = blockIdx.x;
    let_next_start();
    wait_for_inputs();
    const int64_t start = a.cu_seqlens[n], length = a.cu_seqlens[n + 1] - start;
    if (c >= a.C || length <= 0) return;
    const int64_t first = length > RUN ? length - 1 : 0;
    strip<A, VEC, WIDTH, 1> s;
    open_strip(a, n, start, c, s);
    if (first == 0)
        s.read_state();
    else
        s.read_window(first);
    s.run(first, length, a.silu);
    s.write_state();
}

template <int VEC> int64_t strips_of(const arguments &a)
{
    return (a.C + THREADS * VEC - 1) / (THREADS * VEC);
}

template <class A, int VEC, int WIDTH>
kl_status launch(const arguments &a, int64_t T, cudaStream_t stream, kl_error *err)
{
    const int64_t runs = T / RUN + a.N, strips = strips_of<VEC>(a);
    if (runs > MAX_BLOCKS || strips > MAX_BLOCKS_Y)
        return kl_fail(
            err, KL_ERR_VALUE,
            "short_conv: C must be <= %lld and T / %d + N <= %lld, got %lld and %lld",
            static_cast<long long>(MAX_BLOCKS_Y * THREADS * VEC), RUN, MAX_BLOCKS,
            static_cast<long long>(a.C), static_cast<long long>(runs));
    const dim3 blocks(static_cast<unsigned>(runs), static_cast<unsigned>(strips));
    /* A step of single tokens ends before much code has come from memory. */
    const auto kernel =
        T > a.N ? short_conv_kernel<A, VEC, WIDTH, 4> : short_conv_kernel<A, VEC, WIDTH, 1>;
    return kl_cuda_launch(kernel, blocks, THREADS, 0, stream, err, a);
}

/* Whether a thread takes 16 bytes of channels. */
bool takes_vectors(const kl_short_conv *a)
{
    const int VEC = 16 / static_cast<int>(kl_dtype_bytes(a->x.dtype));
    const int64_t C = a->x.shape[1];
    return a->weight.shape[1] == 4 && is_wide(a->x, C, VEC) && is_wide(a->out, C, VEC) &&
           is_aligned(a->weight.data, 0, 4, 16) && is_aligned(a->state.data, 0, 2, 16);
}

arguments arguments_of(const kl_short_conv *a)
{
    return {
        .x = a->x.data,
        .weight = static_cast<const float *>(a->weight.data),
        .state = a->state.data,
        .out = a->out.data,
        .slots = static_cast<const int *>(a->slots.data),
        .cu_seqlens = static_cast<const int *>(a->cu_seqlens.data),
        .x_stride = a->x.stride[0],
        .C = a->x.shape[1],
        .N = a->cu_seqlens.shape[0] - 1,
        .W = static_cast<int>(a->weight.shape[1]),
        .silu = a->silu,
    };
}

} // namespace

kl_status kl_cuda_short_conv(kl_backend *be, const kl_short_conv *a, kl_error *err)
{
    const int64_t T = a->x.shape[0];
    const arguments args = arguments_of(a);
    if (T == 0) return KL_OK;
    return with_float_type(a->x.dtype, [&](auto t) {
        using A = decltype(t);
        return takes_vectors(a) ? launch<A, 16 / sizeof(A), 4>(args, T, kl_cuda_stream(be), err)
                                : launch<A, 1, MAX_WIDTH>(args, T, kl_cuda_stream(be), err);
    });
}

kl_status kl_cuda_short_conv_ends(kl_backend *be, const kl_short_conv *a, kl_error *err)
{
    constexpr int VEC = 8;
    const arguments args = arguments_of(a);
    const bool wide = takes_vectors(a);
    const int64_t strips = wide ? strips_of<VEC>(args) : strips_of<1>(args);
    const auto kernel = wide ? short_conv_ends_kernel<bf16, VEC, 4>
                             : short_conv_ends_kernel<bf16, 1, MAX_WIDTH>;
    if (args.N > MAX_BLOCKS || strips > MAX_BLOCKS_Y)
        return kl_fail(err, KL_ERR_VALUE,
                       "short_conv: N must be <= %lld and C <= %lld, got %lld and %lld",
                       MAX_BLOCKS, static_cast<long long>(MAX_BLOCKS_Y * THREADS),
                       static_cast<long long>(args.N), static_cast<long long>(args.C));
    const dim3 blocks(static_cast<unsigned>(args.N), static_cast<unsigned>(strips));
    return kl_cuda_launch(kernel, blocks, THREADS, 0, kl_cuda_stream(be), err, args);
}
