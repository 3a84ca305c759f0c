/*
 * linear_step.cu -- a matrix product of a few tokens whose rows of x fit in shared memory: a
 * decode step's. The weight is on its way before x is there.
 * Computes     out = h w^T, or with a second weight silu(h w^T) * (h up^T); or two products of one
 *              h. h = x, or norm(x); residual += what would be the out, rounded to bf16
 * Shapes       x [T, in]; w, up [O, in]; out, residual [T, O]; T <= 16
 * Layout       rows of x and of out strided, the residual dense; weights in pieces of 16 bytes
 * Precision    x bf16, before a norm also f32; int4 weights rounded to bf16, the others exact; f32
 *              sums; f32 or bf16 out
 * Grid         blocks that stay, two a multiprocessor, take tiles of 16 rows of weights in turn;
 *              warps share out the columns. A tile with a second weight holds 8 rows of each. Of
 *              two products the first's tiles come first
 * Order        an output: a warp's columns in rising order, then warps in order: that of
 *              linear_few.cu
 * Roofline     the bytes of the weight: [2304, 4096] in bf16 is 19 MB, 6.3 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 12288 and 288
 *              rows of 2304 in 12.6 us, [2304, 4096] 6.5, [4096, 128] 1.9 (2026-11-22)
 */
#include "../device/product.cuh"
#include "../device/ring.cuh"

