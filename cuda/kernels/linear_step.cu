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
 *              warps share out the columns, and a ninth brings the weights by the copy engine
 *              (linear_step_turns.cuh). A tile with a second weight holds 8 rows of each. Of
 *              two products the first's tiles come first. Of a single token and few rows a tile
 *              is 8 rows, the halves of whose columns meet two halves of x: twice as many blocks,
 *              up to three a multiprocessor, have all of the weight on its way. Where each has
 *              one tile, all of it in its ring, product_held_kernel only waits for x, or looks
 *              at an x that is arriving (linear_step_lanes.cuh, device/arriving.cuh)
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
#include "linear_step_lanes.cuh"
#include "linear_step_turns.cuh"

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

/* Of a block, for x as the kernel takes it, without its ring and what that needs. */
template <kl_weight_format scales, x_as numbers, int SUMS> size_t bytes_of(const row_source &x)
{
    return static_cast<size_t>(whole_units(step_rows<scales, numbers>::bytes_of(x.T, x.cols))) +
           2 * SUMS * sizeof(float);
}

/* With a ring of each lane's own. */
template <kl_weight_format scales, x_as numbers, int SUMS>
size_t lanes_bytes(const row_source &x)
{
    return step_rows<scales, numbers>::ring_type::BYTES + bytes_of<scales, numbers, SUMS>(x);
}

/* Rooms for scales, of the most tiles and of the largest one. */
void add_room(const weight_view &w, step_turns *t)
{
    if (w.scales == nullptr) return;
    const int bytes = 2 * turn_scale_bytes(static_cast<int>(w.groups));
    const int rooms = turn_ring<RING_DEPTH>::rooms_of(turns_of(static_cast<int>(w.row_bytes)));
    t->room_bytes = bytes > t->room_bytes ? bytes : t->room_bytes;
    t->rooms = rooms > t->rooms ? rooms : t->rooms;
}

size_t bytes_of_turns(const step_turns &t)
{
    return turn_ring<RING_DEPTH>::BYTES + static_cast<size_t>(t.rooms) * t.room_bytes;
}

size_t bytes_of_turns(const kl_weight &w)
{
    step_turns t = {};
    add_room(weight_view_of(w), &t);
    return bytes_of_turns(t);
}

/* Whether x is also made other numbers. */
bool has_own(kl_backend *be, const kl_cuda_product *p)
{
    if (reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant || p->T != 1) return false;
    return with_format(p->w.format, [&](auto f) {
        if constexpr (IS_QUANTISED<f.value>)
            return p->w.cols >= LEAST_OWN_COLS<f.value> &&
                   bytes_of<f.value, x_as::OWN, STREAM_FLOATS<1>>(row_source_of(p)) +
                           bytes_of_turns(p->w) <=
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
template <x_as numbers> bool is_held(const step_arguments &a, unsigned most)
{
    return a.tiles <= most && a.first.w.row_bytes <= STEPS_AHEAD<numbers> * RING_TURN;
}

/* What kl_cuda_product_step() and _pair() were given. */
struct step_call {
    kl_backend *be;
    const kl_cuda_product *first, *second; /* or null */
    step_arguments a;
};

kl_status turns_from(const step_call &c, step_turns *t, kl_error *err)
{
    *t = {};
    add_room(c.a.first.w, t);
    if (c.second != nullptr) add_room(c.a.second.w, t);
    KL_TRY(map_turns(c.first->w, t->maps, err));
    if (c.second != nullptr) return map_turns(c.second->w, t->maps + 1, err);
    return is_gated(c.first) ? map_turns(c.first->up, t->maps + 1, err) : KL_OK;
}

template <kl_weight_format format, x_as numbers>
kl_status launch_halves(kl_backend *be, const step_arguments &a, kl_error *err)
{
    constexpr tile_of kind = tile_of::HALVES;
    auto kernel = product_halves_kernel<format, numbers>;
    const size_t shared = lanes_bytes<format, numbers, tile_sums<1, kind>::FLOATS>(a.x);
    unsigned most;
    KL_TRY(most_blocks<kind>(shared, &most, err));
    if (is_held<numbers>(a, most))
        kernel = a.arriving ? product_held_kernel<format, numbers, true>
                            : product_held_kernel<format, numbers, false>;
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, STREAM_THREADS, shared,
                          kl_cuda_stream(be), err, a);
}

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, x_as numbers>
kl_status launch(const step_call &c, kl_error *err)
{
    const step_arguments &a = c.a;
    unsigned most;
    const auto kernel = product_step_kernel<first, second, N, kind, numbers>;
    step_turns turns;
    KL_TRY(turns_from(c, &turns, err));
    const size_t shared =
        bytes_of<SCALES<first, second>, numbers, STREAM_FLOATS<N>>(a.x) + bytes_of_turns(turns);
    KL_TRY(most_blocks<kind>(shared, &most, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, STEP_THREADS, shared,
                          kl_cuda_stream(c.be), err, a, turns);
}

template <kl_weight_format first, kl_weight_format second, tile_of kind>
kl_status launch_for(const step_call &c, bool own, kl_error *err)
{
    if constexpr (IS_QUANTISED<second>)
        if (own) return launch<first, second, 1, kind, x_as::OWN>(c, err);
    return c.a.x.T <= STREAM_TOKENS ? launch<first, second, 1, kind, x_as::BF16>(c, err)
                                    : launch<first, second, 2, kind, x_as::BF16>(c, err);
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
           turns_take(weight_view_of(p->w)) && turns_take(weight_view_of(p->up)) &&
           with_format(p->w.format, [&](auto f) {
               const row_source x = row_source_of(p);
               const size_t lanes = least_ring<f.value>::BYTES, turns = bytes_of_turns(p->w);
               const size_t bytes = p->T <= STREAM_TOKENS
                                        ? bytes_of<f.value, x_as::BF16, STREAM_FLOATS<1>>(x)
                                        : bytes_of<f.value, x_as::BF16, STREAM_FLOATS<2>>(x);
               return bytes + (lanes > turns ? lanes : turns) <= RING_MOST_SHARED;
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
        KL_TRY(
            most_blocks<tile_of::HALVES>(lanes_bytes<f.value, numbers, SUMS>(a.x), &most, err));
        *holds = is_held<numbers>(a, most);
        return KL_OK;
    });
}

kl_status kl_cuda_product_step(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const bool halved = is_halved(be, p), own = has_own(be, p);
    const step_call c = {be, p, nullptr, arguments_of(p, halved)};
    return with_format(p->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        if (halved) return launch_halves<w, HALVED<w>>(be, c.a, err);
        return is_gated(p) ? launch_for<w, w, tile_of::PAIRS>(c, own, err)
                           : launch_for<w, w, tile_of::ROWS>(c, own, err);
    });
}

kl_status kl_cuda_product_step_pair(kl_backend *be, const kl_cuda_product *first,
                                    const kl_cuda_product *second, kl_error *err)
{
    step_call c = {be, first, second, arguments_of(first, false)};
    c.a.second = step_of(second);
    c.a.tiles += static_cast<unsigned>(tiles_of(second));
    c.a.unsettled |= is_unsettled(second);
    const bool own = has_own(be, second);
    return with_format(second->w.format, [&](auto f) {
        constexpr kl_weight_format w = f.value;
        return first->w.format == w ? launch_for<w, w, tile_of::ROWS>(c, own, err)
                                    : launch_for<KL_W_BF16, w, tile_of::ROWS>(c, own, err);
    });
}
