/*
 * moe_experts.cu -- a layer of experts: its products in turn, and their weighted sum.
 *
 * Computes     y[t] = sum_j weights[t, j] * expert_{ids[t, j]}(x[t]) + shared(x[t]);  out = y, or
 *              residual += y, rounded
 * Shapes       x, out [T, D]; ids, weights [T, top_k]; w1, w3 [E, I, D]; w2 [E, D, I]
 * Layout       dense. (token, choice) pairs are sorted by expert in moe_experts_plan.cu, so that a
 *              product reads an expert's matrix for a tile of its tokens; the shared expert is one
 *              more, over all tokens. The products are in
 *              moe_experts_{general,few,stream,many}.cu; a single token has
 *              moe_experts_step*.cu instead of all this
 * Precision    f32 or bf16 in, inner products rounded to act, f32 results of the experts, f32
 *              sum, rounded once; for bf16 activations weights become bf16 on their way
 * Grid         combine: a thread an element of out. Tokens go in windows and the down product in
 *              slices of columns, which bounds the workspace; a window's tiles are known only on
 *              the device, their bound here, and surplus blocks leave
 * Order        a row's bits depend on the path and on no other row; the number of tokens decides
 *              the path, on a batch-invariant backend among those that have the same bits
 * Roofline     the weights of the experts chosen, once: 9 * 14.2 MB for a token in bf16, 42 us
 *              at 3.0 TB/s; the results cross memory twice in f32, 8 * top_k * D bytes a token
 * Measured     H200, bf16, 256 experts, 8 chosen and a shared one, D = 2304, I = 1024: T = 8
 *              204 us, 16 346, 32 540, 64 755, 128 865, 256 897, 1024 995; all tokens of 8
 *              experts: T = 8 52, 64 65, 256 121 (2026-11-22). H100, T = 2048 1.6 ms
 */
#include "../device/launch.cuh"
#include "../device/moe.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int64_t WINDOW_PAIRS = 65536; /* 256 for each of 256 experts: weights read for many */
constexpr int64_t RESULT_BYTES = 704
                                 << 20; /* of the experts, beyond which D is sliced        */
constexpr int64_t SLICE = 128;          /* a slice is a multiple: whole tiles of a path    */
/* An expert. Below the first its weights stream by in tiles of 8 tokens; from there on tiles of 64
 * read them as fast, and where all tokens are of a few experts in a fifth of the time. */
constexpr int64_t FEW_PAIRS = 2;
constexpr int64_t SOME_PAIRS = 32; /* up to which narrow tiles are faster than wide ones */
constexpr int MIN_TILE = 8;        /* of the paths                                       */
constexpr int COMBINE_THREADS = 256;

int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- combine --------------------------------------------------------------------------- */

struct combine_arguments {
    const float *y, *shared; /* [pairs, slice], [n, slice] or null */
    const int *places;       /* [n, top_k]                         */
    const float *weights;    /* [n, top_k]                         */
    void *out;               /* [n, D], from the slice's first column */
    float *residual;         /* likewise, or null                  */
    int64_t slice, D;
    int top_k;
};

template <class act>
__global__ __launch_bounds__(COMBINE_THREADS) void moe_combine_kernel(
    __grid_constant__ const combine_arguments a)
{
    let_next_start();
    wait_for_inputs();
    const int64_t t = blockIdx.x;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * COMBINE_THREADS + threadIdx.x;
    if (column >= a.slice) return;
    const int *places = a.places + t * a.top_k;
    const float *weights = a.weights + t * a.top_k;
    float sum = 0;
#pragma unroll 8
    for (int j = 0; j < a.top_k; j++)
        sum = fmaf(weights[j], a.y[places[j] * a.slice + column], sum);
    if (a.shared != nullptr) sum += a.shared[t * a.slice + column];
    const int64_t at = t * a.D + column;
    if (a.residual != nullptr)
        a.residual[at] += to_float(from_float<act>(sum));
    else
        static_cast<act *>(a.out)[at] = from_float<act>(sum);
}

/* ---- host: sizes ----------------------------------------------------------------------- */

/* Of the largest window; a call with fewer tokens is one window. */
struct sizes {
    int64_t D, I, E, top_k, I2; /* I2: the shared expert's width, 0 without one */
    int64_t n, pairs;           /* tokens and pairs of a window                 */
    int64_t slice;              /* columns of out in one down product           */
    /* Offsets in the workspace. */
    size_t tokens, places, tiles, surplus, counts, inner, results, end;
};

