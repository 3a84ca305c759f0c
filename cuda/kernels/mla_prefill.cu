/*
 * mla_prefill.cu -- latent attention of many new tokens: which form each of them takes.
 *
 * Computes     a plan of the call, the plain form by mla_prefill_tiles.cu or, where dimensions
 *              are not its own, mla_prefill_rows.cu, and tiles of few tokens by mla_decode
 * Shapes       lengths [N], cu_seqlens [N+1], both on the device: what follows from them, such
 *              as the number of few tokens, is found there; launches are made for the most
 * Layout       the plan is a struct for each sequence with running numbers of its first page
 *              and tile, and a list of the few tokens; these become dense rows of a call
 * Precision    as the kernels that are called
 * Grid         plan: one block, a thread a sequence; gather, scatter: a block a row
 * Roofline     a launch's time each, beside kernels of milliseconds
 * Measured     not timed yet; right on an H100 (tests/ops/test_mla.py, 2026-11-22)
 */
#include "mla_prefill.cuh"

#include <limits.h>

namespace {

constexpr int THREADS = 256;
constexpr size_t ALIGN = 128; /* of each part of the workspace: a cache line */

/* Few tokens of one call of mla_decode: they take no more memory than the plain form. */
constexpr long long FEW_ROWS = 512;

/* ---- the plan ---------------------------------------------------------------------------- */

/* What a sequence adds to the running numbers. */
struct counts {
    int pages, tiles, few;
};

__device__ counts operator+(const counts &a, const counts &b)
{
    return {a.pages + b.pages, a.tiles + b.tiles, a.few + b.few};
}

__device__ counts count_sequence(const mla_sequence &s, int n_new)
{
    const int plain = s.end - s.begin;
    if (plain == 0) return {0, 0, n_new};
    return {(s.end - 1) / KL_PAGE_TOKENS + 1,
            (s.end - 1) / MLA_QUERIES - s.begin / MLA_QUERIES + 1, n_new - plain};
}

/* Sums of the threads before this one; all of them in `total`. */
__device__ counts scan(const counts &mine, counts *shared, counts &total)
{
    const int t = threadIdx.x;
    counts sum = mine;
    for (int d = 1; d < THREADS; d *= 2) {
        shared[t] = sum;
        __syncthreads();
        if (t >= d) sum = shared[t - d] + sum;
        __syncthreads();
    }
    shared[t] = sum;
    __syncthreads();
    total = shared[THREADS - 1];
    const counts before = t == 0 ? counts{0, 0, 0} : shared[t - 1];
    __syncthreads();
    return before;
}

/* Positions [start, begin) and [end, length) of a sequence, from place `at` of the list. */
__device__ void list_few(const mla_sequence &s, int start, int length, int at, int *list)
{
    for (int p = start; p < s.begin; p++) list[at++] = p + s.token_shift;
    for (int p = s.end; p < length; p++) list[at++] = p + s.token_shift;
}

__global__ __launch_bounds__(THREADS) void plan_kernel(__grid_constant__ const mla_call a,
                                                       __grid_constant__ const mla_plan plan,
                                                       __grid_constant__ const mla_few few)
{
    __shared__ counts shared[THREADS];
    counts done = {0, 0, 0};
    for (long long first = 0; first < a.N; first += THREADS) {
        const long long n = first + threadIdx.x;
        mla_sequence s = {};
        counts mine = {0, 0, 0}, total;
        int n_new = 0;
        if (n < a.N) n_new = a.cu_seqlens[n + 1] - a.cu_seqlens[n];
        if (n_new > 0) s = mla_cut_sequence(a, n), mine = count_sequence(s, n_new);
        const counts before = done + scan(mine, shared, total);
        s.first_page = before.pages, s.first_tile = before.tiles;
        if (n < a.N) plan.sequences[n] = s;
        if (n_new > 0) list_few(s, a.lengths[n] - n_new, a.lengths[n], before.few, few.tokens);
        done = done + total;
    }
    if (threadIdx.x != 0) return;
    plan.sequences[a.N] = {0, 0, 0, done.pages, done.tiles};
    *few.count = done.few;
    plan.next_item[0] = plan.next_item[1] = 0;
}

/* ---- the call ---------------------------------------------------------------------------- */

mla_call call_of(const kl_mla_prefill *a)
{
    mla_call c = {
        .q = a->q.data,
        .pages = a->pages.data,
        .w_kv_b = a->w_kv_b.data,
        .out = a->out.data,
        .block_table = static_cast<const int *>(a->block_table.data),
        .lengths = static_cast<const int *>(a->lengths.data),
        .cu_seqlens = static_cast<const int *>(a->cu_seqlens.data),
        .q_stride = a->q.stride[0],
        .T = a->q.shape[0],
        .N = a->lengths.shape[0],
        .B = a->block_table.shape[1],
        .H = static_cast<int>(a->q.shape[1]),
        .scale = a->scale,
    };
    c.rank = static_cast<int>(a->w_kv_b.shape[2]);
    c.V = static_cast<int>(a->out.shape[2]);
    c.nope = static_cast<int>(a->w_kv_b.shape[1]) - c.V;
    c.rope = static_cast<int>(a->q.shape[2]) - c.nope;
    c.packed = kl_latents_are_packed(&a->pages);
    c.row = kl_latents_row_of(c.rank, c.rope);
    return c;
}

/* Whether the tensor cores' kernel has these dimensions; how memory lies decides besides. */
bool has_tiles(const kl_mla_prefill *a, const mla_call &c)
{
    return a->q.dtype == KL_BF16 && a->w_kv_b.dtype == KL_BF16 && c.nope == 128 &&
           c.rope == 64 && c.V == 128 && c.rank % 64 == 0;
}

bool is_vectored(const mla_call &c)
{
    const int64_t width = c.rank + c.rope;
    return is_aligned(c.q, c.q_stride, 2, 16) &&
           (c.packed || is_aligned(c.pages, width, 2, 16)) &&
           is_aligned(c.w_kv_b, c.rank, 2, 16) && is_aligned(c.out, c.V, 2, 16);
}

struct layout {
    mla_plan plan;
    mla_few few;
    mla_window window;
    size_t bytes;
};

/* A bump allocator over the workspace; with a base of NULL it only measures. */
struct taker {
    char *base;
    size_t used;

