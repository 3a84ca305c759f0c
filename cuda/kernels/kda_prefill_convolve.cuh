/*
 * kda_prefill_convolve.cuh -- k, q and v of a chunk from the rows that short_conv.cu would read, by
 * the group that prepares the chunk: its arithmetic in its order, so its bits.
 *
 * k and q stay where the octets are prepared from, in the places of their pieces of E k and E q
 * until these come; v goes to device memory, for the blocks that own rows of the state. A warp has
 * the channels that it has in the octets, so that it waits for itself alone. Its lane 8 o + i has
 * octet o and twice two channels: more tokens a lane, and fewer rows are read and unpacked for two
 * octets; more channels, and the next rows find no registers while these are convolved.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_CONVOLVE_H
#define KL_CUDA_KERNELS_KDA_PREFILL_CONVOLVE_H

#include "kda_prefill_octets.cuh"

namespace kda {

constexpr int PAST = KDA_TAPS - 1, RUN = PAST + OCTET; /* rows that an octet needs */
constexpr int LANES = WARP / OCTETS, STRIP = 4;        /* of an octet, channels of each */
static_assert(LANES * STRIP * PREPARERS == KDA_K && STRIP * sizeof(bf16) == sizeof(uint2));

/* The parts of a row, H heads each, in their order. */
enum row_part { OF_Q, OF_K, OF_V };

/* The lane's pieces of rows that the group has put into the chunk; gates as ever. */
struct kept_reader {
    const char *own;
    gate_column<false> g;

    __device__ kept_reader(const kda_arguments &a, const item &c, prepare_memory &m)
        : own(lane_piece(m.chunk)), g(a, c)
    {
    }

    __device__ void read(raw_octet &to, int o) const
    {
        const char *from = own + o * OCTET_BYTES;
        to.k = *reinterpret_cast<const uint4 *>(from);
        to.q = *reinterpret_cast<const uint4 *>(from + sizeof(kda_chunk::k_decayed));
        g.read(to.g, o);
    }
};

/* ---- memory ------------------------------------------------------------------------------ */

/* n rows further; a product of 64 bits would take five instructions. */
__device__ inline const char *moved(const char *p, int n, int bytes)
{
    const char *to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(n), "r"(bytes), "l"(p));
    return to;
}

/* To shared memory, `offset` bytes behind an address. */
__device__ inline void store_shared(uint32_t address, int offset, const uint2 &x)
{
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address + offset), "r"(x.x), "r"(x.y)
                 : "memory");
}

__device__ inline uint2 load_shared(uint32_t address)
{
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}

/* ---- a lane's share of a chunk ----------------------------------------------------------- */

/* Of 32 tokens, and what comes before them is rows of the call: as nearly all chunks are, which have
 * code of their own. */
__device__ inline bool is_whole(const item &c)
{
    return c.tokens == KDA_TOKENS && c.window < 0;
}

