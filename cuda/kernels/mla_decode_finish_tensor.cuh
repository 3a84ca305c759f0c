/*
 * mla_decode_finish_tensor.cuh -- what mla_decode_finish_tensor.cu and mla_decode_finish_page.cu
 * share: all but how the pieces come.
 */
#ifndef KL_CUDA_KERNELS_MLA_DECODE_FINISH_TENSOR_H
#define KL_CUDA_KERNELS_MLA_DECODE_FINISH_TENSOR_H

#include "../device/arriving.cuh"
#include "../device/barrier.cuh"
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/mma.cuh"

namespace {

constexpr int RANK = 512, OUTS = 128;
constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int CLUSTER = 4;
constexpr int CHANNELS = RANK / CLUSTER; /* of a block; four a lane */
constexpr int STEPS = CHANNELS / 16, PIECES = CHANNELS / 8;
constexpr int OUT_QUARTER = OUTS / CLUSTER;
constexpr int RUNS = 8; /* interleaved runs of a row's pieces */
constexpr int MOST_PIECES = MLA_MAX_SHARES > MLA_MAX_SPLITS ? MLA_MAX_SHARES : MLA_MAX_SPLITS;
static_assert(CHANNELS == 4 * WARP && OUTS == 16 * WARPS && RUNS == WARPS);

/* Rows of a block: warps that have all runs of a row go on to another. */
template <int runs> constexpr int ROWS = runs == RUNS ? 2 * WARPS : runs;

__device__ int block_of_cluster()
{
    return blockIdx.x % CLUSTER;
}

/* Pieces of 16 bytes of a row lie in another order in each of eight rows, for ldmatrix. */
template <int runs> struct shared_memory {
    static constexpr int MERGED = ROWS<runs> < 8 ? 8 : ROWS<runs>;
    uint4 weights[OUTS][PIECES];
    uint4 merged[2][MERGED][PIECES]; /* as bf16, and what these lack */
    float received[CLUSTER][ROWS<runs>][OUT_QUARTER];
    float factors[WARPS][MOST_PIECES];
    alignas(16) float parts[runs == RUNS ? 1 : WARPS][CHANNELS];
    barrier outs;
};

/* ---- what the blocks of a cluster hand each other: counted, without a barrier at the end ---- */

/* All threads of the cluster: arrive, later wait. Afterwards all its blocks have begun, and the
 * barriers are there that were made before, with barrier_init_done(). */
__device__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Address of the same place in the shared memory of another block of the cluster. */
__device__ uint32_t address_in(const void *own, unsigned rank)
{
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"(shared_address(own)), "r"(rank));
    return at;
}

/* x to `to` of another block, or this one; 4 bytes for the phase of that block's barrier b. */
__device__ void store_in(unsigned rank, float *to, float x, barrier *b)
{
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            address_in(to, rank)),
        "r"(__float_as_uint(x)), "r"(address_in(b, rank))
        : "memory");
}

/* barrier_wait() for what other blocks have stored. */
__device__ void barrier_wait_for_cluster(barrier *b, uint32_t phase)
{
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(phase)
                     : "memory");
    } while (!done);
}

/* ---- merging the pieces ---------------------------------------------------------------- */

/* The factors of a row's pieces, by a warp whose lanes have every 32nd one's maximum and sum: to the
 * common maximum, over the whole sum. */
template <int EACH>
__device__ void weigh(float (&max)[EACH], const float (&sum)[EACH], long long count,
                      float *factors)
{
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) top = fmaxf(top, max[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        max[i] = exp2f(max[i] - top);
        total = fmaf(max[i], sum[i], total);
    }
    total = warp_sum(total);
    __syncwarp(); /* the row before has been read */
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i * WARP + lane_id() < count) factors[i * WARP + lane_id()] = max[i] / total;
    __syncwarp();
}