    template <class T> T *take(size_t count)
    {
        char *const at = base == nullptr ? nullptr : base + used;
        used += (count * sizeof(T) + ALIGN - 1) / ALIGN * ALIGN;
        return reinterpret_cast<T *>(at);
    }
};

void take_window(const mla_call &c, taker *memory, mla_window *w)
{
    const long long pages = c.N * c.B;
    const size_t rows = static_cast<size_t>(c.T * c.H);
    w->pages = min((pages + 1) / 2 * 2, static_cast<long long>(MLA_WINDOW_PAGES));
    const size_t tokens = static_cast<size_t>(w->pages) * KL_PAGE_TOKENS;
    w->keys = memory->take<bf16>(static_cast<size_t>(c.H) * tokens * c.nope);
    w->values = memory->take<bf16>(static_cast<size_t>(c.H) * tokens * c.V);
    w->k_pe = memory->take<bf16>(tokens * c.rope);
    const bool spans = pages > w->pages;
    w->x = memory->take<float>(spans ? rows * c.V : 0);
    w->max_sum = memory->take<float>(spans ? rows * 2 : 0);
}

/* One call of mla_decode. */
kl_mla_decode decode_of(const kl_mla_prefill *a, const mla_few &few)
{
    kl_mla_decode d = *a;
    d.ws = few.ws;
    d.q = kl_tensor_3d(few.q, a->q.dtype, few.rows, a->q.shape[1], a->q.shape[2]);
    d.out = kl_tensor_3d(few.out, a->q.dtype, few.rows, a->q.shape[1], a->out.shape[2]);
    d.block_table = kl_tensor_2d(few.block_table, KL_I32, few.rows, a->block_table.shape[1]);
    d.lengths = kl_tensor_1d(few.lengths, KL_I32, few.rows);
    d.cu_seqlens = {};
    return d;
}

void take_few(kl_backend *be, const kl_mla_prefill *a, const mla_call &c, taker *memory,
              mla_few *few)
{
    const size_t rows = static_cast<size_t>(few->rows), H = static_cast<size_t>(c.H);
    const size_t element = kl_dtype_bytes(a->q.dtype);
    few->q = memory->take<char>(rows * H * static_cast<size_t>(c.nope + c.rope) * element);
    few->out = memory->take<char>(rows * H * static_cast<size_t>(c.V) * element);
    few->block_table = memory->take<int>(rows * static_cast<size_t>(c.B));
    few->lengths = memory->take<int>(rows);
    const kl_mla_decode d = decode_of(a, *few);
    few->ws.bytes = kl_cuda_mla_decode_workspace(be, &d);
    few->ws.data = memory->take<char>(few->ws.bytes);
}

/* The two forms run one after the other, in the same memory. */
layout lay_out(kl_backend *be, const kl_mla_prefill *a, const mla_call &c)
{
    layout l = {};
    taker memory = {static_cast<char *>(a->ws.data), 0};
    l.plan.sequences = memory.take<mla_sequence>(static_cast<size_t>(c.N) + 1);
    l.plan.next_item = memory.take<unsigned>(2);
    l.few.count = memory.take<int>(1);
    l.few.most = min(c.T, 2 * KL_MLA_FEW_TOKENS * c.N);
    l.few.rows = min(l.few.most, FEW_ROWS);
    l.few.tokens = memory.take<int>(static_cast<size_t>(l.few.most));
    taker other = memory;
    take_few(be, a, c, &memory, &l.few);
    if (has_tiles(a, c)) take_window(c, &other, &l.window);
    l.bytes = max(memory.used, other.used);
    return l;
}

/* ---- the few tokens ---------------------------------------------------------------------- */

/* A block's copy of `count` elements between vectors of any alignment. */
template <class T> __device__ void copy(const T *from, long long count, T *to)
{
    for (long long i = threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

/* A row that no token fills sees nothing; its query is zeros, for mla_decode reads it. */
template <class T>
__global__ __launch_bounds__(THREADS) void gather_kernel(__grid_constant__ const mla_call a,
                                                         __grid_constant__ const mla_few few)
{
    const long long row = blockIdx.x, width = a.H * static_cast<long long>(a.nope + a.rope);
    T *const q = static_cast<T *>(few.q) + row * width;
    if (few.first + row >= *few.count) {
        if (threadIdx.x == 0) few.lengths[row] = 0;
        for (long long i = threadIdx.x; i < width; i += THREADS) q[i] = from_float<T>(0);
        return;
    }
    const int token = few.tokens[few.first + row];
    const int n = mla_find_sequence(a.cu_seqlens, static_cast<int>(a.N), token);
    const int length = a.lengths[n] - (a.cu_seqlens[n + 1] - token) + 1;
    if (threadIdx.x == 0) few.lengths[row] = length;
    copy(static_cast<const T *>(a.q) + token * a.q_stride, width, q);
    copy(a.block_table + n * a.B, (length - 1) / KL_PAGE_TOKENS + 1,
         few.block_table + row * a.B);
}

template <class T>
__global__ __launch_bounds__(THREADS) void scatter_kernel(__grid_constant__ const mla_call a,
                                                          __grid_constant__ const mla_few few)
{
    const long long row = blockIdx.x, width = a.H * static_cast<long long>(a.V);
    if (few.first + row < *few.count)
        copy(static_cast<const T *>(few.out) + row * width, width,
             static_cast<T *>(a.out) + few.tokens[few.first + row] * width);
}

template <class T>
kl_status run_few(kl_backend *be, const kl_mla_prefill *a, const mla_call &c, mla_few few,
                  kl_error *err)
{
    const unsigned blocks = static_cast<unsigned>(few.rows);
    const kl_mla_decode decode = decode_of(a, few);
    for (; few.first < few.most; few.first += few.rows) {
        gather_kernel<T><<<blocks, THREADS, 0, kl_cuda_stream(be)>>>(c, few);
        KL_CUDA_TRY(cudaGetLastError(), err);
        KL_TRY(kl_cuda_mla_decode(be, &decode, err));
        scatter_kernel<T><<<blocks, THREADS, 0, kl_cuda_stream(be)>>>(c, few);
        KL_CUDA_TRY(cudaGetLastError(), err);
    }
    return KL_OK;
}

} // namespace

size_t kl_cuda_mla_prefill_workspace(kl_backend *be, const kl_mla_prefill *a)
{
    return lay_out(be, a, call_of(a)).bytes;
}

kl_status kl_cuda_mla_prefill(kl_backend *be, const kl_mla_prefill *a, kl_error *err)
{
    const mla_call c = call_of(a);
    const cudaStream_t stream = kl_cuda_stream(be);
    if (a->q.shape[0] > INT_MAX || a->q.shape[1] > INT_MAX || a->q.shape[2] > INT_MAX ||
        a->w_kv_b.shape[1] > INT_MAX || a->w_kv_b.shape[2] > INT_MAX - a->q.shape[2] ||
        c.N * c.B > INT_MAX)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_prefill: T, H, nope+rope, nope+V, rank+rope and N * B must each be "
                       "<= %d",
                       INT_MAX);
    if (c.T == 0) return KL_OK;
    const layout l = lay_out(be, a, c);
    plan_kernel<<<1, THREADS, 0, stream>>>(c, l.plan, l.few);
    KL_CUDA_TRY(cudaGetLastError(), err);
    /* The running maximum is one of raw scores: a scale that is not positive would turn it. */
    if (has_tiles(a, c) && is_vectored(c) && c.scale > 0)
        KL_TRY(mla_prefill_tiles(c, l.plan, l.window, stream, err));
    else
        KL_TRY(mla_prefill_rows(a, c, stream, err));
    return with_float_type(a->q.dtype,
                           [&](auto t) { return run_few<decltype(t)>(be, a, c, l.few, err); });
}
