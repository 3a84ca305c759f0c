/*
 * linear_step.cu -- a matrix product of a few tokens whose rows of x fit in shared memory: a
 * decode step's. The weight is on its way before x is there.
 * Computes     out = h w^T, or with a second weight silu(h w^T) * (h up^T); or two products of one
 *              h. h = x, or norm(x); residual += what would be the out, rounded to bf16
 * Shapes       x [T, in]; w, up [O, in]; out, residual [T, O]; T <= 16
 * Layout       rows of x and of out strided, the residual dense; weights in pieces of 16 bytes
 * Precision    x bf16, before a norm also f32; int4 weights rounded to bf16, the others exact; f32
 *              sums; f32 or bf16 out. A single token's rows of int8 that are not cut into halves by
 *              whole numbers (device/digits.cuh)
 * Grid         blocks that stay, two a multiprocessor, take tiles of 16 rows of weights in turn;
 *              warps share out the columns. A tile with a second weight holds 8 rows of each. Of
 *              two products the first's tiles come first. Of a single token and few rows a tile
 *              is 8 rows, the halves of whose columns meet two halves of x: twice as many blocks,
 *              up to three a multiprocessor, have all of the weight on its way
 * Order        an output: a warp's columns in rising order, then warps in order: that of
 *              linear_few.cu. Of tiles of halves the warp's two sums are added before; of whole
 *              numbers those of the high digits, of the low digits, and both
 * Roofline     the bytes of the weight: [2304, 4096] in bf16 is 19 MB, 6.3 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 12288
 *              and 288 rows of 2304 in 17.0 us, during which most of [2304, 4096] comes, too:
 *              that in 3.9 to 5.1 by the run; lm_head 168 (4.5 TB/s), in int8 92.5 (2026-11-22)
 */
#include "../device/digits.cuh"
#include "../device/product.cuh"
#include "../device/ring.cuh"

namespace {

constexpr int64_t MOST_ROWS = 1 << 30; /* an int counts them */

/* Blocks of halves on a multiprocessor where so much of its shared memory is enough for each, and
 * how many an H100 or H200 holds. */
constexpr unsigned HALF_BLOCKS = 3;
constexpr size_t HALF_SHARED = 75 << 10;
constexpr int64_t HALF_TILES = 396;

/* A step for each warp. Of 128 columns the digits take 0.3 us longer than they save. */
constexpr int64_t LEAST_DIGIT_COLS = 512;

/* What the 16 rows of a tile are: those of a weight, 8 of each of two, or 8 and then the second
 * halves of their columns. */
enum class tile_of { ROWS, PAIRS, HALVES };

/* Outputs of a token in a tile. */
template <tile_of kind>
constexpr int EACH_OF = kind == tile_of::ROWS ? STREAM_ROWS : STREAM_ROWS / 2;

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
template <tile_of kind>
__device__ weight_row tile_row(const step_product &p, unsigned tile, int i)
{
    constexpr unsigned EACH = EACH_OF<kind>;
    const unsigned last = static_cast<unsigned>(p.w.rows) - 1;
    const unsigned row = min(tile * EACH + i % EACH, last);
    const bool second = i >= EACH;
    if (kind == tile_of::HALVES) return row_of(p.w, 2 * int64_t{row} + second);
    return row_of(kind == tile_of::PAIRS && second ? p.up : p.w, row);
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
template <kl_weight_format format, tile_of kind> struct tile_walk {
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
            feed.start(scaled(tile_row<kind>(p, own, r)), scaled(tile_row<kind>(p, own, r + 8)),
                       row_bytes);
            return;
        }
    }

    __device__ static weight_row scaled(weight_row row)
    {
        if (row.scales == nullptr) row.scales = reinterpret_cast<const bf16 *>(row.data);
        return row;
    }

    template <class Ring> __device__ void put(Ring &ring)
    {
        if (steps == 0) return ring.put_none();
        ring.put(feed);
        feed.advance();
        if (--steps > 0) return;
        tile += gridDim.x;
        enter();
    }
};

/* The sums of the block's warps, and what this thread finds there: at most one output, of N * 8
 * tokens and 16 rows. */
