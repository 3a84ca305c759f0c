/*
 * kda_prefill_walk.cuh -- the order in which chunks go through a pair's state.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_WALK_H
#define KL_CUDA_KERNELS_KDA_PREFILL_WALK_H

#include "kda_prefill.cuh"

namespace kda {

/* One tile of rows of one pair. */
struct scanner {
    const kda_arguments &a;
    const kda_plan &p;
    kda_lane first, end;
    int longest, pair, tile;
};

/* The pair's chunks in the order in which they go through its state. */
struct walk {
    int round = 0, n, h, tokens, chunk = 0; /* of head h of sequence n, chunked tokens */
    int sequence;                           /* of the call's, n or a segment of it     */
    unsigned serial;
    bool valid;

    __device__ explicit walk(const scanner &s) : n(s.first.sequence) { find(s); }

    /* The first sequence from n on that has chunks. */
    __device__ void find(const scanner &s)
    {
        for (; round < s.p.rounds; round++, n = s.first.sequence) {
            h = round * s.p.groups + s.pair % s.p.groups;
            if (h >= s.a.H) break;
            for (; n < s.end.sequence; n++) {
                tokens = kda_chunked_tokens(s.p, n);
                if (tokens <= 0) continue;
                sequence = n / s.p.segments;
                const int number = kda_first_number(s.p.cu, n) - s.first.number;
                serial = static_cast<unsigned>(round * s.longest + number);
                valid = true;
                return;
            }
        }
        valid = false;
    }

    __device__ bool is_last() const { return (chunk + 1) * KDA_TOKENS >= tokens; }

    /* Of the chunk. */
    __device__ int tokens_here() const { return min(tokens - chunk * KDA_TOKENS, KDA_TOKENS); }

    /* Of the sequence, with the chunk. */
    __device__ int done() const { return chunk * KDA_TOKENS + tokens_here(); }

    __device__ long long token(const scanner &s) const
    {
        return s.p.cu[n] + static_cast<long long>(chunk) * KDA_TOKENS;
    }

    /* Within a sequence. */
    __device__ void step() { chunk++, serial++; }

    __device__ void next(const scanner &s)
    {
        if (is_last()) {
            chunk = 0, n++;
            find(s);
        } else
            step();
    }
};

} // namespace kda

#endif
