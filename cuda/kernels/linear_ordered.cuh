/*
 * linear_ordered.cuh -- the main loop of linear_ordered.cu: tiles (device/tile_ring.cuh) by
 * wgmma, each output summed in the order of stream.cuh, to the bit.
 *
 * What stream.cuh's eight warps share out, two warpgroups here do one chain after the other: steps
 * 0, 8, 16, ... of a row, then 1, 9, 17, ...; each chain ends in `total`. A step is 64 bytes of a
 * row of weights, as they lie in memory, and the columns of x that meet them. Operand A comes from
 * registers: lane 4 r + c has piece c of rows r and r + 8, as there, and words 2 i and 2 i + 1 of
 * what the piece becomes are its part of product i. wgmma has its 16 columns in the places that
 * mma.sync has them in, so x, operand B, is turned on its way to shared memory: word j (two
 * columns) of the four pieces' columns make one 16-byte unit, j, of a row. Product i reads units
 * 2 i and 2 i + 1. A filling thread takes 16 bytes of a row of x, four words of one piece, and
 * writes them to four units; a warp's writes meet in no bank.
 *
 * An mma.sync.m16n8k16 and a wgmma.m64nNk16 of the same 16 columns in the same places have the
 * same bits (measured on an H200).
 */
#ifndef KL_CUDA_KERNELS_LINEAR_ORDERED_H
#define KL_CUDA_KERNELS_LINEAR_ORDERED_H

#include "../device/stream.cuh"
#include "../device/tile_ring.cuh"

/* Of a thread: 104 + 2 * 200 = 3 * 168 (tiles.cuh). Sums take 160, of int8 and fp8 144. */
constexpr int ORDERED_FILL_REGISTERS = 104, ORDERED_MULTIPLY_REGISTERS = 200;

/* How tiles of a format lie in shared memory. */
template <kl_weight_format format> struct ordered_shape {
    using own = stream_format<format, 1>;
    static constexpr kl_weight_format FORMAT = format;
    static constexpr bool SCALED = weight_codec<format>::GROUP > 0, WHOLE = own::WHOLE;
    static constexpr int MOST_ROWS = ordered_tile_rows(format);
    static constexpr int PIECE = own::PIECE;   /* columns of a lane */
    static constexpr int PRODUCTS = PIECE / 4; /* of 16 columns each, in a step */
    /* Weights that are operand A as they lie there: no work between products, so all at once. */
    static constexpr bool AS_STORED = format == KL_W_BF16;
    static constexpr int AT_ONCE = AS_STORED || format == KL_W_INT4 ? 2 : 1; /* products */
    static constexpr int GROUPS = PRODUCTS / AT_ONCE;
    /* Units of a row of x lie in planes of at most 128 bytes a row. */
    static constexpr int UNITS = PIECE / 8; /* of 16 bytes, of a piece's columns */
    static constexpr int PLANES = UNITS > 2 ? UNITS / 2 : 1;
    static constexpr int X_ROW_BYTES = STREAM_LANES * UNITS / PLANES * 16;
    static constexpr int PLANE_BYTES = MOST_ROWS * X_ROW_BYTES;
    static constexpr int X_BYTES = PLANES * PLANE_BYTES;
    static constexpr int W_ROW_BYTES = STREAM_LANES * 16, W_BYTES = TILE_ROWS * W_ROW_BYTES;
    static constexpr bool W_SWIZZLED = false;
    static constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
    static constexpr int TABLE_BYTES = 2 * MOST_ROWS * 8; /* two items' rows of x */
    static constexpr int STAGES =
        (MOST_SHARED - ALIGNED - TABLE_BYTES) / (STAGE_BYTES + SLOT_BARRIERS);
    static constexpr int SHARED_BYTES =
        STAGES * (STAGE_BYTES + SLOT_BARRIERS) + ALIGNED + TABLE_BYTES;
    static_assert((AS_STORED ? GROUPS == 1 : GROUPS % 2 == 0) && X_BYTES % ALIGNED == 0);
};

