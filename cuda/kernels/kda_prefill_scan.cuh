/*
 * kda_prefill_scan.cuh -- the state of a sequence and head through its prepared chunks, by the
 * block that owns 64 value rows of it.
 *
 *     U = X (V - (E k) S^T);  O = scale (E q) S^T + M U;  S <- S diag(E_last) + U^T (F k)
 * with k and q raw, and factors for them where sums have been formed (kda_chunk).
 *
 * Everything is transposed, [V, tokens] and [V, K]: then the accumulators of one product are,
 * register for register, the left operand of the next. A warpgroup, the chain, owns 16 rows a
 * warp, in registers from a sequence's first chunk to its last; another one, the output, forms O
 * from what the chain hands over, S and U of each chunk, so that the chain waits for its own
 * products alone. A third one brings chunks and values. U enters the state as the sum of two
 * bf16, which keep 16 bits of it: errors last there.
 *
 * Where summaries of segments are asked for there is no output, and the second warpgroup is a
 * chain, too, of 64 unit rows without values.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_SCAN_H
#define KL_CUDA_KERNELS_KDA_PREFILL_SCAN_H

#include "../device/barrier.cuh"
#include "kda_prefill_prepare.cuh"
#include "kda_prefill_rows.cuh"

namespace kda {

constexpr int STAGES = 4;
constexpr int SCANNERS = KDA_V_TILE / ROWS; /* warps of each of the two kinds */
constexpr int FETCHERS = 2;                 /* of those who bring chunks */
constexpr int VALUES_AHEAD = 6; /* chunks: whose values are asked for when one has come */
constexpr int TILES_OF_TOKENS = KDA_TOKENS / 8;
constexpr int STEPS = KDA_TOKENS / 16, K_STEPS = KDA_K / 16; /* of a product, 16 deep */
constexpr int V_PITCH = KDA_V_TILE + 8; /* of a token's values: 16 bytes off a bank's round */

/* Left operands of a product, 16 deep a step, as they lie in the lanes' registers. */
template <int steps> using left_operand = uint4[steps][WARP];

/* What a chain warp hands to its output warp at every chunk. */
struct handoff {
    left_operand<K_STEPS> S;
    left_operand<STEPS> U;
};

/* The outputs of a chunk, a warp 16 columns of them. */
using output_tile = bf16[KDA_TOKENS][V_PITCH];

struct alignas(1024) stage {
    kda_chunk chunk;
    bf16 v[KDA_TOKENS][V_PITCH];
};

struct scan_memory {
    stage stages[STAGES];
    handoff hands[SCANNERS];
    output_tile output; /* each warp stores its own */
    barrier full[STAGES], empty[STAGES];
    barrier has_state[SCANNERS], took_state[SCANNERS];   /* of a handoff's S */
    barrier has_update[SCANNERS], took_update[SCANNERS]; /* and U */
};

/* ---- chunks on their way ----------------------------------------------------------------- */

/* The chunks of smaller serials have been copied: their slots may be filled again. */
__device__ inline void publish(const scanner &s, unsigned serial)
{
    if (lane_id() == 0)
        write_flag(&s.p.taken[(s.pair * s.p.tiles + s.tile) * KDA_FLAG], serial);
}

/* The stage of chunk number `count` is to be filled. */
__device__ inline void wait_until_empty(scan_memory &m, unsigned count)
{
    if (count >= STAGES) barrier_wait(&m.empty[count % STAGES], (count / STAGES - 1) % 2);
}

/* The values of a chunk's tokens, zeros past the last. */
__device__ inline void fetch_values(const scanner &s, const walk &at, stage &to, barrier *full)
{
    constexpr int PIECES = KDA_V_TILE / 8; /* of a token */
    const int lane = lane_id(), tokens = at.tokens_here();
    const int pieces = (static_cast<int>(s.a.V) - s.tile * KDA_V_TILE) / 8,
              piece = lane % PIECES;
    const bf16 *v = static_cast<const bf16 *>(s.a.v.data) + at.token(s) * s.a.v.stride +
                    at.h * s.a.V + s.tile * KDA_V_TILE;
#pragma unroll
    for (int n = 0; n < KDA_TOKENS * PIECES / WARP; n++) {
        const int token = n * (WARP / PIECES) + lane / PIECES;
        const bool inside = token < tokens && piece < pieces;
        copy_async(&to.v[token][8 * piece], v + (inside ? token * s.a.v.stride + 8 * piece : 0),
                   inside);
    }
    barrier_arrive_after_copies(full);
}

