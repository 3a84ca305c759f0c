/*
 * moe_experts_few.cu -- the products of moe_experts for few tokens an expert: a decode step.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]; K and N multiples of 64; where
 *              8 rows of x do not fit in shared memory, moe_experts_stream.cu
 * Layout       dense, 16-byte aligned rows; w and up of one format
 * Precision    x bf16; int4 weights to bf16, the others exact; f32 sums; out bf16 gated, f32
 *              plain
 * Grid         blocks that stay, two a multiprocessor. An item is a tile of up to 8 tokens by 16
 *              rows of its matrix; a block has one run of all items, most of them of one tile, so
 *              that rows of x come to shared memory once or twice. Weights come through a ring
 *              (device/ring.cuh), across the ends of items. The plain product finds its tiles, and
 *              its first weights, while the gated one before it ends
 * Order        an element: a warp's columns in rising order, then the warps in order
 * Roofline     bytes = the weights of the experts chosen, read once for every 8 tokens
 * Measured     H200, the whole operation (bf16, 256 experts, 8 chosen and a shared one, D =
 *              2304, I = 1024): T = 2 70 us, 8 204, 16 346, 32 540 (4.25 TB/s) (2026-11-22)
 */
#include "../device/moe.cuh"
#include "../device/ring.cuh"

namespace {

/* Steps on their way: what leaves room for x in two blocks a multiprocessor. */
template <kl_weight_format format>
constexpr int DEPTH = weight_codec<format>::GROUP > 0 ? 6 : RING_DEPTH;

template <kl_weight_format format> using few_ring = weight_ring<format, DEPTH<format>>;

constexpr int64_t MAX_COLS = 1 << 20;                         /* sizes stay within an int */
constexpr size_t SUMS = 2 * STREAM_FLOATS<1> * sizeof(float); /* of two items in turn */
static_assert(SUMS % 128 == 0, "rows of x lie behind them");

/* ---- the items of a block -------------------------------------------------------------- */

template <bool gated> struct few_place {
    static constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS; /* rows of a matrix */
    const moe_product &p;
    int64_t left;  /* items of the block from this one on */
    int at, group; /* the tile; which of its matrix' rows */
    moe_tile tile;

    __device__ explicit few_place(const moe_product &product) : p(product), tile{}
    {
        const int64_t surplus = p.surplus == nullptr ? 0 : __ldcg(p.surplus);
        const int64_t items = (p.n_tiles - surplus) * p.groups;
        const int64_t first = items * blockIdx.x / gridDim.x;
        left = items * (blockIdx.x + 1) / gridDim.x - first;
        at = static_cast<int>(first / p.groups);
        group = static_cast<int>(first % p.groups);
        load();
    }

    /* Past the L1, which only a wait cleans: the plan may be younger than this block. */
    __device__ void load()
    {
        if (left <= 0) return;
        const int *const from = &p.tiles[at].expert;
        tile = {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2)};
    }

    __device__ void advance()
    {
        left--;
        if (++group < p.groups) return;
        group = 0, at++;
        load();
    }

    __device__ const moe_operand &operand() const { return operand_of(p, tile); }

    __device__ int64_t column() const { return int64_t{group} * EACH; }

    /* Not of rows that one of the operands does not have. */
    __device__ bool has_work() const { return column() < operand().n; }

    __device__ int row_bytes() const { return static_cast<int>(operand().w.row_bytes); }

    /* Of one matrix, or half from each of two. */
    __device__ weight_row row(int i) const
    {
        const moe_operand &o = operand();
        return row_of(gated && i >= EACH ? o.up : o.w,
                      first_weight_row(o, tile) + column() + i % EACH);
    }
};

/* What the ring is to hold next: this warp's steps of the block's items. */
template <kl_weight_format format, bool gated> struct few_walk {
    few_place<gated> next;
    int steps = 0; /* of the item, still to be asked for */
    ring_feed<format> feed;

    __device__ explicit few_walk(const moe_product &p) : next(p) { enter(); }

    /* The next item from here on that has a step for this warp. */
    __device__ void enter()
    {
        for (; next.left > 0; next.advance()) {
            steps = next.has_work() ? ring_steps(next.row_bytes()) : 0;
            if (steps == 0) continue;
            const int r = lane_id() / STREAM_LANES;
            feed.start(next.row(r), next.row(r + 8), next.row_bytes());
            return;
        }
    }

    __device__ void put(few_ring<format> &ring)
    {
        if (steps == 0) return ring.put_none();
        ring.put(feed);
        feed.advance();
        if (--steps > 0) return;
        next.advance();
        enter();
    }
};

/* ---- an item --------------------------------------------------------------------------- */

/* A tile's rows of x to shared memory, zeros behind them. All of a thread's loads are under way
 * before it waits for one: of the model's 8 rows of 2304 columns each has nine. */
