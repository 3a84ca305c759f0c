/*
 * kda.c -- Kimi Delta Attention on the CPU: cuts kl_kda_prefill and kl_kda_decode into tasks
 * for the kernels of simd/kda.h.
 *
 * A task is a sequence, a head and a range of value channels; columns of a state never see
 * each other, so the ranges depend on the number of threads and the bits do not. A prefill task
 * carries its part of the state through the chunks in scratch memory, transposed. A last chunk
 * of a single token, and every decode token, is one step on the state where it lies: so
 * decoding is prefill of one token, bit for bit.
 */
#include "base/arena.h"
#include "base/bf16.h"
#include "base/memory.h"
#include "cpu/cpu_backend.h"

#include <math.h>

/* Below this many elements of state in all, waking threads costs more than the work. */
#define MIN_PARALLEL_STATE 65536

/* Scratch memory of a worker. tokens holds a chunk; state is unused by decode. */
typedef struct {
    kl_kda_token tokens;
    kl_kda_chunk chunk;
    float *state; /* [blocks][pitch][2 lanes]    */
} kda_scratch;

/* What all tasks of a call share. */
typedef struct {
    const kl_kda *a;
    const kl_kda_kernels *kernels;
    int64_t width;         /* columns of a block of the state          */
    int64_t splits, range; /* of V, and columns of one (whole blocks)  */
    int64_t chunk;         /* tokens of a chunk: C, or 1 in decode     */
    size_t worker_bytes;
} kda_call;

/* One task's head and range of columns. */
typedef struct {
    const kda_call *call;
    kl_kda_head head;
    int64_t h, key_head, first, columns; /* value channels first .. first + columns - 1 */
    float *state;                        /* [columns, K], where it lies */
    kda_scratch s;
} kda_task;

static int64_t pitch_of(const kl_kda *a)
{
    return (int64_t)kl_align_up((size_t)a->state.shape[3], KL_KDA_PITCH);
}

static kda_scratch take_scratch(kl_arena *arena, const kl_kda *a, int64_t chunk,
                                int64_t columns)
{
    const int64_t pitch = pitch_of(a);
    const size_t row = (size_t)pitch * sizeof(float), rows = (size_t)chunk * row;
    kda_scratch s = {
        .tokens = {.q = kl_arena_take(arena, rows),
                   .k = kl_arena_take(arena, rows),
                   .log_decay = kl_arena_take(arena, rows),
                   .decay = kl_arena_take(arena, rows)},
        .chunk = {.K = a->state.shape[3],
                  .pitch = pitch,
                  .act = a->q.dtype,
                  .x = kl_arena_take(arena, 2 * rows),
                  .kg = kl_arena_take(arena, rows),
                  .decay = {kl_arena_take(arena, row), kl_arena_take(arena, row)}},
    };
    if (columns > 0) s.state = kl_arena_take(arena, (size_t)columns * row);
    return s;
}

static size_t scratch_bytes(const kl_kda *a, int64_t chunk, int64_t columns)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_scratch(&arena, a, chunk, columns);
    return kl_align_up(arena.used, 64);
}

static int64_t block_width(const kl_cpu *cpu)
{
    return 2 * cpu->kernels->lanes;
}

static int64_t padded_columns(const kl_cpu *cpu, const kl_kda *a)
{
    return (int64_t)kl_align_up((size_t)a->state.shape[2], (size_t)block_width(cpu));
}

size_t kl_cpu_kda_prefill_workspace(kl_backend *be, const kl_kda_prefill *a)
{
    const kl_cpu *cpu = (const kl_cpu *)be;
    return (size_t)kl_pool_size(cpu->pool) *
           scratch_bytes(a, KL_KDA_CHUNK, padded_columns(cpu, a));
}

size_t kl_cpu_kda_decode_workspace(kl_backend *be, const kl_kda_decode *a)
{
    return (size_t)kl_pool_size(((const kl_cpu *)be)->pool) * scratch_bytes(a, 1, 0);
}

static void *element(const kl_tensor *t, int64_t row, int64_t offset)
{
    return (char *)t->data + (size_t)(row * t->stride[0] + offset) * kl_dtype_bytes(t->dtype);
}

