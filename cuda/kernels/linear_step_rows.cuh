/*
 * linear_step_rows.cuh -- what x becomes in the shared memory of linear_step.cu's blocks, the
 * ring that goes with it, and what a warp adds up of both.
 */
#ifndef KL_CUDA_KERNELS_LINEAR_STEP_ROWS_H
#define KL_CUDA_KERNELS_LINEAR_STEP_ROWS_H

#include "../device/digits.cuh"
#include "../device/halves.cuh"
#include "linear_step_tiles.cuh"

/* What x becomes once it is there: bf16, or for a single token and quantised weights what
 * numbers_of them says, or its halves by halves.cuh. */
enum class x_as { BF16, OWN, HALVES };

/* Steps on their way: five of halves with scales, all of the model's o, leave room for three
 * blocks. */
template <x_as numbers> constexpr int STEPS_AHEAD = numbers == x_as::HALVES ? 5 : RING_DEPTH;

/* Of the two formats that with scales. */
template <kl_weight_format first, kl_weight_format second>
constexpr kl_weight_format SCALES = weight_codec<first>::GROUP > 0 ? first : second;

/* x in shared memory: T rows as bf16, */
template <kl_weight_format format, x_as numbers> struct step_rows {
    using ring_type = least_ring<format>;
    const shared_rows plain;

    static __host__ __device__ int bytes_of(int T, int cols)
    {
        return T * shared_rows::pitch_of(cols);
    }

    __device__ step_rows(unsigned char *shared, int cols)
        : plain{shared, shared_rows::pitch_of(cols)}
    {
    }

    __device__ void finish() const {}
};

/* and of a single one other numbers, too, */
template <kl_weight_format format> struct step_rows<format, x_as::OWN> {
    using row_type = typename numbers_of<format>::row;
    using columns_type = typename numbers_of<format>::walk;
    using ring_type = typename numbers_of<format>::template ring<STEPS_AHEAD<x_as::OWN>>;
    const shared_rows plain;
    const row_type own;

    static __host__ __device__ int bytes_of(int, int cols)
    {
        return shared_rows::pitch_of(cols) + row_type::bytes_of(cols);
    }

    __device__ step_rows(unsigned char *shared, int cols)
        : plain{shared, shared_rows::pitch_of(cols)}, own(shared + plain.pitch, cols)
    {
    }

    __device__ columns_type columns() const { return columns_type(own); }

    /* After a barrier; another follows. */
    __device__ void finish() const
    {
        const int units = own.units();
        for (int first = threadIdx.x - lane_id(); first < units; first += STREAM_THREADS) {
            const int u = first + lane_id();
            typename row_type::raw_type raw = {};
            if (u < units) raw = row_type::load(plain, u);
            own.put(u, raw, u < units);
        }
        rows_barrier<STREAM_THREADS>();
    }
};

/* or its two halves. */
template <kl_weight_format format> struct step_rows<format, x_as::HALVES> {
    using columns_type = ring_halves<format>;
    using ring_type = weight_ring<format, STEPS_AHEAD<x_as::HALVES>>;
    const shared_rows plain;

    static __host__ __device__ int bytes_of(int, int cols)
    {
        return columns_type::bytes_of(cols);
    }

    __device__ step_rows(unsigned char *shared, int cols)
        : plain{shared, shared_rows::pitch_of(cols)}
    {
        columns_type::clear(plain);
    }

    __device__ columns_type columns() const { return columns_type(plain); }

    __device__ void finish() const {}
};

/* This warp's share of the sums of a tile, of `rows` rows of x, step by step: as bf16, */
template <kl_weight_format format, int N, kl_weight_format scales, x_as numbers>
struct step_sums {
    ring_x<format, N> columns;
    float acc[N][4] = {};

    __device__ step_sums(const step_rows<scales, numbers> &x, int rows) : columns(x.plain, rows)
    {
    }

    __device__ void add(const ring_pieces &p)
    {
        ring_multiply(acc, p, columns);
        columns.advance();
    }

    template <tile_of kind> __device__ void share(float *sums) const
    {
        tile_sums<N, kind>::share(sums, acc);
    }
};

/* or by what else x is for weights of this format. */
template <kl_weight_format format, int N, x_as numbers>
requires(numbers != x_as::BF16) struct step_sums<format, N, format, numbers> {
    typename step_rows<format, numbers>::columns_type columns;
    float own[2] = {};

    __device__ step_sums(const step_rows<format, numbers> &x, int) : columns(x.columns()) {}

    __device__ void add(const ring_pieces &p)
    {
        columns.multiply(own, p);
        columns.advance();
    }

    template <tile_of kind> __device__ void share(float *sums) const
    {
        float acc[N][4] = {};
        acc[0][0] = columns.total(own[0]);
        acc[0][numbers == x_as::HALVES ? 3 : 2] = columns.total(own[1]);
        tile_sums<N, kind>::share(sums, acc);
    }
};

/* Steps whose operands are on their way together. What is not bf16 takes longer to become numbers
 * than to come, and the registers for it. */
template <kl_weight_format format> constexpr int HELD_AT_ONCE = format == KL_W_BF16 ? 4 : 1;

/* The products of the ring's next steps, all of which are there, as many at a time as can be. */
template <int AT_ONCE, kl_weight_format format, class Sums, class Ring>
__device__ void add_held(Sums &own, Ring &ring, const bool (&odd)[2], int steps)
{
#pragma unroll 1
    for (; steps >= AT_ONCE; steps -= AT_ONCE)
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++, ring.skip()) own.add(ring.template read<format>(odd));
    if constexpr (AT_ONCE > 1) add_held<AT_ONCE / 2, format>(own, ring, odd, steps);
}

/* Look until some of x is there, before copy_halves(): a word of every 128 columns, a head of what
 * makes x. Even threads look where the first unit is that this thread copies, odd ones at the
 * second. Looks at all of x would keep the L2 from those that write it, and at one place they come
 * one after the other: blocks take turns at eight. */
template <int threads> __device__ void await_some(const row_source &s)
{
    const unsigned unit = threadIdx.x + threadIdx.x % 2 * threads;
    const unsigned column = unit / 16 * 128 + blockIdx.x % 8 * 16;
    if (column < static_cast<unsigned>(s.T * s.cols))
        await(static_cast<const bf16 *>(s.x) + column);
}

#endif
