/*
 * ring.cuh -- x w^T for a few rows of x, as stream.cuh has it, with the weight on its way before
 * x is there: a lane's pieces come by asynchronous copies to a ring of its own in shared memory.
 *
 * Weights never change, so the ring is filled before wait_for_inputs(), while the kernels ahead
 * still run (not those that kl_weight calls unsettled: wait first). It takes no registers: at most
 * 64 a thread leave room for the blocks of a neighbour in the stream; shared memory has room for
 * two of these blocks a multiprocessor, or three where rings or x are short.
 * Blocks stay and go from tile to tile; the ring runs on, so that the next tile's weights are on
 * their way while the sums of one are added.
 *
 * A step is 64 bytes of each of 16 rows: what a warp multiplies at a time, in any format. Lane
 * 4 r + c has the c-th piece of 16 bytes of rows r and r + 8. The warps of a block take turns
 * along a row. What a lane copies only it reads, so no barrier is needed, only the wait for its
 * own copies, which are counted: one commit a step, an empty one where no step is left.
 *
 *     weight_ring<format> ring(shared);
 *     let_next_start();    here or after the wait: linear_step.cu has why
 *     for (DEPTH times) more ? ring.put(feed), feed.advance(), ... : ring.put_none();
 *     wait_for_inputs();
 *     ... rows of x to shared memory (shared_rows), a barrier ...
 *     for each tile {
 *         ring_x<N> x(rows, ...);
 *         for (ring_steps(row_bytes) times) {
 *             ring_multiply<format, N>(acc, ring.take(odd), x);
 *             more ? ring.put(feed), feed.advance(), ... : ring.put_none();
 *         }
 *         stream_share(), stream_sum() between barriers
 *     }
 *
 * `feed` runs ahead of the products, over the steps of all tiles in the order in which they are
 * taken: whoever knows where the next tile lies points it there (ring_feed) once this one's steps
 * are asked for. Every take() is followed by one put() or put_none(), after the products: they
 * have what was read in registers, so that the slot is free.
 */
#ifndef KL_CUDA_DEVICE_RING_H
#define KL_CUDA_DEVICE_RING_H

#include "../product.h"
#include "arriving.cuh"
#include "barrier.cuh"
#include "math.cuh"
#include "stream.cuh"
#include "wide.cuh"

/* Steps on their way, timed in notes/SPEED.md, and blocks a multiprocessor that a kernel starts,
 * where it has no numbers of its own. */
constexpr int RING_DEPTH = 8;
constexpr int RING_BLOCKS = 2;

/* More, for one block, would leave one a multiprocessor. */
constexpr size_t RING_MOST_SHARED = 113 << 10;

constexpr int RING_STEP = STREAM_LANES * 16;         /* bytes of a row */
constexpr int RING_TURN = STREAM_WARPS * RING_STEP;  /* from a warp's step to its next */
constexpr int RING_PIECES = 2 * 16 * STREAM_THREADS; /* bytes of a slot */
constexpr int RING_SCALES = 2 * 4 * STREAM_THREADS;  /* likewise */

/* copy_async() of memory that is read once, a row at a time: the L2 brings whole lines of 128 bytes
 * when a half is asked for. Without that an H200 reads [163840, 2048] at 4.0 TB/s, with it at
 * 4.5. */
__device__ inline void copy_once(void *shared, const void *global, bool inside)
{
    const int bytes = inside ? 16 : 0;
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes)
        : "memory");
}