template <int N, tile_of kind> struct tile_sums {
    static constexpr int EACH = EACH_OF<kind>;
    static constexpr int FLOATS = STREAM_FLOATS<N>;

    static __device__ void share(float *sums, const float (&acc)[N][4])
    {
        stream_share<N>(sums, acc);
    }

    static __device__ float sum(const float *sums, int token, int row)
    {
        const float y = stream_sum<N>(sums, token, row);
        if constexpr (kind == tile_of::ROWS) return y;
        return silu(y) * stream_sum<N>(sums, token, row + EACH);
    }
};

/* The halves of a single token's x are two columns of the mma: one lane has both sums of a row. */
template <int N> struct tile_sums<N, tile_of::HALVES> {
    static constexpr int EACH = EACH_OF<tile_of::HALVES>;
    static constexpr int FLOATS = STREAM_WARPS * EACH;

    static __device__ void share(float *sums, const float (&acc)[N][4])
    {
        if (lane_id() % STREAM_LANES == 0)
            sums[warp_id() * EACH + lane_id() / STREAM_LANES] = acc[0][0] + acc[0][3];
    }

    static __device__ float sum(const float *sums, int, int row)
    {
        float y = 0;
#pragma unroll
        for (int w = 0; w < STREAM_WARPS; w++) y += sums[w * EACH + row];
        return y;
    }
};

/* The output of this thread: at most one, of N * 8 tokens and 16 rows. */
template <int N, tile_of kind> struct tile_output {
    static constexpr int EACH = EACH_OF<kind>;
    static constexpr bool ADDS = kind != tile_of::PAIRS;
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
        if (ADDS && p.residual != nullptr && is_inside(p, tile, T))
            before = p.residual[place(p, tile)];
    }

    __device__ void store(const step_product &p, unsigned tile, int T, const float *sums) const
    {
        if (!is_inside(p, tile, T)) return;
        const int64_t at = place(p, tile);
        const float y = tile_sums<N, kind>::sum(sums, token(), row());
        if (ADDS && p.residual != nullptr)
            p.residual[at] = before + to_float(from_float<bf16>(y));
        else if (p.out_is_bf16)
            static_cast<bf16 *>(p.out)[at] = from_float<bf16>(y);
        else
            static_cast<float *>(p.out)[at] = y;
    }
};

/* x in shared memory: T rows as bf16, */
template <kl_weight_format format, bool digits> struct step_rows {
    using ring_type = weight_ring<format>;
    const shared_rows plain;

    static __host__ __device__ int bytes_of(int T, int cols)
    {
        return T * shared_rows::pitch_of(cols);
    }

    __device__ step_rows(unsigned char *shared, int cols)
        : plain{shared, shared_rows::pitch_of(cols)}
    {
    }

    __device__ void finish() const {}
};

/* and of a single one the digits, too. */
template <kl_weight_format format> struct step_rows<format, true> {
    using ring_type = digit_ring<format, RING_DEPTH>;
    const shared_rows plain;
    const int chunks;
    const digit_row<format> whole;

    static __host__ __device__ int chunks_of(int cols)
    {
        return digit_row<format>::chunks_of(shared_rows::pitch_of(cols) / 2);
    }

    static __host__ __device__ int bytes_of(int, int cols)
    {
        return shared_rows::pitch_of(cols) + digit_row<format>::bytes_of(chunks_of(cols));
    }

    __device__ step_rows(unsigned char *shared, int cols)
        : plain{shared, shared_rows::pitch_of(cols)}, chunks(chunks_of(cols)),
          whole(shared + plain.pitch, chunks)
    {
    }

    /* After a barrier; another follows. */
    __device__ void finish() const
    {
        digits_of_row<STREAM_THREADS>(whole, plain, chunks * DIGIT_CHUNK / 8);
        __syncthreads();
    }
};

