/*
 * group_ring.cuh -- a ring of weights as ring.cuh has it, for formats of which a row's part of a step
 * is one group: a scale for the four lanes of a row, not one for each, so a slot is 8.5 KB instead
 * of 10.
 */
#ifndef KL_CUDA_DEVICE_GROUP_RING_H
#define KL_CUDA_DEVICE_GROUP_RING_H

#include "ring.cuh"

/* As weight_ring. Lanes of a row read what one of them has copied. */
template <kl_weight_format format, int DEPTH> struct group_ring {
    static_assert(weight_codec<format>::GROUP == STREAM_LANES * weight_codec<format>::PIECE);
    static constexpr int WORDS = STREAM_WARPS * 8; /* of scales, half */
    static constexpr int SLOT = RING_PIECES + 2 * 4 * WORDS, BYTES = DEPTH * SLOT;

    unsigned char *first, *slot;

    __device__ explicit group_ring(unsigned char *shared) : first(shared), slot(shared) {}

    __device__ void put_none()
    {
        copy_commit();
        slot = slot == first + BYTES - SLOT ? first : slot + SLOT;
    }

    __device__ uint4 *pieces() const { return reinterpret_cast<uint4 *>(slot) + threadIdx.x; }

    __device__ uint32_t *scales() const
    {
        return reinterpret_cast<uint32_t *>(slot + RING_PIECES) + threadIdx.x / STREAM_LANES;
    }

    /* Pieces past the end of their row become zeros. */
    __device__ void put(const ring_feed<format> &feed)
    {
        const bool inside = feed.left > 0;
        __syncwarp(); /* all lanes have read what was here */
#pragma unroll
        for (int i = 0; i < 2; i++) {
            copy_once(pieces() + i * STREAM_THREADS, feed.row[i].data, inside);
            if (lane_id() % STREAM_LANES == 0)
                copy_word(scales() + i * WORDS, feed.row[i].scales, inside);
        }
        put_none();
    }

    /* The oldest step, once it is there; odd as ring_feed says it of the lane's own groups. Weights
     * without scales pass through, too. */
    template <kl_weight_format f> __device__ ring_pieces take(const bool (&odd)[2]) const
    {
        copy_wait<DEPTH - 1>();
        if constexpr (f == format) __syncwarp();
        ring_pieces p = {{pieces()[0], pieces()[STREAM_THREADS]}, {1, 1}};
        if constexpr (f == format) {
            p.scale[0] = scale_of(scales()[0], odd[0]);
            p.scale[1] = scale_of(scales()[WORDS], odd[1]);
        } else {
            static_assert(weight_codec<f>::GROUP == 0);
        }
        return p;
    }

    __device__ static float scale_of(uint32_t word, bool odd)
    {
        return __uint_as_float(choose_bytes(word, 0, odd ? 0x3244u : 0x1044u));
    }
};

/* Of the two the one that takes less room. */
template <kl_weight_format format, int DEPTH = RING_DEPTH> struct least_ring_of {
    using type = weight_ring<format, DEPTH>;
};

template <kl_weight_format format, int DEPTH>
requires(weight_codec<format>::GROUP ==
         STREAM_LANES * weight_codec<format>::PIECE) struct least_ring_of<format, DEPTH> {
    using type = group_ring<format, DEPTH>;
};

template <kl_weight_format format, int DEPTH = RING_DEPTH>
using least_ring = typename least_ring_of<format, DEPTH>::type;

#endif
