/*
 * pack_weight.cu -- storing a matrix in a weight's format.
 *
 * Computes     f32, bf16: the values, rounded;  int8, int4, fp8: for each group of columns
 *              scale = bf16(max|w| / qmax), q = clamp(round(w / scale))
 * Shapes       src [rows, cols], out as base/weight.h has it
 * Layout       rows of src may be strided
 * Precision    f32; rounding to nearest, ties to even: the bytes of the CPU
 * Grid         a thread has UNIT columns; the 8 or 4 threads of a group find its maximum by
 *              butterflies. A group that is not finite gets the scale NaN, and so reads as NaN: a
 *              kernel cannot refuse it by place
 * Roofline     bf16 to int8: 3.03 bytes an element, memory-bound, about 1 ms for 2^30 elements on
 *              an H100 (3.0 TB/s)
 * Measured     H100, [65536, 2304] bf16, kl.ops.quantize whole: int8 0.57 ms, fp8 0.62, int4 0.58
 *              (0.5 TB/s of src), before the blocks shared rows evenly. Out of pinned memory it
 *              keeps up with the bus: 98 GB of bf16 loaded as int8 in 3.1 s on an H200
 *              (benchmarks/bench_checkpoint.py, 2026-11-22)
 */
#include "../device/warp.cuh"
#include "../device/wide.cuh"

#include <cuda_fp8.h>

