/*
 * linear_step.cu -- a matrix product of a few tokens whose rows of x fit in shared memory: a
 * decode step's. The weight is on its way before x is there.
 * Computes     out = h w^T, or with a second weight silu(h w^T) * (h up^T); or two products of one
 *              h. h = x, or norm(x); residual += what would be out, rounded to bf16; and peaks.
 *              Of a single token's residual also a router's work (device/router_sums.cuh)
 * Shapes       x [T, in]; w, up [O, in]; out, residual [T, O]; T <= 16
 * Layout       rows of x and of out strided, the residual dense; weights in pieces of 16 bytes
 * Precision    x bf16, before a norm also f32; int4 weights rounded to bf16, the others exact; f32
 *              sums; f32 or bf16 out. A single token meets quantised weights as they are: int8 and
 *              int4 as whole numbers (device/digits.cuh), fp8 as float16 (device/scaled.cuh), halves
 *              of rows as bf16 (device/halves.cuh)
 * Grid         blocks that stay, two a multiprocessor, take tiles of 16 rows of weights in turn;
 *              warps share out the columns. A tile with a second weight holds 8 rows of each. Of
 *              two products the first's tiles come first. Of a single token and few rows a tile
 *              is 8 rows, the halves of whose columns meet two halves of x: twice as many blocks,
 *              up to three a multiprocessor, have all of the weight on its way. Where each has
 *              one tile, all of it in its ring, product_held_kernel only waits for x, or looks
 *              at an x that is arriving (device/arriving.cuh)
 * Order        an output: a warp's columns in rising order, then warps in order: that of
 *              linear_few.cu. Of tiles of halves the warp's two sums are added before; of whole
 *              numbers those of a row's four lanes
 * Roofline     the bytes of the weight: [2304, 4096] in bf16 is 19 MB, 6.3 us at 3.0 TB/s; of a
 *              router [256, 2304] another 2.4 MB
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 12288
 *              and 288 rows of 2304 in 16.8 us, during which most of [2304, 4096] comes, too:
 *              that with a router's work, in product_held_kernel, in 5.3; lm_head with its
 *              peaks 169.6 (4.5 TB/s) (2026-11-23); in int8 without them 92.5 (2026-11-22)
 */
#include "../device/product.cuh"
#include "linear_step_rows.cuh"
#include "linear_step_tiles.cuh"

