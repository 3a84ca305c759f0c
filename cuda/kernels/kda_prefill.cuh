/*
 * kda_prefill.cuh -- chunked KDA prefill: what the blocks that prepare chunks hand to the blocks
 * that take the state through them, and who does what. cuda/notes/KDA_PREFILL.md explains it.
 *
 * With a_l = exp(log-decay of token l) and products over the tokens of a chunk, each at most 1:
 *     E_i = a_0 ... a_i,  F_j = a_{j+1} ... a_last
 *     A[i, j] = b_i sum_d k_i k_j a_{j+1} ... a_i    j <  i
 *     M[i, j] = scale sum_d q_i k_j a_{j+1} ... a_i  j <= i
 *     (1 + A) U = b (V - (E k) S^T),  O = scale (E q) S^T + M U
 *     S' = S diag(E_last) + U^T (F k)
 *
 * Work. A pair is a lane (a run of consecutive sequences) and a group of heads h, h + groups, ...
 * that it takes one after the other. For each pair, one block a tile of 64 value rows takes the
 * state through the chunks; all blocks prepare chunks, whichever comes next. A chunk has a serial
 * number in its pair, growing in the order in which the state needs it, with gaps; it travels
 * through slot (serial % slots) of the pair's ring, which stays in the L2. Where heads are few
 * and sequences long, segments of these take the sequences' place (kda_prefill_segments.cu).
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_H
#define KL_CUDA_KERNELS_KDA_PREFILL_H

#include "../device/kda.cuh"
#include "../device/ragged.cuh"

constexpr int KDA_TOKENS = 32; /* of a chunk */
constexpr int KDA_K = 128;
constexpr int KDA_V_TILE = 64; /* rows of the state that a block owns */
constexpr int KDA_MAX_LANES = 64;
/* Each tile of a head needs a block of its own that is resident with all others: the smallest
 * slice of an H100 (MIG 1g.10gb) has 16 multiprocessors. */
constexpr int KDA_MAX_V = 16 * KDA_V_TILE;
constexpr int KDA_UNIT_TILES = KDA_K / KDA_V_TILE; /* of the rows that give a segment's M */

/* Cutting a sequence at multiples of so many tokens changes no bit; a last token beyond them is
 * left to kda_decode's arithmetic. */
constexpr int KDA_GRID = 64;

/* Tokens that are worth a segment of their own. */
constexpr int KDA_SEGMENT = 1024;

/* A prepared chunk of a head, copied to shared memory as it lies. k and q are as they were given;
 * f and g bring them to unit length, g with the scale, and U comes times f:
 *     f U = X (V - f (E k) S^T),  X = diag(f) (1 + A)^-1 diag(b);  O = g ((E q) S^T + M (f U))
 * In the order in which wgmma reads it (wgmma.cuh): the channels in two halves, and of rows of 128
 * or 64 bytes the pieces of 16 at swizzled(row, piece). */
struct alignas(16) kda_chunk {
    bf16 k_decayed[2][KDA_TOKENS][KDA_K / 2]; /* E k */
    bf16 q_decayed[2][KDA_TOKENS][KDA_K / 2]; /* E q */
    bf16 k_left[2][KDA_TOKENS][KDA_K / 2];    /* F k */
    bf16 M[KDA_TOKENS][KDA_TOKENS];
    bf16 X[KDA_TOKENS][KDA_TOKENS];
    bf16 X_low[KDA_TOKENS][KDA_TOKENS]; /* what X rounds away */
    /* E_last - 1, which keeps the digits of a weak decay: of channels 8 i + 2 j and the next at
     * [j][2 i], for lane 4 r + j of an accumulator; rows 16 bytes off a bank's round. */
    float decay[4][KDA_K / 4 + 4];
    float factor[2][KDA_TOKENS]; /* f and g */
    /* What M rounds away of pairs within an octet o (8 tokens), as lanes have the right operand
     * of m16n8k8: row i, columns 2 c and 2 c + 1 of the octet at [4 i + c][o]. */
    uint32_t M_low[WARP][KDA_TOKENS / 8];
};

/* Where k, q and v come from, if they are to be convolved first, as short_conv does with SiLU: rows
 * of the raw q | k | v, H heads of 128 channels each. v goes to the call's own v. */
struct kda_convolution {
    static constexpr bool IS_THERE = true;
    kda_operand x;       /* [T, 3 H K] bf16                             */
    const float *taps;   /* [3 H K, 4]                                  */
    const bf16 *windows; /* [S, 3 H K, 3] what comes before a sequence */
};

/* None: k, q and v are given. */
struct kda_no_convolution {
    static constexpr bool IS_THERE = false;
};

