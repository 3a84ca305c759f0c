/*
 * product.cuh -- what the kernels of a matrix product share: a kl_cuda_product as they take it,
 * and the choice of their template from it.
 */
#ifndef KL_CUDA_DEVICE_PRODUCT_H
#define KL_CUDA_DEVICE_PRODUCT_H

#include "../product.h"
#include "weight.cuh"

struct product_arguments {
    const void *x;
    weight_view w, up;
    void *out;
    int64_t T, x_stride, out_stride;
    int64_t t_tiles; /* of tokens, which the launcher sets */
    int64_t ahead;   /* bytes of a row of the weight, asked for before x is there; likewise */
    bool out_is_bf16;
};

/* Host. */

inline bool is_gated(const kl_cuda_product *p)
{
    return p->up.data != nullptr;
}

inline product_arguments product_arguments_of(const kl_cuda_product *p)
{
    return {
        .x = p->x,
        .w = weight_view_of(p->w),
        .up = is_gated(p) ? weight_view_of(p->up) : weight_view{},
        .out = p->out,
        .T = p->T,
        .x_stride = p->x_stride,
        .out_stride = p->out_stride,
        .t_tiles = 0,
        .ahead = 0,
        .out_is_bf16 = p->out_dtype == KL_BF16,
    };
}

/* Call f with whether there is a second weight, and with the output's type, as constants:
 *     return with_output(p, [&](auto gated, auto out) { ... gated.value, decltype(out) ... }); */
template <bool gated> struct gated_constant {
    static constexpr bool value = gated;
};

template <class F> kl_status with_output(const kl_cuda_product *p, F f)
{
    return with_float_type(p->out_dtype, [&](auto out) {
        return is_gated(p) ? f(gated_constant<true>{}, out) : f(gated_constant<false>{}, out);
    });
}

/* Blocks of `t_tiles` x `o_tiles`, as a grid's x axis. */
inline kl_status product_grid(const product_arguments &a, int64_t o_tiles, unsigned *blocks,
                              kl_error *err)
{
    if (a.t_tiles > MAX_BLOCKS / o_tiles)
        return kl_fail(err, KL_ERR_VALUE, "linear: %lld x %lld outputs are too many",
                       static_cast<long long>(a.T), static_cast<long long>(a.w.rows));
    *blocks = static_cast<unsigned>(a.t_tiles * o_tiles);
    return KL_OK;
}

#endif
