/*
 * tiles.cuh -- the main loop of kernels/linear_tiles.cu: a ring of steps in shared memory, the
 * warpgroup that fills it and the two that multiply.
 *
 * A tile is TILE_ROWS rows of weights by up to 320 rows of x. A step of it is STEP_K columns of
 * both: weights come by the copy engine as they are stored, rows of x from wherever they lie by
 * cp.async. Each multiplying warpgroup has 64 of the rows of weights, as operand A, from
 * registers, and all rows of x as operand B; so the number of x's rows may be any multiple of
 * 32, and quantised weights become bf16 on a way that they go anyway.
 *
 * An output is one chain of products over k = 0, 16, ..., whatever the tile: its bits depend on
 * its own row of x and row of the weight only.
 */
#ifndef KL_CUDA_DEVICE_TILES_H
#define KL_CUDA_DEVICE_TILES_H

#include "fragments.cuh"
#include "tile_ring.cuh"

/* Of a thread. A block begins with 168 each, and no more than it has can be handed over: 72 + 2 *
 * 216 = 3 * 168. Sums take 160. */
constexpr int FILL_REGISTERS = 72, MULTIPLY_REGISTERS = 216;

constexpr int X_ROW_BYTES = 2 * STEP_K;

/* A kernel's tiles, of at most ROWS rows of x, and how they cut shared memory. Where tiles are
 * narrow, weights are what there is to read: as many steps as fit are on their way. */
template <kl_weight_format format, int ROWS> struct tile_shape {
    static constexpr kl_weight_format FORMAT = format;
    static constexpr int MOST_ROWS = ROWS;
    static constexpr int X_BYTES = ROWS * X_ROW_BYTES;
    static constexpr int W_ROW_BYTES = step_bytes<format>;
    static constexpr bool W_SWIZZLED = true;
    static constexpr int W_BYTES = TILE_ROWS * W_ROW_BYTES;
    static constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
    static constexpr int STAGES =
        ROWS == MOST_TILE_ROWS ? 4 : (MOST_SHARED - ALIGNED) / (STAGE_BYTES + SLOT_BARRIERS);
    static constexpr int LAG =
        STAGES / 2; /* steps a filler sends off before it waits for one */
    /* The barriers follow the stages; those begin at a multiple of 1024. */
    static constexpr int SHARED_BYTES = STAGES * (STAGE_BYTES + SLOT_BARRIERS) + ALIGNED;
    static_assert(STAGE_BYTES % ALIGNED == 0 && SHARED_BYTES <= MOST_SHARED);
};

__device__ inline int steps_of(const tile_operand &o)
{
    return static_cast<int>((o.K + STEP_K - 1) / STEP_K);
}

/* ---- the warpgroup that fills ---------------------------------------------------------- */

/* What a thread copies of the rows of x: one 16-byte piece of every 16th row. */
template <int ROWS> struct tile_copier {
    static constexpr int PIECES = X_ROW_BYTES / 16, STRIDE = WARPGROUP / PIECES;
    static constexpr int EACH = ROWS / STRIDE;
    const bf16 *from[EACH]; /* null past the tile's rows */

    __device__ void aim(const tile_operand &o, const moe_tile &tile)
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int row = static_cast<int>(threadIdx.x) / PIECES + i * STRIDE;
            from[i] = nullptr;
            if (row >= tile.n) continue;
            const int64_t source =
                o.rows == nullptr ? tile.first + row : o.rows[tile.first + row];
            from[i] = o.x + source * o.x_stride + threadIdx.x % PIECES * 8;
        }
    }

    /* Rows that the tile does not have keep what they held: each is a column of the product
     * that is not stored. */
    __device__ void copy(uint8_t *to, int64_t k, int64_t K) const
    {
        const int row = static_cast<int>(threadIdx.x) / PIECES, piece = threadIdx.x % PIECES;
        const bool inside = k + piece * 8 < K;
        uint8_t *const at = to + swizzled<X_ROW_BYTES>(row, piece);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (from[i] != nullptr)
                copy_async(at + i * STRIDE * X_ROW_BYTES, from[i] + k, inside);
    }
};

/* Steps that a filling thread has sent off and not yet announced. cp.async writes by another
 * way than the one wgmma reads by: hence the fence, and the lag, so that nobody waits for it. */
template <class S> struct fill_announcer {
    ring_place<S> at;
    int pending = 0;

    template <int left> __device__ void announce(barrier *full)
    {
        copy_wait<left>();
        fence_async_proxy();
        for (; pending > left; pending--) {
            barrier_arrive(full + at.slot);
            at.advance();
        }
    }
};

