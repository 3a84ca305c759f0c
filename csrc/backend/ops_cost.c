/*
 * ops_cost.c -- flops and bytes of each operation, from checked arguments, for rooflines.
 *
 * Every operand and result counts once. What only the device knows is taken at its largest:
 * contexts fill their block tables, and no two (token, choice) pairs share an expert until all
 * experts are in use.
 */
#include "backend/moe.h"

static double tensor_bytes(const kl_tensor *t)
{
    if (kl_tensor_absent(t)) return 0;
    return (double)kl_tensor_size(t) * (double)kl_dtype_bytes(t->dtype);
}

static double weight_bytes(const kl_weight *w)
{
    if (w->data == NULL) return 0;
    return (double)kl_weight_data_bytes(w) + (double)kl_weight_scale_bytes(w);
}

static double dim(const kl_tensor *t, int axis)
{
    return (double)t->shape[axis];
}

static double count_of(const kl_tensor *cu_seqlens, double T)
{
    return kl_tensor_absent(cu_seqlens) ? T : dim(cu_seqlens, 0) - 1;
}

static double at_most(double a, double b)
{
    return a < b ? a : b;
}

/* ---- rows and products ----------------------------------------------------------------- */

kl_cost kl_cost_embedding(const kl_embedding *a)
{
    const double row = (double)kl_weight_row_bytes(a->table.format, a->table.cols);
    return (kl_cost){0, tensor_bytes(&a->ids) + dim(&a->out, 0) * row + tensor_bytes(&a->out) +
                            tensor_bytes(&a->sums) + tensor_bytes(&a->blanks)};
}

kl_cost kl_cost_gather(const kl_gather *a)
{
    return (kl_cost){0, tensor_bytes(&a->rows) + 2 * tensor_bytes(&a->out)};
}

kl_cost kl_cost_rms_norm(const kl_rms_norm *a)
{
    const bool has_x = !kl_tensor_absent(&a->x), has_out = !kl_tensor_absent(&a->out);
    const bool adds = has_x && !kl_tensor_absent(&a->residual);
    const double elements = (double)kl_tensor_size(has_x ? &a->x : &a->residual);
    return (kl_cost){
        .flops =
            elements * ((adds ? 1 : 0) + (has_out ? 4 : 0)), /* square, sum, two products */
        .bytes = tensor_bytes(&a->x) + (adds ? 2 : 1) * tensor_bytes(&a->residual) +
                 tensor_bytes(&a->weight) + tensor_bytes(&a->out),
    };
}

kl_cost kl_cost_gated_rms_norm(const kl_gated_rms_norm *a)
{
    return (kl_cost){
        .flops = 8 * (double)kl_tensor_size(&a->x), /* a norm, then a sigmoid and its product */
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->z) + tensor_bytes(&a->weight) +
                 tensor_bytes(&a->out),
    };
}

/* The norm of x, if there is one: square, sum, two products. */
static double norm_flops(const kl_tensor *x, const kl_tensor *norm_weight)
{
    return kl_tensor_absent(norm_weight) ? 0 : 4 * (double)kl_tensor_size(x);
}

/* A residual is read, added to and written. */
static kl_cost residual_cost(const kl_tensor *residual)
{
    if (kl_tensor_absent(residual)) return (kl_cost){0, 0};
    return (kl_cost){(double)kl_tensor_size(residual), 2 * tensor_bytes(residual)};
}

/* Of a router's work for the layer behind; its sums stay where they are. */
static kl_cost ahead_cost(const kl_router_ahead *a)
{
    if (a->sums == NULL) return (kl_cost){0, 0};
    return (kl_cost){2 * (double)a->router.rows * (double)a->router.cols,
                     weight_bytes(&a->router) + tensor_bytes(&a->norm_weight)};
}

kl_cost kl_cost_linear(const kl_linear *a)
{
    const kl_cost sum = residual_cost(&a->residual), ahead = ahead_cost(&a->ahead);
    return (kl_cost){
        .flops = 2 * dim(&a->x, 0) * (double)a->w.rows * (double)a->w.cols +
                 norm_flops(&a->x, &a->norm_weight) + sum.flops + ahead.flops,
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->norm_weight) + weight_bytes(&a->w) +
                 tensor_bytes(&a->out) + tensor_bytes(&a->peaks) + sum.bytes + ahead.bytes,
    };
}

