/*
 * moe.cuh -- what the kernels of moe_experts share: rows of (token, choice) pairs sorted by
 * expert, cut into tiles, and a product of every tile with its expert's matrix.
 */
#ifndef KL_CUDA_DEVICE_MOE_H
#define KL_CUDA_DEVICE_MOE_H

#include "../tiles.h"
#include "route.cuh"
#include "weight.cuh"

extern "C" {
#include "backend/moe.h"
}

/* out = x w^T, or silu(x w^T) * (x up^T) in the gated product, for rows [first, first + n) of
 * each matrix: column i of out is row first + i. */
struct moe_operand {
    weight_view w, up; /* up unused in the plain product               */
    kl_weight_format format, up_format;
    const void *x;   /* [., w.cols] act                                */
    const int *rows; /* row of x for each row of out; null: the same   */
    void *out;       /* [., n]: act if gated, else f32                 */
    int64_t first, n;
    int64_t count; /* matrices of the stack                          */
};

struct moe_product {
    moe_operand routed, shared;
    const moe_tile *tiles;
    int64_t n_tiles;    /* with the surplus, which has no rows            */
    const int *surplus; /* how many of the last tiles are; null: none     */
    int64_t groups;     /* blocks for a tile; the launcher's own          */
};

__device__ inline moe_tile tile_of_block(const moe_product &p)
{
    return p.tiles[blockIdx.x / p.groups];
}

__device__ inline int64_t group_of_block(const moe_product &p)
{
    return blockIdx.x % p.groups;
}

__device__ inline const moe_operand &operand_of(const moe_product &p, const moe_tile &tile)
{
    return tile.expert == MOE_SHARED ? p.shared : p.routed;
}

/* Row of the stack where the tile's matrix begins, less what the operand leaves out. */
__device__ inline int64_t first_weight_row(const moe_operand &o, const moe_tile &tile)
{
    return (tile.expert == MOE_SHARED ? 0 : tile.expert * o.w.rows) + o.first;
}

/* Row of x for row i of a tile. */
__device__ inline int64_t source_row(const moe_operand &o, const moe_tile &tile, int i)
{
    return o.rows == nullptr ? tile.first + i : o.rows[tile.first + i];
}

/* Host: the grid of a product whose blocks take `width` weight rows each. */
inline kl_status moe_grid(moe_product &p, int64_t width, unsigned *blocks, kl_error *err)
{
    const int64_t widest = p.routed.n > p.shared.n ? p.routed.n : p.shared.n;
    p.groups = (widest + width - 1) / width;
    if (p.n_tiles > 0x7fffffff / p.groups)
        return kl_fail(err, KL_ERR_VALUE,
                       "moe_experts: tiles * rows / %lld must fit a grid, got %lld * %lld",
                       static_cast<long long>(width), static_cast<long long>(p.n_tiles),
                       static_cast<long long>(p.groups));
    *blocks = static_cast<unsigned>(p.n_tiles * p.groups);
    return KL_OK;
}

/* What moe_experts_plan.cu is asked for, pairs = tokens * top_k of them at least one. */
struct moe_plan {
    const int *ids;  /* [pairs]                                  */
    int *tokens;     /* [pairs] the token of each sorted pair    */
    int *places;     /* [pairs] where each pair was sorted to    */
    moe_tile *tiles; /* the shared expert's, then the routed ones', then the surplus */
    int *surplus;
    int *counts; /* scratch, [kl_cuda_moe_plan_counts()]     */
    int pairs, top_k, E, tile;
    int routed_tiles;              /* the bound                                 */
    int shared_rows, shared_tiles; /* tokens and tiles, 0 without a shared expert */
};

int64_t kl_cuda_moe_plan_counts(int64_t pairs, int64_t E);
kl_status kl_cuda_moe_plan(const moe_plan &p, cudaStream_t stream, kl_error *err);

/* A way to do the product: tiles of at most `tile` rows. The formats and dimensions that each
 * takes are written in its file; the general one takes all. */
struct moe_path {
    int tile;
    kl_status (*run)(moe_product p, bool gated, kl_dtype act, cudaStream_t stream,
                     kl_error *err);
};

struct router_sums;

/* A single token's experts, without a plan. Their ids and weights come from the call, or where
 * there are logits, of at most FEW_EXPERTS experts in one group whose scores are sigmoids, from
 * these by the kernels' own choice; the result goes out or to a residual. */
struct moe_step {
    const kl_moe_experts *experts;
    const float *logits; /* or null */
    router_sums *sums;   /* or null: then in place of logits and of the experts' x */
    float norm_eps;      /* with sums */
    route_rule rule;
    float *residual; /* or null */
    bool apart;      /* with the bits of the other paths: each expert's sum by itself */
};

/* moe_experts, whose y is added to a residual [T, D] instead, if there is one. */
kl_status kl_cuda_moe_experts_to(kl_backend *be, const kl_moe_experts *a, float *residual,
                                 kl_error *err);

bool kl_cuda_moe_is_step(const kl_moe_experts *a);    /* whether they are for it */
bool kl_cuda_moe_step_takes(const kl_moe_experts *a); /* of what tensor cores take */
kl_status kl_cuda_moe_step_run(const moe_step &s, cudaStream_t stream, kl_error *err);

/* The ordered ones have the bits of the second, the last two have not. */
extern const moe_path kl_moe_general, kl_moe_few, kl_moe_ordered, kl_moe_ordered_quantised,
    kl_moe_some, kl_moe_many;

/* What few does where x does not fit in shared memory. */
kl_status kl_cuda_moe_stream(moe_product p, bool gated, cudaStream_t stream, kl_error *err);

#endif
