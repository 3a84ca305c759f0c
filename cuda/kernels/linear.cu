/*
 * linear.cu -- linear, linear_pair and mlp: which kernel computes their products.
 * Computes     linear: out = h w^T;  linear_pair: two of them;  mlp: out = (silu(h w1^T) *
 *              (h w3^T)) w2^T;  h = x or norm(x), and a residual += out, where no kernel of a
 *              product does so
 * Shapes       linear: x [T, in], w [O, in], out [T, O];  mlp: x, out [T, D], w1, w3 [I, D]
 * Layout       rows strided; h, the inner product of mlp and what is added to a residual lie
 *              dense in the workspace
 * Precision    that of linear_{single,f32,step,few,many,any}.cu; inner rounded to act
 * Grid         theirs
 * Roofline     theirs; the inner product of mlp is written and read once more, 2 * 2 T I bytes
 * Measured     those of the kernels
 */
#include "../blas.h"
#include "../device/weight.cuh"
#include "../device/wide.cuh"
#include "../peaks.h"
#include "../product.h"
#include "backend/ends.h"

namespace {

/* Past so many tokens tiles read the weight less often than the streaming kernel would. */
constexpr int64_t FEW_TOKENS = 16;

/* Up to so many rows of a quantised weight make few tiles, for which most multiprocessors wait:
 * it rather streams by, once from memory and for each 16 of so many tokens from the L2. */
constexpr int64_t NARROW_ROWS = 4096, NARROW_TOKENS = 64;

/* Of so many tokens each block of a product normalises all for itself; of more, a kernel does. */
constexpr int64_t NORM_TOKENS = 4;

constexpr int64_t MAX_COLS = 1 << 28; /* tensor-core kernels count the columns in an int */

bool suits_tensor_cores(const kl_cuda_product *p)
{
    const weight_view w = weight_view_of(p->w), up = weight_view_of(p->up);
    const bool gated = p->up.data != nullptr;
    return p->act == KL_BF16 && p->w.cols % 8 == 0 && p->w.cols < MAX_COLS &&
           is_aligned(p->x, p->x_stride, kl_dtype_bytes(p->x_dtype), 16) && has_pieces(w) &&
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

size_t act_bytes(kl_dtype act, int64_t rows, int64_t cols)
{
    return align_up(static_cast<size_t>(rows) * static_cast<size_t>(cols) *
                    kl_dtype_bytes(act));
}

kl_cuda_product gate_up_of(const kl_mlp *a, void *inner)
{
    const kl_dtype act = kl_mlp_act(a);
    return {
        .x = a->x.data,
        .act = act,
        .x_dtype = a->x.dtype,
        .T = a->x.shape[0],
        .x_stride = a->x.stride[0],
        .w = a->w1,
        .up = a->w3,
        .out = inner,
        .out_dtype = act,
        .out_stride = a->w1.rows,
        .norms = !kl_tensor_absent(&a->norm_weight),
        .adds = false,
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .norm_eps = a->norm_eps,
        .residual = nullptr,
    };
}

kl_cuda_product down_of(const kl_mlp *a, const void *inner)
{
    const kl_dtype act = kl_mlp_act(a);
    return {
        .x = inner,
        .act = act,
        .x_dtype = act,
        .T = a->x.shape[0],
        .x_stride = a->w1.rows,
        .w = a->w2,
        .up = {},
        .out = a->out.data,
        .out_dtype = act,
        .out_stride = a->w2.rows,
        .norms = false,
        .adds = !kl_tensor_absent(&a->residual),
        .norm_weight = nullptr,
        .norm_eps = 0,
        .residual = static_cast<float *>(a->residual.data),
    };
}

size_t inner_bytes(const kl_mlp *a)
{
    return act_bytes(kl_mlp_act(a), a->x.shape[0], a->w1.rows);
}

kl_cuda_product product_of(const kl_linear *a)
{
    return {
        .x = a->x.data,
        .act = kl_linear_act(a),
        .x_dtype = a->x.dtype,
        .T = a->x.shape[0],
        .x_stride = a->x.stride[0],
        .w = a->w,
        .up = {},
        .out = a->out.data,
        .out_dtype = a->out.dtype,
        .out_stride = a->out.stride[0],
        .norms = !kl_tensor_absent(&a->norm_weight),
        .adds = !kl_tensor_absent(&a->residual),
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .norm_eps = a->norm_eps,
        .residual = static_cast<float *>(a->residual.data),
        .h = nullptr,
        .ahead = a->ahead,
        .peaks = static_cast<float *>(a->peaks.data),
        .arriving = a->arriving,
    };
}

/* The ways to compute a product: linear_{single,f32,step,few,many,any}.cu and cuBLASLt. */
enum class way { SINGLE, F32, STEP, FEW, MANY, ANY, BLAS };

way way_of(kl_backend *be, const kl_cuda_product *p)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    if (p->T > FEW_TOKENS && !invariant && kl_cuda_blas_takes(p)) return way::BLAS;
    if (!suits_tensor_cores(p)) return way::ANY;
    const way few = kl_cuda_product_step_takes(p) ? way::STEP : way::FEW;
    if (kl_cuda_product_single_takes(p)) {
        if (p->T == 1) return way::SINGLE;
        if (invariant) return way::F32;
    }
    if (p->w.format == KL_W_F32 || !kl_cuda_has_sm_90a(be)) return few;
    return suits_streaming(p) ? few : way::MANY;
}

/* Whether the kernel of a way does the norm and the sum itself. The norm of more tokens is
 * rms_norm's, whose order of sums is the same up to NORM_COLS. */
bool takes_ends(kl_backend *be, way w, const kl_cuda_product *p)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    if (!p->norms && !p->adds) return true;
    if (w != way::STEP && (w != way::SINGLE || p->adds)) return false;
    return !p->norms || (p->T <= NORM_TOKENS && (!invariant || p->w.cols <= NORM_COLS) &&
                         is_aligned(p->norm_weight, 0, sizeof(float), 16));
}