kl_cost kl_cost_linear_pair(const kl_linear_pair *a)
{
    const kl_cost first = kl_cost_linear(&a->first), second = kl_cost_linear(&a->second);
    return (kl_cost){first.flops + second.flops, first.bytes + second.bytes};
}

/* Gate, up and down, and the product between them. */
static double ffn_flops(double T, const kl_weight *w1)
{
    return T * (double)w1->rows * (6 * (double)w1->cols + 5);
}

kl_cost kl_cost_mlp(const kl_mlp *a)
{
    const kl_cost sum = residual_cost(&a->residual);
    return (kl_cost){
        .flops =
            ffn_flops(dim(&a->x, 0), &a->w1) + norm_flops(&a->x, &a->norm_weight) + sum.flops,
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->norm_weight) + weight_bytes(&a->w1) +
                 weight_bytes(&a->w3) + weight_bytes(&a->w2) + tensor_bytes(&a->out) +
                 sum.bytes,
    };
}

kl_cost kl_cost_pack_weight(const kl_pack_weight *a)
{
    return (kl_cost){
        .flops = 3 * (double)kl_tensor_size(&a->src), /* maximum, division, rounding */
        .bytes = tensor_bytes(&a->src) + weight_bytes(&a->out),
    };
}

kl_cost kl_cost_fill_normal(const kl_fill_normal *a)
{
    return (kl_cost){2 * (double)kl_tensor_size(&a->out), tensor_bytes(&a->out)};
}

/* ---- mixers ---------------------------------------------------------------------------- */

/* Bytes of the slots that N sequences read and write. */
static double slot_bytes(const kl_tensor *state, double N)
{
    return state->shape[0] == 0 ? 0 : 2 * N * tensor_bytes(state) / dim(state, 0);
}

kl_cost kl_cost_short_conv(const kl_short_conv *a)
{
    const double N = count_of(&a->cu_seqlens, dim(&a->x, 0));
    const double per_output = 2 * dim(&a->weight, 1) + (a->silu ? 4 : 0);
    return (kl_cost){
        .flops = (double)kl_tensor_size(&a->x) * per_output,
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->weight) + slot_bytes(&a->state, N) +
                 tensor_bytes(&a->slots) + tensor_bytes(&a->cu_seqlens) + tensor_bytes(&a->out),
    };
}

/* The recurrent form: decay 1, S k 2, u k^T 2, S q 2, for each element of S. */
static kl_cost kda_cost(const kl_kda *a)
{
    const double T = dim(&a->q, 0), H = dim(&a->state, 1);
    const double V = dim(&a->state, 2), K = dim(&a->state, 3);
    return (kl_cost){
        .flops = 7 * T * H * V * K,
        .bytes = slot_bytes(&a->state, count_of(&a->cu_seqlens, T)) + tensor_bytes(&a->q) +
                 tensor_bytes(&a->k) + tensor_bytes(&a->v) + tensor_bytes(&a->g) +
                 tensor_bytes(&a->beta) + tensor_bytes(&a->slots) +
                 tensor_bytes(&a->cu_seqlens) + tensor_bytes(&a->A_log) +
                 tensor_bytes(&a->dt_bias) + tensor_bytes(&a->out) +
                 tensor_bytes(&a->checkpoints),
    };
}

kl_cost kl_cost_kda_prefill(const kl_kda_prefill *a)
{
    return kda_cost(a);
}

kl_cost kl_cost_kda_decode(const kl_kda_decode *a)
{
    return kda_cost(a);
}