/* This warp's share of the sums of a tile, in so many steps. */
template <kl_weight_format format, int N, kl_weight_format scales, bool digits, class Walk>
__device__ void multiply_steps(float (&acc)[N][4], const bool (&odd)[2], int steps, int rows,
                               const step_rows<scales, digits> &x,
                               typename step_rows<scales, digits>::ring_type &ring, Walk &walk)
{
    if constexpr (digits && format == scales) {
        float own[2] = {};
        ring_digits<format> columns(x.whole);
        for (; steps > 0; steps--) {
            digits_multiply(own, ring.take(odd), columns);
            columns.advance();
            walk.put(ring);
        }
        acc[0][0] = digits_total<format>(own[0]), acc[0][2] = digits_total<format>(own[1]);
    } else {
        ring_x<format, N> columns(x.plain, rows);
        for (; steps > 0; steps--) {
            ring_multiply(acc, ring.template take<format>(odd), columns);
            columns.advance();
            walk.put(ring);
        }
    }
}

template <kl_weight_format format, int N, tile_of kind, kl_weight_format scales, bool digits>
__device__ void multiply_tile(const step_product &p, unsigned tile, int T,
                              const step_rows<scales, digits> &x, float *sums,
                              typename step_rows<scales, digits>::ring_type &ring,
                              tile_walk<scales, kind> &walk)
{
    const int r = lane_id() / STREAM_LANES;
    const bool odd[2] = {ring_feed<format>::odd(tile_row<kind>(p, tile, r)),
                         ring_feed<format>::odd(tile_row<kind>(p, tile, r + 8))};
    float acc[N][4] = {};
    const tile_output<N, kind> output(p, tile, T);
    multiply_steps<format>(acc, odd, ring_steps(static_cast<int>(p.w.row_bytes)),
                           kind == tile_of::HALVES ? 2 * T : T, x, ring, walk);
    tile_sums<N, kind>::share(sums, acc);
    __syncthreads();
    output.store(p, tile, T, sums);
}

/* Of the two formats that with scales. */
template <kl_weight_format first, kl_weight_format second>
constexpr kl_weight_format SCALES = weight_codec<first>::GROUP > 0 ? first : second;

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, bool digits>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void product_step_kernel(
    const __grid_constant__ step_arguments a)
{
    using rows_type = step_rows<SCALES<first, second>, digits>;
    using ring_type = typename rows_type::ring_type;
    extern __shared__ __align__(128) unsigned char shared[];
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums =
        reinterpret_cast<float *>(x.plain.data + rows_type::bytes_of(a.x.T, a.x.cols));
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    tile_walk<SCALES<first, second>, kind> walk(a);
#pragma unroll 1
    for (int d = 0; d < RING_DEPTH; d++) walk.put(ring);
    prefetch_rows<STREAM_THREADS>(a.x);
    wait_for_inputs();
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one */
    if constexpr (kind == tile_of::HALVES)
        copy_rows<STREAM_THREADS>(x.plain, a.x);
    else
        bring_rows<STREAM_THREADS>(x.plain, a.x, sums);
    __syncthreads();
    x.finish();
    const int T = kind == tile_of::HALVES ? a.x.T / 2 : a.x.T;
    float *own = sums; /* this tile's: those of the one before are being read */
    for (unsigned t = blockIdx.x; t < a.tiles; t += gridDim.x) {
        own = own == sums ? sums + tile_sums<N, kind>::FLOATS : sums;
        unsigned tile = t;
        const step_product &p = product_of(a, tile);
        if (first == second || t < a.first_tiles) /* one piece of code where one will do */
            multiply_tile<first, N>(p, tile, T, x, own, ring, walk);
        else
            multiply_tile<second, N>(p, tile, T, x, own, ring, walk);
    }
}

/* ---- host ------------------------------------------------------------------------------ */

int64_t tiles_of(const kl_cuda_product *p)
{
    const int each = is_gated(p) ? STREAM_ROWS / 2 : STREAM_ROWS;
    return (p->w.rows + each - 1) / each;
}

/* x and the rows of the weight as two rows each: only where the sum over a row is plain, and may
 * have an order of its own. */
bool is_halved(kl_backend *be, const kl_cuda_product *p)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    constexpr int64_t UNIT = 256; /* columns: two steps of every format, or more */
    return !invariant && p->T == 1 && !is_gated(p) && !p->norms && p->w.cols % UNIT == 0 &&
           2 * tiles_of(p) <= HALF_TILES;
}

