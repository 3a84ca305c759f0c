/*
 * turn_ring.cuh -- a ring of weights for the products of ring.cuh, brought by the copy engine: one
 * warp asks for a turn at a time, RING_TURN bytes of each of 16 rows, in two boxes of 8, and with
 * the first turn of a tile for all of its scales. The warps that multiply have neither addresses
 * nor copies of their own: a step takes half the instructions or less.
 *
 * A slot is free when all warps have read it, so a slow one holds up the others, and so many slots
 * hold less than as many steps of a ring of each lane's own: the last turn of a row may be short.
 *
 *     turn_ring<DEPTH> ring = {slots, scales, bars, bytes of a tile's scales, tiles of them};
 *     one thread, before a barrier: ring.init();
 *     the warp that brings:         turn_feed<DEPTH> feed(ring);
 *                                   for each turn of each tile: feed.put(...);
 *     those that multiply:          turn_reader<DEPTH> own(ring);
 *                                   for each tile: own.start<format>(...);
 *                                                  for (own.steps times) own.take<format>();
 *                                                  own.end();
 */
#ifndef KL_CUDA_DEVICE_TURN_RING_H
#define KL_CUDA_DEVICE_TURN_RING_H

#include "barrier.cuh"
#include "ring.cuh"

constexpr int TURN_ROWS = STREAM_ROWS / 2;      /* of a box */
constexpr int TURN_BOX = TURN_ROWS * RING_TURN; /* bytes */

/* Turns of a row. */
__host__ __device__ inline int turns_of(int row_bytes)
{
    return (row_bytes + RING_TURN - 1) / RING_TURN;
}

/* Bytes of the scales of 8 rows. */
__host__ __device__ inline int turn_scale_bytes(int groups)
{
    return TURN_ROWS * groups * static_cast<int>(sizeof(bf16));
}

/* One, in shared memory. */
__device__ inline float scale_at(const unsigned char *scale)
{
    const uint32_t bits = *reinterpret_cast<const uint16_t *>(scale);
    return __uint_as_float(bits << 16);
}

template <int DEPTH> struct turn_ring {
    static constexpr int STAGES = DEPTH, SLOT = 2 * TURN_BOX, BYTES = DEPTH * SLOT;

    struct barriers {
        barrier full[DEPTH], empty[DEPTH];
    };

    unsigned char *slots,
        *scales; /* 128-byte aligned; 16-byte aligned, a room for each tile's */
    barriers &bars;
    int room_bytes, rooms;

    /* Tiles whose scales need room, each of so many turns: when a tile is begun, the turn DEPTH
     * before it has been used, and that one is behind the last of the tile whose room it takes. */
    static int rooms_of(int turns) { return 1 + (DEPTH - 1 + turns - 1) / turns; }

    /* By one thread; barrier_init_done() and a barrier follow. The copies of a slot begin and end
     * so many times. */
    __device__ void init(int times = 1) const
    {
        for (int d = 0; d < DEPTH; d++) {
            barrier_init(bars.full + d, times * WARP_ARRIVALS);
            barrier_init(bars.empty + d, STREAM_WARPS * WARP_ARRIVALS);
        }
    }
};

/* A slot of the ring, its phase, and the room of a tile's scales. */
template <int DEPTH> struct turn_place : ring_place<turn_ring<DEPTH>> {
    int room = 0;

    __device__ void next_room(int rooms)
    {
        if (++room == rooms) room = 0;
    }
};

/* Eight rows of a turn: a box, zeros where it is outside of the matrix; and of a tile's first turn the
 * rows' scales. */
struct turn_rows {
    const box_map *map;
    int column, row; /* bytes, rows */
    const bf16 *scales;
    int scale_bytes; /* of all eight rows; or none */
};