int64_t tiles_of(int64_t rows, int64_t tile)
{
    return (rows + tile - 1) / tile;
}

/* Experts that have pairs have at most one tile that is not full. */
int64_t bound_routed_tiles(const sizes &s, int64_t pairs, int tile)
{
    return least(pairs, pairs / tile + least(s.E, pairs));
}

size_t take(size_t *end, int64_t count, size_t element)
{
    const size_t at = *end;
    *end = (at + static_cast<size_t>(count) * element + 255) / 256 * 256;
    return at;
}

sizes sizes_of(const kl_moe_experts *a)
{
    sizes s = {};
    s.D = a->w1.cols, s.I = a->w1.rows, s.E = a->w1.count, s.top_k = a->ids.shape[1];
    s.I2 = kl_moe_has_shared(a) ? a->shared_w1.rows : 0;
    const int64_t window = WINDOW_PAIRS / s.top_k;
    s.n = least(a->x.shape[0], window < 1 ? 1 : window);
    s.pairs = s.n * s.top_k;
    const int64_t rows = s.pairs + (s.I2 > 0 ? s.n : 0);
    const int64_t fit = rows == 0 ? s.D : RESULT_BYTES / 4 / rows / SLICE * SLICE;
    const int64_t slices = tiles_of(s.D, fit < SLICE ? SLICE : fit); /* of about one width */
    s.slice = tiles_of(tiles_of(s.D, slices), SLICE) * SLICE;
    s.slice = least(s.D, s.slice);
    s.tokens = take(&s.end, s.pairs, sizeof(int));
    s.places = take(&s.end, s.pairs, sizeof(int));
    s.tiles = take(&s.end, bound_routed_tiles(s, s.pairs, MIN_TILE) + tiles_of(s.n, MIN_TILE),
                   sizeof(moe_tile));
    s.surplus = take(&s.end, 1, sizeof(int));
    s.counts = take(&s.end, kl_cuda_moe_plan_counts(s.pairs, s.E), sizeof(int));
    s.inner = take(&s.end, s.pairs * s.I + s.n * s.I2, kl_dtype_bytes(a->x.dtype));
    /* The bound, not what the slices of this many rows take: more tokens never ask for less. */
    const int64_t whole = rows * s.D, bound = least(whole, RESULT_BYTES / 4);
    s.results = take(&s.end, rows * s.slice > bound ? rows * s.slice : bound, sizeof(float));
    return s;
}

/* ---- host: one window ------------------------------------------------------------------ */

struct window {
    const kl_moe_experts *a;
    float *residual; /* or null */
    const sizes *s;
    const moe_path *path;
    cudaStream_t stream;
    int64_t first, n, pairs, routed_tiles, shared_tiles;
    int *tokens, *places, *surplus, *counts;
    moe_tile *tiles;
    char *inner;
    float *results;
};

bool has_fast_shape(const kl_weight &w)
{
    return w.cols % 64 == 0 && w.rows % 64 == 0 && has_pieces(weight_view_of(w));
}

/* Whether the tensor cores' paths take the call. */
bool is_fast(const kl_moe_experts *a)
{
    if (a->x.dtype != KL_BF16 || !is_aligned(a->x.data, a->x.shape[1], 2, 16)) return false;
    if (a->w1.format != a->w3.format || !has_fast_shape(a->w1) || !has_fast_shape(a->w3) ||
        !has_fast_shape(a->w2))
        return false;
    return !kl_moe_has_shared(a) ||
           (a->shared_w1.format == a->shared_w3.format && has_fast_shape(a->shared_w1) &&
            has_fast_shape(a->shared_w3) && has_fast_shape(a->shared_w2));
}

/* Whether f is true of a format of the weights. */
template <class F> bool any_format(const kl_moe_experts *a, F f)
{
    return f(a->w1.format) || f(a->w2.format) ||
           (kl_moe_has_shared(a) && (f(a->shared_w1.format) || f(a->shared_w2.format)));
}

bool is_f32(kl_weight_format format)
{
    return format == KL_W_F32;
}

bool is_quantised(kl_weight_format format)
{
    return format != KL_W_F32 && format != KL_W_BF16;
}