/* An aligned word, through the L1; zeros where `inside` is false. */
__device__ inline void copy_word(void *shared, const void *global, bool inside)
{
    const int bytes = inside ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

/* Steps of this warp in a row. */
__device__ inline int ring_steps(int row_bytes)
{
    const int from_here = row_bytes - warp_id() * RING_STEP;
    return from_here > 0 ? (from_here + RING_TURN - 1) / RING_TURN : 0;
}

/* Bytes of a row before this lane's first piece. */
__device__ inline int ring_skip()
{
    return warp_id() * RING_STEP + lane_id() % STREAM_LANES * 16;
}

/* Which half of its word a scale lies in. */
__device__ inline bool is_odd(const bf16 *scale)
{
    return reinterpret_cast<uintptr_t>(scale) % 4 != 0;
}

/* Where a lane's next pieces lie, of rows r and r + 8 of a tile. Scales come by aligned words, the
 * least that can be copied: the other half may lie past the end of their array, never past that
 * of the memory it is part of, and is not looked at. */
template <kl_weight_format format> struct ring_feed {
    using codec = weight_codec<format>;
    static constexpr bool SCALED = codec::GROUP > 0;
    weight_row row[2]; /* after start() the words of the scales */
    int left;          /* bytes of the rows, from there on */

    /* From the start of both rows. */
    __device__ void start(weight_row top, weight_row bottom, int row_bytes)
    {
        row[0] = top;
        row[1] = bottom;
        left = row_bytes;
        move(ring_skip());
        if constexpr (SCALED)
#pragma unroll
            for (int i = 0; i < 2; i++) row[i].scales -= is_odd(row[i].scales);
    }

    /* Which half of their words the scales of a row lie in, of this lane's steps: the same for
     * all of them, for a turn is a number of words. */
    static __device__ bool odd(weight_row row)
    {
        if constexpr (SCALED) return is_odd(row.scales + groups(ring_skip()));
        return false;
    }

    __device__ void advance()
    {
        move(RING_TURN);
    }

    /* In so many bytes. */
    static __host__ __device__ int groups(int bytes)
    {
        return bytes / 16 * codec::PIECE / codec::GROUP;
    }

    /* So many bytes on; whole steps, or pieces within one. */
    __device__ void move(int bytes)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i].data += bytes;
            if constexpr (SCALED) row[i].scales += groups(bytes);
        }
        left -= bytes;
    }
};

/* A step as a lane has it. */
struct ring_pieces {
    uint4 raw[2];
    float scale[2];
};

/* `format` decides about the scales; weights without any pass through every ring. DEPTH: steps on
 * their way. */
template <kl_weight_format format, int DEPTH = RING_DEPTH> struct weight_ring {
    static constexpr bool SCALED = weight_codec<format>::GROUP > 0;
    static constexpr int SLOT = RING_PIECES + (SCALED ? RING_SCALES : 0);
    static constexpr int STEPS = DEPTH;
    static constexpr int BYTES = DEPTH * SLOT; /* of shared memory */

    unsigned char *first, *slot;

    __device__ explicit weight_ring(unsigned char *shared) : first(shared), slot(shared) {}

    __device__ uint4 *piece(int i) const
    {
        return reinterpret_cast<uint4 *>(slot) + i * STREAM_THREADS + threadIdx.x;
    }

    __device__ uint32_t *scales() const
    {
        return reinterpret_cast<uint32_t *>(slot + RING_PIECES) + 2 * threadIdx.x;
    }

    __device__ void skip() { slot += SLOT; }

    __device__ void put_none()
    {
        copy_commit();
        slot = slot == first + BYTES - SLOT ? first : slot + SLOT;
    }

    /* Pieces past the end of their row become zeros. */
    template <kl_weight_format f> __device__ void put(const ring_feed<f> &feed)
    {
        const bool inside = feed.left > 0;
        put<f>(feed.row, {inside, inside});
    }

    /* The same of two rows that have nothing in common, with the words of their scales. */
    template <kl_weight_format f>
    __device__ void put(const weight_row (&row)[2], const bool (&inside)[2])
    {
#pragma unroll
        for (int i = 0; i < 2; i++) copy_once(piece(i), row[i].data, inside[i]);
        if constexpr (ring_feed<f>::SCALED)
#pragma unroll
            for (int i = 0; i < 2; i++) copy_word(scales() + i, row[i].scales, inside[i]);
        put_none();
    }

    /* The oldest step, once it is there. */
    template <kl_weight_format f> __device__ ring_pieces take(const bool (&odd)[2]) const
    {
        copy_wait<DEPTH - 1>();
        return read<f>(odd);
    }

    /* The same where it is known to be there; then skip(), if no more is put. */
    template <kl_weight_format f> __device__ ring_pieces read(const bool (&odd)[2]) const
    {
        ring_pieces p = {{*piece(0), *piece(1)}, {1, 1}};
        if constexpr (weight_codec<f>::GROUP > 0) {
            const uint2 words = *reinterpret_cast<const uint2 *>(scales());
            p.scale[0] = odd[0] ? high_half(words.x) : low_half(words.x);
            p.scale[1] = odd[1] ? high_half(words.y) : low_half(words.y);
        }
        return p;
    }
};