static kl_kda_head head_of(const kl_kda *a, int64_t h)
{
    const float *A_log = a->A_log.data, *dt_bias = a->dt_bias.data;
    const int64_t K = a->state.shape[3];
    return (kl_kda_head){
        .K = K,
        .pitch = pitch_of(a),
        .act = a->q.dtype,
        .g_dtype = a->g.dtype,
        .gate = a->gate,
        .normalize = a->normalize,
        .scale = a->scale,
        .rate = kl_tensor_absent(&a->A_log) ? 1.0f : expf(A_log[h]),
        .lower_bound = a->lower_bound,
        .dt_bias = kl_tensor_absent(&a->dt_bias) ? NULL : dt_bias + h * K,
    };
}

/* Task `index` of a call, of sequence *n. */
static kda_task task_of(const kda_call *call, int64_t index, int worker, int64_t *n)
{
    const kl_kda *a = call->a;
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    kda_task t = {.call = call};
    const int64_t split = index % call->splits;
    t.h = index / call->splits % H;
    *n = index / call->splits / H;
    t.key_head = t.h / (H / a->q.shape[1]);
    t.first = split * call->range;
    t.columns = V - t.first < call->range ? V - t.first : call->range;
    t.head = head_of(a, t.h);

    const int32_t *slots = a->slots.data;
    const int64_t slot = kl_tensor_absent(&a->slots) ? *n : slots[*n];
    t.state = (float *)a->state.data + ((slot * H + t.h) * V + t.first) * K;

    kl_arena arena;
    char *scratch = (char *)a->ws.data + (size_t)worker * call->worker_bytes;
    kl_arena_init(&arena, scratch, call->worker_bytes);
    const int64_t held = (int64_t)kl_align_up((size_t)t.columns, (size_t)call->width);
    t.s = take_scratch(&arena, a, call->chunk, call->chunk == 1 ? 0 : held);
    return t;
}

static float beta_of(const kl_kda *a, int64_t token, int64_t h)
{
    const void *p = element(&a->beta, token, h);
    const float b =
        a->beta.dtype == KL_BF16 ? kl_bf16_to_f32(*(const uint16_t *)p) : *(const float *)p;
    if (!a->beta_logits) return b;
    const float e = expf(-fabsf(b));
    return b < 0 ? e / (1.0f + e) : 1.0f / (1.0f + e);
}

/* Row `row` of the task's scratch from a token's inputs. */
static kl_kda_token read_token(const kda_task *t, int64_t token, int64_t row)
{
    const kl_kda *a = t->call->a;
    const int64_t K = t->head.K, at = row * t->head.pitch;
    const kl_kda_token *all = &t->s.tokens;
    const kl_kda_token one = {all->q + at, all->k + at, all->log_decay + at, all->decay + at};
    t->call->kernels->token(&t->head, element(&a->q, token, t->key_head * K),
                            element(&a->k, token, t->key_head * K),
                            element(&a->g, token, t->h * K), &one);
    return one;
}

/* One token on the state where it lies. */
static void run_step(const kda_task *t, int64_t token)
{
    const kl_kda *a = t->call->a;
    const int64_t at = t->h * a->state.shape[2] + t->first, pitch = t->head.pitch;
    const kl_kda_step s = {
        .token = read_token(t, token, 0),
        .decay = t->s.chunk.decay,
        .k_decayed = t->s.chunk.x,
        .beta = beta_of(a, token, t->h),
    };
    for (int64_t i = 0; i < pitch; i++) s.k_decayed[i] = s.token.decay[i] * s.token.k[i];
    t->call->kernels->decay(s.token.log_decay, pitch, &s.decay);
    t->call->kernels->step(&s, &t->head, element(&a->v, token, at), t->state,
                           element(&a->out, token, at), t->columns);
}

/* `rows` tokens on the state in scratch. */
static void run_chunk(kda_task *t, int64_t token, int64_t rows)
{
    const kl_kda *a = t->call->a;
    const kl_kda_kernels *kernels = t->call->kernels;
    kl_kda_chunk *c = &t->s.chunk;
    const int64_t V = a->state.shape[2], pitch = t->head.pitch, width = t->call->width;
    c->rows = rows;
    for (int64_t i = 0; i < rows; i++) {
        read_token(t, token + i, i);
        c->beta[i] = beta_of(a, token + i, t->h);
    }
    kernels->chunk(&t->s.tokens, c);

    for (int64_t j = 0; j < t->columns; j += width) {
        const int64_t left = t->columns - j, at = t->h * V + t->first + j;
        kernels->columns(c, t->s.state + j * pitch, element(&a->v, token, at), a->v.stride[0],
                         element(&a->out, token, at), a->out.stride[0],
                         (int)(left < width ? left : width));
    }
}