template <bool whole> struct convolver {
    const kda_convolution &x;
    const kda_arguments &a;
    const item &c;
    prepare_memory &m;
    unsigned channel; /* of a head, the lane's first             */
    uint2 row[RUN];   /* the three before its octet, and its own */
    float taps[STRIP][KDA_TAPS];

    __device__ convolver(const kda_convolution &x, const kda_arguments &a, const item &c,
                         prepare_memory &m)
        : x(x), a(a), c(c), m(m)
    {
        const unsigned thread = made_here(threadIdx.x % GROUP);
        channel = (thread / WARP * LANES + thread % LANES) * STRIP;
    }

    __device__ static int octet() { return lane_id() / LANES; }

    /* Whether what comes before the octet lies there. */
    __device__ bool has_window() const { return !whole && c.window >= 0 && octet() == 0; }

    /* In a row of x. */
    __device__ int column(int part) const
    {
        return (part * static_cast<int>(a.H) + c.h) * KDA_K + static_cast<int>(channel);
    }

    /* If there is such a part. Past the last token its row again; none before the call's first. */
    __device__ void ask_rows(int part)
    {
        const int before = made_here(OCTET * octet() - PAST), last = c.tokens - 1 - before;
        const int bytes = static_cast<int>(x.x.stride) * static_cast<int>(sizeof(bf16));
        const char *const first =
            moved(static_cast<const char *>(x.x.data) +
                      (c.token + before) * x.x.stride * static_cast<long long>(sizeof(bf16)),
                  column(part), sizeof(bf16));
        const char *at = first;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (!whole) at = moved(first, min(i, last), bytes);
            load_if(part >= 0 && (i >= PAST || !has_window()), row[i], at);
            if (whole) at += bytes, keep_whole(at); /* else a product for each */
        }
    }

    /* Of two channels. */
    __device__ void ask_taps(int part, int first)
    {
        const float *from = x.taps + (column(part) + first) * KDA_TAPS;
        load_if(part >= 0, taps[first], from);
        load_if(part >= 0, taps[first + 1], from + KDA_TAPS);
    }

    /* Where a sequence begins, its window takes the place of the rows before: three inputs of a
     * channel, then those of the next. */
    __device__ void read_window(int part)
    {
        if (!has_window()) return;
        constexpr unsigned LOW_HIGH = 0x7610, HIGH_LOW = 0x5432;
        const long long C = 3 * a.H * KDA_K;
        const uint2 *from =
            reinterpret_cast<const uint2 *>(x.windows + (c.window * C + column(part)) * PAST);
        const uint2 u = from[0], v = from[1], w = from[2];
        row[0] = {__byte_perm(u.x, u.y, LOW_HIGH), __byte_perm(v.y, w.x, LOW_HIGH)};
        row[1] = {__byte_perm(u.x, v.x, HIGH_LOW), __byte_perm(v.y, w.y, HIGH_LOW)};
        row[2] = {__byte_perm(u.y, v.x, LOW_HIGH), __byte_perm(w.x, w.y, LOW_HIGH)};
    }

    __device__ static float output(const float *in, const float (&tap)[KDA_TAPS])
    {
        float y = 0;
#pragma unroll
        for (int j = 0; j < KDA_TAPS; j++) y = fmaf(tap[j], in[j], y);
        return silu_for<bf16>(y);
    }

    /* Two channels of all tokens, which each row has in a word. */
    __device__ void convolve(const uint32_t (&in)[RUN], int first, uint32_t (&y)[OCTET]) const
    {
        float low[RUN], high[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) low[i] = low_half(in[i]), high[i] = high_half(in[i]);
#pragma unroll
        for (int t = 0; t < OCTET; t++)
            y[t] = pack_bf16(output(low + t, taps[first]), output(high + t, taps[first + 1]));
    }

    /* The lane's channels of an octet's first row in the chunk; in the octets another lane of the
     * warp has them, see lane_piece(). Those of row r lie at (first ^ 16 r) + 128 r. */
    __device__ uint32_t place(int part, int octet) const
    {
        const unsigned piece = channel / CHANNELS;
        return shared_address(&m.chunk) +
               (part == OF_Q ? Q_DECAYED : K_DECAYED) * sizeof(kda_chunk::k_decayed) +
               piece / 8 * sizeof(kda_chunk::k_decayed[0]) + octet * OCTET_BYTES +
               piece % 8 * 16 + channel % CHANNELS * sizeof(bf16);
    }

    __device__ void store(int part, const uint32_t (&low)[OCTET],
                          const uint32_t (&high)[OCTET]) const
    {
        const uint32_t first = place(part, octet());
#pragma unroll
        for (int t = 0; t < OCTET; t++)
            store_shared(first ^ t * 16, t * KDA_K, uint2{low[t], high[t]});
    }

    __device__ void store_v(const uint32_t (&low)[OCTET], const uint32_t (&high)[OCTET]) const
    {
        const int first = made_here(OCTET * octet()), left = c.tokens - first;
        bf16 *to = static_cast<bf16 *>(const_cast<void *>(a.v.data)) +
                   (c.token + first) * a.v.stride + column(0);
#pragma unroll
        for (int t = 0; t < OCTET; t++, to += a.v.stride)
            if (whole || t < left) *reinterpret_cast<uint2 *>(to) = uint2{low[t], high[t]};
    }

    /* Past the last token its row again, as where rows are given. */
    __device__ void fill(int part) const
    {
        const int last = c.tokens - 1, row = last % OCTET;
        const uint32_t first = place(part, octet());
        __syncwarp();
        const uint2 y = load_shared((place(part, last / OCTET) ^ row * 16) + row * KDA_K);
#pragma unroll 1
        for (int t = 0; t < OCTET; t++)
            if (OCTET * octet() + t > last) store_shared(first ^ t * 16, t * KDA_K, y);
    }

    __device__ void ask(int part)
    {
        ask_rows(part);
        ask_taps(part, 0), ask_taps(part, 2);
    }

    /* The part that has been asked for; the next one's rows and taps are, then. */
    __device__ void convolve_part(int part, uint32_t (&low)[OCTET], uint32_t (&high)[OCTET])
    {
        uint32_t in[RUN];
        read_window(part);
#pragma unroll
        for (int i = 0; i < RUN; i++) in[i] = row[i].x;
        convolve(in, 0, low);
#pragma unroll
        for (int i = 0; i < RUN; i++) in[i] = row[i].y;
        ask_taps(part - 1, 0);
        ask_rows(part - 1);
        __syncwarp(); /* so that compilers leave the loads here */
        convolve(in, 2, high);
        ask_taps(part - 1, 2);
    }

    /* Parts from `part` down, which has been asked for. `have_chunk` is called when v is known:
     * before anything goes to the chunk, and before stores that a release of the last one's flag
     * would wait for. */
    template <class F> __device__ void run(int part, F have_chunk)
    {
        uint32_t low[OCTET], high[OCTET];
        if constexpr (whole) {
            run_whole(part, have_chunk, low, high);
        } else {
#pragma unroll 1 /* three times the code would not stay in the instruction cache */
            for (; part >= 0; part--) {
                convolve_part(part, low, high);
                if (part == OF_V)
                    have_chunk(), store_v(low, high);
                else
                    store(part, low, high);
            }
            if (c.tokens < KDA_TOKENS) fill(OF_K), fill(OF_Q);
        }
        __syncwarp();
    }

    /* v, k and q; what v alone needs lies behind the loop, as far octets do in prepare_octets(). */
    template <class F>
    __device__ void run_whole(int part, F have_chunk, uint32_t (&low)[OCTET],
                              uint32_t (&high)[OCTET])
    {
        for (;; part--) {
#pragma unroll 1
            for (;; part--) {
                convolve_part(part, low, high);
                if (part == OF_V) break;
                store(part, low, high);
                if (part == 0) break;
            }
            if (part == 0) break;
            have_chunk();
            store_v(low, high);
        }
    }
};

} // namespace kda

#endif
