/*
 * moe_experts_step_apart.cu -- the second product of a single token's experts with the bits that
 * many tokens have: what a batch-invariant backend takes in place of moe_experts_step.cu's.
 *
 * Computes     y = sum_j weight_j (w2_j inner_j) + w2_shared inner_shared;  out = y, or
 *              residual += y
 * Shapes       inner [I', top_k * I]; w2 [E, D, I]; out, residual [D]; D and I multiples of 64
 * Layout       dense, 16-byte aligned rows; each routed matrix in the shared one's format
 * Precision    bf16 in and out, the residual f32; int4 weights to bf16, the others exact; f32 sums,
 *              y rounded to bf16
 * Grid         a block for each 8 rows, which goes through the experts two by two: rows of one are
 *              the upper half of an mma's, rows of the other the lower. It knows the experts before
 *              the inner products are there, and has their first weights on the way. Which turns
 *              it goes through is a list, made once; scales lie beside it, not in the ring
 * Order        that of moe_experts_few.cu: an expert's columns by warps that take turns, then
 *              warps in order; then experts in the order of the choice, the shared one last
 * Roofline     the weights of the experts chosen, once: 9 * 4.7 MB for the model in bf16, 14 us at
 *              3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 12.3
 *              us; a token 2.094 ms, with moe_experts_step.cu and all else of the default mode
 *              1.923 (2026-11-23, without the list)
 */
#include "../device/moe_step.cuh"

namespace {

constexpr int ROW_FLOATS = STREAM_WARPS * EACH; /* of an expert's sums: [warp][row] */

/* Steps on their way: with so many, three blocks find room on a multiprocessor, so that the model's
 * 288 all do and none waits for another's end. Scales do not come through the ring. */
template <kl_weight_format format>
using apart_ring = weight_ring<KL_W_BF16, (weight_codec<format>::GROUP > 0 ? 5 : 6)>;

__host__ __device__ inline int visits_of(const moe_step_arguments &a)
{
    return a.n_shared + a.top_k;
}

__host__ __device__ inline const weight_view &down_of(const moe_step_arguments &a, int v)
{
    return v < a.n_shared ? a.shared_w2 : a.w2;
}

__host__ __device__ inline int turns_of(const weight_view &w)
{
    return static_cast<int>((w.row_bytes + RING_TURN - 1) / RING_TURN);
}

/* Pairs of visits, 2 p and 2 p + 1, and the turns of the warps through them: all but the first
 * have as many as a routed expert. */
struct pair_list {
    int pairs, first, each;

    __host__ __device__ explicit pair_list(const moe_step_arguments &a)
        : pairs((visits_of(a) + 1) / 2), first(turns_of(down_of(a, 0))), each(turns_of(a.w2))
    {
        if (visits_of(a) > 1 && each > first) first = each;
    }

    __host__ __device__ int turns(int p) const { return p == 0 ? first : each; }
    __host__ __device__ int all() const { return first + (pairs - 1) * each; }
    __device__ int pair_of(int turn) const
    {
        return turn < first ? 0 : 1 + (turn - first) / each;
    }
    __device__ int start(int p) const { return p == 0 ? 0 : first + (p - 1) * each; }
};

/* A turn through one of a pair's visits. */
struct alignas(16) visit_turn {
    const uint8_t *data; /* of the first of the block's 8 rows, from there on; as the scales */
    const bf16 *scales;
    int row_bytes;
    int left;   /* bytes of a row from there on, or none */
    int column; /* of the inner products */
    float weight;
};

template <kl_weight_format format>
__device__ visit_turn turn_of(const moe_step_arguments &a, const chosen_experts &chosen,
                              const pair_list &list, int turn, int half)
{
    using feed = ring_feed<format>;
    const int pair = list.pair_of(turn), v = 2 * pair + half, j = v - a.n_shared;
    if (v >= visits_of(a)) return {a.w2.data, a.w2.scales, 0, 0, 0, 0};
    const weight_view &w = down_of(a, v);
    const int at = (turn - list.start(pair)) * RING_TURN;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH;
    weight_row first = row_of(w, j < 0 ? row : chosen.ids[j] * a.w2.rows + row);
    const int before = a.n_shared * static_cast<int>(a.shared_w2.cols);
    const int column = j < 0 ? 0 : before + j * static_cast<int>(w.cols);
    const int row_bytes = static_cast<int>(w.row_bytes);
    if constexpr (feed::SCALED) first.scales += feed::groups(at);
    return {first.data + at,
            first.scales,
            row_bytes,
            row_bytes - at,
            column + at / 16 * weight_codec<format>::PIECE,
            j < 0 ? 1.0f : chosen.weights[j]};
}

/* What the ring is to hold next: a turn of both visits of a pair; zeros where one has none. */
template <kl_weight_format format> struct turn_walk {
    const visit_turn *next, *end;

    __device__ void put(apart_ring<format> &ring)
    {
        if (next == end) return ring.put_none();
        weight_row row[2];
        bool inside[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i].data =
                next[i].data + (lane_id() / STREAM_LANES * next[i].row_bytes + ring_skip());
            inside[i] = ring_skip() < next[i].left;
        }
        ring.template put<KL_W_BF16>(row, inside);
        next += 2;
    }
};