/* ---- rows of x ------------------------------------------------------------------------- */

/* In shared memory as bf16, zeros up to a whole number of any format's steps. Units of 16 bytes
 * are swapped within their 128, by token and place, so that the lanes of a fragment meet in no
 * bank whatever the format: a lane's columns are one to four units, or half of one. */
struct shared_rows {
    unsigned char *data; /* 128-byte aligned */
    int pitch;           /* bytes of a row */

    static __host__ __device__ int pitch_of(int64_t cols)
    {
        return static_cast<int>((cols + 127) / 128) * 256;
    }

    static __device__ int swap_of(int token) { return (token & 1 ? 7 : 0) ^ (token & 2); }

    /* Unit u of a token: columns 8 u and on. */
    __device__ uint4 *unit(int token, int u) const
    {
        const int place = u ^ (u >> 3 & 1) ^ swap_of(token);
        return reinterpret_cast<uint4 *>(data + token * pitch) + place;
    }
};

/* Where a lane finds the columns of x that meet its pieces, for N fragments of tokens. Fragments
 * are filled up with the last token: nobody looks at those sums. */
template <kl_weight_format format, int N> struct ring_x {
    static constexpr int PIECE = weight_codec<format>::PIECE;
    static constexpr int TURN = RING_TURN / 16 * PIECE * 2; /* bytes: a multiple of 128 */
    unsigned char *rows;
    int at[N];

    __device__ ring_x(const shared_rows &x, int T) : rows(x.data)
    {
        const int column = warp_id() * STREAM_LANES * PIECE + lane_id() % STREAM_LANES * PIECE;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int token = n * STREAM_TOKENS + lane_id() / STREAM_LANES;
            const auto *unit = reinterpret_cast<unsigned char *>(
                x.unit(token < T ? token : T - 1, column / 8));
            at[n] = static_cast<int>(unit - rows) + column % 8 * 2;
        }
    }

    __device__ void advance()
    {
#pragma unroll
        for (int n = 0; n < N; n++) at[n] += TURN;
    }

    /* Columns 8 u and on of the piece, as pairs; four columns where it has no more. */
    __device__ void load(uint32_t (&to)[PIECE < 8 ? 2 : 4], int n, int u) const
    {
        const unsigned char *const from = rows + (at[n] ^ u << 4);
        if constexpr (PIECE < 8) {
            const uint2 v = *reinterpret_cast<const uint2 *>(from);
            to[0] = v.x, to[1] = v.y;
        } else {
            const uint4 v = *reinterpret_cast<const uint4 *>(from);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
};

/* sum += weights x of a step, without the scale where that is of the whole step. The order is
 * that of stream_step. */
template <kl_weight_format format, int N>
__device__ void ring_multiply_raw(float (&sum)[N][4], const ring_pieces &p,
                                  const ring_x<format, N> &x)
{
    using F = stream_format<format, N>;
    constexpr int UNITS = F::PIECE < 8 ? 1 : F::PIECE / 8, EACH = F::PIECE / 4 / UNITS;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        /* Of these only the unit's are computed: few registers at a time. */
        uint32_t top[F::TERMS][F::PIECE / 2], bottom[F::TERMS][F::PIECE / 2];
        F::split(p.raw[0], p.scale[0], top);
        F::split(p.raw[1], p.scale[1], bottom);
        uint32_t b[N][2 * EACH];
#pragma unroll
        for (int n = 0; n < N; n++) x.load(b[n], n, u);
#pragma unroll
        for (int e = 0; e < EACH; e++)
#pragma unroll
            for (int t = F::TERMS - 1; t >= 0; t--) { /* small terms first */
                const int i = 2 * (u * EACH + e);
#pragma unroll
                for (int n = 0; n < N; n++)
                    mma_bf16(sum[n], {top[t][i], bottom[t][i], top[t][i + 1], bottom[t][i + 1]},
                             {b[n][2 * e], b[n][2 * e + 1]});
            }
    }
}