/* The sum of its parts' flops, but no bytes for what passes between them. */
kl_cost kl_cost_kda_mixer(const kl_kda_mixer *a)
{
    const double T = dim(&a->qkv, 0), H = dim(&a->state, 1);
    const double V = dim(&a->state, 2), K = dim(&a->state, 3);
    const double N = count_of(&a->cu_seqlens, T);
    return (kl_cost){
        .flops = (double)kl_tensor_size(&a->qkv) * (2 * dim(&a->conv_weight, 1) + 4) +
                 7 * T * H * V * K + 8 * T * H * V +
                 2 * T * H * (K * dim(&a->f_low, 1) + V * dim(&a->g_low, 1)),
        .bytes =
            slot_bytes(&a->state, N) + slot_bytes(&a->conv_state, N) + tensor_bytes(&a->qkv) +
            tensor_bytes(&a->conv_weight) + tensor_bytes(&a->f_low) + weight_bytes(&a->f_b) +
            tensor_bytes(&a->g_low) + weight_bytes(&a->g_b) + tensor_bytes(&a->beta) +
            tensor_bytes(&a->slots) + tensor_bytes(&a->cu_seqlens) + tensor_bytes(&a->A_log) +
            tensor_bytes(&a->dt_bias) + tensor_bytes(&a->norm_weight) + tensor_bytes(&a->out),
    };
}

kl_cost kl_cost_mla_lay_out(const kl_mla_lay_out *a)
{
    return (kl_cost){0, tensor_bytes(&a->cu_past) + tensor_bytes(&a->cu_seqlens) +
                            tensor_bytes(&a->lengths) + tensor_bytes(&a->block_table)};
}

static double latent_row_bytes(const kl_tensor *pages)
{
    return dim(pages, 2) * (double)kl_dtype_bytes(pages->dtype);
}

kl_cost kl_cost_mla_append(const kl_mla_append *a)
{
    return (kl_cost){
        .flops = kl_tensor_absent(&a->norm_weight)
                     ? 0
                     : 4 * dim(&a->raw, 0) * dim(&a->norm_weight, 0),
        .bytes = tensor_bytes(&a->raw) + dim(&a->raw, 0) * latent_row_bytes(&a->pages) +
                 tensor_bytes(&a->norm_weight) + tensor_bytes(&a->block_table) +
                 tensor_bytes(&a->lengths) + tensor_bytes(&a->cu_seqlens),
    };
}

/* Tokens of context that the block table has room for, one sequence. */
static double mla_context(const kl_mla *a)
{
    return dim(&a->block_table, 1) * KL_PAGE_TOKENS;
}

static double mla_bytes(const kl_mla *a, double N)
{
    const double row = latent_row_bytes(&a->pages);
    return tensor_bytes(&a->q) + N * mla_context(a) * row + tensor_bytes(&a->block_table) +
           tensor_bytes(&a->lengths) + tensor_bytes(&a->cu_seqlens) + tensor_bytes(&a->w_kv_b) +
           tensor_bytes(&a->raw) + dim(&a->raw, 0) * row + tensor_bytes(&a->norm_weight) +
           tensor_bytes(&a->out);
}

/* The plain form, causal: keys and values of the context, then each visible pair. */
kl_cost kl_cost_mla_prefill(const kl_mla_prefill *a)
{
    const double T = dim(&a->q, 0), H = dim(&a->q, 1), head = dim(&a->q, 2);
    const double V = dim(&a->out, 2), context = mla_context(a);
    const double N = count_of(&a->cu_seqlens, T), mean = N > 0 ? T / N : 0;
    const double visible = T * (context - (mean > 1 ? (mean - 1) / 2 : 0));
    const double expand = 2 * N * context * (double)kl_tensor_size(&a->w_kv_b);
    return (kl_cost){expand + 2 * H * visible * (head + V), mla_bytes(a, N)};
}

/* The absorbed form: into the latent space and back, and attention within it. */
kl_cost kl_cost_mla_decode(const kl_mla_decode *a)
{
    const double N = dim(&a->q, 0), H = dim(&a->q, 1);
    const double rank = dim(&a->w_kv_b, 2), nope = dim(&a->w_kv_b, 1) - dim(&a->out, 2);
    const double width = rank + dim(&a->q, 2) - nope;
    const double absorb = 2 * N * (double)kl_tensor_size(&a->w_kv_b);
    return (kl_cost){absorb + 2 * N * H * mla_context(a) * (width + rank), mla_bytes(a, N)};
}

/* ---- experts, log-probabilities, sampling ---------------------------------------------- */

kl_cost kl_cost_moe_route(const kl_moe_route *a)
{
    return (kl_cost){
        .flops = 5 * (double)kl_tensor_size(&a->logits), /* score, bias, one comparison */
        .bytes = tensor_bytes(&a->logits) + tensor_bytes(&a->bias) + tensor_bytes(&a->ids) +
                 tensor_bytes(&a->weights),
    };
}

