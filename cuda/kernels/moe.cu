/*
 * moe.cu -- a layer of experts with its router: which kernels do it.
 * Computes     h = rms_norm(x);  logits = h router^T;  ids, weights = moe_route(logits);
 *              y = moe_experts(h, ids, weights);  out = y, or residual += y
 * Shapes       x, out, residual [T, D]; router [E, D]; the others those of moe_experts
 * Layout       dense; what one operation hands to the next lies in the workspace
 * Precision    that of the operations; logits in f32
 * Grid         theirs. A single token: linear_single.cu, unless the linear before has done its
 *              work (device/router_sums.cuh), then moe_experts_step*.cu, which choose
 * Roofline     theirs
 * Measured     those of the kernels
 */
#include "../device/moe.cuh"
#include "../device/router_sums.cuh"
#include "../device/wide.cuh"
#include "../product.h"

namespace {

size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Whether the kernels of a single token's experts may choose them. */
bool chooses(const kl_moe *a)
{
    return a->score == KL_SCORE_SIGMOID && a->groups == 1 && a->w1.count <= FEW_EXPERTS &&
           a->top_k <= WARP;
}

/* The router's product with the norm before it, of a single token. */
kl_cuda_product router_of(const kl_moe *a, const kl_moe_parts &p)
{
    const bool norms = !kl_tensor_absent(&a->norm_weight);
    return {
        .x = a->x.data,
        .act = kl_moe_act(a),
        .x_dtype = a->x.dtype,
        .T = 1,
        .x_stride = a->x.shape[1],
        .w = a->router,
        .up = {},
        .out = p.route.logits.data,
        .out_dtype = KL_F32,
        .out_stride = a->router.rows,
        .norms = norms,
        .adds = false,
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .norm_eps = a->norm_eps,
        .residual = nullptr,
        .h = norms ? p.experts.x.data : nullptr,
    };
}

bool is_single(kl_backend *be, const kl_moe *a, const kl_cuda_product &router)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    return a->x.shape[0] == 1 && router.act == KL_BF16 && router.w.cols % 8 == 0 &&
           (!invariant || !router.norms || router.w.cols <= NORM_COLS) && /* as rms_norm */
           is_aligned(router.x, 0, 1, 16) && is_aligned(router.norm_weight, 0, 1, 16) &&
           has_pieces(weight_view_of(router.w)) && kl_cuda_product_single_takes(&router);
}

kl_status run_router(kl_backend *be, const kl_moe *a, const kl_moe_parts &p, kl_error *err)
{
    const kl_cuda_product router = router_of(a, p);
    if (is_single(be, a, router)) return kl_cuda_product_single(be, &router, err);
    if (!kl_tensor_absent(&a->norm_weight)) KL_TRY(kl_cuda_rms_norm(be, &p.norm, err));
    return kl_cuda_linear(be, &p.router, err);
}

/* The linear that a layer of a single token follows. */
kl_linear linear_before(const kl_weight *w, const kl_moe *a)
{
    kl_linear before = {};
    before.x = kl_tensor_2d(nullptr, kl_moe_act(a), 1, w->cols);
    before.w = *w;
    before.residual = a->x;
    before.ahead.router = a->router;
    before.ahead.norm_weight = a->norm_weight;
    return before;
}

bool takes_sums(kl_backend *be, const kl_moe *a, const kl_moe_parts &p)
{
    return !reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant && a->x.dtype == KL_F32 &&
           a->x.shape[0] == 1 && a->norm_eps >= LEAST_EPS &&
           !kl_tensor_absent(&a->norm_weight) && kl_moe_act(a) == KL_BF16 && chooses(a) &&
           kl_cuda_moe_is_step(&p.experts);
}

kl_status run_step(kl_backend *be, const kl_moe *a, const kl_moe_parts &p, kl_error *err)
{
    const moe_step step = {
        .experts = &p.experts,
        .logits = static_cast<const float *>(p.route.logits.data),
        .sums = static_cast<router_sums *>(a->sums),
        .norm_eps = a->norm_eps,
        .rule = {.bias = static_cast<const float *>(a->bias.data),
                 .E = static_cast<int>(a->w1.count),
                 .top_k = a->top_k,
                 .score = a->score,
                 .scaling = a->scaling,
                 .renormalize = a->renormalize},
        .residual = static_cast<float *>(a->residual.data),
        .apart = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant,
    };
    return kl_cuda_moe_step_run(step, kl_cuda_stream(be), err);
}

} // namespace

size_t kl_cuda_moe_workspace(kl_backend *be, const kl_moe *a)
{
    const kl_moe_parts p = kl_moe_parts_of(a, nullptr);
    return p.bytes + largest(kl_cuda_linear_workspace(be, &p.router),
                             kl_cuda_moe_experts_workspace(be, &p.experts));
}

size_t kl_cuda_router_sums(kl_backend *be, const kl_weight *before, const kl_moe *a)
{
    const kl_moe_parts p = kl_moe_parts_of(a, nullptr);
    const kl_linear linear = linear_before(before, a);
    if (!takes_sums(be, a, p) || !kl_cuda_linear_routes(be, &linear)) return 0;
    return sizeof(router_sums) + static_cast<size_t>(before->rows) * sizeof(bf16);
}

kl_status kl_cuda_moe(kl_backend *be, const kl_moe *a, kl_error *err)
{
    if (a->x.shape[0] == 0) return KL_OK;
    char *const scratch = static_cast<char *>(a->ws.data);
    kl_moe_parts p = kl_moe_parts_of(a, scratch);
    p.router.ws = p.experts.ws = {scratch + p.bytes, a->ws.bytes - p.bytes};
    if (a->sums != nullptr) {
        if (takes_sums(be, a, p)) return run_step(be, a, p, err);
        return kl_fail(err, KL_ERR_VALUE, "moe: sums must be NULL where router_sums() is 0");
    }
    KL_TRY(run_router(be, a, p, err));
    if (chooses(a) && kl_cuda_moe_is_step(&p.experts)) return run_step(be, a, p, err);
    KL_TRY(kl_cuda_moe_route(be, &p.route, err));
    return kl_cuda_moe_experts_to(be, &p.experts, static_cast<float *>(a->residual.data), err);
}