const moe_path *path_of(const kl_backend *be, const kl_moe_experts *a, const sizes &s)
{
    const bool invariant = reinterpret_cast<const kl_cuda_backend *>(be)->batch_invariant;
    if (!is_fast(a)) return &kl_moe_general;
    if (any_format(a, is_f32) || !kl_cuda_has_sm_90a(be)) return &kl_moe_few;
    if (s.pairs < FEW_PAIRS * s.E) return &kl_moe_few;
    if (invariant)
        return any_format(a, is_quantised) ? &kl_moe_ordered_quantised : &kl_moe_ordered;
    return s.pairs <= SOME_PAIRS * s.E ? &kl_moe_some : &kl_moe_many;
}

window window_of(kl_backend *be, const kl_moe_experts *a, float *residual, const sizes &s)
{
    char *ws = static_cast<char *>(a->ws.data);
    window w = {.a = a,
                .residual = residual,
                .s = &s,
                .path = path_of(be, a, s),
                .stream = kl_cuda_stream(be)};
    w.tokens = reinterpret_cast<int *>(ws + s.tokens);
    w.places = reinterpret_cast<int *>(ws + s.places);
    w.tiles = reinterpret_cast<moe_tile *>(ws + s.tiles);
    w.surplus = reinterpret_cast<int *>(ws + s.surplus);
    w.counts = reinterpret_cast<int *>(ws + s.counts);
    w.inner = ws + s.inner;
    w.results = reinterpret_cast<float *>(ws + s.results);
    return w;
}

kl_status run_plan(const window &w, kl_error *err)
{
    const moe_plan p = {
        .ids = static_cast<const int *>(w.a->ids.data) + w.first * w.s->top_k,
        .tokens = w.tokens,
        .places = w.places,
        .tiles = w.tiles,
        .surplus = w.surplus,
        .counts = w.counts,
        .pairs = static_cast<int>(w.pairs),
        .top_k = static_cast<int>(w.s->top_k),
        .E = static_cast<int>(w.s->E),
        .tile = w.path->tile,
        .routed_tiles = static_cast<int>(w.routed_tiles),
        .shared_rows = w.shared_tiles > 0 ? static_cast<int>(w.n) : 0,
        .shared_tiles = static_cast<int>(w.shared_tiles),
    };
    return kl_cuda_moe_plan(p, w.stream, err);
}

/* Both experts' tiles in one launch, if their formats allow it. */
kl_status run_product(const window &w, const moe_operand &routed, const moe_operand *shared,
                      bool gated, kl_error *err)
{
    const kl_dtype act = w.a->x.dtype;
    const moe_product all = {routed, shared == nullptr ? routed : *shared, w.tiles,
                             w.shared_tiles + w.routed_tiles, w.surplus};
    if (shared == nullptr || shared->format == routed.format || w.path == &kl_moe_general)
        return w.path->run(all, gated, act, w.stream, err);
    const moe_product first = {routed, routed, w.tiles + w.shared_tiles, w.routed_tiles,
                               w.surplus};
    const moe_product second = {*shared, *shared, w.tiles, w.shared_tiles, nullptr};
    KL_TRY(w.path->run(first, gated, act, w.stream, err));
    return w.path->run(second, gated, act, w.stream, err);
}

moe_operand gated_operand(const kl_weight &w1, const kl_weight &w3, const void *x,
                          const int *rows, void *out)
{
    return {weight_view_of(w1),
            weight_view_of(w3),
            w1.format,
            w3.format,
            x,
            rows,
            out,
            0,
            w1.rows,
            w1.count};
}

moe_operand plain_operand(const kl_weight &w2, const void *x, void *out, int64_t first,
                          int64_t n)
{
    const weight_view view = weight_view_of(w2);
    return {view, view, w2.format, w2.format, x, nullptr, out, first, n, w2.count};
}

kl_status run_inner(const window &w, char *shared_inner, kl_error *err)
{
    const kl_moe_experts *a = w.a;
    const size_t row = static_cast<size_t>(w.s->D) * kl_dtype_bytes(a->x.dtype);
    const char *x = static_cast<const char *>(a->x.data) + static_cast<size_t>(w.first) * row;
    const moe_operand routed = gated_operand(a->w1, a->w3, x, w.tokens, w.inner);
    if (w.shared_tiles == 0) return run_product(w, routed, nullptr, true, err);
    const moe_operand shared =
        gated_operand(a->shared_w1, a->shared_w3, x, nullptr, shared_inner);
    return run_product(w, routed, &shared, true, err);
}

