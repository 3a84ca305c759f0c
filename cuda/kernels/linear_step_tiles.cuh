/*
 * linear_step_tiles.cuh -- the outputs of a tile of linear_step.cu: how the sums of the block's
 * warps meet, and where they go.
 */
#ifndef KL_CUDA_KERNELS_LINEAR_STEP_TILES_H
#define KL_CUDA_KERNELS_LINEAR_STEP_TILES_H

#include "../device/peaks.cuh"
#include "../device/ring.cuh"
#include "../device/router_sums.cuh"

namespace {

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
    peak *peaks;     /* [T, tiles], or null: then of rows of one product */
    int64_t out_stride;
    bool out_is_bf16;
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
    float before = 0; /* of a residual: asked for long before it is needed */

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

    __device__ void load(const step_product &p, unsigned tile, int T)
    {
        if (ADDS && p.residual != nullptr && is_inside(p, tile, T))
            before = __ldcg(p.residual + place(p, tile)); /* see arriving.cuh, as below */
    }

    __device__ void store(const step_product &p, unsigned tile, int T, const float *sums) const
    {
        if (!is_inside(p, tile, T)) return;
        const int64_t at = place(p, tile);
        const float y = tile_sums<N, kind>::sum(sums, token(), row());
        if (ADDS && p.residual != nullptr)
            p.residual[at] = before + to_float(from_float<bf16>(y));
        else if (p.out_is_bf16)
            store_arriving(static_cast<bf16 *>(p.out) + at, y);
        else
            static_cast<float *>(p.out)[at] = y;
    }

    /* With the peak of each token's 16 rows; a warp without a token does nothing. */
    __device__ void store_logits(const step_product &p, unsigned tile, int T,
                                 const float *sums) const
    {
        static_assert(EACH_OF<tile_of::ROWS> == PEAK && WARP % PEAK == 0);
        if (warp_id() * (WARP / PEAK) >= T) return;
        const bool inside = is_inside(p, tile, T);
        const float y = tile_sums<N, kind>::sum(sums, token(), row());
        const peak own = peak_of(inside ? y : -INFINITY);
        const int64_t count = peaks_of(static_cast<uint32_t>(p.w.rows));
        if (inside) static_cast<float *>(p.out)[place(p, tile)] = y;
        if (inside && row() == 0) p.peaks[token() * count + tile] = own;
    }
};

/* Of a single token's residual that a router follows every warp finds out all rows of a tile, lane
 * l row l % 8, so that the router's sums wait for no other barrier. */
struct routed_rows {
    using sums_type = tile_sums<1, tile_of::HALVES>;
    float before = 0, weight = 0;

    static __device__ int row(unsigned tile)
    {
        return static_cast<int>(tile) * SHARE_ROWS + lane_id() % SHARE_ROWS;
    }

    /* Before the wait, as the router's columns; */
    __device__ void load_weight(const router_work &router, unsigned tile)
    {
        if (router.sums != nullptr) weight = router.norm_weight[row(tile)];
    }

    /* and after it. */
    __device__ void load_residual(const step_product &p, unsigned tile)
    {
        before = __ldcg(p.residual + row(tile));
    }

    __device__ void store(const step_product &p, const router_work &router,
                          const router_share &share, unsigned tile, const float *sums) const
    {
        const float y = sums_type::sum(sums, 0, lane_id() % SHARE_ROWS);
        const float x = before + to_float(from_float<bf16>(y));
        if (threadIdx.x < SHARE_ROWS) p.residual[row(tile)] = x;
        share.add(router, static_cast<int>(tile) * SHARE_ROWS, x, weight);
    }
};

struct step_arguments {
    row_source x;
    step_product first, second;
    unsigned first_tiles, tiles; /* of the first product, of both */
    bool unsettled;              /* one of the weights, or the router */
    bool arriving;               /* x: of product_held_kernel */
    router_work router;          /* of tiles of halves that add to a residual */
};

/* Whose the tile is; `tile` becomes its number in that product. */
__device__ inline const step_product &product_of(const step_arguments &a, unsigned &tile)
{
    if (tile < a.first_tiles) return a.first;
    tile -= a.first_tiles;
    return a.second;
}

} // namespace

#endif