/* ---- norm, product, sum as kernels of their own -------------------------------------------- */

size_t h_bytes(const kl_cuda_product *p)
{
    return !p->norms ? 0 : act_bytes(p->act, p->T, p->w.cols);
}

/* Of h, and y behind it. */
size_t ends_bytes(const kl_cuda_product *p)
{
    return h_bytes(p) + (!p->adds ? 0 : act_bytes(p->act, p->T, p->w.rows));
}

size_t plain_workspace(const kl_cuda_product *p)
{
    return p->T <= FEW_TOKENS || is_quantised(p) ? 0 : KL_CUDA_BLAS_BYTES;
}

/* The product alone: from h to y, both in the workspace where they are no arguments. */
kl_cuda_product plain_of(const kl_cuda_product *p, char *ws)
{
    kl_cuda_product plain = *p;
    plain.norms = plain.adds = false;
    plain.norm_weight = nullptr;
    plain.residual = nullptr;
    plain.x_dtype = p->act;
    if (p->norms) plain.x = ws, plain.x_stride = p->w.cols;
    if (!p->adds) return plain;
    plain.out = ws + h_bytes(p);
    plain.out_dtype = p->act;
    plain.out_stride = p->w.rows;
    return plain;
}

kl_status run_norm(kl_backend *be, const kl_cuda_product *p, const kl_cuda_product *plain,
                   kl_error *err)
{
    if (!p->norms) return KL_OK;
    kl_tensor x = kl_tensor_2d(const_cast<void *>(p->x), p->x_dtype, p->T, p->w.cols);
    x.stride[0] = p->x_stride;
    const kl_tensor h = kl_tensor_2d(const_cast<void *>(plain->x), plain->act, p->T, p->w.cols);
    const kl_tensor weight =
        kl_tensor_1d(const_cast<float *>(p->norm_weight), KL_F32, p->w.cols);
    const kl_rms_norm norm = kl_norm_before(x, weight, p->norm_eps, h);
    return kl_cuda_rms_norm(be, &norm, err);
}

kl_status run_sum(kl_backend *be, const kl_cuda_product *p, const kl_cuda_product *plain,
                  kl_error *err)
{
    if (!p->adds) return KL_OK;
    const kl_tensor y = kl_tensor_2d(plain->out, plain->act, p->T, p->w.rows);
    const kl_rms_norm sum = kl_sum_after(y, kl_tensor_2d(p->residual, KL_F32, p->T, p->w.rows));
    return kl_cuda_rms_norm(be, &sum, err);
}