/* Columns [column, column + n) of out. */
kl_status run_slice(const window &w, const char *shared_inner, int64_t column, int64_t n,
                    kl_error *err)
{
    const kl_moe_experts *a = w.a;
    float *const shared_results = w.shared_tiles > 0 ? w.results + w.pairs * n : nullptr;
    const moe_operand routed = plain_operand(a->w2, w.inner, w.results, column, n);
    if (shared_results == nullptr) {
        KL_TRY(run_product(w, routed, nullptr, false, err));
    } else {
        const moe_operand shared =
            plain_operand(a->shared_w2, shared_inner, shared_results, column, n);
        KL_TRY(run_product(w, routed, &shared, false, err));
    }
    const int64_t at = w.first * w.s->D + column;
    const combine_arguments c = {
        .y = w.results,
        .shared = shared_results,
        .places = w.places,
        .weights = static_cast<const float *>(a->weights.data) + w.first * w.s->top_k,
        .out = static_cast<char *>(a->out.data) +
               static_cast<size_t>(at) * kl_dtype_bytes(a->out.dtype),
        .residual = w.residual == nullptr ? nullptr : w.residual + at,
        .slice = n,
        .D = w.s->D,
        .top_k = static_cast<int>(w.s->top_k),
    };
    const dim3 grid(static_cast<unsigned>(w.n),
                    static_cast<unsigned>(tiles_of(n, COMBINE_THREADS)));
    return with_float_type(a->out.dtype, [&](auto t) {
        return kl_cuda_launch(moe_combine_kernel<decltype(t)>, grid, COMBINE_THREADS, 0,
                              w.stream, err, c);
    });
}

kl_status run_window(window &w, kl_error *err)
{
    const sizes &s = *w.s;
    w.n = least(w.a->x.shape[0] - w.first, s.n);
    w.pairs = w.n * s.top_k;
    w.routed_tiles = bound_routed_tiles(s, w.pairs, w.path->tile);
    w.shared_tiles = s.I2 > 0 ? tiles_of(w.n, w.path->tile) : 0;
    char *const shared_inner =
        w.inner + static_cast<size_t>(w.pairs * s.I) * kl_dtype_bytes(w.a->x.dtype);
    KL_TRY(run_plan(w, err));
    KL_TRY(run_inner(w, shared_inner, err));
    for (int64_t column = 0; column < s.D; column += s.slice)
        KL_TRY(run_slice(w, shared_inner, column, least(s.slice, s.D - column), err));
    return KL_OK;
}

} // namespace

bool kl_cuda_moe_is_step(const kl_moe_experts *a)
{
    return is_fast(a) && kl_cuda_moe_step_takes(a);
}

size_t kl_cuda_moe_experts_workspace(kl_backend *, const kl_moe_experts *a)
{
    return sizes_of(a).end;
}

kl_status kl_cuda_moe_experts(kl_backend *be, const kl_moe_experts *a, kl_error *err)
{
    return kl_cuda_moe_experts_to(be, a, nullptr, err);
}

kl_status kl_cuda_moe_experts_to(kl_backend *be, const kl_moe_experts *a, float *residual,
                                 kl_error *err)
{
    const int64_t T = a->x.shape[0];
    const sizes s = sizes_of(a);
    if (T == 0) return KL_OK;
    if (s.top_k > WINDOW_PAIRS || s.D > (int64_t)0xffff * COMBINE_THREADS)
        return kl_fail(err, KL_ERR_VALUE,
                       "moe_experts: top_k must be <= %lld and D <= %lld, got %lld and %lld",
                       static_cast<long long>(WINDOW_PAIRS),
                       static_cast<long long>(0xffff * COMBINE_THREADS),
                       static_cast<long long>(s.top_k), static_cast<long long>(s.D));
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    if (kl_cuda_moe_is_step(a))
        return kl_cuda_moe_step_run({a, nullptr, nullptr, 0, {}, residual, invariant},
                                    kl_cuda_stream(be), err);
    window w = window_of(be, a, residual, s);
    for (; w.first < T; w.first += s.n) KL_TRY(run_window(w, err));
    return KL_OK;
}