template <class S, bool gated>
__device__ void fill_ring(const tile_arguments &p, const tile_ring<S> &ring)
{
    ring_place<S> at;
    fill_announcer<S> sent;
    const int n_tiles = tiles_of(p);
    for (int i = blockIdx.x; i < n_tiles * p.groups; i += gridDim.x) {
        const tile_item item = item_at<gated>(p, n_tiles, i);
        const tile_operand &o = operand_of(p, item.tile);
        if (!has_work(o, item)) continue;
        const int row = first_weight_row(o, item), steps = steps_of(o);
        tile_copier<S::MOST_ROWS> rows;
        rows.aim(o, item.tile);
        for (int s = 0; s < steps; s++) {
            barrier_wait(ring.empty + at.slot, at.phase ^ 1);
            if (threadIdx.x < WARP_ARRIVALS)
                copy_weights<S, gated>(ring.w(at.slot), o, row, s, ring.full + at.slot);
            rows.copy(ring.x(at.slot), s * STEP_K, o.K);
            copy_commit();
            sent.pending++;
            if (sent.pending > S::LAG) sent.template announce<S::LAG>(ring.full);
            at.advance();
        }
    }
    sent.template announce<0>(ring.full);
}

/* ---- the warpgroups that multiply ------------------------------------------------------ */

/* N: rows of x, in one wgmma or two. */
template <int N> struct tile_split {
    static constexpr int FIRST = N <= 160 ? N : N / 64 * 32, SECOND = N - FIRST;
};

/* acc += the products of 32 columns from `k` on. */
template <int N>
__device__ __forceinline__ void multiply_half(float (&acc)[N / 2], const uint32_t (&a)[2][4],
                                              const uint8_t *x, int k)
{
    using split = tile_split<N>;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint8_t *const b = x + (k + i * 16) * 2;
        wgmma<split::FIRST>(acc, a[i], wgmma_descriptor(b));
        if constexpr (split::SECOND > 0)
            wgmma<split::SECOND>(acc + split::FIRST / 2, a[i],
                                 wgmma_descriptor(b + split::FIRST * X_ROW_BYTES));
    }
    wgmma_commit();
}

template <kl_weight_format format, bool gated>
__device__ fragment_scales<format> scales_of(const tile_operand &o, const tile_item &item,
                                             const tile_rows<gated> &rows)
{
    fragment_scales<format> scales;
    scales.groups = static_cast<int>(o.groups);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int64_t matrix = item.tile.expert == MOE_SHARED ? 0 : item.tile.expert;
        const int64_t row = o.first + item.column + rows.columns[h] + lane_id() / 4;
        scales.rows[h] = o.scales[gated ? h : 0] +
                         (matrix * o.matrix_rows + min(row, o.matrix_rows - 1)) * o.groups;
    }
    scales.fetch(0);
    return scales;
}

/* acc = the item's sums. While one half of a step is multiplied, the other's operand A is made
 * ready; a slot is handed back when both have been read. */
template <class S, bool gated, int N>
__device__ __forceinline__ void multiply_item(float (&acc)[N / 2], const tile_operand &o,
                                              const tile_item &item, const tile_ring<S> &ring,
                                              ring_place<S> &at)
{
    constexpr kl_weight_format format = S::FORMAT;
    const tile_rows<gated> rows;
    const int steps = steps_of(o);
    fragment_scales<format> scales = scales_of<format, gated>(o, item, rows);
    uint32_t low[2][4], high[2][4];
    const auto begin = [&](int step) {
        barrier_wait(ring.full + at.slot, at.phase);
        scales.arrive(step);
        load_fragments<format, 0>(low, ring.w(at.slot), rows.bases, scales);
    };
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0;
    begin(0);
#pragma unroll 1
    for (int s = 0; s < steps; s++) {
        const int slot = at.slot;
        multiply_half<N>(acc, low, ring.x(slot), 0);
        load_fragments<format, 1>(high, ring.w(slot), rows.bases, scales);
        wgmma_wait<0>();
        multiply_half<N>(acc, high, ring.x(slot), STEP_K / 2);
        at.advance();
        if (s + 1 < steps) begin(s + 1);
        wgmma_wait<0>();
        if (ALL_SPEAK || lane_id() == 0) barrier_arrive(ring.empty + slot);
    }
    wgmma_settle(acc);
}

#endif