template <bool gated>
__device__ void gather_rows(const shared_rows &to, const few_place<gated> &item)
{
    constexpr unsigned AT_ONCE = 9;
    const moe_operand &o = item.operand();
    const unsigned units = to.pitch / 16, all = item.tile.n * units;
#pragma unroll 1
    for (unsigned first = threadIdx.x; first < all; first += AT_ONCE * STREAM_THREADS) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            const unsigned unit = first + i * STREAM_THREADS, t = unit / units;
            const unsigned u = unit % units;
            v[i] = uint4{};
            if (unit >= all || 8 * u >= o.w.cols) continue;
            const int64_t row = source_row(o, item.tile, static_cast<int>(t));
            v[i] = *reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(o.x) +
                                                    row * o.w.cols + 8 * u);
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            const unsigned unit = first + i * STREAM_THREADS;
            if (unit < all) *to.unit(static_cast<int>(unit / units), unit % units) = v[i];
        }
    }
}

template <bool gated>
__device__ void store_item(const few_place<gated> &item, const float *sums)
{
    constexpr int EACH = few_place<gated>::EACH;
    const int i = threadIdx.x % EACH, t = threadIdx.x / EACH;
    if (t >= item.tile.n) return;
    const moe_operand &o = item.operand();
    const int64_t at = (item.tile.first + t) * o.n + item.column() + i;
    const float sum = stream_sum<1>(sums, t, i);
    if constexpr (gated)
        static_cast<bf16 *>(o.out)[at] =
            from_float<bf16>(silu(sum) * stream_sum<1>(sums, t, i + EACH));
    else
        static_cast<float *>(o.out)[at] = sum;
}

template <kl_weight_format format, bool gated>
__device__ void multiply_item(const few_place<gated> &item, const shared_rows &x, float *sums,
                              few_ring<format> &ring, few_walk<format, gated> &walk)
{
    const int r = lane_id() / STREAM_LANES;
    const bool odd[2] = {ring_feed<format>::odd(item.row(r)),
                         ring_feed<format>::odd(item.row(r + 8))};
    float acc[1][4] = {};
    ring_x<format, 1> columns(x, item.tile.n);
    for (int n = ring_steps(item.row_bytes()); n > 0; n--) {
        ring_multiply<format, 1>(acc, ring.template take<format>(odd), columns);
        columns.advance();
        walk.put(ring);
    }
    stream_share<1>(sums, acc);
    __syncthreads();
    store_item(item, sums);
}

/* ---- kernel ---------------------------------------------------------------------------- */

template <kl_weight_format format, bool gated>
__global__ __launch_bounds__(STREAM_THREADS, RING_BLOCKS) void moe_few_kernel(
    __grid_constant__ const moe_product p, const int pitch)
{
    extern __shared__ __align__(128) unsigned char shared[];
    float *const sums = reinterpret_cast<float *>(shared + few_ring<format>::BYTES);
    const shared_rows x = {shared + few_ring<format>::BYTES + SUMS, pitch};
    few_ring<format> ring(shared);
    /* The plain product starts when all blocks of the gated one have waited for the plan: that is
     * complete then. */
    if constexpr (gated) wait_for_inputs();
    few_walk<format, gated> walk(p);
#pragma unroll 1
    for (int d = 0; d < DEPTH<format>; d++) walk.put(ring);
    wait_for_inputs();
    let_next_start();
    float *own = sums; /* this item's: those of the one before are being read */
    int held = -1;     /* the tile whose rows x has */
    for (few_place<gated> item(p); item.left > 0; item.advance()) {
        if (!item.has_work()) continue;
        if (item.at != held) { /* all warps are past the barrier in the item before */
            gather_rows(x, item);
            held = item.at;
            __syncthreads();
        }
        own = own == sums ? sums + STREAM_FLOATS<1> : sums;
        multiply_item<format>(item, x, own, ring, walk);
    }
}

/* ---- host ------------------------------------------------------------------------------ */

int64_t widest(const moe_product &p)
{
    return p.routed.w.cols > p.shared.w.cols ? p.routed.w.cols : p.shared.w.cols;
}

template <kl_weight_format format> size_t shared_bytes(int64_t cols)
{
    return few_ring<format>::BYTES + SUMS +
           STREAM_TOKENS * static_cast<size_t>(shared_rows::pitch_of(cols));
}

template <kl_weight_format format, bool gated>
kl_status launch(const moe_product &p, unsigned items, cudaStream_t stream, kl_error *err)
{
    const auto kernel = moe_few_kernel<format, gated>;
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    const unsigned most = static_cast<unsigned>(multiprocessors) * RING_BLOCKS;
    return kl_cuda_launch(kernel, items < most ? items : most, STREAM_THREADS,
                          shared_bytes<format>(widest(p)), stream, err, p,
                          shared_rows::pitch_of(widest(p)));
}

kl_status run_few(moe_product p, bool gated, kl_dtype, cudaStream_t stream, kl_error *err)
{
    return with_format(p.routed.format, [&](auto f) {
        if (widest(p) > MAX_COLS || shared_bytes<f.value>(widest(p)) > RING_MOST_SHARED)
            return kl_cuda_moe_stream(p, gated, stream, err);
        unsigned items;
        KL_TRY(moe_grid(p, gated ? STREAM_ROWS / 2 : STREAM_ROWS, &items, err));
        return gated ? launch<f.value, true>(p, items, stream, err)
                     : launch<f.value, false>(p, items, stream, err);
    });
}

} // namespace

const moe_path kl_moe_few = {STREAM_TOKENS, run_few};