/* Values of a later chunk on their way to the L2, a token a lane: a stage would wait for device
 * memory else. */
__device__ inline void prefetch_values(const scanner &s, const walk &at)
{
    const int ahead = VALUES_AHEAD * KDA_TOKENS + lane_id(), first = s.tile * KDA_V_TILE;
    if (at.chunk * KDA_TOKENS + ahead >= at.tokens || first >= s.a.V) return;
    prefetch_line(static_cast<const bf16 *>(s.a.v.data) + (at.token(s) + ahead) * s.a.v.stride +
                  at.h * s.a.V + first);
}

/* Gates of the chunk's outputs, likewise: these are wanted a chunk after it. */
__device__ inline void prefetch_gates(const scanner &s, const kda_norm &norm, const walk &at)
{
    if (lane_id() < at.tokens_here())
        prefetch_line(norm.z + (at.token(s) + lane_id()) * norm.z_stride + at.h * KDA_NORM_V +
                      s.tile * KDA_V_TILE);
}

/* A chunk, once it is ready and its stage is free. */
__device__ inline void fetch_chunk(const scanner &s, const walk &at, unsigned count,
                                   scan_memory &m)
{
    const int slot = s.pair * s.p.slots + static_cast<int>(at.serial % s.p.slots);
    const unsigned *ready = &s.p.ready[slot * KDA_FLAG], i = count % STAGES;
    while (load_here(ready) != at.serial + 1) {
    }
    read_acquire(ready);
    wait_until_empty(m, count);
    if (!ALL_SPEAK && lane_id() > 0) return;
    fence_global_for_copies();
    copies_begin(&m.full[i], static_cast<int>(sizeof(kda_chunk)));
    copy_bytes(&m.stages[i].chunk, &s.p.ring[slot], sizeof(kda_chunk), &m.full[i]);
    copies_end(&m.full[i]);
}

/* A warpgroup brings the chunks of the walk: two warps take turns at the prepared ones, for the
 * round trips to a flag and a chunk take longer than the chain does; one brings the values; one
 * says which have come. Convolved values come with their chunk: three warps take turns at both. */
template <bool convolved, bool normed>
__device__ inline void bring_chunks(const scanner &s, const kda_norm &norm, int w,
                                    scan_memory &m)
{
    constexpr int fetchers = convolved ? FETCHERS + 1 : FETCHERS;
    unsigned count = 0;
    for (walk at(s); at.valid; at.next(s), count++) {
        const unsigned i = count % STAGES;
        if (w < fetchers && count % fetchers == static_cast<unsigned>(w)) {
            fetch_chunk(s, at, count, m);
            if (convolved) fetch_values(s, at, m.stages[i], &m.full[i]);
        } else if (!convolved && w == FETCHERS) {
            wait_until_empty(m, count);
            fetch_values(s, at, m.stages[i], &m.full[i]);
        } else if (w > FETCHERS) {
            publish(s, at.serial); /* also where serials have a gap here */
            if (!convolved) prefetch_values(s, at);
            if (normed) prefetch_gates(s, norm, at);
            barrier_wait(&m.full[i], count / STAGES % 2);
            warp_arrive(&m.empty[i]);
        }
    }
}

/* ---- operands ---------------------------------------------------------------------------- */

/* [64, tokens] of a warpgroup: tile t of the warp's 16 rows holds tokens 8 t .. 8 t + 7. */
using token_sums = float[TILES_OF_TOKENS][4];

__device__ inline void put(uint4 &to, const uint32_t (&a)[4])
{
    to = uint4{a[0], a[1], a[2], a[3]};
}

__device__ inline void get(uint32_t (&a)[4], const uint4 &from)
{
    a[0] = from.x, a[1] = from.y, a[2] = from.z, a[3] = from.w;
}

