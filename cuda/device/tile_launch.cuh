/*
 * tile_launch.cuh -- host: the operands of a kernel of tiles (tile_ring.cuh) from those of
 * kl_cuda_tile_product, and its launch.
 */
#ifndef KL_CUDA_DEVICE_TILE_LAUNCH_H
#define KL_CUDA_DEVICE_TILE_LAUNCH_H

#include "launch.cuh"
#include "tile_ring.cuh"

#include <limits.h>

/* Boxes of 64 rows by a step of the matrix of bytes that the stack is. */
template <class S> kl_status map_weights(const kl_weight &w, box_map *map, kl_error *err)
{
    const box_matrix stack = {
        .data = w.data,
        .rows = w.count * w.rows,
        .row_bytes = static_cast<int64_t>(kl_weight_row_bytes(w.format, w.cols)),
        .box_rows = TILE_ROWS / 2,
        .box_bytes = S::W_ROW_BYTES,
        .element_bytes = 1,
        .swizzled = S::W_SWIZZLED,
    };
    return kl_cuda_map_boxes(stack, map, err);
}

template <class S>
kl_status operand_from(const kl_cuda_tile_operand &from, kl_dtype out_dtype, tile_operand *to,
                       kl_error *err)
{
    const bool gated = from.up.data != nullptr;
    const kl_weight &second = gated ? from.up : from.w;
    if (from.w.count > INT_MAX / from.w.rows)
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: rows of all matrices must be < 2^31, got %lld",
                       static_cast<long long>(from.w.count * from.w.rows));
    KL_TRY(map_weights<S>(from.w, &to->maps[0], err));
    KL_TRY(map_weights<S>(second, &to->maps[1], err));
    to->scales[0] = reinterpret_cast<const bf16 *>(from.w.scales);
    to->scales[1] = reinterpret_cast<const bf16 *>(second.scales);
    to->matrix_rows = from.w.rows;
    to->first = from.first;
    to->n = from.n;
    to->K = from.w.cols;
    to->groups = kl_weight_groups(S::FORMAT, from.w.cols);
    to->x = static_cast<const bf16 *>(from.x);
    to->x_stride = from.x_stride;
    to->rows = from.rows;
    to->out = from.out;
    to->out_stride = from.out_stride;
    to->pairs =
        is_aligned(from.out, from.out_stride, kl_dtype_bytes(out_dtype), 2 * sizeof(bf16));
    return KL_OK;
}

template <class S>
kl_status arguments_from(const kl_cuda_tile_product *p, int64_t width, tile_arguments *a,
                         kl_error *err)
{
    const int64_t widest = p->routed.n > p->shared.n ? p->routed.n : p->shared.n;
    const int64_t groups = (widest + width - 1) / width;
    /* Tiles of about one size; `tiles` holds such already. */
    const int64_t tile = p->tiles != nullptr ? 0 : (p->T + p->n_tiles - 1) / p->n_tiles;
    if (p->n_tiles > (INT_MAX - 1024) / groups || p->T > INT_MAX - MOST_TILE_ROWS)
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: tiles * rows / %lld must be < 2^31, got %lld * %lld",
                       static_cast<long long>(width), static_cast<long long>(p->n_tiles),
                       static_cast<long long>(groups));
    KL_TRY(operand_from<S>(p->routed, p->out_dtype, &a->routed, err));
    KL_TRY(operand_from<S>(p->shared, p->out_dtype, &a->shared, err));
    a->tiles = p->tiles;
    a->surplus = p->surplus;
    a->n_tiles = static_cast<int>(p->n_tiles);
    a->groups = static_cast<int>(groups);
    a->tile = static_cast<int>(tile);
    a->T = static_cast<int>(p->T);
    return KL_OK;
}

/* A block a multiprocessor, or one an item. */
template <class S, class K>
kl_status launch_tiles(K kernel, int64_t width, const kl_cuda_tile_product *p,
                       cudaStream_t stream, kl_error *err)
{
    constexpr int BYTES = S::SHARED_BYTES;
    tile_arguments a;
    int multiprocessors;
    KL_TRY(arguments_from<S>(p, width, &a, err));
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, BYTES, err));
    const int items = a.n_tiles * a.groups;
    const unsigned blocks =
        static_cast<unsigned>(items < multiprocessors ? items : multiprocessors);
    return kl_cuda_launch(kernel, blocks, TILE_THREADS, BYTES, stream, err, a);
}

#endif