/* Move the task's part of a state into scratch memory, or back. */
static void move_state(const kda_task *t, float *state, bool in)
{
    const kl_kda_kernels *kernels = t->call->kernels;
    const int64_t width = t->call->width, K = t->head.K, pitch = t->head.pitch;
    for (int64_t j = 0; j < t->columns; j += width) {
        const int n = (int)(t->columns - j < width ? t->columns - j : width);
        float *lies = state + j * K, *block = t->s.state + j * pitch;
        if (in)
            kernels->load(lies, K, pitch, n, block);
        else
            kernels->store(block, K, n, lies);
    }
}

_Static_assert(KL_KDA_CHECKPOINT % KL_KDA_CHUNK == 0, "a checkpoint ends a chunk");

/* After the first `done` tokens of a sequence that begins at token `begin`. */
static void keep_checkpoint(const kda_task *t, int64_t begin, int64_t done)
{
    const kl_kda *a = t->call->a;
    if (kl_tensor_absent(&a->checkpoints) || done % a->checkpoint_every != 0) return;
    const int64_t H = a->state.shape[1], V = a->state.shape[2], E = a->checkpoint_every;
    const int64_t row = begin / E + done / E - 1;
    float *rows = a->checkpoints.data;
    move_state(t, rows + ((row * H + t->h) * V + t->first) * t->head.K, false);
}

static void prefill_task(void *ctx, int64_t index, int worker)
{
    const kda_call *call = ctx;
    const int32_t *cu = call->a->cu_seqlens.data;
    int64_t n;
    kda_task t = task_of(call, index, worker, &n);
    int64_t token = cu[n];
    const int64_t end = cu[n + 1];
    if (end - token > 1) {
        move_state(&t, t.state, true);
        while (end - token > 1) {
            const int64_t rows = end - token < KL_KDA_CHUNK ? end - token : KL_KDA_CHUNK;
            run_chunk(&t, token, rows);
            token += rows;
            keep_checkpoint(&t, cu[n], token - cu[n]);
        }
        move_state(&t, t.state, false);
    }
    if (token < end) run_step(&t, token);
}

static void decode_task(void *ctx, int64_t index, int worker)
{
    int64_t n;
    const kda_task t = task_of(ctx, index, worker, &n);
    run_step(&t, n);
}

/* Cut V so that there are about three tasks a thread, but never through a block. */
static void split_columns(kda_call *call, int64_t heads, int64_t columns, int threads)
{
    const int64_t blocks = (columns + call->width - 1) / call->width;
    int64_t splits = (3 * (int64_t)threads + heads - 1) / heads;
    splits = threads == 1 ? 1 : splits < blocks ? splits : blocks;
    call->range = (blocks + splits - 1) / splits * call->width;
    call->splits = (columns + call->range - 1) / call->range;
}

static void run(kl_cpu *cpu, const kl_kda *a, int64_t chunk_tokens, int64_t sequences,
                kl_task_fn fn)
{
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    const int64_t heads = sequences * H;
    if (heads == 0) return;

    kda_call call = {
        .a = a,
        .kernels = &cpu->kernels->kda,
        .width = block_width(cpu),
        .chunk = chunk_tokens,
        .worker_bytes =
            scratch_bytes(a, chunk_tokens, chunk_tokens == 1 ? 0 : padded_columns(cpu, a)),
    };
    const bool alone = heads * V * K < MIN_PARALLEL_STATE && a->out.shape[0] <= sequences;
    split_columns(&call, heads, V, alone ? 1 : kl_pool_size(cpu->pool));
    if (!alone) {
        kl_pool_run(cpu->pool, heads * call.splits, fn, &call);
        return;
    }
    for (int64_t i = 0; i < heads; i++) fn(&call, i, 0);
}

kl_status kl_cpu_kda_prefill(kl_backend *be, const kl_kda_prefill *a, kl_error *err)
{
    (void)err;
    run((kl_cpu *)be, a, KL_KDA_CHUNK, a->cu_seqlens.shape[0] - 1, prefill_task);
    return KL_OK;
}

kl_status kl_cpu_kda_decode(kl_backend *be, const kl_kda_decode *a, kl_error *err)
{
    (void)err;
    run((kl_cpu *)be, a, 1, a->q.shape[0], decode_task);
    return KL_OK;
}