/* sum += a x^T over half of the channels, x given by the descriptor of its first half. */
__device__ inline void multiply_half(token_sums &sum, const uint32_t (&a)[K_STEPS][4],
                                     uint64_t x, int half)
{
    constexpr int EACH = K_STEPS / 2, BYTES = KDA_TOKENS * KDA_K;
#pragma unroll
    for (int k = 0; k < EACH; k++)
        wgmma<KDA_TOKENS>(sum[0], a[half * EACH + k], wgmma_moved(x, half * BYTES + 32 * k));
}

/* sum += a x^T over tokens. */
__device__ inline void multiply_tokens(token_sums &sum, const uint32_t (&a)[STEPS][4],
                                       uint64_t x)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++) wgmma<KDA_TOKENS>(sum[0], a[k], wgmma_moved(x, 32 * k));
}

/* ---- the chain --------------------------------------------------------------------------- */

/* The warp's 16 columns of the values, in pairs of bf16 as token_sums has them. */
__device__ inline void load_values(uint32_t (&v)[STEPS][4], const bf16 (*from)[V_PITCH],
                                   int first)
{
    const int lane = made_here(lane_id()), i = lane % 8, part = lane / 8;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        ldmatrix_transposed(v[k], &from[16 * k + part / 2 * 8 + i][first + part % 2 * 8]);
}

/* Factors of tokens, as token_sums has them: those of tile t at [t][0] and [t][1]. */
using lane_factors = float[TILES_OF_TOKENS][2];

__device__ inline void load_factors(lane_factors &f, const float (&from)[KDA_TOKENS])
{
#pragma unroll
    for (int t = 0; t < TILES_OF_TOKENS; t++)
        load_floats(&from[8 * t + lane_id() % 4 * 2], f[t]);
}

/* V - f x as a left operand. */
__device__ inline void subtract_from(uint32_t (&to)[STEPS][4], const uint32_t (&v)[STEPS][4],
                                     const lane_factors &f, const token_sums &x)
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int t = 2 * k + j / 2;
            const float *pair = &x[t][j % 2 * 2];
            to[k][j] = pack_bf16(fmaf(-f[t][0], pair[0], low_half(v[k][j])),
                                 fmaf(-f[t][1], pair[1], high_half(v[k][j])));
        }
}

/* After the wait for products that add to x. */
__device__ inline void settle(token_sums &x)
{
#pragma unroll
    for (int t = 0; t < TILES_OF_TOKENS; t++) wgmma_settle(x[t]);
}

/* Descriptors of the operands in the first stage; those of the next lie behind. */
struct descriptors {
    uint64_t k_decayed, q_decayed, k_left, M, X, X_low;

    __device__ explicit descriptors(const kda_chunk &c)
        : k_decayed(wgmma_descriptor(c.k_decayed)), q_decayed(wgmma_descriptor(c.q_decayed)),
          k_left(wgmma_descriptor_transposed(c.k_left, sizeof c.k_left[0])),
          M(wgmma_descriptor<2 * KDA_TOKENS>(c.M)), X(wgmma_descriptor<2 * KDA_TOKENS>(c.X)),
          X_low(wgmma_descriptor<2 * KDA_TOKENS>(c.X_low))
    {
    }
};

__device__ inline uint64_t of_stage(uint64_t descriptor, unsigned i)
{
    return wgmma_moved(descriptor, i * sizeof(stage));
}

/* What a lane takes from a chunk before its products. */
struct chain_inputs {
    lane_decays decays;
    uint32_t v[STEPS][4] = {};

    template <chain_rows rows> __device__ void load(scan_memory &m, int w, unsigned count)
    {
        const stage &in = m.stages[count % STAGES];
        barrier_wait(&m.full[count % STAGES], count / STAGES % 2);
        load_decays(decays, in.chunk);
        if constexpr (rows != OF_UNITS) load_values(v, in.v, w * ROWS);
    }
};

/* S += u x, x the descriptor of F k. */
__device__ inline void add_update(warp_state &state, const uint32_t (&u)[STEPS][4], uint64_t x)
{
    constexpr int ROW_BYTES = 128;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        wgmma_transposed<KDA_K>(state.S, u[k], wgmma_moved(x, 16 * ROW_BYTES * k));
    wgmma_commit();
}

/* old = S (E k)^T, and S as left operands; those of its second half are made beside the products of
 * the first. */