template <kl_weight_format format, int N>
__device__ void ring_multiply(float (&acc)[N][4], const ring_pieces &p,
                              const ring_x<format, N> &x)
{
    using F = stream_format<format, N>;
    if constexpr (F::WHOLE) {
        float part[N][4] = {};
        ring_multiply_raw(part, p, x);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[n][e] = F::add_scaled(p.scale[e / 2], part[n][e], acc[n][e]);
    } else {
        ring_multiply_raw(acc, p, x);
    }
}

/* ---- bringing x ------------------------------------------------------------------------ */

/* A barrier of the threads that bring x, of a block that may have others. */
template <int threads> __device__ void rows_barrier()
{
    barrier_of_threads<1, threads>();
}

/* x [T, cols], bf16 or float, or with a norm_weight the norm of that. */
struct row_source {
    const void *x;
    const float *norm_weight; /* [cols], or null */
    int64_t stride;
    int T, cols; /* a multiple of 8 */
    float eps;
    bool is_float; /* only with a norm_weight */
};

inline row_source row_source_of(const kl_cuda_product *p)
{
    return {
        .x = p->x,
        .norm_weight = p->norm_weight,
        .stride = p->x_stride,
        .T = static_cast<int>(p->T),
        .cols = static_cast<int>(p->w.cols),
        .eps = p->norm_eps,
        .is_float = p->x_dtype == KL_F32,
    };
}

/* All of a thread's loads, up to AT_ONCE, are under way before it waits for one. */
template <int threads> __device__ void copy_rows(const shared_rows &to, const row_source &s)
{
    constexpr unsigned AT_ONCE = 4;
    const unsigned units = to.pitch / 16, all = s.T * units;
#pragma unroll 1
    for (unsigned first = threadIdx.x; first < all; first += AT_ONCE * threads) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            const unsigned at = first + i * threads, t = at / units, u = at % units;
            const bf16 *const from = static_cast<const bf16 *>(s.x) + t * s.stride + 8 * u;
            v[i] = uint4{};
            if (at < all && 8 * u < s.cols) v[i] = *reinterpret_cast<const uint4 *>(from);
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            const unsigned at = first + i * threads;
            if (at < all) *to.unit(at / units, at % units) = v[i];
        }
    }
}

/* The same of the halves of a row, which lie one behind the other, of a multiple of 128 columns;
 * or of one that is arriving. */