/* Of a block with such a ring, for x as the kernel takes it. */
template <kl_weight_format scales, bool digits, int SUMS> size_t bytes_of(const row_source &x)
{
    using rows_type = step_rows<scales, digits>;
    return rows_type::ring_type::BYTES + static_cast<size_t>(rows_type::bytes_of(x.T, x.cols)) +
           2 * SUMS * sizeof(float);
}

/* Whether x is also made whole numbers. */
bool has_digits(kl_backend *be, const kl_cuda_product *p)
{
    return !reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant && p->T == 1 &&
           p->w.format == KL_W_INT8 && p->w.cols >= LEAST_DIGIT_COLS &&
           bytes_of<KL_W_INT8, true, STREAM_FLOATS<1>>(row_source_of(p)) <= RING_MOST_SHARED;
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

/* As the kernel takes it, x and the weight by halves of their columns. */
void halve(step_arguments &a)
{
    a.x.T = 2, a.x.cols /= 2, a.x.stride = a.x.cols;
    weight_view &w = a.first.w;
    w.cols /= 2, w.row_bytes /= 2, w.groups /= 2;
    a.tiles = a.first_tiles *= 2;
}

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, bool digits>
kl_status launch(kl_backend *be, const step_arguments &a, kl_error *err)
{
    const auto kernel = product_step_kernel<first, second, N, kind, digits>;
    const size_t shared =
        bytes_of<SCALES<first, second>, digits, tile_sums<N, kind>::FLOATS>(a.x);
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    const bool three = kind == tile_of::HALVES && shared <= HALF_SHARED;
    const unsigned most =
        static_cast<unsigned>(multiprocessors) * (three ? HALF_BLOCKS : RING_BLOCKS);
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, STREAM_THREADS, shared,
                          kl_cuda_stream(be), err, a);
}

template <kl_weight_format first, kl_weight_format second, tile_of kind>
kl_status launch_for(kl_backend *be, const step_arguments &a, bool digits, kl_error *err)
{
    if constexpr (second == KL_W_INT8)
        if (digits) return launch<first, second, 1, kind, true>(be, a, err);
    return a.x.T <= STREAM_TOKENS ? launch<first, second, 1, kind, false>(be, a, err)
                                  : launch<first, second, 2, kind, false>(be, a, err);
}

} // namespace

bool kl_cuda_product_step_takes(const kl_cuda_product *p)
{
    return p->T <= 2 * STREAM_TOKENS && p->w.rows <= MOST_ROWS &&
           with_format(p->w.format, [&](auto f) {
               const row_source x = row_source_of(p);
               const size_t bytes = p->T <= STREAM_TOKENS
                                        ? bytes_of<f.value, false, STREAM_FLOATS<1>>(x)
                                        : bytes_of<f.value, false, STREAM_FLOATS<2>>(x);
               return bytes <= RING_MOST_SHARED;
           });
}

bool kl_cuda_product_step_halves(kl_backend *be, const kl_cuda_product *p)
{
    return kl_cuda_product_step_takes(p) && is_halved(be, p);
}

kl_status kl_cuda_product_step(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const unsigned tiles = static_cast<unsigned>(tiles_of(p));
    step_arguments a = {row_source_of(p), step_of(p), step_of(p), tiles, tiles,
                        is_unsettled(p)};
    const bool halved = is_halved(be, p), digits = has_digits(be, p);
    if (halved) halve(a);
    return with_format(p->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        if (halved) return launch<w, w, 1, tile_of::HALVES, false>(be, a, err);
        return is_gated(p) ? launch_for<w, w, tile_of::PAIRS>(be, a, digits, err)
                           : launch_for<w, w, tile_of::ROWS>(be, a, digits, err);
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
    const bool digits = has_digits(be, second);
    return with_format(second->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        return first->w.format == w
                   ? launch_for<w, w, tile_of::ROWS>(be, a, digits, err)
                   : launch_for<KL_W_BF16, w, tile_of::ROWS>(be, a, digits, err);
    });
}