__device__ float4 plus(float4 a, float4 b)
{
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

/* The sum of neighbours, of their neighbours and so on; `count` is a power of two. */
template <int count> __device__ float4 tree_sum(float4 (&x)[count])
{
#pragma unroll
    for (int d = 1; d < count; d *= 2)
#pragma unroll
        for (int i = 0; i + d < count; i += 2 * d) x[i] = plus(x[i], x[i + d]);
    return x[0];
}

/* A lane's channels of a row, as operand B. */
template <int runs> __device__ void store_merged(shared_memory<runs> &s, int row, float4 x)
{
    const int piece = (lane_id() / 2) ^ row % 8, half = lane_id() % 2;
    const uint2 high = {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
    const uint2 low = {pack_bf16(x.x - low_half(high.x), x.y - high_half(high.x)),
                       pack_bf16(x.z - low_half(high.y), x.w - high_half(high.y))};
    reinterpret_cast<uint2 *>(&s.merged[0][row][piece])[half] = high;
    reinterpret_cast<uint2 *>(&s.merged[1][row][piece])[half] = low;
}

/* What the warps of a row have of it. */
template <int runs> __device__ void add_parts(int rows, shared_memory<runs> &s)
{
    constexpr int SHARE = RUNS / runs;
    float4 x[SHARE];
    if (warp_id() >= rows) return;
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        x[i] = reinterpret_cast<const float4 *>(s.parts[warp_id() * SHARE + i])[lane_id()];
    store_merged(s, warp_id(), tree_sum(x));
}

/* ---- out = W_UV ctx -------------------------------------------------------------------- */

template <int runs>
__device__ void bring_weights(const mla_arguments &a, long long h, shared_memory<runs> &s)
{
    const bf16 *w = static_cast<const bf16 *>(a.w_kv_b) +
                    (h * (a.nope + OUTS) + a.nope) * RANK + block_of_cluster() * CHANNELS;
#pragma unroll
    for (int i = threadIdx.x; i < OUTS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        copy_async(&s.weights[row][piece ^ row % 8], w + row * RANK + piece * 8, true);
    }
    copy_commit();
}

/* Operand A of a step: 16 channels of 16 outputs. */
template <int runs>
__device__ void load_weights(const shared_memory<runs> &s, int step, uint32_t (&w)[4])
{
    const int lane = lane_id(), out = 16 * warp_id() + lane % 16;
    ldmatrix(w, &s.weights[out][(2 * step + lane / 16) ^ out % 8]);
}

/* Operand B of a step and 8 rows from `first` on: two matrices of the bf16, two of what they lack. */
template <int runs>
__device__ void load_merged(const shared_memory<runs> &s, int step, int first, uint32_t (&x)[4])
{
    const int lane = lane_id(), row = first + lane % 8;
    ldmatrix(x, &s.merged[lane / 16][row][(2 * step + lane / 8 % 2) ^ row % 8]);
}

/* Each block its quarter of the outputs. */
template <int runs, int TILES>
__device__ void send_out(shared_memory<runs> &s, int rows, const float (&acc)[TILES][4])
{
    const unsigned own = block_of_cluster(), to = warp_id() / (OUT_QUARTER / 16);
    const int out = warp_id() % (OUT_QUARTER / 16) * 16 + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = 8 * j + lane_id() % 4 * 2 + i % 2;
            if (n < rows)
                store_in(to, &s.received[own][n][out + i / 2 * 8], acc[j][i], &s.outs);
        }
}

template <int runs> __device__ float total_of(const shared_memory<runs> &s, int row, int v)
{
    float sum = 0;
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) sum += s.received[b][row][v];
    return sum;
}

template <int runs>
__device__ void add_up(const mla_arguments &a, long long n0, int rows, long long h,
                       const shared_memory<runs> &s)
{
    const int v0 = block_of_cluster() * OUT_QUARTER;
    for (int i = threadIdx.x; i < rows * OUT_QUARTER; i += THREADS) {
        const int n = i / OUT_QUARTER, v = i % OUT_QUARTER;
        store_arriving(static_cast<bf16 *>(a.out) + ((n0 + n) * a.H + h) * OUTS + v0 + v,
                       total_of(s, n, v));
    }
}

/* What does not need the pieces. */
template <int runs>
__device__ void begin(const mla_arguments &a, long long h, int rows, shared_memory<runs> &s)
{
    if (a.unsettled) wait_for_inputs();
    bring_weights(a, h, s);
    if (threadIdx.x == 0) {
        barrier_init(&s.outs, 1);
        barrier_init_done();
        barrier_arrive_expecting(&s.outs, CLUSTER * rows * OUT_QUARTER * 4);
    }
    __syncwarp();
    cluster_arrive();
}

} // namespace

#endif
