/*
 * head.c -- from the residual stream to logits, log-probabilities and tokens.
 *
 * Only the rows that are asked for are normalised and multiplied; logits exist for row_block
 * rows at a time, never for all tokens of a step.
 */
#include "model/pass.h"

#include "base/memory.h"

/* rows [R, D] of the stream; where all are wanted, the stream itself. */
static kl_status gather_rows(kl_pass *p, kl_tensor *rows, kl_error *err)
{
    *rows = p->x;
    if (p->shape.all_rows) return KL_OK;
    *rows = kl_pass_take(p, KL_F32, p->shape.R, p->config->hidden_size);
    kl_gather gather = {.x = p->x, .rows = p->in.rows, .out = *rows};
    return kl_pass_gather(p, &gather, err);
}

static kl_status row_logprobs(kl_pass *p, kl_tensor rows, kl_error *err)
{
    kl_token_logprobs a = {.hidden = kl_pass_take(p, p->act, rows.shape[0], rows.shape[1]),
                           .lm_head = p->weights->lm_head,
                           .targets = p->in.targets,
                           .logprobs = p->out.logprobs,
                           .greedy = p->out.greedy,
                           .top_ids = p->out.top_ids,
                           .top_logprobs = p->out.top_logprobs};
    kl_rms_norm norm = {.residual = rows,
                        .weight = kl_vector_of(&p->weights->norm),
                        .out = a.hidden,
                        .eps = p->config->rms_eps};
    KL_TRY(kl_pass_rms_norm(p, &norm, err));
    return kl_pass_token_logprobs(p, &a, err);
}

kl_status kl_head_sample(kl_pass *p, kl_tensor logits, kl_tensor peaks, kl_error *err)
{
    kl_sample a = {.logits = logits,
                   .peaks = peaks,
                   .sampling = p->in.sampling,
                   .seen = p->in.seen,
                   .ids = p->out.ids,
                   .logprobs = p->out.logprobs,
                   .top_ids = p->out.top_ids,
                   .top_logprobs = p->out.top_logprobs,
                   .greedy = p->shape.greedy};
    return kl_pass_sample(p, &a, err);
}

static kl_tensor take_peaks(kl_pass *p, int64_t rows)
{
    const int64_t count = kl_peaks_of(p->config->vocab_size);
    const kl_tensor flat = kl_pass_take(p, KL_F32, rows, 2 * count);
    return kl_tensor_3d(flat.data, KL_F32, rows, count, 2);
}

/* Logits of rows [first, first + n), out to the host or to the sampler (then n is R). */
static kl_status logits_block(kl_pass *p, kl_tensor rows, int64_t first, int64_t n,
                              kl_error *err)
{
    const int64_t vocab = p->config->vocab_size;
    const kl_tensor z = kl_pass_take(p, KL_F32, n, vocab);
    kl_linear a = {.x = kl_row_slice(&rows, first, n),
                   .norm_weight = kl_vector_of(&p->weights->norm),
                   .act = p->act,
                   .norm_eps = p->config->rms_eps,
                   .w = p->weights->lm_head,
                   .out = z,
                   .peaks = p->shape.sampling ? take_peaks(p, n) : (kl_tensor){0}};
    KL_TRY(kl_pass_linear(p, &a, err));
    if (p->shape.logits && !kl_pass_dry(p))
        KL_TRY(p->be->vt->copy_out(p->be, p->step->logits + first * vocab, z.data,
                                   (size_t)kl_tensor_size(&z) * sizeof(float), err));
    return p->shape.sampling ? kl_head_sample(p, z, a.peaks, err) : KL_OK;
}

kl_status kl_head(kl_pass *p, kl_error *err)
{
    kl_tensor rows;
    KL_TRY(gather_rows(p, &rows, err));
    const size_t mark = p->arena.used;
    if (p->shape.logits || p->shape.sampling)
        for (int64_t r = 0; r < p->shape.R; r += p->row_block) {
            KL_TRY(logits_block(p, rows, r, kl_min_i64(p->row_block, p->shape.R - r), err));
            kl_arena_rewind(&p->arena, mark);
        }
    return p->shape.targets ? row_logprobs(p, rows, err) : KL_OK;
}