kl_cost kl_cost_moe_experts(const kl_moe_experts *a)
{
    const double T = dim(&a->x, 0), pairs = T * dim(&a->ids, 1), E = (double)a->w1.count;
    const double stack = weight_bytes(&a->w1) + weight_bytes(&a->w3) + weight_bytes(&a->w2);
    return (kl_cost){
        .flops = ffn_flops(pairs, &a->w1) + 2 * pairs * dim(&a->x, 1) +
                 (kl_moe_has_shared(a) ? ffn_flops(T, &a->shared_w1) : 0),
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->ids) + tensor_bytes(&a->weights) +
                 stack * at_most(pairs, E) / E + weight_bytes(&a->shared_w1) +
                 weight_bytes(&a->shared_w3) + weight_bytes(&a->shared_w2) +
                 tensor_bytes(&a->out),
    };
}

/* The sum of its parts' flops, but no bytes for what passes between them. */
kl_cost kl_cost_moe(const kl_moe *a)
{
    const kl_moe_parts p = kl_moe_parts_of(a, NULL);
    const bool normed = !kl_tensor_absent(&a->norm_weight);
    const bool adds = !kl_tensor_absent(&a->residual);
    const kl_cost experts = kl_cost_moe_experts(&p.experts), router = kl_cost_linear(&p.router);
    const double elements = (double)kl_tensor_size(&a->x);
    const double router_flops = a->sums == NULL ? router.flops : 0;
    const double router_bytes = a->sums == NULL ? weight_bytes(&a->router) : 0;
    const double passed = tensor_bytes(&p.experts.x) + tensor_bytes(&p.experts.ids) +
                          tensor_bytes(&p.experts.weights) + tensor_bytes(&p.experts.out);
    return (kl_cost){
        .flops = (normed ? 4 * elements : 0) + router_flops +
                 kl_cost_moe_route(&p.route).flops + experts.flops + (adds ? elements : 0),
        .bytes = tensor_bytes(&a->x) + tensor_bytes(&a->norm_weight) + router_bytes +
                 tensor_bytes(&a->bias) + experts.bytes - passed + tensor_bytes(&a->out) +
                 2 * tensor_bytes(&a->residual),
    };
}

kl_cost kl_cost_token_logprobs(const kl_token_logprobs *a)
{
    const double logits = dim(&a->hidden, 0) * (double)a->lm_head.rows;
    return (kl_cost){
        .flops = logits * (2 * (double)a->lm_head.cols + 3), /* and a maximum, exp, sum */
        .bytes = tensor_bytes(&a->hidden) + weight_bytes(&a->lm_head) +
                 tensor_bytes(&a->targets) + tensor_bytes(&a->logprobs) +
                 tensor_bytes(&a->greedy) + tensor_bytes(&a->top_ids) +
                 tensor_bytes(&a->top_logprobs),
    };
}

/* Peaks are all that a greedy row needs, with the logits of one of them, and no sampling; but for a
 * penalty or alternatives. */
static bool needs_peaks_alone(const kl_sample *a)
{
    return a->greedy && !kl_tensor_absent(&a->peaks) && kl_tensor_absent(&a->seen) &&
           kl_tensor_absent(&a->top_ids);
}

kl_cost kl_cost_sample(const kl_sample *a)
{
    const bool alone = needs_peaks_alone(a);
    const double N = dim(&a->logits, 0), V = dim(&a->logits, 1);
    const double logits = N * (alone ? at_most(KL_PEAK_OUTPUTS, V) : V);
    const double peaks = alone ? N * (double)kl_peaks_of(a->logits.shape[1]) : 0;
    return (kl_cost){
        .flops = 3 * (logits + peaks), /* a maximum, exp, sum */
        .bytes = logits * sizeof(float) + tensor_bytes(&a->peaks) + tensor_bytes(&a->seen) +
                 tensor_bytes(&a->ids) + tensor_bytes(&a->logprobs) +
                 tensor_bytes(&a->top_ids) + tensor_bytes(&a->top_logprobs) +
                 (alone ? 0 : N * sizeof(kl_sampling)),
    };
}
