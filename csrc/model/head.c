/*
 * head.c -- from the residual stream to logits, log-probabilities and tokens.
 *
 * Only the rows that are asked for are normalised and multiplied; logits exist for row_block
 * rows at a time, never for all tokens of a step.
 */
#include "model/pass.h"

#include "base/memory.h"

static kl_status copy_out(kl_pass *p, void *host, const kl_tensor *t, kl_error *err)
{
    if (kl_pass_dry(p) || host == NULL) return KL_OK;
    const size_t bytes = (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype);
    return p->be->vt->copy_out(p->be, host, t->data, bytes, err);
}

/* hidden [R, D] = norm(x[rows]). */
static kl_status gather_rows(kl_pass *p, kl_tensor *hidden, kl_error *err)
{
    const int64_t R = p->shape.R, D = p->config->hidden_size;
    *hidden = kl_pass_take(p, p->act, R, D);
    const size_t mark = p->arena.used;
    kl_gather gather = {.x = p->x, .rows = p->ints.rows, .out = kl_pass_take(p, KL_F32, R, D)};
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
    const int64_t R = p->shape.R;
    const kl_step *s = p->step;
    kl_token_logprobs a = {
        .hidden = hidden, .lm_head = p->weights->lm_head, .targets = p->ints.targets};
    const kl_tensor logprobs = kl_pass_take(p, KL_F32, R, 1);
    const kl_tensor greedy = kl_pass_take(p, KL_U8, R, 1);
    a.logprobs = kl_tensor_1d(logprobs.data, KL_F32, R);
    a.greedy = kl_tensor_1d(greedy.data, KL_U8, R);
    if (p->shape.top > 0) {
        a.top_ids = kl_pass_take(p, KL_I32, R, p->shape.top);
        a.top_logprobs = kl_pass_take(p, KL_F32, R, p->shape.top);
    }
    KL_TRY(kl_pass_token_logprobs(p, &a, err));
    if (kl_pass_dry(p)) return KL_OK;
    KL_TRY(copy_out(p, s->logprobs, &a.logprobs, err));
    KL_TRY(copy_out(p, s->greedy, &a.greedy, err));
    if (p->shape.top == 0) return KL_OK;
    KL_TRY(copy_out(p, s->top_ids, &a.top_ids, err));
    return copy_out(p, s->top_logprobs, &a.top_logprobs, err);
}

/* The parameters of the rows, and the tokens seen, from the step to the device. */
static kl_status send_sampling(kl_pass *p, kl_sample *a, kl_error *err)
{
    const int64_t R = p->shape.R, words = (p->config->vocab_size + 31) / 32;
    const size_t bytes = (size_t)R * sizeof(kl_sampling);
    void *params = kl_arena_take(&p->arena, bytes);
    a->sampling = params;
    if (p->shape.seen) a->seen = kl_pass_take(p, KL_I32, R, words);
    if (kl_pass_dry(p) || p->arena.overflowed) return KL_OK;
    KL_TRY(p->be->vt->copy_in(p->be, params, p->step->sampling, bytes, err));
    if (!p->shape.seen) return KL_OK;
    return p->be->vt->copy_in(p->be, a->seen.data, p->step->seen,
                              (size_t)(R * words) * sizeof(int32_t), err);
}

kl_status kl_head_sample(kl_pass *p, kl_tensor logits, kl_error *err)
{
    const int64_t R = p->shape.R;
    const kl_step *s = p->step;
    kl_sample a = {.logits = logits};
    KL_TRY(send_sampling(p, &a, err));
    const kl_tensor ids = kl_pass_take(p, KL_I32, R, 1);
    const kl_tensor logprobs = kl_pass_take(p, KL_F32, R, 1);
    a.ids = kl_tensor_1d(ids.data, KL_I32, R);
    a.logprobs = kl_tensor_1d(logprobs.data, KL_F32, R);
    if (p->shape.top > 0) {
        a.top_ids = kl_pass_take(p, KL_I32, R, p->shape.top);
        a.top_logprobs = kl_pass_take(p, KL_F32, R, p->shape.top);
    }
    KL_TRY(kl_pass_sample(p, &a, err));
    if (kl_pass_dry(p)) return KL_OK;
    KL_TRY(copy_out(p, s->ids, &a.ids, err));
    KL_TRY(copy_out(p, s->id_logprobs, &a.logprobs, err));
    if (p->shape.top == 0) return KL_OK;
    KL_TRY(copy_out(p, s->top_ids, &a.top_ids, err));
    return copy_out(p, s->top_logprobs, &a.top_logprobs, err);
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
        KL_TRY(copy_out(p, p->step->logits + first * vocab, &z, err));
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