kl_status run_product(kl_backend *be, way w, const kl_cuda_product *p, kl_workspace ws,
                      kl_error *err)
{
    switch (w) {
    case way::SINGLE:
        return kl_cuda_product_single(be, p, err);
    case way::F32:
        return kl_cuda_product_f32(be, p, err);
    case way::STEP:
        return kl_cuda_product_step(be, p, err);
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

kl_status run_way(kl_backend *be, way w, const kl_cuda_product *p, kl_workspace ws,
                  kl_error *err)
{
    if (p->w.rows == 0) return KL_OK;
    KL_TRY(run_product(be, w, p, ws, err));
    const bool there = w == way::STEP && !kl_cuda_product_step_halves(be, p);
    if (p->peaks == nullptr || there) return KL_OK;
    kl_tensor out = kl_tensor_2d(p->out, p->out_dtype, p->T, p->w.rows);
    out.stride[0] = p->out_stride;
    return kl_cuda_find_peaks(be, &out, p->peaks, err);
}

/* Two products of one input, normalised alike. */
bool same_input(const kl_cuda_product *a, const kl_cuda_product *b)
{
    return a->x == b->x && a->x_dtype == b->x_dtype && a->x_stride == b->x_stride &&
           a->w.cols == b->w.cols && a->norms == b->norms && a->norm_weight == b->norm_weight &&
           a->norm_eps == b->norm_eps && a->act == b->act;
}

/* One launch for both, where there is one. */
bool suits_pair(kl_backend *be, const kl_cuda_product *first, const kl_cuda_product *second)
{
    const bool formats = first->w.format == second->w.format || first->w.format == KL_W_BF16;
    const bool step = way_of(be, first) == way::STEP && way_of(be, second) == way::STEP;
    const bool halved =
        kl_cuda_product_step_halves(be, first) || kl_cuda_product_step_halves(be, second);
    return formats && step && !halved && same_input(first, second) && first->w.rows > 0 &&
           takes_ends(be, way::STEP, first) && takes_ends(be, way::STEP, second);
}

kl_status run_plain_pair(kl_backend *be, const kl_cuda_product *first,
                         const kl_cuda_product *second, kl_workspace ws, kl_error *err)
{
    if (suits_pair(be, first, second)) return kl_cuda_product_step_pair(be, first, second, err);
    KL_TRY(run_way(be, way_of(be, first), first, ws, err));
    return run_way(be, way_of(be, second), second, ws, err);
}

} // namespace

kl_status kl_cuda_product_run(kl_backend *be, const kl_cuda_product *p, kl_workspace ws,
                              kl_error *err)
{
    if (p->T == 0 || p->w.rows == 0) return KL_OK;
    const way whole = way_of(be, p);
    if (takes_ends(be, whole, p)) return run_way(be, whole, p, ws, err);
    char *const start = static_cast<char *>(ws.data);
    const size_t used = ends_bytes(p);
    const kl_workspace rest = {start + used, ws.bytes - used};
    const kl_cuda_product plain = plain_of(p, start);
    KL_TRY(run_norm(be, p, &plain, err));
    KL_TRY(run_way(be, way_of(be, &plain), &plain, rest, err));
    return run_sum(be, p, &plain, err);
}

size_t kl_cuda_product_workspace(const kl_cuda_product *p)
{
    return ends_bytes(p) + plain_workspace(p);
}

static bool routes(kl_backend *be, const kl_cuda_product *p)
{
    return way_of(be, p) == way::STEP && kl_cuda_product_step_routes(be, p);
}

bool kl_cuda_linear_routes(kl_backend *be, const kl_linear *a)
{
    const kl_cuda_product p = product_of(a);
    return routes(be, &p);
}

bool kl_cuda_linear_pair_tells(kl_backend *be, const kl_linear_pair *a)
{
    const kl_cuda_product first = product_of(&a->first), second = product_of(&a->second);
    return first.out_dtype == KL_BF16 && second.out_dtype == KL_BF16 &&
           suits_pair(be, &first, &second);
}

kl_status kl_cuda_linear_hears(kl_backend *be, const kl_linear *a, bool *hears, kl_error *err)
{
    const kl_cuda_product p = product_of(a);
    *hears = false;
    if (way_of(be, &p) != way::STEP) return KL_OK;
    return kl_cuda_product_step_holds(be, &p, hears, err);
}

static kl_status require_arriving(kl_backend *be, const kl_linear *a, kl_error *err)
{
    bool hears = true;
    if (a->arriving) KL_TRY(kl_cuda_linear_hears(be, a, &hears, err));
    if (hears) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE,
                   "linear: x must not be arriving where arrivals() says so");
}

kl_status kl_cuda_linear(kl_backend *be, const kl_linear *a, kl_error *err)
{
    const kl_cuda_product p = product_of(a);
    KL_TRY(require_arriving(be, a, err));
    if (a->ahead.sums != nullptr && !routes(be, &p))
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: ahead.sums must be NULL where router_sums() is 0");
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
    if (first.T == 0) return KL_OK;
    if (suits_pair(be, &first, &second))
        return kl_cuda_product_step_pair(be, &first, &second, err);
    char *const ws = static_cast<char *>(a->ws.data);
    const size_t used = ends_bytes(&first) + ends_bytes(&second);
    const kl_workspace rest = {ws + used, a->ws.bytes - used};
    const kl_cuda_product f = plain_of(&first, ws);
    kl_cuda_product s = plain_of(&second, ws + ends_bytes(&first));
    KL_TRY(run_norm(be, &first, &f, err));
    if (same_input(&first, &second))
        s.x = f.x;
    else
        KL_TRY(run_norm(be, &second, &s, err));
    KL_TRY(run_plain_pair(be, &f, &s, rest, err));
    KL_TRY(run_sum(be, &first, &f, err));
    return run_sum(be, &second, &s, err);
}

size_t kl_cuda_linear_pair_workspace(kl_backend *, const kl_linear_pair *a)
{
    const kl_cuda_product first = product_of(&a->first), second = product_of(&a->second);
    const size_t f = plain_workspace(&first), s = plain_workspace(&second);
    return ends_bytes(&first) + ends_bytes(&second) + (f > s ? f : s);
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