__device__ inline void multiply_state(token_sums &old, uint32_t (&S)[K_STEPS][4],
                                      const warp_state &state, uint64_t k_decayed)
{
    constexpr int EACH = K_STEPS / 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int k = half * EACH; k < half * EACH + EACH; k++) to_left(S[k], &state.S[8 * k]);
        wgmma_fence();
        multiply_half(old, S, k_decayed, half);
    }
    wgmma_commit();
}

/* The output warp has taken what it was handed with the last chunk. */
__device__ inline void wait_until_taken(barrier *took, unsigned count)
{
    if (count > 0) barrier_wait(took, (count - 1) % 2);
}

/* To the output warp. */
template <int steps>
__device__ inline void hand_over(left_operand<steps> &to, const uint32_t (&x)[steps][4],
                                 barrier *has)
{
#pragma unroll
    for (int k = 0; k < steps; k++) put(to[k][lane_id()], x[k]);
    warp_arrive(has);
}

/* U = X (V - old), of which rest has V - old. */
__device__ inline void correct(token_sums &U, const uint32_t (&rest)[STEPS][4],
                               const descriptors &d, unsigned i)
{
    wgmma_fence();
    multiply_tokens(U, rest, of_stage(d.X, i));
    multiply_tokens(U, rest, of_stage(d.X_low, i));
    wgmma_commit();
}

/* Chunk number `count`, up to the products that make the next state; the stage before is done
 * with. The products are the warpgroup's, all else is the warp's. */
template <chain_rows rows>
__device__ inline void chain_chunk(warp_state &state, const chain_inputs &in,
                                   const descriptors &d, int w, unsigned count, scan_memory &m)
{
    const unsigned i = count % STAGES;
    handoff &hand = m.hands[w];
    uint32_t S[K_STEPS][4], high[STEPS][4], low[STEPS][4];
    token_sums old = {}, U = {};
    multiply_state(old, S, state, of_stage(d.k_decayed, i));
    lane_factors f; /* before S is stored: behind that they would be late */
    load_factors(f, m.stages[i].chunk.factor[0]);
    if constexpr (rows == OF_OUTPUT) {
        wait_until_taken(&m.took_state[w], count);
        hand_over<K_STEPS>(hand.S, S, &m.has_state[w]);
    }
    if (count > 0) warp_arrive(&m.empty[(count - 1) % STAGES]);
    wgmma_wait<0>();
    settle(old);
    subtract_from(high, in.v, f, old);
    correct(U, high, d, i);
    /* Beside these products, the one place where nothing waits for it, the state fades: what read
     * it had its operands. The wait keeps ptxas from doing that earlier. */
    if constexpr (rows == OF_OUTPUT) wait_until_taken(&m.took_update[w], count);
    state.decay(in.decays);
    wgmma_wait<0>();
    settle(U);

#pragma unroll
    for (int k = 0; k < STEPS; k++) to_left(high[k], U[2 * k]);
    add_update(state, high, of_stage(d.k_left, i));
#pragma unroll
    for (int k = 0; k < STEPS; k++) to_left_low(low[k], high[k], U[2 * k]);
    add_update(state, low, of_stage(d.k_left, i));
    if constexpr (rows == OF_OUTPUT) hand_over<STEPS>(hand.U, high, &m.has_update[w]);
}

template <chain_rows rows>
__device__ inline void run_chain(const scanner &s, int w, scan_memory &m)
{
    const descriptors d(m.stages[0].chunk);
    const bool owns = owns_rows(s, w, rows);
    const bool keeps = owns && rows == OF_OUTPUT && s.a.checkpoints != nullptr;
    unsigned count = 0;
    warp_state state = {};
    chain_inputs in;
    for (walk at(s); at.valid; at.next(s)) {
        if (at.chunk == 0) {
            if (owns) begin_rows<rows>(state, s, at, w);
            in.load<rows>(m, w, count);
        }
        /* A loop of its own, whose code has no gaps: behind a jump the next instructions are late. */
        for (;; at.step()) {
            chain_chunk<rows>(state, in, d, w, count++, m);
            if (keeps || at.is_last()) break;
            in.load<rows>(m, w, count); /* beside the last products */
            wgmma_wait<0>();
            wgmma_settle(state.S);
        }
        const bool is_last = at.is_last();
        if (!is_last) in.load<rows>(m, w, count);
        wgmma_wait<0>();
        wgmma_settle(state.S);
        if (owns && is_last) end_rows<rows>(state, s, at, w);
        if (keeps) keep_rows(state, s, at, w);
    }
}