namespace {

constexpr int64_t MOST_ROWS = 1 << 30; /* an int counts them */

struct step_product {
    weight_view w, up;
    void *out;
    float *residual; /* or null */
    int64_t out_stride;
    bool out_is_bf16;
};

struct step_arguments {
    row_source x;
    step_product first, second;
    unsigned first_tiles, tiles; /* of the first product, of both */
    bool unsettled;              /* one of the weights */
};

/* Row i of a tile. Rows past the end repeat the last one, which is read anyway. */
template <bool gated>
__device__ weight_row tile_row(const step_product &p, unsigned tile, int i)
{
    constexpr unsigned EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    const unsigned row = tile * EACH + i % EACH, last = static_cast<unsigned>(p.w.rows) - 1;
    return row_of(gated && i >= EACH ? p.up : p.w, row < last ? row : last);
}

/* Whose the tile is; `tile` becomes its number in that product. */
__device__ inline const step_product &product_of(const step_arguments &a, unsigned &tile)
{
    if (tile < a.first_tiles) return a.first;
    tile -= a.first_tiles;
    return a.second;
}

/* What the ring is to hold next: this warp's steps of the block's tiles. `format` is that of the
 * scales; weights without any bring words of their own in place of them, which nobody reads. */
template <kl_weight_format format, bool gated> struct tile_walk {
    const step_arguments &a;
    unsigned tile;
    int steps = 0; /* of the tile, still to be asked for */
    ring_feed<format> feed;

    __device__ explicit tile_walk(const step_arguments &args) : a(args), tile(blockIdx.x)
    {
        enter();
    }

    /* The next tile from `tile` on that has a step for this warp. */
    __device__ void enter()
    {
        for (; tile < a.tiles; tile += gridDim.x) {
            unsigned own = tile;
            const step_product &p = product_of(a, own);
            const int row_bytes = static_cast<int>(p.w.row_bytes);
            steps = ring_steps(row_bytes);
            if (steps == 0) continue;
            const int r = lane_id() / STREAM_LANES;
            feed.start(scaled(tile_row<gated>(p, own, r)),
                       scaled(tile_row<gated>(p, own, r + 8)), row_bytes);
            return;
        }
    }

    __device__ static weight_row scaled(weight_row row)
    {
        if (row.scales == nullptr) row.scales = reinterpret_cast<const bf16 *>(row.data);
        return row;
    }

    __device__ void put(weight_ring<format> &ring)
    {
        if (steps == 0) return ring.put_none();
        ring.put(feed);
        feed.advance();
        if (--steps > 0) return;
        tile += gridDim.x;
        enter();
    }
};

/* The output of this thread: at most one, of N * 8 tokens and 16 rows. */
template <int N, bool gated> struct tile_output {
    static constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    static_assert(N * STREAM_TOKENS * EACH <= STREAM_THREADS);
    float before; /* of a residual: asked for long before it is needed */

    static __device__ int token() { return threadIdx.x / EACH; }

    static __device__ int row() { return threadIdx.x % EACH; }

    static __device__ bool is_inside(const step_product &p, unsigned tile, int T)
    {
        return token() < T && int64_t{tile} * EACH + row() < p.w.rows;
    }

    static __device__ int64_t place(const step_product &p, unsigned tile)
    {
        return token() * p.out_stride + int64_t{tile} * EACH + row();
    }

    __device__ tile_output(const step_product &p, unsigned tile, int T)
    {
        before = 0;
        if (!gated && p.residual != nullptr && is_inside(p, tile, T))
            before = p.residual[place(p, tile)];
    }

    __device__ void store(const step_product &p, unsigned tile, int T, const float *sums) const
    {
        if (!is_inside(p, tile, T)) return;
        const int64_t at = place(p, tile);
        float y = stream_sum<N>(sums, token(), row());
        if constexpr (gated) y = silu(y) * stream_sum<N>(sums, token(), row() + EACH);
        if (!gated && p.residual != nullptr)
            p.residual[at] = before + to_float(from_float<bf16>(y));
        else if (p.out_is_bf16)
            static_cast<bf16 *>(p.out)[at] = from_float<bf16>(y);
        else
            static_cast<float *>(p.out)[at] = y;
    }
};

template <kl_weight_format format, int N, bool gated, kl_weight_format scales>
__device__ void multiply_tile(const step_product &p, unsigned tile, int T, shared_rows x,
                              float *sums, weight_ring<scales> &ring,
                              tile_walk<scales, gated> &walk)
{
    const int r = lane_id() / STREAM_LANES;
    const bool odd[2] = {ring_feed<format>::odd(tile_row<gated>(p, tile, r)),
                         ring_feed<format>::odd(tile_row<gated>(p, tile, r + 8))};
    float acc[N][4] = {};
    ring_x<format, N> columns(x, T);
    const tile_output<N, gated> output(p, tile, T);
    for (int n = ring_steps(static_cast<int>(p.w.row_bytes)); n > 0; n--) {
        ring_multiply(acc, ring.template take<format>(odd), columns);
        columns.advance();
        walk.put(ring);
    }
    stream_share<N>(sums, acc);
    __syncthreads();
    output.store(p, tile, T, sums);
}

/* Of the two formats that with scales. */
template <kl_weight_format first, kl_weight_format second>
constexpr kl_weight_format SCALES = weight_codec<first>::GROUP > 0 ? first : second;

template <kl_weight_format first, kl_weight_format second, int N, bool gated>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void product_step_kernel(
    const __grid_constant__ step_arguments a)
{
    using ring_type = weight_ring<SCALES<first, second>>;
    extern __shared__ __align__(128) unsigned char shared[];
    const shared_rows x = {shared + ring_type::BYTES, shared_rows::pitch_of(a.x.cols)};
    float *const sums = reinterpret_cast<float *>(x.data + a.x.T * x.pitch);
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    tile_walk<SCALES<first, second>, gated> walk(a);
#pragma unroll 1
    for (int d = 0; d < RING_DEPTH; d++) walk.put(ring);
    prefetch_rows<STREAM_THREADS>(a.x);
    wait_for_inputs();
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one */
    bring_rows<STREAM_THREADS>(x, a.x, sums);
    __syncthreads();
    float *own = sums; /* this tile's: those of the one before are being read */
    for (unsigned t = blockIdx.x; t < a.tiles; t += gridDim.x) {
        own = own == sums ? sums + STREAM_FLOATS<N> : sums;
        unsigned tile = t;
        const step_product &p = product_of(a, tile);
        if (first == second || t < a.first_tiles) /* one piece of code where one will do */
            multiply_tile<first, N>(p, tile, a.x.T, x, own, ring, walk);
        else
            multiply_tile<second, N>(p, tile, a.x.T, x, own, ring, walk);
    }
}

/* ---- host ------------------------------------------------------------------------------ */

size_t shared_bytes(kl_weight_format scales, const kl_cuda_product *p)
{
    const size_t scaled = kl_weight_group(scales) > 0 ? RING_SCALES : 0;
    const size_t sums = p->T <= STREAM_TOKENS ? STREAM_FLOATS<1> : STREAM_FLOATS<2>;
    return RING_DEPTH * (RING_PIECES + scaled) +
           static_cast<size_t>(p->T) * shared_rows::pitch_of(p->w.cols) +
           2 * sums * sizeof(float);
}

step_product step_of(const kl_cuda_product *p)
{
    return {
        .w = weight_view_of(p->w),
        .up = is_gated(p) ? weight_view_of(p->up) : weight_view{},
        .out = p->out,
        .residual = p->residual,
        .out_stride = p->residual == nullptr ? p->out_stride : p->w.rows,
        .out_is_bf16 = p->out_dtype == KL_BF16,
    };
}

bool is_unsettled(const kl_cuda_product *p)
{
    return p->w.unsettled || p->up.unsettled;
}

int64_t tiles_of(const kl_cuda_product *p)
{
    const int each = is_gated(p) ? STREAM_ROWS / 2 : STREAM_ROWS;
    return (p->w.rows + each - 1) / each;
}

template <kl_weight_format first, kl_weight_format second, int N, bool gated>
kl_status launch(kl_backend *be, const step_arguments &a, size_t shared, kl_error *err)
{
    const auto kernel = product_step_kernel<first, second, N, gated>;
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    const unsigned most = static_cast<unsigned>(multiprocessors) * RING_BLOCKS;
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, STREAM_THREADS, shared,
                          kl_cuda_stream(be), err, a);
}