constexpr int KDA_TAPS = 4;
constexpr long long KDA_MOST_STRIDE = 1ll << 29; /* elements of x: bytes of a row fit an int */

/* What a launch is for: the summaries of segments (kda_prefill_segments.cu), or the outputs. */
enum kda_pass { KDA_SUMMARIES, KDA_OUTPUTS };

/* gated_rms_norm of the outputs, for heads of KDA_NORM_V values: two tiles, which hand each other
 * their sums of squares of every chunk and keep those of a few. */
constexpr int KDA_NORM_V = 2 * KDA_V_TILE, KDA_SUMS_KEPT = 4;

struct kda_norm {
    const bf16 *z; /* [T, H, V] */
    const float *weight;
    long long z_stride;
    float eps;
    uint64_t *sums; /* [pairs, 2, KDA_SUMS_KEPT, KDA_TOKENS] chunk + 1 above its token's sum */
};

/* How a call is dealt out; the results do not depend on it, but for the segments. */
struct kda_plan {
    kda_pass pass;
    int segments;     /* of a sequence of the call, at most: from here on each is a sequence */
    int sequences;    /* so many of the call's times the above     */
    const int *cu;    /* [sequences + 1] their borders             */
    float *summaries; /* [sequences, H, V + 128, 128] C, then S, above M */
    int lanes, groups, pairs; /* pairs = lanes * groups             */
    int rounds;               /* heads of a group, at most          */
    int tiles;                /* of a head's value rows             */
    int slots;                /* of a pair's ring                   */
    kda_chunk *ring;          /* [pairs, slots]                     */
    unsigned *ready;  /* [pairs, slots] flags: serial + 1 of the chunk that lies there       */
    unsigned *taken;  /* [pairs, tiles] flags: chunks of smaller serials lie there no longer */
    unsigned *ticket; /* the next chunk that nobody prepares */
};

/* Words from a flag to the next: polls of neighbours do not meet in the L2. */
constexpr int KDA_FLAG = 32;

/* A run of sequences: its first, and the number of that one's first chunk. */
struct kda_lane {
    int sequence, number;
};

/* What every warp of a block knows of the lanes. */
struct kda_lanes_of_call {
    kda_lane lane[KDA_MAX_LANES + 1]; /* the last one ends the others */
    int longest;                      /* numbers of a lane, at most   */
};

/* Chunks are numbered through all sequences without a sum over them, with gaps. */
__device__ inline int kda_first_number(const int *cu, int n)
{
    return cu[n] / KDA_TOKENS + n;
}

/* Sequence n of a plan ends where the call's does; the empty ones behind it do, too. */
__device__ inline bool kda_ends(const kda_plan &p, int n)
{
    return p.cu[n + 1] == p.cu[(n / p.segments + 1) * p.segments];
}

/* Tokens of a sequence that go by chunks: nobody asks for what the last segment makes of S. */
__device__ inline int kda_chunked_tokens(const kda_plan &p, int n)
{
    const int tokens = p.cu[n + 1] - p.cu[n];
    if (p.pass == KDA_SUMMARIES && kda_ends(p, n)) return 0;
    return tokens % KDA_GRID == 1 ? tokens - 1 : tokens;
}

/* State rows of head h of the call's sequence n. */
__device__ inline float *kda_slot(const kda_arguments &a, int n, int h)
{
    const long long slot = a.slots == nullptr ? n : a.slots[n];
    return a.state + (slot * a.H + h) * a.V * KDA_K;
}

/* Rows of C, then of M, of head h of a plan's sequence n. */
__device__ inline float *kda_summary(const kda_arguments &a, const kda_plan &p, int n, int h)
{
    return p.summaries + (n * a.H + h) * (a.V + KDA_K) * KDA_K;
}

/* Host: bf16 with K = 128 and 32 | V <= KDA_MAX_V, in pieces of 16 bytes; all but the last tokens
 * above. */
size_t kda_chunked_workspace(const kl_kda *a, bool invariant);
bool kda_has_segments(const kl_kda *a, bool invariant);

/* With `conv`, q and k are not read and v is written; not where there are segments. */
kl_status kda_chunked(const kda_arguments &a, const kl_short_conv *conv, const kl_kda *op,
                      const kl_gated_rms_norm *norm, bool invariant, cudaStream_t stream,
                      kl_error *err);

/* Host, of kda_prefill_segments.cu: where N sequences are cut, and every segment's start. */
kl_status kda_cut(const int *cu, long long N, int segments, int *borders, cudaStream_t stream,
                  kl_error *err);
kl_status kda_join(const kda_arguments &a, const kda_plan &p, cudaStream_t stream,
                   kl_error *err);

#endif