namespace {

constexpr int64_t MOST_ROWS = 1 << 30; /* an int counts them */

/* Blocks of halves on a multiprocessor where so much of its shared memory is enough for each, and
 * how many an H100 or H200 holds. */
constexpr unsigned HALF_BLOCKS = 3;
constexpr size_t HALF_SHARED = 75 << 10;
constexpr int64_t HALF_TILES = 396;

/* A step for each warp. Of 128 columns of int8 the digits take 0.3 us longer than they save. */
template <kl_weight_format format>
constexpr int64_t LEAST_OWN_COLS = RING_TURN / 16 * weight_codec<format>::PIECE;

/* Blocks that registers leave room for: int4's digits take more than 64 a thread. */
template <kl_weight_format format, x_as numbers>
constexpr int FITTING = 2 * RING_BLOCKS - (numbers == x_as::OWN && format == KL_W_INT4 ? 1 : 0);

struct step_arguments {
    row_source x;
    step_product first, second;
    unsigned first_tiles, tiles; /* of the first product, of both */
    bool unsettled;              /* one of the weights, or the router */
    bool arriving;               /* x: of product_held_kernel */
    router_work router;          /* of tiles of halves that add to a residual */
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

/* Which halves of their words the scales of this lane's rows lie in. */
template <kl_weight_format format, tile_of kind>
__device__ void odd_scales(bool (&odd)[2], const step_product &p, unsigned tile)
{
    const int r = lane_id() / STREAM_LANES;
    odd[0] = ring_feed<format>::odd(tile_row<kind>(p, tile, r));
    odd[1] = ring_feed<format>::odd(tile_row<kind>(p, tile, r + 8));
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

/* This warp's steps of a tile whose steps a ring holds. */
template <kl_weight_format format, tile_of kind, int DEPTH, class Ring>
__device__ void fill_ring(Ring &ring, const step_product &p, unsigned tile, int steps)
{
    const int r = lane_id() / STREAM_LANES;
    ring_feed<format> feed;
    feed.start(tile_row<kind>(p, tile, r), tile_row<kind>(p, tile, r + 8),
               static_cast<int>(p.w.row_bytes));
#pragma unroll
    for (int d = 0; d < DEPTH; d++, feed.advance())
        if (d < steps)
            ring.put(feed);
        else
            ring.put_none();
}

/* What a tile's sums are added to; for a router's work there is routed.load_weight(), too. */
template <int N, tile_of kind>
__device__ void load_tile(const step_product &p, const router_work &router, unsigned tile,
                          int T, tile_output<N, kind> &output, routed_rows &routed)
{
    if (kind == tile_of::HALVES && router.sums != nullptr)
        routed.load_residual(p, tile);
    else
        output.load(p, tile, T);
}

template <int N, tile_of kind, bool logits>
__device__ void store_tile(const step_product &p, const router_work &router, unsigned tile,
                           int T, const tile_output<N, kind> &output, const routed_rows &routed,
                           const router_share &share, const float *sums)
{
    if (logits && p.peaks != nullptr)
        output.store_logits(p, tile, T, sums);
    else if (kind == tile_of::HALVES && router.sums != nullptr)
        routed.store(p, router, share, tile, sums);
    else
        output.store(p, tile, T, sums);
}

template <kl_weight_format format, int N, tile_of kind, bool logits, kl_weight_format scales,
          x_as numbers>
__device__ void multiply_tile(const step_product &p, unsigned tile, int T,
                              const step_rows<scales, numbers> &x, float *sums,
                              typename step_rows<scales, numbers>::ring_type &ring,
                              tile_walk<scales, kind> &walk, const router_share &share)
{
    const router_work &router = walk.a.router;
    bool odd[2];
    odd_scales<format, kind>(odd, p, tile);
    tile_output<N, kind> output;
    routed_rows routed;
    if constexpr (kind == tile_of::HALVES) routed.load_weight(router, tile);
    load_tile<N, kind>(p, router, tile, T, output, routed);
    step_sums<format, N, scales, numbers> own(x, kind == tile_of::HALVES ? 2 * T : T);
    for (int s = ring_steps(static_cast<int>(p.w.row_bytes)); s > 0; s--) {
        own.add(ring.template take<format>(odd));
        walk.put(ring);
    }
    own.template share<kind>(sums);
    __syncthreads();
    store_tile<N, kind, logits>(p, router, tile, T, output, routed, share, sums);
}

/* Of the two formats that with scales. */
template <kl_weight_format first, kl_weight_format second>
constexpr kl_weight_format SCALES = weight_codec<first>::GROUP > 0 ? first : second;

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, x_as numbers>
__global__
__launch_bounds__(STREAM_THREADS, (FITTING<second, numbers>)) void product_step_kernel(
    const __grid_constant__ step_arguments a)
{
    using rows_type = step_rows<SCALES<first, second>, numbers>;
    using ring_type = typename rows_type::ring_type;
    constexpr bool logits = kind == tile_of::ROWS && first == second; /* may have peaks */
    extern __shared__ __align__(128) unsigned char shared[];
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums =
        reinterpret_cast<float *>(x.plain.data + rows_type::bytes_of(a.x.T, a.x.cols));
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    tile_walk<SCALES<first, second>, kind> walk(a);
#pragma unroll 1
    for (int d = 0; d < STEPS_AHEAD<SCALES<first, second>, numbers>; d++) walk.put(ring);
    router_share share; /* of the tile that comes first, then of the next one */
    if constexpr (kind == tile_of::HALVES) share.load(a.router, blockIdx.x * SHARE_ROWS);
    const held_norm<STREAM_THREADS> norm(a.x);
    wait_for_inputs();
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one,
                         and the next ones may rely on it (arriving.cuh) */
    if constexpr (kind == tile_of::HALVES)
        copy_halves<STREAM_THREADS, false>(x.plain, a.x);
    else
        bring_rows<STREAM_THREADS>(x.plain, a.x, norm, sums);
    __syncthreads();
    x.finish();
    const int T = kind == tile_of::HALVES ? a.x.T / 2 : a.x.T;
    float *own = sums; /* this tile's: those of the one before are being read */
    for (unsigned t = blockIdx.x; t < a.tiles; t += gridDim.x) {
        own = own == sums ? sums + tile_sums<N, kind>::FLOATS : sums;
        unsigned tile = t;
        const step_product &p = product_of(a, tile);
        if (first == second || t < a.first_tiles) /* one piece of code where one will do */
            multiply_tile<first, N, kind, logits>(p, tile, T, x, own, ring, walk, share);
        else
            multiply_tile<second, N, kind, logits>(p, tile, T, x, own, ring, walk, share);
        if (const unsigned next = t + gridDim.x; kind == tile_of::HALVES && next < a.tiles)
            share.load(a.router, next * SHARE_ROWS);
    }
}

/* Tiles of halves, one a block, whose weights are all in the rings before x is there: no more is
 * asked for, and nothing but products stands between x and the sums. */
template <kl_weight_format format, x_as numbers, bool arriving>
__global__
__launch_bounds__(STREAM_THREADS, (FITTING<format, numbers>)) void product_held_kernel(
    const __grid_constant__ step_arguments a)
{
    constexpr tile_of kind = tile_of::HALVES;
    using rows_type = step_rows<format, numbers>;
    using ring_type = typename rows_type::ring_type;
    extern __shared__ __align__(128) unsigned char shared[];
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums =
        reinterpret_cast<float *>(x.plain.data + rows_type::bytes_of(a.x.T, a.x.cols));
    const unsigned tile = blockIdx.x;
    const int steps = ring_steps(static_cast<int>(a.first.w.row_bytes));
    bool odd[2];
    odd_scales<format, kind>(odd, a.first, tile);
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    fill_ring<format, kind, STEPS_AHEAD<format, numbers>>(ring, a.first, tile, steps);
    router_share share;
    share.load(a.router, tile * SHARE_ROWS);
    routed_rows routed;
    routed.load_weight(a.router, tile);
    step_sums<format, 1, format, numbers> own(x, a.x.T);
    tile_output<1, kind> output;
    if constexpr (arriving) {
        load_tile<1, kind>(a.first, a.router, tile, 1, output, routed);
        await_some<STREAM_THREADS>(a.x);
    } else {
        wait_for_inputs();
    }
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one */
    if constexpr (!arriving) load_tile<1, kind>(a.first, a.router, tile, 1, output, routed);
    copy_halves<STREAM_THREADS, arriving>(x.plain, a.x);
    copy_wait<0>();
    __syncthreads();
    add_held<HELD_AT_ONCE<format>, format>(own, ring, odd, steps);
    own.template share<kind>(sums);
    __syncthreads();
    store_tile<1, kind, false>(a.first, a.router, tile, 1, output, routed, share, sums);
    if constexpr (arriving) wait_for_inputs();
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
template <kl_weight_format scales, x_as numbers, int SUMS> size_t bytes_of(const row_source &x)
{
    using rows_type = step_rows<scales, numbers>;
    return rows_type::ring_type::BYTES + static_cast<size_t>(rows_type::bytes_of(x.T, x.cols)) +
           2 * SUMS * sizeof(float);
}

/* Whether x is also made other numbers. */
bool has_own(kl_backend *be, const kl_cuda_product *p)
{
    if (reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant || p->T != 1) return false;
    return with_format(p->w.format, [&](auto f) {
        if constexpr (IS_QUANTISED<f.value>)
            return p->w.cols >= LEAST_OWN_COLS<f.value> &&
                   bytes_of<f.value, x_as::OWN, STREAM_FLOATS<1>>(row_source_of(p)) <=
                       RING_MOST_SHARED;
        return false;
    });
}

step_product step_of(const kl_cuda_product *p)
{
    return {
        .w = weight_view_of(p->w),
        .up = is_gated(p) ? weight_view_of(p->up) : weight_view{},
        .out = p->out,
        .residual = p->residual,
        .peaks = reinterpret_cast<peak *>(p->peaks),
        .out_stride = p->residual == nullptr ? p->out_stride : p->w.rows,
        .out_is_bf16 = p->out_dtype == KL_BF16,
    };
}

bool is_unsettled(const kl_cuda_product *p)
{
    return p->w.unsettled || p->up.unsettled ||
           (p->ahead.sums != nullptr && p->ahead.router.unsettled);
}

router_work router_of(const kl_cuda_product *p)
{
    return {
        .router = static_cast<const float *>(p->ahead.router.data),
        .norm_weight = static_cast<const float *>(p->ahead.norm_weight.data),
        .sums = static_cast<router_sums *>(p->ahead.sums),
        .E = static_cast<int>(p->ahead.router.rows),
        .D = static_cast<int>(p->w.rows),
    };
}

/* As the kernel takes it, x and the weight by halves of their columns. */
void halve(step_arguments &a)
{
    a.x.T = 2, a.x.cols /= 2, a.x.stride = a.x.cols;
    weight_view &w = a.first.w;
    w.cols /= 2, w.row_bytes /= 2, w.groups /= 2;
    a.tiles = a.first_tiles *= 2;
}

/* The most blocks of a launch, with so much shared memory each. */
template <tile_of kind> kl_status most_blocks(size_t shared, unsigned *most, kl_error *err)
{
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    const bool three = kind == tile_of::HALVES && shared <= HALF_SHARED;
    *most = static_cast<unsigned>(multiprocessors) * (three ? HALF_BLOCKS : RING_BLOCKS);
    return KL_OK;
}

/* Of tiles of halves: whether each is a block's only one, and all in its ring. */
template <kl_weight_format format, x_as numbers>
bool is_held(const step_arguments &a, unsigned most)
{
    return a.tiles <= most && a.first.w.row_bytes <= STEPS_AHEAD<format, numbers> * RING_TURN;
}

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, x_as numbers>
kl_status launch(kl_backend *be, const step_arguments &a, kl_error *err)
{
    auto kernel = product_step_kernel<first, second, N, kind, numbers>;
    const size_t shared =
        bytes_of<SCALES<first, second>, numbers, tile_sums<N, kind>::FLOATS>(a.x);
    unsigned most;
    KL_TRY(most_blocks<kind>(shared, &most, err));
    if constexpr (kind == tile_of::HALVES)
        if (is_held<first, numbers>(a, most))
            kernel = a.arriving ? product_held_kernel<first, numbers, true>
                                : product_held_kernel<first, numbers, false>;
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, STREAM_THREADS, shared,
                          kl_cuda_stream(be), err, a);
}

template <kl_weight_format first, kl_weight_format second, tile_of kind>
kl_status launch_for(kl_backend *be, const step_arguments &a, bool own, kl_error *err)
{
    if constexpr (IS_QUANTISED<second>)
        if (own) return launch<first, second, 1, kind, x_as::OWN>(be, a, err);
    return a.x.T <= STREAM_TOKENS ? launch<first, second, 1, kind, x_as::BF16>(be, a, err)
                                  : launch<first, second, 2, kind, x_as::BF16>(be, a, err);
}

/* What x is for tiles of halves. */
template <kl_weight_format format>
constexpr x_as HALVED = IS_QUANTISED<format> ? x_as::HALVES : x_as::BF16;

step_arguments arguments_of(const kl_cuda_product *p, bool halved)
{
    const unsigned tiles = static_cast<unsigned>(tiles_of(p));
    step_arguments a = {row_source_of(p), step_of(p),  step_of(p),  tiles, tiles,
                        is_unsettled(p),  p->arriving, router_of(p)};
    if (halved) halve(a);
    return a;
}

} // namespace

bool kl_cuda_product_step_takes(const kl_cuda_product *p)
{
    return p->T <= 2 * STREAM_TOKENS && p->w.rows <= MOST_ROWS &&
           with_format(p->w.format, [&](auto f) {
               const row_source x = row_source_of(p);
               const size_t bytes = p->T <= STREAM_TOKENS
                                        ? bytes_of<f.value, x_as::BF16, STREAM_FLOATS<1>>(x)
                                        : bytes_of<f.value, x_as::BF16, STREAM_FLOATS<2>>(x);
               return bytes <= RING_MOST_SHARED;
           });
}

bool kl_cuda_product_step_halves(kl_backend *be, const kl_cuda_product *p)
{
    return kl_cuda_product_step_takes(p) && is_halved(be, p);
}

/* Tiles of halves are at most HALF_TILES, and so are their blocks. There are two of them for 16 rows,
 * and each adds its 8 rows to the sums: none may lie past the last. */
bool kl_cuda_product_step_routes(kl_backend *be, const kl_cuda_product *p)
{
    static_assert(HALF_TILES <= MOST_BLOCKS && STREAM_THREADS == SUMMED_EXPERTS);
    static_assert(EACH_OF<tile_of::HALVES> == SHARE_ROWS);
    const kl_weight &router = p->ahead.router;
    return kl_cuda_product_step_halves(be, p) && p->adds && p->w.rows % STREAM_ROWS == 0 &&
           router.format == KL_W_F32 && router.rows <= SUMMED_EXPERTS &&
           router.cols == p->w.rows && has_pieces(weight_view_of(router));
}

kl_status kl_cuda_product_step_holds(kl_backend *be, const kl_cuda_product *p, bool *holds,
                                     kl_error *err)
{
    *holds = kl_cuda_product_step_halves(be, p);
    if (!*holds) return KL_OK;
    const step_arguments a = arguments_of(p, true);
    return with_format(p->w.format, [&](auto f) {
        constexpr x_as numbers = HALVED<f.value>;
        constexpr int SUMS = tile_sums<1, tile_of::HALVES>::FLOATS;
        unsigned most;
        KL_TRY(most_blocks<tile_of::HALVES>(bytes_of<f.value, numbers, SUMS>(a.x), &most, err));
        *holds = is_held<f.value, numbers>(a, most);
        return KL_OK;
    });
}

kl_status kl_cuda_product_step(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const bool halved = is_halved(be, p), own = has_own(be, p);
    const step_arguments a = arguments_of(p, halved);
    return with_format(p->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        if (halved) return launch<w, w, 1, tile_of::HALVES, HALVED<w>>(be, a, err);
        return is_gated(p) ? launch_for<w, w, tile_of::PAIRS>(be, a, own, err)
                           : launch_for<w, w, tile_of::ROWS>(be, a, own, err);
    });
}

kl_status kl_cuda_product_step_pair(kl_backend *be, const kl_cuda_product *first,
                                    const kl_cuda_product *second, kl_error *err)
{
    step_arguments a = arguments_of(first, false);
    a.second = step_of(second);
    a.tiles += static_cast<unsigned>(tiles_of(second));
    a.unsettled |= is_unsettled(second);
    const bool own = has_own(be, second);
    return with_format(second->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        return first->w.format == w ? launch_for<w, w, tile_of::ROWS>(be, a, own, err)
                                    : launch_for<KL_W_BF16, w, tile_of::ROWS>(be, a, own, err);
    });
}