/* The scales of all turns in shared memory, zeros where there are none: [turn][warp][row] and,
 * where a step has several of a row, [group], those of a pair's visits as the halves of a word.
 * They are asked for before the ring is filled, and kept after it. */
template <kl_weight_format format> struct turn_scales {
    using codec = weight_codec<format>;
    static constexpr int STEP = STREAM_LANES * codec::PIECE / codec::GROUP; /* of a row */
    static constexpr int TURN = STREAM_WARPS * EACH * STEP;                 /* words */
    static constexpr int BATCH = STEP == 1 ? 3 : 5; /* with 256 threads all of the model's */
    uint16_t held[BATCH][2];

    static __host__ __device__ int bytes_of(int turns)
    {
        return turns * TURN * static_cast<int>(sizeof(uint32_t));
    }

    static __device__ uint16_t load(const visit_turn &t, int word)
    {
        const int row = word / STEP % EACH, step = word / (EACH * STEP), group = word % STEP;
        if (step * RING_STEP + group * (RING_STEP / STEP) >= t.left) return 0;
        const int at = row * ring_feed<format>::groups(t.row_bytes) + step * STEP + group;
        return reinterpret_cast<const uint16_t *>(t.scales)[at];
    }

    __device__ void ask(const visit_turn *turns, int all)
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = b * STREAM_THREADS + threadIdx.x;
                held[b][i] = at < all * TURN ? load(turns[2 * (at / TURN) + i], at % TURN) : 0;
            }
    }

    static __device__ uint32_t word_of(uint16_t first, uint16_t second)
    {
        return first | static_cast<uint32_t>(second) << 16;
    }

    __device__ void keep(uint32_t *to, const visit_turn *turns, int all) const
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (const int at = b * STREAM_THREADS + threadIdx.x; at < all * TURN)
                to[at] = word_of(held[b][0], held[b][1]);
#pragma unroll 1
        for (int at = BATCH * STREAM_THREADS + threadIdx.x; at < all * TURN;
             at += STREAM_THREADS) {
            const visit_turn *const pair = turns + 2 * (at / TURN);
            to[at] = word_of(load(pair[0], at % TURN), load(pair[1], at % TURN));
        }
    }

    /* Where this lane finds those of its steps, TURN words apart. */
    static __device__ const uint32_t *own(const uint32_t *words)
    {
        const int row = lane_id() / STREAM_LANES, group = lane_id() % STREAM_LANES;
        return words + (warp_id() * EACH + row) * STEP + group * STEP / STREAM_LANES;
    }

    static __device__ void read(float (&to)[2], const uint32_t *own)
    {
        to[0] = low_half(*own), to[1] = high_half(*own);
    }
};

template <kl_weight_format format>
requires(weight_codec<format>::GROUP == 0) struct turn_scales<format> {
    static constexpr int TURN = 0;
    static __host__ __device__ int bytes_of(int) { return 0; }
    static __device__ void ask(const visit_turn *, int) {}
    static __device__ void keep(uint32_t *, const visit_turn *, int) {}
    static __device__ const uint32_t *own(const uint32_t *words) { return words; }
    static __device__ void read(float (&)[2], const uint32_t *) {}
};

/* The inner products as two rows of x: those of each pair's first visits and of their second ones,
 * in whole turns. Through registers, so that what the ring holds is not waited for. */
