/*
 * sample.cu -- drawing the next token of each row.
 *
 * Computes     p = softmax(z / temperature), cut by top_k, top_p and min_p, and one id of it,
 *              all as in backend/ops.h; the log-probability of the id and of the n best
 * Shapes       logits [N, V], peaks [N, ceil(V / 16), 2], ids and logprobs [N], alternatives
 *              [N, n], seen [N, ceil(V / 32)]
 * Layout       dense
 * Precision    exponentials in f32, rounded to multiples of at most 2^-31 of the largest (2^-44
 *              at V = 163,840) and summed as integers, exactly; those of log softmax in f32
 * Grid         a cluster of 8 blocks a row; a row is not sorted, device/select.cuh says how its
 *              cuts and its draw are found
 * Order        every cut keeps a head of the order of falling p, so the mass kept is the least
 *              of those the cuts keep, and drawing is finding a mass once more. A thread's
 *              exponentials are added in rising order, then warps, blocks and the cluster
 * Roofline     4 V bytes, 0.2 us at V = 163,840, read once: a row of up to 262,144 then lies in
 *              the shared memory of its cluster, for three passes or more; a longer one is read
 *              again in each. Largest logit and log softmax are of the peaks: a greedy row is not
 *              read at all, and where all are greedy sample_greedy.cu draws
 * Measured     not timed yet
 *
 * A row whose largest logit is not finite yields id -1: NaN, all -inf, and +inf too, for then
 * the softmax is NaN.
 */
#include "../device/launch.cuh"
#include "../device/peaks.cuh"
#include "../device/select.cuh"
#include "../device/types.cuh"
#include "../peaks.h"

#include "base/rng.h"

namespace {

constexpr int MAX_ROWS = 0x7fffffff / RANKS; /* of a grid's x axis */

/* Values of a row that a block can hold: with select_shared 196 KB of 227. */
constexpr int64_t MOST_OF_A_PART = 32 << 10;
constexpr size_t MOST_SHARED = sizeof(select_shared) + MOST_OF_A_PART * sizeof(float);

static_assert(PEAK_THREADS == SELECT_THREADS); /* each block reads the peaks of its row */

struct arguments {
    const float *logits;
    const peak *peaks;
    const kl_sampling *sampling;
    const uint32_t *seen; /* or null */
    int *ids, *top_ids;
    float *logprobs, *top_logprobs;
    int64_t V, words;
    int top;
    bool fits;         /* a part of a row in shared memory, behind select_shared */
    float mass_of_one; /* what the largest exponential weighs: V of them stay below 2^63 */
};

/* A row of logits after the penalty, with the masses of its entries. */
struct sampled_row {
    row_part part;
    const uint32_t *seen; /* null: no penalty */
    float penalty, top, temperature, mass_of_one;

    __device__ float penalized(uint32_t i, float z) const
    {
        if (seen == nullptr || (seen[i / 32] >> i % 32 & 1) == 0) return z;
        return z > 0 ? z / penalty : z * penalty;
    }

    __device__ uint64_t order(uint32_t i, float z) const
    {
        return order_of(penalized(i, z), i);
    }

    __device__ float weight(float z) const { return expf((z - top) / temperature); }

    __device__ uint64_t mass_of(float weight) const
    {
        return weight > 0 ? __float2ull_rn(weight * mass_of_one) : 0;
    }