/* Which steps of a row come in which order: every eighth from 0 on, from 1 on, ... */
struct step_order {
    int steps, step = 0;

    __device__ explicit step_order(int count) : steps(count) {}

    /* Whether the step after this one is of another chain. */
    __device__ bool ends() const { return step + STREAM_WARPS >= steps; }

    __device__ bool is_last() const
    {
        return ends() && step % STREAM_WARPS + 1 == min(STREAM_WARPS, steps);
    }

    __device__ void advance() { step = ends() ? step % STREAM_WARPS + 1 : step + STREAM_WARPS; }

    __device__ int next() const
    {
        step_order after = *this;
        after.advance();
        return after.step;
    }
};

template <class S> __device__ int ordered_steps(const tile_operand &o)
{
    constexpr int COLUMNS = STREAM_LANES * S::PIECE;
    return static_cast<int>((o.K + COLUMNS - 1) / COLUMNS);
}

/* ---- the warpgroup that fills ---------------------------------------------------------- */

/* What a filling thread has of a step of x: unit `unit` of piece `piece`, of row `row` of every
 * PASS_ROWS rows. Where there are two planes, a warp's four rows are of either in turn: so its
 * words meet in no bank. */
template <class S> struct ordered_place {
    static constexpr int IN_PLANE = S::UNITS / S::PLANES;
    static constexpr int PASS_ROWS = WARPGROUP / (STREAM_LANES * S::UNITS);
    static constexpr int PASSES = S::MOST_ROWS / PASS_ROWS;
    static constexpr int PORTIONS =
        PASSES > 8 ? 2 : 1; /* of a step, loaded one after the other */
    static constexpr int EACH = PASSES / PORTIONS;
    static constexpr int AHEAD = 3; /* portions on their way to registers */
    int row, piece, unit, plane;

    __device__ explicit ordered_place(int thread)
    {
        const int rest = thread / (STREAM_LANES * IN_PLANE);
        row = S::PLANES == 1 ? rest : rest / 8 * 4 + rest % 4;
        plane = S::PLANES == 1 ? 0 : (rest / 2 ^ rest / 4) % 2;
        piece = thread / IN_PLANE % STREAM_LANES;
        unit = plane * IN_PLANE + thread % IN_PLANE;
        static_assert(S::PLANES <= 2 && EACH * PORTIONS * PASS_ROWS == S::MOST_ROWS);
        static_assert(S::STAGES > AHEAD, "a slot is handed back during the step after it");
    }

    /* From the step's first column. */
    __device__ int column() const { return piece * S::PIECE + unit * 8; }

    /* Byte of the stage for word `i` of the unit. */
    __device__ int offset(int i) const
    {
        return plane * S::PLANE_BYTES + swizzled<S::X_ROW_BYTES>(row, unit % IN_PLANE * 4 + i) +
               piece * 4;
    }
};

template <class S> struct ordered_portion {
    uint4 of[ordered_place<S>::EACH];
};

/* All threads of the warpgroup that fills. */
__device__ inline void filling_barrier()
{
    barrier_of_threads<1, WARPGROUP>();
}

/* The rows of x of an item, by all threads. Nobody is still at the table of the item before the
 * last one: all have come to the barrier of the last one since. */
__device__ inline void find_rows(const bf16 **table, const tile_operand &o,
                                 const moe_tile &tile)
{
#pragma unroll 1
    for (int r = threadIdx.x; r < tile.n; r += WARPGROUP) {
        const int row = tile.first + r;
        table[r] = o.x + int64_t{o.rows == nullptr ? row : o.rows[row]} * o.x_stride;
    }
    filling_barrier();
}

/* What the ring is to hold of an item. Weights are sent off, and x is loaded, once there is a
 * slot. */
