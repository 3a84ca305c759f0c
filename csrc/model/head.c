/*
 * head.c -- from the residual stream to logits, log-probabilities and tokens.
 *
 * Only the rows that are asked for are normalised and multiplied; logits exist for row_block
 * rows at a time, never for all tokens of a step.
 */
#include "model/pass.h"

#include "base/memory.h"

/* hidden [R, D] = norm(x[rows]). */
static kl_status gather_rows(kl_pass *p, kl_tensor *hidden, kl_error *err)
{
    const int64_t R = p->shape.R, D = p->config->hidden_size;
    *hidden = kl_pass_take(p, p->act, R, D);
    const size_t mark = p->arena.used;
    kl_gather gather = {.x = p->x, .rows = p->in.rows, .out = kl_pass_take(p, KL_F32, R, D)};
    KL_TRY(kl_pass_gather(p, &gather, err));
    kl_rms_norm norm = {.residual = gather.out,
                        .weight = kl_vector_of(&p->weights->norm),
                        .out = *hidden,
                        .eps = p->config->rms_eps};
    KL_TRY(kl_pass_rms_norm(p, &norm, err));
    kl_arena_rewind(&p->arena, mark);
    return KL_OK;
}

static kl_status row_logprobs(kl_pass *p, kl_tensor hidden, kl_error *err)
{
    kl_token_logprobs a = {.hidden = hidden,
                           .lm_head = p->weights->lm_head,
                           .targets = p->in.targets,
                           .logprobs = p->out.logprobs,
                           .greedy = p->out.greedy,
                           .top_ids = p->out.top_ids,
                           .top_logprobs = p->out.top_logprobs};
    return kl_pass_token_logprobs(p, &a, err);
}

kl_status kl_head_sample(kl_pass *p, kl_tensor logits, kl_error *err)
{
    kl_sample a = {.logits = logits,
                   .sampling = p->in.sampling,
                   .seen = p->in.seen,
                   .ids = p->out.ids,
                   .logprobs = p->out.logprobs,
                   .top_ids = p->out.top_ids,
                   .top_logprobs = p->out.top_logprobs};
    return kl_pass_sample(p, &a, err);
}

/* Logits of rows [first, first + n), out to the host or to the sampler (then n is R). */
static kl_status logits_block(kl_pass *p, kl_tensor hidden, int64_t first, int64_t n,
                              kl_error *err)
{
    const int64_t vocab = p->config->vocab_size;
    kl_tensor rows = hidden, z;
    rows.shape[0] = n;
    if (rows.data != NULL)
        rows.data = (char *)hidden.data +
                    (size_t)(first * hidden.stride[0]) * kl_dtype_bytes(hidden.dtype);
    KL_TRY(kl_pass_project(p, rows, &p->weights->lm_head, KL_F32, &z, err));
    if (p->shape.logits && !kl_pass_dry(p))
        KL_TRY(p->be->vt->copy_out(p->be, p->step->logits + first * vocab, z.data,
                                   (size_t)kl_tensor_size(&z) * sizeof(float), err));
    return p->shape.sampling ? kl_head_sample(p, z, err) : KL_OK;
}

kl_status kl_head(kl_pass *p, kl_error *err)
{
    kl_tensor hidden;
    KL_TRY(gather_rows(p, &hidden, err));
    const size_t mark = p->arena.used;
    if (p->shape.logits || p->shape.sampling)
        for (int64_t r = 0; r < p->shape.R; r += p->row_block) {
            KL_TRY(logits_block(p, hidden, r, kl_min_i64(p->row_block, p->shape.R - r), err));
            kl_arena_rewind(&p->arena, mark);
        }
    return p->shape.targets ? row_logprobs(p, hidden, err) : KL_OK;
}