/* ---- the output -------------------------------------------------------------------------- */

/* out += U M_low^T, octet by octet: of so few numbers the operands come from registers. */
__device__ inline void multiply_low(token_sums &out, const uint32_t (&U)[STEPS][4],
                                    const uint32_t (&M_low)[TILES_OF_TOKENS])
{
#pragma unroll
    for (int t = 0; t < TILES_OF_TOKENS; t++)
        mma_bf16(out[t], U[t / 2][t % 2 * 2], U[t / 2][t % 2 * 2 + 1], M_low[t]);
}

/* out = (S (E q)^T + U M^T) times the tokens' factors, M with M_low. */
__device__ inline void make_output(token_sums &out, const descriptors &d, unsigned i, int w,
                                   unsigned count, scan_memory &m)
{
    const handoff &hand = m.hands[w];
    uint32_t S[K_STEPS][4], U[STEPS][4];
    barrier_wait(&m.has_state[w], count % 2);
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) get(S[k], hand.S[k][lane_id()]);
    warp_arrive(&m.took_state[w]);
    wgmma_fence();
    multiply_half(out, S, of_stage(d.q_decayed, i), 0);
    multiply_half(out, S, of_stage(d.q_decayed, i), 1);
    wgmma_commit();
    barrier_wait(&m.has_update[w], count % 2);
#pragma unroll
    for (int k = 0; k < STEPS; k++) get(U[k], hand.U[k][lane_id()]);
    warp_arrive(&m.took_update[w]);
    wgmma_fence();
    multiply_tokens(out, U, of_stage(d.M, i));
    wgmma_commit();
    const kda_chunk &chunk = m.stages[i].chunk;
    lane_factors f;
    uint32_t M_low[TILES_OF_TOKENS];
    load_factors(f, chunk.factor[1]);
    get(M_low, *reinterpret_cast<const uint4 *>(chunk.M_low[lane_id()]));
    wgmma_wait<0>();
    settle(out);
    multiply_low(out, U, M_low);
#pragma unroll
    for (int t = 0; t < TILES_OF_TOKENS; t++)
#pragma unroll
        for (int j = 0; j < 4; j++) out[t][j] *= f[t][j % 2];
}

__device__ inline void store_transposed(bf16 *row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* To rows of tokens, from the warp's first column on. */
__device__ inline void put_output(const token_sums &x, output_tile &to, int first)
{
    const int i = lane_id() % 8, part = lane_id() / 8;
#pragma unroll
    for (int t = 0; t < TILES_OF_TOKENS; t += 2) {
        uint32_t r[4];
        to_left(r, x[t]);
        store_transposed(&to[8 * t + part / 2 * 8 + i][first + part % 2 * 8], r);
    }
}

__device__ inline void store_output(const output_tile &from, int first, bf16 *to,
                                    long long stride, int tokens)
{
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 2 * KDA_TOKENS / WARP; n++) {
        const int piece = n * WARP + lane_id(), row = piece / 2, half = piece % 2;
        if (row < tokens)
            __stcs(reinterpret_cast<uint4 *>(to + row * stride + 8 * half),
                   *reinterpret_cast<const uint4 *>(&from[row][first + 8 * half]));
    }
    __syncwarp();
}

__device__ inline void run_output(const scanner &s, int w, scan_memory &m)
{
    const long long stride = s.a.H * s.a.V;
    const descriptors d(m.stages[0].chunk);
    unsigned count = 0;
    for (walk at(s); at.valid; at.next(s), count++) {
        const unsigned i = count % STAGES;
        token_sums out = {};
        barrier_wait(&m.full[i], count / STAGES % 2);
        make_output(out, d, i, w, count, m);
        warp_arrive(&m.empty[i]);
        if (!owns_rows(s, w)) continue;
        put_output(out, m.output, w * ROWS);
        store_output(m.output, w * ROWS,
                     static_cast<bf16 *>(s.a.out) + at.token(s) * stride + at.h * s.a.V +
                         first_row(s, w),
                     stride, at.tokens_here());
    }
}

} // namespace kda

#endif