template <kl_weight_format format> struct inner_rows {
    static constexpr int PIECE = weight_codec<format>::PIECE;
    static constexpr int UNITS = RING_TURN / 16 * PIECE / 8; /* of 16 bytes, in a turn */
    static constexpr int UNIT_BYTES = 128 / PIECE;           /* of a weight */
    static constexpr int BATCH =
        5; /* with 256 threads all of the model's 9 times 1024 columns */
    const visit_turn *turns;
    const int units; /* of a row */
    int columns[BATCH];
    uint4 held[BATCH];

    __device__ inner_rows(const visit_turn *list, int all) : turns(list), units(all * UNITS) {}

    /* Of unit i of both rows, or -1. */
    __device__ int column(int i) const
    {
        const int second = i >= units, at = i - second * units, u = at % UNITS;
        const visit_turn &t = turns[2 * (at / UNITS) + second];
        return u * UNIT_BYTES < t.left ? t.column + 8 * u : -1;
    }

    /* Before the products are there, */
    __device__ void prepare()
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int i = b * STREAM_THREADS + threadIdx.x;
            columns[b] = i < 2 * units ? column(i) : -1;
        }
    }

    static __device__ uint4 load(const bf16 *inner, int column)
    {
        return column < 0 ? uint4{} : *reinterpret_cast<const uint4 *>(inner + column);
    }

    /* then all at once; */
    __device__ void ask(const bf16 *inner)
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++) held[b] = load(inner, columns[b]);
    }

    __device__ void put(const shared_rows &to, int i, uint4 v) const
    {
        const int second = i >= units;
        *to.unit(second, i - second * units) = v;
    }

    /* a barrier follows. */
    __device__ void keep(const shared_rows &to, const bf16 *inner) const
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (const int i = b * STREAM_THREADS + threadIdx.x; i < 2 * units)
                put(to, i, held[b]);
#pragma unroll 1
        for (int i = BATCH * STREAM_THREADS + threadIdx.x; i < 2 * units; i += STREAM_THREADS)
            put(to, i, load(inner, column(i)));
    }
};

/* sums: [visit][warp][row] of this warp. */
template <kl_weight_format format>
__device__ void multiply_experts(float *sums, int visits, const pair_list &list,
                                 turn_walk<format> &walk, apart_ring<format> &ring,
                                 const shared_rows &inner, const uint32_t *scales)
{
    using scales_type = turn_scales<format>;
    ring_x<format, 1> columns(inner, 2);
    const uint32_t *scale = scales_type::own(scales);
    float *own = sums + warp_id() * EACH + lane_id() / STREAM_LANES;
#pragma unroll 1
    for (int p = 0; p < list.pairs; p++, own += 2 * ROW_FLOATS) {
        float acc[1][4] = {};
#pragma unroll 1
        for (int n = list.turns(p); n > 0; n--) {
            ring_pieces pieces = ring.template take<KL_W_BF16>({false, false});
            scales_type::read(pieces.scale, scale);
            ring_multiply<format, 1>(acc, pieces, columns);
            columns.advance();
            scale += scales_type::TURN;
            walk.put(ring);
        }
        if (lane_id() % STREAM_LANES != 0) continue;
        own[0] = acc[0][0];                                  /* rows 0 to 7 by row 0 of x */
        if (2 * p + 1 < visits) own[ROW_FLOATS] = acc[0][3]; /* rows 8 to 15 by row 1 */
    }
}

/* The sum over the warps of each visit, in place of the first warp's; a barrier follows. */
__device__ void add_warps(float *sums, int visits)
{
    for (int i = threadIdx.x; i < visits * EACH; i += STREAM_THREADS) {
        float *const own = sums + i / EACH * ROW_FLOATS;
        own[i % EACH] = sum_of_warps<EACH>(own, i % EACH);
    }
}

__device__ float add_experts(const moe_step_arguments &a, const pair_list &list,
                             const visit_turn *turns, const float *sums, int row)
{
    float y = 0;
#pragma unroll 4
    for (int v = a.n_shared; v < visits_of(a); v++)
        y = fmaf(turns[2 * list.start(v / 2) + v % 2].weight, sums[v * ROW_FLOATS + row], y);
    return a.n_shared > 0 ? y + sums[row] : y;
}