template <class S, bool gated> struct ordered_walk {
    using place = ordered_place<S>;
    const tile_operand &o;
    const tile_ring<S> &ring;
    ring_place<S> &at;
    const bf16 *const *rows; /* [n], in shared memory */
    const int n, weight_row;
    const place own;
    step_order now;
    int portion = 0, left; /* of the step; of the item, still to come */

    __device__ ordered_walk(const tile_operand &operand, const tile_item &item,
                            const tile_ring<S> &to, ring_place<S> &slot,
                            const bf16 *const *table)
        : o(operand), ring(to), at(slot), rows(table), n(item.tile.n),
          weight_row(first_weight_row(operand, item)), own(threadIdx.x),
          now(ordered_steps<S>(operand)), left(now.steps * place::PORTIONS)
    {
    }

    __device__ void begin_step()
    {
        barrier_wait(ring.empty + at.slot, at.phase ^ 1);
        if (threadIdx.x < WARP_ARRIVALS)
            copy_weights<S, gated>(ring.w(at.slot), o, weight_row, now.step,
                                   ring.full + at.slot);
        at.advance();
    }

    /* Rows past the tile's and columns past the end are zeros. */
    __device__ void load(ordered_portion<S> &to)
    {
        if (portion == 0) begin_step();
        const int64_t column = int64_t{now.step} * STREAM_LANES * S::PIECE + own.column();
        const bool inside = column < o.K;
#pragma unroll
        for (int j = 0; j < place::EACH; j++) {
            const int row = own.row + (portion * place::EACH + j) * place::PASS_ROWS;
            to.of[j] = uint4{};
            if (inside && row < n)
                to.of[j] = load_once(reinterpret_cast<const uint8_t *>(rows[row] + column));
        }
        left--;
        if (++portion < place::PORTIONS) return;
        portion = 0;
        now.advance();
    }
};

/* x to the ring, a portion at a time. */
template <class S> struct ordered_store {
    using place = ordered_place<S>;
    const tile_ring<S> &ring;
    ring_place<S> at, announced;
    int portion = 0, steps = 0, offsets[4]; /* of the step; stored and not announced */

    __device__ explicit ordered_store(const tile_ring<S> &to) : ring(to)
    {
        const place own(threadIdx.x);
#pragma unroll
        for (int i = 0; i < 4; i++) offsets[i] = own.offset(i);
    }

    __device__ void store(const ordered_portion<S> &from)
    {
        constexpr int PASS_BYTES = place::PASS_ROWS * S::X_ROW_BYTES;
        uint8_t *const x = ring.x(at.slot) + portion * place::EACH * PASS_BYTES;
#pragma unroll
        for (int j = 0; j < place::EACH; j++) {
            const uint32_t words[4] = {from.of[j].x, from.of[j].y, from.of[j].z, from.of[j].w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                *reinterpret_cast<uint32_t *>(x + offsets[i] + j * PASS_BYTES) = words[i];
        }
        if (++portion < place::PORTIONS) return;
        portion = 0;
        at.advance();
        steps++;
    }

    /* wgmma reads by another way than these stores take: hence the fence. */
    __device__ void announce()
    {
        fence_async_proxy();
        for (; steps > 0; steps--) {
            barrier_arrive(ring.full + announced.slot);
            announced.advance();
        }
    }
};

/* Of each thread so many portions are on their way. */
template <class S, bool gated>
__device__ void fill_item(ordered_walk<S, gated> walk, ordered_store<S> &to)
{
    constexpr int AHEAD = ordered_place<S>::AHEAD;
    ordered_portion<S> held[AHEAD];
    int pending = 0;
#pragma unroll
    for (int d = 0; d < AHEAD; d++)
        if (walk.left > 0) walk.load(held[d]), pending++;
    while (pending > 0)
#pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            if (pending == 0) break;
            to.store(held[d]);
            to.announce();
            pending--;
            if (walk.left > 0) walk.load(held[d]), pending++;
        }
}