/* By all lanes of the warp that brings. */
template <int DEPTH> struct turn_feed {
    using ring_type = turn_ring<DEPTH>;
    const ring_type &ring;
    turn_place<DEPTH> place;

    __device__ explicit turn_feed(const ring_type &to) : ring(to) {}

    /* Once a slot is free. */
    __device__ void put(const turn_rows (&rows)[2])
    {
        barrier *const full = ring.bars.full + place.slot;
        unsigned char *const to = ring.slots + place.slot * ring_type::SLOT;
        const int with_scales = rows[0].scale_bytes + rows[1].scale_bytes;
        barrier_wait(ring.bars.empty + place.slot, place.phase ^ 1);
        warp_copies_begin(full, ring_type::SLOT + with_scales);
#pragma unroll
        for (int i = 0; i < 2; i++)
            warp_copy_box(to + i * TURN_BOX, rows[i].map, rows[i].column / 4, rows[i].row,
                          full);
        if (with_scales > 0) {
            unsigned char *const room = ring.scales + place.room * ring.room_bytes;
            warp_copy_bytes(room, rows[0].scales, rows[0].scale_bytes, full);
            if (rows[1].scale_bytes > 0)
                warp_copy_bytes(room + rows[0].scale_bytes, rows[1].scales, rows[1].scale_bytes,
                                full);
            place.next_room(ring.rooms);
        }
        copies_end(full);
        place.advance();
    }
};

/* The ring as one of the warps that multiply has it. */
template <int DEPTH> struct turn_reader {
    using ring_type = turn_ring<DEPTH>;

    const ring_type &ring;
    const unsigned char *own;                /* this lane's pieces in the first slot */
    int steps = 0, turns = 0;                /* of this warp in the tile; of the tile */
    int scale = 0, last = 0, from_first = 0; /* of the scales, in bytes: this lane's next one,
                                                its row's last; from row r's to row r + 8's */
    turn_place<DEPTH> place;

    __device__ explicit turn_reader(const ring_type &from)
        : ring(from), own(from.slots + lane_id() / STREAM_LANES * RING_TURN + ring_skip())
    {
    }

    /* A tile of rows of so many bytes and groups. */
    template <kl_weight_format format> __device__ void start(int row_bytes, int groups)
    {
        constexpr int SCALE = sizeof(bf16);
        steps = ring_steps(row_bytes);
        turns = turns_of(row_bytes);
        if constexpr (weight_codec<format>::GROUP > 0) {
            const int row = groups * SCALE, r = lane_id() / STREAM_LANES;
            const int first = place.room * ring.room_bytes + r * row;
            scale = first + ring_feed<format>::groups(ring_skip()) * SCALE;
            last = first + row - SCALE;
            from_first = TURN_ROWS * row;
            place.next_room(ring.rooms);
        }
    }

    /* The tile's next step, once it is there. */
    template <kl_weight_format format> __device__ ring_pieces take()
    {
        using codec = weight_codec<format>;
        /* A step may be partly past the end of a row, all zeros there: any scale will do. */
        constexpr bool PARTLY = codec::GROUP > 0 && codec::GROUP < STREAM_LANES * codec::PIECE;
        barrier_wait(ring.bars.full + place.slot, place.phase);
        const auto *const piece =
            reinterpret_cast<const uint4 *>(own + place.slot * ring_type::SLOT);
        ring_pieces p = {{piece[0], piece[TURN_BOX / 16]}, {1, 1}};
        if constexpr (codec::GROUP > 0) {
            const int at = PARTLY ? min(scale, last) : scale;
            p.scale[0] = scale_at(ring.scales + at);
            p.scale[1] = scale_at(ring.scales + at + from_first);
            scale += ring_feed<format>::groups(RING_TURN) * static_cast<int>(sizeof(bf16));
        }
        release();
        return p;
    }

    /* The turn in which this warp has no step. */
    __device__ void end()
    {
        if (steps == turns) return;
        barrier_wait(ring.bars.full + place.slot, place.phase);
        release();
    }

    __device__ void release()
    {
        warp_arrive(ring.bars.empty + place.slot);
        place.advance();
    }
};

/* ---- host ------------------------------------------------------------------------------ */

/* Whether the copy engine can bring the scales of rows 8 i to 8 i + 7, one behind the other. */
inline bool turns_take(const weight_view &w)
{
    return w.scales == nullptr || (is_aligned(w.scales, 0, 1, 16) && w.rows % TURN_ROWS == 0);
}

/* A stack of matrices as the boxes of turns, or as narrower ones. */
inline kl_status map_turns(const kl_weight &w, box_map *map, kl_error *err,
                           int box_bytes = RING_TURN)
{
    const box_matrix stack = {
        .data = w.data,
        .rows = w.count * w.rows,
        .row_bytes = static_cast<int64_t>(kl_weight_row_bytes(w.format, w.cols)),
        .box_rows = TURN_ROWS,
        .box_bytes = box_bytes,
        .element_bytes = 4,
        .swizzled = false,
        .line_bytes = 128,
    };
    return kl_cuda_map_boxes(stack, map, err);
}

#endif
