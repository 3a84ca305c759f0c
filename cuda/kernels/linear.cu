/*
 * linear.cu -- linear, linear_pair and mlp: which kernel computes their products.
 * Computes     linear: out = x w^T;  linear_pair: two of them;  mlp: out = (silu(x w1^T) * (x w3^T))
 *              w2^T
 * Shapes       linear: x [T, in], w [O, in], out [T, O];  mlp: x, out [T, D], w1, w3 [I, D]
 * Layout       rows strided; the inner product of mlp lies dense in the workspace
 * Precision    that of linear_{single,few,many,any}.cu; inner rounded to act
 * Grid         theirs
 * Roofline     theirs; the inner product of mlp is written and read once more, 2 * 2 T I bytes
 * Measured     those of the kernels
 */
#include "../blas.h"
#include "../device/weight.cuh"
#include "../product.h"

namespace {

/* Past so many tokens tiles read the weight less often than the streaming kernel would. */
constexpr int64_t FEW_TOKENS = 16;

/* Up to so many rows of a quantised weight make few tiles, for which most multiprocessors wait:
 * it rather streams by, once from memory and for each 16 of so many tokens from the L2. */
constexpr int64_t NARROW_ROWS = 4096, NARROW_TOKENS = 64;

constexpr int64_t MAX_COLS = 1 << 28; /* tensor-core kernels count the columns in an int */

bool suits_tensor_cores(const kl_cuda_product *p)
{
    const weight_view w = weight_view_of(p->w), up = weight_view_of(p->up);
    const bool gated = p->up.data != nullptr;
    return p->act == KL_BF16 && p->w.cols % 8 == 0 && p->w.cols < MAX_COLS &&
           is_aligned(p->x, p->x_stride, sizeof(bf16), 16) && has_pieces(w) &&
           (!gated || (p->up.format == p->w.format && has_pieces(up)));
}

bool is_quantised(const kl_cuda_product *p)
{
    return p->w.format != KL_W_F32 && p->w.format != KL_W_BF16;
}

bool suits_streaming(const kl_cuda_product *p)
{
    if (p->T <= FEW_TOKENS) return true;
    return is_quantised(p) && p->T <= NARROW_TOKENS && p->w.rows <= NARROW_ROWS;
}

size_t align_up(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

kl_cuda_product gate_up_of(const kl_mlp *a, void *inner)
{
    return {
        .x = a->x.data,
        .act = a->x.dtype,
        .T = a->x.shape[0],
        .x_stride = a->x.stride[0],
        .w = a->w1,
        .up = a->w3,
        .out = inner,
        .out_dtype = a->x.dtype,
        .out_stride = a->w1.rows,
    };
}

kl_cuda_product down_of(const kl_mlp *a, const void *inner)
{
    return {
        .x = inner,
        .act = a->x.dtype,
        .T = a->x.shape[0],
        .x_stride = a->w1.rows,
        .w = a->w2,
        .out = a->out.data,
        .out_dtype = a->out.dtype,
        .out_stride = a->out.stride[0],
    };
}

size_t inner_bytes(const kl_mlp *a)
{
    return align_up(static_cast<size_t>(a->x.shape[0]) * static_cast<size_t>(a->w1.rows) *
                    kl_dtype_bytes(a->x.dtype));
}

kl_cuda_product product_of(const kl_linear *a)
{
    return {
        .x = a->x.data,
        .act = a->x.dtype,
        .T = a->x.shape[0],
        .x_stride = a->x.stride[0],
        .w = a->w,
        .out = a->out.data,
        .out_dtype = a->out.dtype,
        .out_stride = a->out.stride[0],
    };
}

/* The ways to compute a product: linear_{single,few,many,any}.cu and cuBLASLt. */
enum class way { SINGLE, FEW, MANY, ANY, BLAS };

way way_of(kl_backend *be, const kl_cuda_product *p)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    if (p->T > FEW_TOKENS && !invariant && kl_cuda_blas_takes(p)) return way::BLAS;
    if (!suits_tensor_cores(p)) return way::ANY;
    const bool single = p->T == 1 && p->up.data == nullptr && !invariant;
    if (p->w.format == KL_W_F32) return single ? way::SINGLE : way::FEW;
    return suits_streaming(p) && !invariant ? way::FEW : way::MANY;
}

} // namespace

kl_status kl_cuda_product_run(kl_backend *be, const kl_cuda_product *p, kl_workspace ws,
                              kl_error *err)
{
    if (p->T == 0 || p->w.rows == 0) return KL_OK;
    switch (way_of(be, p)) {
    case way::SINGLE:
        return kl_cuda_product_single(be, p, err);
    case way::FEW:
        return kl_cuda_product_few(be, p, err);
    case way::MANY:
        return kl_cuda_product_many(be, p, err);
    case way::BLAS:
        return kl_cuda_blas_run(be, p, ws, err);
    default:
        return kl_cuda_product_any(be, p, err);
    }
}

size_t kl_cuda_product_workspace(const kl_cuda_product *p)
{
    return p->T <= FEW_TOKENS || is_quantised(p) ? 0 : KL_CUDA_BLAS_BYTES;
}

kl_status kl_cuda_linear(kl_backend *be, const kl_linear *a, kl_error *err)
{
    const kl_cuda_product p = product_of(a);
    return kl_cuda_product_run(be, &p, a->ws, err);
}

size_t kl_cuda_linear_workspace(kl_backend *, const kl_linear *a)
{
    const kl_cuda_product p = product_of(a);
    return kl_cuda_product_workspace(&p);
}

kl_status kl_cuda_linear_pair(kl_backend *be, const kl_linear_pair *a, kl_error *err)
{
    const kl_cuda_product first = product_of(&a->first), second = product_of(&a->second);
    const bool formats = first.w.format == second.w.format || first.w.format == KL_W_BF16;
    const bool empty = first.T == 0 || first.w.rows == 0 || second.w.rows == 0;
    if (!empty && formats && way_of(be, &first) == way::FEW && way_of(be, &second) == way::FEW)
        return kl_cuda_product_few_pair(be, &first, &second, err);
    KL_TRY(kl_cuda_product_run(be, &first, a->ws, err));
    return kl_cuda_product_run(be, &second, a->ws, err);
}

size_t kl_cuda_linear_pair_workspace(kl_backend *be, const kl_linear_pair *a)
{
    const size_t first = kl_cuda_linear_workspace(be, &a->first);
    const size_t second = kl_cuda_linear_workspace(be, &a->second);
    return first > second ? first : second;
}

kl_status kl_cuda_mlp(kl_backend *be, const kl_mlp *a, kl_error *err)
{
    char *const inner = static_cast<char *>(a->ws.data);
    const kl_workspace rest = {inner + inner_bytes(a), a->ws.bytes - inner_bytes(a)};
    const kl_cuda_product gate_up = gate_up_of(a, inner), down = down_of(a, inner);
    KL_TRY(kl_cuda_product_run(be, &gate_up, rest, err));
    return kl_cuda_product_run(be, &down, rest, err);
}

size_t kl_cuda_mlp_workspace(kl_backend *, const kl_mlp *a)
{
    const kl_cuda_product gate_up = gate_up_of(a, nullptr), down = down_of(a, nullptr);
    const size_t up_bytes = kl_cuda_product_workspace(&gate_up);
    const size_t down_bytes = kl_cuda_product_workspace(&down);
    return inner_bytes(a) + (up_bytes > down_bytes ? up_bytes : down_bytes);
}
