/*
 * moe.cu -- a layer of experts with its router: which kernels do it.
 * Computes     h = rms_norm(x);  logits = h router^T;  ids, weights = moe_route(logits);
 *              y = moe_experts(h, ids, weights);  out = y, or residual += y
 * Shapes       x, out, residual [T, D]; router [E, D]; the others those of moe_experts
 * Layout       dense; what one operation hands to the next lies in the workspace
 * Precision    that of the operations; logits in f32
 * Grid         theirs
 * Roofline     theirs
 * Measured     those of the kernels
 */
#include "../cuda_backend.h"

extern "C" {
#include "backend/moe.h"
}

namespace {

size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

kl_status run_parts(kl_backend *be, const kl_moe *a, kl_error *err)
{
    char *const scratch = static_cast<char *>(a->ws.data);
    kl_moe_parts p = kl_moe_parts_of(a, scratch);
    p.router.ws = p.experts.ws = {scratch + p.bytes, a->ws.bytes - p.bytes};
    if (!kl_tensor_absent(&a->norm_weight)) KL_TRY(kl_cuda_rms_norm(be, &p.norm, err));
    KL_TRY(kl_cuda_linear(be, &p.router, err));
    KL_TRY(kl_cuda_moe_route(be, &p.route, err));
    KL_TRY(kl_cuda_moe_experts(be, &p.experts, err));
    return kl_tensor_absent(&a->residual) ? KL_OK : kl_cuda_rms_norm(be, &p.add, err);
}

} // namespace

size_t kl_cuda_moe_workspace(kl_backend *be, const kl_moe *a)
{
    const kl_moe_parts p = kl_moe_parts_of(a, nullptr);
    return p.bytes + largest(kl_cuda_linear_workspace(be, &p.router),
                             kl_cuda_moe_experts_workspace(be, &p.experts));
}

kl_status kl_cuda_moe(kl_backend *be, const kl_moe *a, kl_error *err)
{
    return run_parts(be, a, err);
}