namespace {

constexpr int THREADS = 128; /* at most; as many as share a row evenly */
constexpr int UNIT = 8;      /* columns of a thread */
constexpr int64_t MAX_ROWS = 0x7fffffff, MAX_STRIPS = 65535;

struct arguments {
    const void *src;
    uint8_t *data;
    bf16 *scales;
    int64_t src_stride, cols, row_bytes, groups;
    bool wide_src, wide_out;
};

/* What tells the integer formats apart. */
template <kl_weight_format format> struct quantised;

template <> struct quantised<KL_W_INT8> {
    static constexpr int GROUP = KL_INT8_GROUP;
    static constexpr float QMAX = 127;
};

template <> struct quantised<KL_W_INT4> {
    static constexpr int GROUP = KL_INT4_GROUP;
    static constexpr float QMAX = 7;
};

template <> struct quantised<KL_W_FP8> {
    static constexpr int GROUP = KL_FP8_GROUP;
    static constexpr float QMAX = KL_FP8_MAX;
};

/* Columns [col, col + UNIT) of a row; zeros past the last one. */
template <class S>
__device__ void read_unit(const arguments &a, int64_t row, int64_t col, float (&w)[UNIT])
{
    const S *from = static_cast<const S *>(a.src) + row * a.src_stride + col;
    if (a.wide_src && col + UNIT <= a.cols) {
        load_wide(from, w);
        return;
    }
#pragma unroll
    for (int i = 0; i < UNIT; i++) w[i] = col + i < a.cols ? to_float(from[i]) : 0.0f;
}

/* 8 bytes, byte i in bits 8 i. */
__device__ void write_bytes(uint8_t *to, uint64_t bytes, bool wide)
{
    if (wide) {
        *reinterpret_cast<uint64_t *>(to) = bytes;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = static_cast<uint8_t>(bytes >> 8 * i);
}

/* ---- values ---------------------------------------------------------------------------- */

template <class S, class D>
__global__ __launch_bounds__(THREADS) void convert_kernel(__grid_constant__ const arguments a)
{
    const int64_t row = blockIdx.x;
    const int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * UNIT;
    if (col >= a.cols) return;
    float w[UNIT];
    read_unit<S>(a, row, col, w);
    D *to = reinterpret_cast<D *>(a.data) + row * a.cols + col;
    if (a.wide_out && col + UNIT <= a.cols) {
        store_wide(to, w);
        return;
    }
#pragma unroll
    for (int i = 0; i < UNIT; i++)
        if (col + i < a.cols) to[i] = from_float<D>(w[i]);
}

/* ---- groups ---------------------------------------------------------------------------- */

/* The magnitude whose bits are largest: a NaN is above an infinity, and that above the rest. */
template <int LANES> __device__ float largest_of_group(const float (&w)[UNIT])
{
    unsigned top = 0;
#pragma unroll
    for (int i = 0; i < UNIT; i++) top = max(top, __float_as_uint(w[i]) & 0x7fffffffu);
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) top = max(top, __shfl_xor_sync(ALL_LANES, top, d));
    return __uint_as_float(top);
}

__device__ bf16 scale_of(float largest, float qmax)
{
    const float nan = __uint_as_float(0x7fc00000u);
    return __float2bfloat16_rn(isfinite(largest) ? largest / qmax : nan);
}

/* q as a byte: two's complement, q + 8, or the bits of e4m3. */
template <kl_weight_format format> __device__ uint64_t quantise(float w, float scale)
{
    constexpr float QMAX = quantised<format>::QMAX;
    const float ratio = scale > 0 ? w / scale : 0.0f; /* a scale of 0 or NaN: q = 0 */
    if constexpr (format == KL_W_FP8)
        return __nv_cvt_float_to_fp8(ratio, __NV_SATFINITE, __NV_E4M3);
    const int q = static_cast<int>(fminf(fmaxf(rintf(ratio), -QMAX), QMAX));
    return static_cast<uint8_t>(format == KL_W_INT4 ? q + 8 : q);
}

template <class S, kl_weight_format format>
__global__ __launch_bounds__(THREADS) void quantise_kernel(__grid_constant__ const arguments a)
{
    constexpr int GROUP = quantised<format>::GROUP, LANES = GROUP / UNIT;
    const int64_t row = blockIdx.x;
    const int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * UNIT;
    const int64_t group = col / GROUP;
    const int lane = threadIdx.x % LANES;
    float w[UNIT];
    read_unit<S>(a, row, col, w);
    const bf16 scale = scale_of(largest_of_group<LANES>(w), quantised<format>::QMAX);

    uint64_t bytes = 0;
#pragma unroll
    for (int i = 0; i < UNIT; i++) bytes |= quantise<format>(w[i], to_float(scale)) << 8 * i;
    uint8_t *to = a.data + row * a.row_bytes;
    if constexpr (format == KL_W_INT4) {
        /* The first half of the group's lanes has the low nibbles, the second the high ones. */
        const uint64_t high = __shfl_xor_sync(ALL_LANES, bytes, LANES / 2);
        if (group < a.groups && lane < LANES / 2)
            write_bytes(to + group * (GROUP / 2) + lane * UNIT, bytes | high << 4, a.wide_out);
    } else if (group < a.groups)
        write_bytes(to + col, bytes, a.wide_out);
    if (group < a.groups && lane == 0) a.scales[row * a.groups + group] = scale;
}

template <class K>
kl_status launch(K kernel, const arguments &a, int64_t rows, int64_t cols, cudaStream_t stream,
                 kl_error *err)
{
    const int64_t units = (cols + UNIT - 1) / UNIT, strips = (units + THREADS - 1) / THREADS;
    if (rows > MAX_ROWS || strips > MAX_STRIPS)
        return kl_fail(err, KL_ERR_VALUE,
                       "pack_weight: src must be at most [%lld, %lld], got [%lld, %lld]",
                       static_cast<long long>(MAX_ROWS),
                       static_cast<long long>(MAX_STRIPS * THREADS * UNIT),
                       static_cast<long long>(rows), static_cast<long long>(cols));
    const dim3 blocks(static_cast<unsigned>(rows), static_cast<unsigned>(strips));
    /* Whole warps, so that a group's lanes share one: 2304 columns are 3 blocks of 96. */
    const int64_t threads = ((units + strips - 1) / strips + 31) / 32 * 32;
    kernel<<<blocks, static_cast<unsigned>(threads), 0, stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class S>
kl_status launch_format(const arguments &a, const kl_weight &w, cudaStream_t stream,
                        kl_error *err)
{
    switch (w.format) {
    case KL_W_F32:
        return launch(convert_kernel<S, float>, a, w.rows, w.cols, stream, err);
    case KL_W_BF16:
        return launch(convert_kernel<S, bf16>, a, w.rows, w.cols, stream, err);
    case KL_W_INT8:
        return launch(quantise_kernel<S, KL_W_INT8>, a, w.rows, w.cols, stream, err);
    case KL_W_INT4:
        return launch(quantise_kernel<S, KL_W_INT4>, a, w.rows, w.cols, stream, err);
    case KL_W_FP8:
        return launch(quantise_kernel<S, KL_W_FP8>, a, w.rows, w.cols, stream, err);
    case KL_N_WEIGHT_FORMATS:
        break;
    }
    return kl_fail(err, KL_ERR_TYPE, "pack_weight: unknown format %d", w.format);
}

} // namespace

kl_status kl_cuda_pack_weight(kl_backend *be, const kl_pack_weight *a, kl_error *err)
{
    const kl_weight &w = a->out;
    const size_t row_bytes = kl_weight_row_bytes(w.format, w.cols);
    const arguments args = {
        .src = a->src.data,
        .data = static_cast<uint8_t *>(w.data),
        .scales = reinterpret_cast<bf16 *>(w.scales),
        .src_stride = a->src.stride[0],
        .cols = w.cols,
        .row_bytes = static_cast<int64_t>(row_bytes),
        .groups = kl_weight_groups(w.format, w.cols),
        .wide_src = is_wide(a->src, UNIT, UNIT),
        .wide_out = reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && row_bytes % 16 == 0,
    };
    return with_float_type(a->src.dtype, [&](auto t) {
        return launch_format<decltype(t)>(args, w, kl_cuda_stream(be), err);
    });
}