struct choice_room {
    chosen_experts chosen;
    choice_keys keys;
};

/* A block's shared memory behind its ring. The choice lies where the sums are later. */
template <kl_weight_format format> struct apart_layout {
    int turns, visits;
    int pitch; /* of a row of inner products */

    __host__ __device__ explicit apart_layout(const moe_step_arguments &a)
        : turns(pair_list(a).all()), visits(visits_of(a)),
          pitch(shared_rows::pitch_of(int64_t{turns} * inner_rows<format>::UNITS * 8))
    {
    }

    static constexpr int INNER = apart_ring<format>::BYTES;
    __host__ __device__ int list() const { return INNER + 2 * pitch; }
    __host__ __device__ int scales() const
    {
        return list() + 2 * turns * static_cast<int>(sizeof(visit_turn));
    }
    __host__ __device__ int sums() const
    {
        return scales() + turn_scales<format>::bytes_of(turns);
    }
    __host__ __device__ int bytes() const
    {
        constexpr int CHOICE = static_cast<int>(sizeof(choice_room));
        const int own = visits * ROW_FLOATS * static_cast<int>(sizeof(float));
        return sums() + (own > CHOICE ? own : CHOICE);
    }
};

template <kl_weight_format format>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void moe_step_apart_kernel(
    __grid_constant__ const moe_step_arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const apart_layout<format> layout(a);
    const pair_list list(a);
    const shared_rows inner = {shared + layout.INNER, layout.pitch};
    auto *const turns = reinterpret_cast<visit_turn *>(shared + layout.list());
    auto *const scales = reinterpret_cast<uint32_t *>(shared + layout.scales());
    auto *const sums = reinterpret_cast<float *>(shared + layout.sums());
    auto &choice = *reinterpret_cast<choice_room *>(sums);
    apart_ring<format> ring(shared);
    let_next_start();
    if (a.unsettled) wait_for_inputs(); /* scales come through the L1 */
    share_keys(a, choice.keys);
    __syncthreads();
    if (warp_id() == 0) choose(a, choice.keys, choice.chosen);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * layout.turns; i += STREAM_THREADS)
        turns[i] = turn_of<format>(a, choice.chosen, list, i / 2, i % 2);
    __syncthreads();
    turn_scales<format> asked;
    asked.ask(turns, layout.turns);
    turn_walk<format> walk = {turns, turns + 2 * layout.turns};
#pragma unroll 1
    for (int d = 0; d < apart_ring<format>::STEPS; d++) walk.put(ring);
    inner_rows<format> products(turns, layout.turns);
    products.prepare();

    wait_for_inputs();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH + threadIdx.x;
    const bool stores = threadIdx.x < EACH;
    const float before = stores && a.residual != nullptr ? a.residual[row] : 0;
    products.ask(a.inner);
    asked.keep(scales, turns, layout.turns);
    products.keep(inner, a.inner);
    __syncthreads();
    multiply_experts<format>(sums, layout.visits, list, walk, ring, inner, scales);
    __syncthreads();
    add_warps(sums, layout.visits);
    __syncthreads();
    if (!stores) return;
    const bf16 y = from_float<bf16>(add_experts(a, list, turns, sums, threadIdx.x));
    if (a.residual != nullptr)
        a.residual[row] = before + to_float(y);
    else
        a.out[row] = y;
}

} // namespace

/* ---- host ------------------------------------------------------------------------------ */

bool kl_cuda_moe_step_apart_takes(const moe_step_arguments &a, kl_weight_format format)
{
    return with_format(format, [&](auto f) {
        return apart_layout<f.value>(a).bytes() <= static_cast<int>(RING_MOST_SHARED);
    });
}

kl_status kl_cuda_moe_step_apart(const moe_step_arguments &a, kl_weight_format format,
                                 cudaStream_t stream, kl_error *err)
{
    return with_format(format, [&](auto f) {
        const auto kernel = moe_step_apart_kernel<f.value>;
        KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
        return kl_cuda_launch(kernel, static_cast<unsigned>(a.w2.rows / EACH), STREAM_THREADS,
                              static_cast<size_t>(apart_layout<f.value>(a).bytes()), stream,
                              err, a);
    });
}