template <int threads, bool arriving>
__device__ void copy_halves(const shared_rows &to, const row_source &s)
{
    constexpr int AT_ONCE = 2;
    const uint4 *const from = static_cast<const uint4 *>(s.x);
    const int units = to.pitch / 16;
#pragma unroll 1
    for (int first = threadIdx.x; first < 2 * units; first += AT_ONCE * threads) {
        uint4 v[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (const int u = first + i * threads; u < 2 * units)
                v[i] = arriving ? load_here(from + u) : from[u];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (const int u = first + i * threads; u < 2 * units) {
                if (arriving && !is_there(v[i])) v[i] = await(from + u);
                *to.unit(u >= units, u >= units ? u - units : u) = v[i];
            }
    }
}

/* Columns 8 u and on of a row, zeros past its end. */
template <class X> __device__ void load_unit(float (&to)[8], const X *row, int u, int cols)
{
#pragma unroll
    for (int j = 0; j < 8; j++) to[j] = 0;
    if (8 * u < cols) load_wide(row + 8 * u, to);
}

/* Before the wait: the norm's weight never changes either. A thread has that of its first units, 4096
 * columns of all together, and asks the L2 for the others. */
template <int threads> struct held_norm {
    static constexpr int HELD = 2 * 256 / threads;
    float weight[HELD][8];

    __device__ explicit held_norm(const row_source &s)
    {
        if (s.norm_weight == nullptr) return;
#pragma unroll
        for (int i = 0; i < HELD; i++)
            load_unit(weight[i], s.norm_weight, threadIdx.x + i * threads, s.cols);
#pragma unroll 1
        for (int i = (threadIdx.x + HELD * threads) * 8; i < s.cols; i += threads * 8)
            prefetch_line(s.norm_weight + i);
    }
};

template <class X>
__device__ void norm_unit(const shared_rows &to, const row_source &s, int t, int u,
                          float inverse, const float (&weight)[8])
{
    float v[8];
    uint32_t h[4];
    load_unit(v, static_cast<const X *>(s.x) + t * s.stride, u, s.cols);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = v[j] * inverse * weight[j];
    round_pairs(v, h);
    *to.unit(t, u) = {h[0], h[1], h[2], h[3]};
}

/* The squares of units u, u + STRIDE and on of a row, added up by their whole warp; two at a time, so
 * that both are on their way before one is waited for. */
template <int STRIDE, class X>
__device__ float squares_of_units(const X *row, int u, int units, int cols)
{
    float sum = 0;
#pragma unroll 1
    for (; u - lane_id() < units; u += 2 * STRIDE) {
        float v[2][8];
#pragma unroll
        for (int i = 0; i < 2; i++) load_unit(v[i], row, u + i * STRIDE, cols);
#pragma unroll
        for (int i = 0; i < 2; i++) sum += warp_sum(sum_of_squares(v[i]));
    }
    return sum;
}

/* To the bit as rms_norm stores it, of up to NORM_COLS columns. `sums` holds NORM_SUMS floats for
 * each token. */
template <int threads, class X>
__device__ void norm_rows(const shared_rows &to, const row_source &s,
                          const held_norm<threads> &norm, float *sums)
{
    constexpr int HELD = held_norm<threads>::HELD, STRIDE = NORM_SUMS * WARP;
    static_assert(STRIDE % threads == 0);
    const int units = to.pitch / 16;
#pragma unroll 1
    for (int t = 0; t < s.T; t++)
#pragma unroll
        for (int first = threadIdx.x; first < STRIDE; first += threads) {
            const X *const row = static_cast<const X *>(s.x) + t * s.stride;
            const float sum = squares_of_units<STRIDE>(row, first, units, s.cols);
            if (lane_id() == 0) sums[t * NORM_SUMS + first / WARP] = sum;
        }
    rows_barrier<threads>();
#pragma unroll 1
    for (int t = 0; t < s.T; t++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < NORM_SUMS; i++) sum += sums[t * NORM_SUMS + i];
        const float inverse = inverse_rms(sum, s.cols, s.eps);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (threadIdx.x + i * threads < units)
                norm_unit<X>(to, s, t, threadIdx.x + i * threads, inverse, norm.weight[i]);
#pragma unroll 1
        for (int u = threadIdx.x + HELD * threads; u < units; u += threads) {
            float v[8];
            load_unit(v, s.norm_weight, u, s.cols);
            norm_unit<X>(to, s, t, u, inverse, v);
        }
    }
}

/* After the wait; a barrier follows. */
template <int threads>
__device__ void bring_rows(const shared_rows &to, const row_source &s,
                           const held_norm<threads> &norm, float *sums)
{
    if (s.norm_weight == nullptr)
        copy_rows<threads>(to, s);
    else if (s.is_float)
        norm_rows<threads, float>(to, s, norm, sums);
    else
        norm_rows<threads, bf16>(to, s, norm, sums);
}

#endif