template <kl_weight_format first, kl_weight_format second>
kl_status launch_for(kl_backend *be, const step_arguments &a, size_t shared, kl_error *err)
{
    return a.x.T <= STREAM_TOKENS ? launch<first, second, 1, false>(be, a, shared, err)
                                  : launch<first, second, 2, false>(be, a, shared, err);
}

} // namespace

bool kl_cuda_product_step_takes(const kl_cuda_product *p)
{
    return p->T <= 2 * STREAM_TOKENS && p->w.rows <= MOST_ROWS &&
           shared_bytes(p->w.format, p) <= RING_MOST_SHARED;
}

kl_status kl_cuda_product_step(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const unsigned tiles = static_cast<unsigned>(tiles_of(p));
    const step_arguments a = {row_source_of(p), step_of(p), step_of(p), tiles, tiles,
                              is_unsettled(p)};
    const size_t shared = shared_bytes(p->w.format, p);
    return with_format(p->w.format, [&](auto f) {
        if (!is_gated(p)) return launch_for<f.value, f.value>(be, a, shared, err);
        return p->T <= STREAM_TOKENS ? launch<f.value, f.value, 1, true>(be, a, shared, err)
                                     : launch<f.value, f.value, 2, true>(be, a, shared, err);
    });
}

kl_status kl_cuda_product_step_pair(kl_backend *be, const kl_cuda_product *first,
                                    const kl_cuda_product *second, kl_error *err)
{
    const unsigned tiles = static_cast<unsigned>(tiles_of(first));
    const step_arguments a = {row_source_of(first),
                              step_of(first),
                              step_of(second),
                              tiles,
                              tiles + static_cast<unsigned>(tiles_of(second)),
                              is_unsettled(first) || is_unsettled(second)};
    const size_t shared = shared_bytes(second->w.format, second);
    return with_format(second->w.format, [&](auto f) {
        if (first->w.format == f.value) return launch_for<f.value, f.value>(be, a, shared, err);
        return launch_for<KL_W_BF16, f.value>(be, a, shared, err);
    });
}
