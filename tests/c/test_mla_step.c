/*
 * test_mla_step.c -- mla_decode that writes its tokens' latents has the bits of mla_append and
 * mla_decode: on the CPU and, where KL_CUDA_LIBRARY finds a device, on CUDA, beside the CPU's.
 */
#include "pieces.h"

#include "backend/mla.h"

static void decode_whole(kl_backend *be, void *call)
{
    kl_mla_decode *const a = call;
    RUN_THERE(mla_decode, be, a);
}

static void decode_pieces(kl_backend *be, void *call)
{
    kl_mla_decode rest = *(kl_mla_decode *)call;
    const kl_tensor none = {0};
    kl_mla_append append = kl_mla_append_of(&rest);
    RUN_THERE(mla_append, be, &append);
    rest.raw = rest.norm_weight = none;
    RUN_THERE(mla_decode, be, &rest);
}

/* Rows of 8-bit latents in all pages. */
static kl_tensor packed_pages(int64_t P, int64_t rank, int64_t rope)
{
    const kl_latents_row row = kl_latents_row_of(rank, rope);
    kl_tensor pages = tensor(KL_U8, true, 3, P, KL_PAGE_TOKENS, row.row_bytes, 1);
    for (int64_t i = 0; i < P * KL_PAGE_TOKENS; i++) {
        uint8_t *at = (uint8_t *)pages.data + i * row.row_bytes;
        kl_tensor others = kl_tensor_1d(at + row.rope_at, KL_BF16, rope);
        for (int64_t j = 0; j < rank; j++) at[j] = kl_latents_code(448 * number());
        for (int64_t j = 0; j < rope; j++) put(&others, j, number());
        for (int64_t j = 0; j < rank; j += KL_LATENTS_GROUP)
            ((float *)(at + row.scales_at))[j / KL_LATENTS_GROUP] = 0x1p-9f;
    }
    return pages;
}

/* Four sequences, one of which begins a page; each has pages of its own, the last first. */
static void check_decode(kl_dtype act, int64_t H, int64_t nope, int64_t rope, int64_t rank,
                         bool norm, bool packed)
{
    enum { ROWS = 4, B = 4, P = ROWS * B, V = 24 };
    static const int32_t lengths[ROWS] = {1, 193, 64, 150};
    int32_t table[ROWS * B];
    for (int32_t i = 0; i < ROWS * B; i++) table[i] = P - 1 - i;
    parts p = {0};
    const int64_t width = rank + rope;
    kl_tensor raw = tensor(act, false, 2, ROWS, width + 8, 1, 1);
    kl_mla_decode a = {.q = tensor(act, false, 3, ROWS, H, nope + rope, 1),
                       .pages = packed ? packed_pages(P, rank, rope)
                                       : tensor(act, false, 3, P, KL_PAGE_TOKENS, width, 1),
                       .block_table = integers(ROWS * B, table),
                       .lengths = integers(ROWS, lengths),
                       .w_kv_b = tensor(act, false, 3, H, nope + V, rank, 1),
                       .raw = kl_columns(&raw, 8, width),
                       .out = tensor(act, true, 3, ROWS, H, V, 1),
                       .norm_eps = 1e-5f,
                       .scale = 0.02f};
    a.block_table = kl_tensor_2d(a.block_table.data, KL_I32, ROWS, B);
    if (norm) a.norm_weight = tensor(KL_F32, false, 1, rank, 1, 1, 1);
    char name[64];
    snprintf(name, sizeof name, "mla_decode: act %d, H %lld, rank %lld, norm %d, packed %d",
             act, (long long)H, (long long)rank, norm, packed);
    IN(a.q);
    IN(a.block_table);
    IN(a.lengths);
    IN(a.w_kv_b);
    IN(a.raw);
    IN(a.norm_weight);
    OUT(a.pages, !norm    ? 0
                 : packed ? 1e-3
                          : bound_of(act)); /* of bytes a few may differ by 1 */
    OUT(a.out, act == KL_F32 ? 5e-6 : 6e-3);
    same_bits(cpu, &p, &a, sizeof a, decode_whole, decode_pieces, name);
    if (cuda != NULL) {
        same_bits(cuda, &p, &a, sizeof a, decode_whole, decode_pieces, name);
        ON_BOTH(mla_decode, name);
    }
    used = 0;
}

static void steps_of_attention(void)
{
    for (int i = 0; i < 8; i++) {
        check_decode(ACTS[i % 2], 3, 128, 64, 512, i / 2 % 2 == 0, i >= 4);
        check_decode(ACTS[i % 2], 5, 17, 5, 33, i / 2 % 2 == 0, i >= 4);
    }
}

int main(void)
{
    open_both();
    RUN(steps_of_attention);
    return close_both();
}