    __device__ uint64_t mass(uint64_t order) const { return mass_of(weight(value_of(order))); }
};

constexpr uint64_t NAN_WITHIN = 0; /* no entry has it, and it is less than all */

/* The first entry of the order, but NAN_WITHIN if a NaN is among them: its value is one, too. */
__device__ uint64_t find_first(const sampled_row &row, select_shared &s)
{
    uint64_t best = NO_ENTRY;
    for_each(row.part, [&](uint32_t i, float z, bool inside) {
        if (!inside) return;
        const uint64_t order = z != z ? NAN_WITHIN : row.order(i, z);
        best = order < best ? order : best;
    });
    return cluster_reduce(
        best, [](uint64_t x, uint64_t y) { return x < y ? x : y; }, s);
}

/* The mass of all entries, and of those that min_p leaves; the best always stays. */
struct row_mass {
    uint64_t all, likely;
};

__device__ row_mass find_mass(const sampled_row &row, float min_p, uint32_t best,
                              select_shared &s)
{
    row_mass m = {0, 0};
    for_each(row.part, [&](uint32_t i, float z, bool inside) {
        if (!inside) return;
        const float weight = row.weight(row.penalized(i, z));
        const uint64_t mass = row.mass_of(weight);
        m.all += mass;
        if (weight >= min_p || i == best) m.likely += mass;
    });
    const auto add = [](uint64_t x, uint64_t y) { return x + y; };
    m.all = cluster_reduce(m.all, add, s);
    m.likely = cluster_reduce(m.likely, add, s);
    return m;
}

__device__ int draw(const kl_sampling &p, const sampled_row &row, uint32_t best,
                    select_shared &s)
{
    const row_mass m = find_mass(row, p.min_p, best, s);
    uint64_t kept = m.likely;
    tally enough = {~0ull, ~0u};
    if (p.top_p < 1)
        enough.mass = static_cast<uint64_t>(
            ceil(static_cast<double>(p.top_p) * static_cast<double>(m.all)));
    if (p.top_k > 0 && p.top_k < row.part.n) enough.count = static_cast<uint32_t>(p.top_k);
    if (p.top_p < 1 || enough.count != ~0u) {
        const uint64_t head = find(row, enough, s).mass;
        kept = head < kept ? head : kept;
    }
    /* The first entry whose mass and that of all before it exceed this. The product may round
     * up to the very end. */
    uint64_t target =
        static_cast<uint64_t>(kl_rng_uniform(p.seed, p.position) * static_cast<double>(kept));
    target = target < kept ? target : kept - 1;
    return find(row, {target + 1, ~0u}, s).id;
}

__device__ bool penalizes(const arguments &a, const kl_sampling &p)
{
    return a.seen != nullptr && p.repetition_penalty != 1;
}

/* Given the first of the logits as they are; -1 where the penalty overflowed. */
__device__ int choose(const arguments &a, int64_t n, const kl_sampling &p, const row_part &part,
                      uint64_t first, select_shared &s)
{
    const bool penalize = penalizes(a, p);
    sampled_row row = {.part = part,
                       .seen = penalize ? a.seen + n * a.words : nullptr,
                       .penalty = p.repetition_penalty,
                       .top = 0,
                       .temperature = p.temperature,
                       .mass_of_one = a.mass_of_one};
    const uint64_t best = penalize ? find_first(row, s) : first;
    row.top = value_of(best);
    if (!isfinite(row.top)) return -1;
    if (!(p.temperature > 0)) return id_of(best);
    return draw(p, row, static_cast<uint32_t>(id_of(best)), s);
}

__device__ void store_best(const arguments &a, int64_t n, const row_part &part, bool known,
                           double log_sum, select_shared &s)
{
    if (a.top == 0) return;
    const uint64_t order = known ? find_best(part, a.top, s) : NO_ENTRY;
    const int t = threadIdx.x;
    if (!is_first_rank() || t >= a.top) return;
    a.top_ids[n * a.top + t] = known ? id_of(order) : -1;
    a.top_logprobs[n * a.top + t] =
        known ? static_cast<float>(static_cast<double>(value_of(order)) - log_sum) : NAN;
}

__global__ __cluster_dims__(RANKS, 1, 1)
    __launch_bounds__(SELECT_THREADS, 1) void sample_kernel(__grid_constant__ const arguments a)
{
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ peaks_shared of_peaks;
    select_shared &s = *reinterpret_cast<select_shared *>(shared);
    const int64_t n = blockIdx.x / RANKS;
    const float *const logits = a.logits + n * a.V;
    const uint32_t V = static_cast<uint32_t>(a.V);

    let_next_start();
    wait_for_inputs();
    const kl_sampling p = a.sampling[n];
    const bool walks = p.temperature > 0 || penalizes(a, p) || a.top > 0;
    row_part part = part_of(logits, a.V);
    if (walks && a.fits) part = copy_part(part, reinterpret_cast<float *>(shared + sizeof s));
    const row_top top = find_top(logits, a.peaks + n * peaks_of(V), V, of_peaks);
    wait_for_part();
    const bool known = isfinite(top.value);
    const double log_sum = top.log_sum;
    const uint64_t first = order_of(top.value, static_cast<uint32_t>(top.id));
    const int id = known ? choose(a, n, p, part, first, s) : -1;
    if (is_first_rank() && threadIdx.x == 0) {
        a.ids[n] = id;
        a.logprobs[n] =
            id < 0 ? NAN : static_cast<float>(static_cast<double>(logits[id]) - log_sum);
    }
    store_best(a, n, part, known, log_sum, s);
}

/* The largest power of two of which V stay below 2^63, with a bit to spare. */
float mass_of_one(int64_t V)
{
    float mass = 0x1p62f;
    for (int64_t reach = 1; reach < V; reach *= 2) mass /= 2;
    return mass;
}

kl_status sample_rows(kl_backend *be, const kl_sample *a, kl_error *err)
{
    const int64_t N = a->logits.shape[0], V = a->logits.shape[1];
    const bool fits = part_values(V) <= MOST_OF_A_PART;
    const size_t bytes = sizeof(select_shared) +
                         (fits ? static_cast<size_t>(part_values(V)) * sizeof(float) : 0);
    const arguments args = {
        .logits = static_cast<const float *>(a->logits.data),
        .peaks = static_cast<const peak *>(a->peaks.data),
        .sampling = a->sampling,
        .seen = static_cast<const uint32_t *>(a->seen.data),
        .ids = static_cast<int *>(a->ids.data),
        .top_ids = static_cast<int *>(a->top_ids.data),
        .logprobs = static_cast<float *>(a->logprobs.data),
        .top_logprobs = static_cast<float *>(a->top_logprobs.data),
        .V = V,
        .words = (V + 31) / 32,
        .top = kl_tensor_absent(&a->top_ids) ? 0 : static_cast<int>(a->top_ids.shape[1]),
        .fits = fits,
        .mass_of_one = mass_of_one(V),
    };
    KL_TRY(kl_cuda_allow_shared(sample_kernel, MOST_SHARED, err));
    const unsigned blocks = static_cast<unsigned>(N * RANKS);
    return kl_cuda_launch(sample_kernel, blocks, SELECT_THREADS, bytes, kl_cuda_stream(be), err,
                          args);
}

/* The call with peaks: its own, or those that its workspace gets. */
kl_status add_peaks(kl_backend *be, kl_sample *a, kl_error *err)
{
    const int64_t N = a->logits.shape[0], count = kl_peaks_of(a->logits.shape[1]);
    if (!kl_tensor_absent(&a->peaks)) return KL_OK;
    a->peaks = kl_tensor_3d(a->ws.data, KL_F32, N, count, 2);
    return kl_cuda_find_peaks(be, &a->logits, static_cast<float *>(a->ws.data), err);
}

} // namespace

size_t kl_cuda_sample_workspace(kl_backend *, const kl_sample *a)
{
    const int64_t N = a->logits.shape[0], count = kl_peaks_of(a->logits.shape[1]);
    return kl_tensor_absent(&a->peaks) ? static_cast<size_t>(N * count) * sizeof(peak) : 0;
}

kl_status kl_cuda_sample(kl_backend *be, const kl_sample *a, kl_error *err)
{
    const int64_t N = a->logits.shape[0];
    kl_sample with = *a;
    if (N == 0) return KL_OK;
    if (N > MAX_ROWS)
        return kl_fail(err, KL_ERR_VALUE, "sample: at most %d rows, got %lld", MAX_ROWS,
                       static_cast<long long>(N));
    KL_TRY(add_peaks(be, &with, err));
    const bool plain = kl_tensor_absent(&a->seen) && kl_tensor_absent(&a->top_ids);
    return a->greedy && plain ? kl_cuda_sample_greedy(be, &with, err)
                              : sample_rows(be, &with, err);
}
