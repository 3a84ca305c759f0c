/*
 * mla_prefill.cu -- latent attention of many new tokens: which form each of them takes.
 *
 * Computes     the plan of a call: the positions of each sequence that the plain form takes, in
 *              tiles of 128 queries, and the tokens left to the absorbed form
 * Shapes       lengths [N], cu_seqlens [N+1], both on the device
 * Layout       a struct for each sequence with running numbers of its first page and tile
 * Precision    integers
 * Grid         one block: a thread for each sequence, a scan for the running numbers
 * Roofline     16 bytes a sequence: as long as a launch takes
 * Measured     not timed yet
 */
#include "mla_prefill.cuh"

#include <limits.h>

namespace {

constexpr int THREADS = 256;
constexpr size_t ALIGN = 128; /* of each part of the workspace: a cache line */

/* ---- the plan ---------------------------------------------------------------------------- */

/* What a sequence adds to the running numbers. */
struct counts {
    int pages, tiles, few;
};

__device__ counts operator+(const counts &a, const counts &b)
{
    return {a.pages + b.pages, a.tiles + b.tiles, a.few + b.few};
}

/* Tiles of ops.h are cut at pages: only a first and a last one can be few. */
__device__ mla_sequence cut_sequence(const mla_call &a, long long n)
{
    const int page = KL_PAGE_TOKENS, length = a.lengths[n];
    const int count = a.cu_seqlens[n + 1] - a.cu_seqlens[n], start = length - count;
    const int first_end = min(start / page * page + page, length);
    mla_sequence s = {start, length, a.cu_seqlens[n] - start, 0, 0};
    if (first_end - start <= KL_MLA_FEW_TOKENS) s.begin = first_end;
    const int last_begin = (length - 1) / page * page;
    if (s.begin <= last_begin && length - last_begin <= KL_MLA_FEW_TOKENS) s.end = last_begin;
    return s;
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

/* Tokens [cu, begin) and [end, length) of a sequence, from place `at` of the list. */
__device__ void list_few(const mla_sequence &s, int start, int length, int at, int *list)
{
    for (int p = start; p < s.begin; p++) list[at++] = p + s.token_shift;
    for (int p = s.end; p < length; p++) list[at++] = p + s.token_shift;
}

__global__ __launch_bounds__(THREADS) void plan_kernel(__grid_constant__ const mla_call a,
                                                       __grid_constant__ const mla_plan plan)
{
    __shared__ counts shared[THREADS];
    counts done = {0, 0, 0};
    for (long long first = 0; first < a.N; first += THREADS) {
        const long long n = first + threadIdx.x;
        mla_sequence s = {};
        counts mine = {0, 0, 0}, total;
        int n_new = 0;
        if (n < a.N) n_new = a.cu_seqlens[n + 1] - a.cu_seqlens[n];
        if (n_new > 0) s = cut_sequence(a, n), mine = count_sequence(s, n_new);
        const counts before = done + scan(mine, shared, total);
        s.first_page = before.pages, s.first_tile = before.tiles;
        if (n < a.N) plan.sequences[n] = s;
        if (n_new > 0)
            list_few(s, a.lengths[n] - n_new, a.lengths[n], before.few, plan.few.list);
        done = done + total;
    }
    if (threadIdx.x != 0) return;
    plan.sequences[a.N] = {0, 0, 0, done.pages, done.tiles};
    *plan.few.count = done.few;
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
    c.rope = static_cast<int>(a->pages.shape[2]) - c.rank;
    c.nope = static_cast<int>(a->q.shape[2]) - c.rope;
    c.V = static_cast<int>(a->w_kv_b.shape[1]) - c.nope;
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
    return is_aligned(c.q, c.q_stride, 2, 16) && is_aligned(c.pages, width, 2, 16) &&
           is_aligned(c.w_kv_b, c.rank, 2, 16) && is_aligned(c.out, c.V, 2, 16);
}

struct layout {
    mla_plan plan;
    mla_window window;
    size_t bytes;
};

template <class T> T *take(char *base, size_t &used, size_t count)
{
    char *const at = base + used;
    used += (count * sizeof(T) + ALIGN - 1) / ALIGN * ALIGN;
    return reinterpret_cast<T *>(at);
}

/* The workspace from `base` on; with a base of NULL only its size means anything. */
layout lay_out(const mla_call &c, void *workspace)
{
    char *const base = static_cast<char *>(workspace);
    const size_t N = static_cast<size_t>(c.N), H = static_cast<size_t>(c.H);
    const size_t T = static_cast<size_t>(c.T);
    layout l = {};
    size_t used = 0;
    l.plan.sequences = take<mla_sequence>(base, used, N + 1);
    l.plan.next_item = take<unsigned>(base, used, 2);
    l.plan.few.count = take<int>(base, used, 1);
    l.plan.few.most = min(c.T, 2 * KL_MLA_FEW_TOKENS * c.N);
    l.plan.few.list = take<int>(base, used, static_cast<size_t>(l.plan.few.most));

    const long long pages = c.N * c.B;
    l.window.pages = min((pages + 1) / 2 * 2, static_cast<long long>(MLA_WINDOW_PAGES));
    const size_t tokens = static_cast<size_t>(l.window.pages) * KL_PAGE_TOKENS;
    const size_t nope = static_cast<size_t>(c.nope), V = static_cast<size_t>(c.V);
    l.window.keys = take<bf16>(base, used, H * tokens * nope);
    l.window.values = take<bf16>(base, used, H * tokens * V);
    l.window.k_pe = take<bf16>(base, used, tokens * static_cast<size_t>(c.rope));
    const bool spans = pages > l.window.pages;
    l.window.x = take<float>(base, used, spans ? T * H * V : 0);
    l.window.max_sum = take<float>(base, used, spans ? T * H * 2 : 0);
    l.bytes = used;
    return l;
}

kl_status run_both(const kl_mla_prefill *a, const mla_call &c, cudaStream_t stream,
                   kl_error *err)
{
    /* The caller aligns to 64 bytes, which is enough: ALIGN only keeps the parts' lines apart. */
    const layout l = lay_out(c, a->ws.data);
    plan_kernel<<<1, THREADS, 0, stream>>>(c, l.plan);
    KL_CUDA_TRY(cudaGetLastError(), err);
    KL_TRY(mla_prefill_tiles(c, l.plan, l.window, stream, err));
    return mla_prefill_rows(a, c, l.plan.few, stream, err);
}

} // namespace

size_t kl_cuda_mla_prefill_workspace(kl_backend *, const kl_mla_prefill *a)
{
    const mla_call c = call_of(a);
    return has_tiles(a, c) ? lay_out(c, nullptr).bytes : 0;
}

kl_status kl_cuda_mla_prefill(kl_backend *be, const kl_mla_prefill *a, kl_error *err)
{
    const mla_call c = call_of(a);
    const cudaStream_t stream = kl_cuda_stream(be);
    if (a->q.shape[1] > INT_MAX || a->q.shape[2] > INT_MAX || a->w_kv_b.shape[1] > INT_MAX ||
        a->pages.shape[2] > INT_MAX || c.N * c.B > INT_MAX)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_prefill: H, nope+rope, nope+V, rank+rope and N * B must each be "
                       "<= %d",
                       INT_MAX);
    if (c.T == 0) return KL_OK;
    KL_TRY(kl_cuda_bind(be, err));
    /* The running maximum is one of raw scores: a scale that is not positive would turn it. */
    if (has_tiles(a, c) && is_vectored(c) && c.scale > 0) return run_both(a, c, stream, err);
    return mla_prefill_rows(a, c, {nullptr, nullptr, c.T}, stream, err);
}