/* table: [2][MOST_ROWS], in shared memory. */
template <class S, bool gated>
__device__ void fill_ordered(const tile_arguments &p, const tile_ring<S> &ring,
                             const bf16 **table)
{
    ordered_store<S> to(ring);
    ring_place<S> at;
    const int n_tiles = tiles_of(p);
    bool odd = false;
    for (int i = blockIdx.x; i < n_tiles * p.groups; i += gridDim.x) {
        const tile_item item = item_at<gated>(p, n_tiles, i);
        const tile_operand &o = operand_of(p, item.tile);
        if (!has_work(o, item)) continue;
        const bf16 **const rows = table + (odd ? S::MOST_ROWS : 0);
        odd = !odd;
        find_rows(rows, o, item.tile);
        fill_item(ordered_walk<S, gated>(o, item, ring, at, rows), to);
    }
}

/* ---- the warpgroups that multiply ------------------------------------------------------ */

/* Of a thread's two rows of weights: where their scales begin, and what it holds of a step. */
template <class S> struct ordered_weights {
    using own = stream_format<S::FORMAT, 1>;
    int offsets[2]; /* in a slot */
    const bf16 *scales[2];
    int groups;
    uint4 raw[2];
    bf16 coming[2];
    float scale[2] = {1, 1};

    template <bool gated>
    __device__ ordered_weights(const tile_operand &o, const tile_item &item,
                               const tile_rows<gated> &rows)
        : groups(static_cast<int>(o.groups))
    {
        const int r = lane_id() / STREAM_LANES;
        const int64_t matrix = item.tile.expert == MOE_SHARED ? 0 : item.tile.expert;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int64_t row = o.first + item.column + rows.columns[h] + r;
            offsets[h] = (rows.bases[h] + r) * S::W_ROW_BYTES + lane_id() % STREAM_LANES * 16;
            scales[h] = o.scales[gated ? h : 0] +
                        (matrix * o.matrix_rows + min(row, o.matrix_rows - 1)) * o.groups;
        }
        fetch(0);
    }

    /* Ask for the scales of a step: zero past the last group. */
    __device__ void fetch(int step)
    {
        if constexpr (S::SCALED) {
            const int piece = step * STREAM_LANES + lane_id() % STREAM_LANES;
            const int group = piece * S::PIECE / own::codec::GROUP;
#pragma unroll
            for (int h = 0; h < 2; h++)
                coming[h] = group < groups ? scales[h][group] : from_float<bf16>(0);
        }
    }

    /* A step; `next`: the one after it. */
    __device__ void load(const uint8_t *w, int next)
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            raw[h] = *reinterpret_cast<const uint4 *>(w + offsets[h]);
            if constexpr (S::SCALED) scale[h] = to_float(coming[h]);
        }
        fetch(next);
    }

    /* Operand A of the products of a group. Of each piece only these are computed. */
    __device__ void prepare(uint32_t (&a)[S::AT_ONCE][4], int group) const
    {
        uint32_t pairs[2][1][S::PIECE / 2];
#pragma unroll
        for (int h = 0; h < 2; h++) own::split(raw[h], scale[h], pairs[h]);
#pragma unroll
        for (int i = 0; i < S::AT_ONCE; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                a[i][e] = pairs[e % 2][0][2 * (group * S::AT_ONCE + i) + e / 2];
    }
};

/* Of a thread: `chain` is a warp's of stream.cuh, `part` a step's where scales meet sums. */
template <class S, int N> struct ordered_sums {
    float total[N / 2], chain[N / 2], part[S::WHOLE ? N / 2 : 1];

    __device__ ordered_sums()
    {
        clear(total);
        clear(chain);
        clear(part);
    }

    template <int n> static __device__ void clear(float (&sums)[n])
    {
#pragma unroll
        for (int i = 0; i < n; i++) sums[i] = 0;
    }

    /* += the products of a group, x from the start of its stage. */
    __device__ void multiply(const uint32_t (&a)[S::AT_ONCE][4], const uint8_t *x, int group)
    {
        constexpr int IN_PLANE = S::X_ROW_BYTES / 32; /* products */
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < S::AT_ONCE; i++) {
            const int product = group * S::AT_ONCE + i;
            const uint8_t *const b =
                x + product / IN_PLANE * S::PLANE_BYTES + product % IN_PLANE * 32;
            float *const to = S::WHOLE ? part : chain;
            wgmma<N>(to, a[i], wgmma_descriptor<S::X_ROW_BYTES>(b));
        }
        wgmma_commit();
    }

    /* chain += scale part, after a step. */
    __device__ void scale_part(const float (&scale)[2])
    {
        wgmma_wait<0>();
        wgmma_settle(part);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            chain[i] = S::own::add_scaled(scale[i / 2 % 2], part[i], chain[i]);
        clear(part);
    }

    __device__ void end_chain()
    {
        wgmma_wait<0>();
        wgmma_settle(chain);
#pragma unroll
        for (int i = 0; i < N / 2; i++) total[i] += chain[i];
        clear(chain);
    }
};

/* What is multiplied next: operand A of a step's first group is in a[0]. */
template <class S, bool gated> struct ordered_reader {
    const tile_ring<S> &ring;
    ring_place<S> &at; /* of the step */
    step_order order;
    ordered_weights<S> weights;
    uint32_t a[2][S::AT_ONCE][4];
    int before; /* the slot that is to be handed back; none: negative */

    __device__ ordered_reader(const tile_operand &o, const tile_item &item,
                              const tile_ring<S> &from, ring_place<S> &place)
        : ring(from), at(place), order(ordered_steps<S>(o)),
          weights(o, item, tile_rows<gated>()), before(-1)
    {
        load();
        weights.prepare(a[0], 0);
    }

    __device__ void load()
    {
        barrier_wait(ring.full + at.slot, at.phase);
        weights.load(ring.w(at.slot), order.next());
    }

    __device__ void hand_back()
    {
        if (before >= 0 && (ALL_SPEAK || lane_id() == 0)) barrier_arrive(ring.empty + before);
    }
};

/* The products of a step, and operand A of the step after it. While a group of products runs,
 * operand A of the next is made ready; a slot is handed back during the step after it. Weights that
 * are operand A as they are stored are loaded when nothing is multiplied any more: while products
 * run in a loop, ptxas may put them where these still read (tests/wgmma_registers.py looks for
 * that). The other warpgroup's products fill the time. */
template <class S, bool gated, int N>
__device__ __forceinline__ void multiply_step(ordered_sums<S, N> &sums,
                                              ordered_reader<S, gated> &from)
{
    const int slot = from.at.slot;
    const bool more = !from.order.is_last();
    const float scale[2] = {from.weights.scale[0], from.weights.scale[1]};
    from.order.advance();
    from.at.advance();
#pragma unroll
    for (int g = 0; g < S::GROUPS; g++) {
        const bool loads = g + 1 == S::GROUPS && more;
        const int next = (g + 1) % S::GROUPS;
        sums.multiply(from.a[g % 2], from.ring.x(slot), g);
        if (!S::AS_STORED && loads) from.load();
        wgmma_wait<S::AS_STORED ? 0 : 1>(); /* the group before: its registers are free */
        if (g == 0) from.hand_back();
        if (S::AS_STORED && loads) from.load();
        from.weights.prepare(from.a[next % 2], next);
    }
    from.before = slot;
    if constexpr (S::WHOLE) sums.scale_part(scale);
}

/* sums.total = the item's. */
template <class S, bool gated, int N>
__device__ __forceinline__ void multiply_ordered(ordered_sums<S, N> &sums,
                                                 const tile_operand &o, const tile_item &item,
                                                 const tile_ring<S> &ring, ring_place<S> &at)
{
    ordered_reader<S, gated> from(o, item, ring, at);
    const int chains = min(STREAM_WARPS, from.order.steps);
#pragma unroll 1
    for (int c = 0; c < chains; c++) {
        bool ends;
#pragma unroll 1
        do {
            ends = from.order.ends();
            multiply_step(sums, from);
        } while (!ends);
        sums.end_chain();
    }
    from.hand_back();
}

#endif
