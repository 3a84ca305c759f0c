/*
 * engine.h -- a model on a device: its weights, its sequences, and steps over them.
 *
 * An engine owns three kinds of memory, all planned before anything is taken: weights (filled
 * once), cache (KDA slots and MLA pages, once per engine), scratch (one block, laid out anew
 * each step). A step calls no allocator.
 *
 * Not thread-safe: the binding holds one lock around every call.
 */
#ifndef KL_MODEL_ENGINE_H
#define KL_MODEL_ENGINE_H

#include "backend/backend.h"
#include "model/config.h"

/* ---- plan ------------------------------------------------------------------------------ */

typedef struct {
    kl_weight_format
        format;          /* storage of the big matrices; act is f32 for KL_W_F32, else bf16 */
    kl_latents latents;  /* how MLA pages are stored                               */
    int64_t max_context; /* tokens of one sequence; 0: the planner's choice        */
    int64_t max_batch;   /* sequences alive at once; 0: the planner's choice       */
    int64_t step_tokens; /* tokens of one step at most; 0: the planner's choice    */
    size_t cache_bytes;  /* KDA slots and MLA pages together; 0: planner's choice  */
    size_t budget_bytes; /* everything together at most; 0: what is free           */
} kl_engine_options;

typedef struct {
    size_t weight_bytes, state_bytes /* KDA states and conv windows */, page_bytes,
        scratch_bytes, total_bytes, free_bytes;
    size_t snapshot_bytes; /* states and windows that only the prefix cache uses */
    size_t limit_bytes, cache_limit_bytes; /* what total and cache may be; 0: any cache */
    int64_t max_context, max_batch, step_tokens, n_pages, snapshot_slots;
    kl_latents latents;
    size_t state_bytes_per_sequence, page_bytes_per_token;
} kl_plan;

/* Choose what the options leave open and compute every figure, also where it cannot fit: then
 * with pages for one sequence of max_context. Takes nothing. */
kl_status kl_plan_make(kl_backend *be, const kl_config *config,
                       const kl_engine_options *options, kl_plan *out, kl_error *err);
/* KL_ERR_MEMORY, with the figures in the message, for a plan that exceeds its limits. */
kl_status kl_plan_check(const kl_plan *plan, kl_error *err);

/* ---- life ------------------------------------------------------------------------------ */

typedef struct kl_engine kl_engine;

/* Called between layers, and every 20 ms while files are read; nonzero stops with
 * KL_ERR_CANCELLED. Both are called on the thread that called the engine. */
typedef int (*kl_poll_fn)(void *ctx);
typedef void (*kl_progress_fn)(void *ctx, uint64_t done, uint64_t total);

/* A tensor of a checkpoint: bytes [offset, offset + bytes) of file `file` (validated against
 * the file's size by the reader of the header). */
typedef struct {
    const char *name;
    int file; /* index into fds */
    uint64_t offset, bytes;
    kl_dtype dtype; /* KL_F32 or KL_BF16 */
    int ndim;
    int64_t shape[KL_MAX_NDIM];
} kl_source;

/* `be` is borrowed and must outlive the engine. Takes all memory of the plan. */
kl_status kl_engine_new(kl_backend *be, const kl_config *config,
                        const kl_engine_options *options, kl_engine **out, kl_error *err);
void kl_engine_free(kl_engine *e); /* NULL is fine */
const kl_plan *kl_engine_plan(const kl_engine *e);
const kl_config *kl_engine_config(const kl_engine *e);

/* Bind every tensor of the model by name, with its shape, before a byte is read; then read
 * with pread, convert and store. Names: the published checkpoint's. Sources that the model
 * does not use are counted in *n_unused. */
kl_status kl_engine_load(kl_engine *e, const int *fds, int n_fds, const kl_source *sources,
                         int64_t n_sources, int64_t *n_unused, kl_progress_fn progress,
                         kl_poll_fn poll, void *ctx, kl_error *err);

/* Random weights of plausible scale, made on the device, the same for one seed everywhere. The
 * routers' biases are drawn `skew` (>= 0) times as large: a few hundred give every token the same
 * experts. */
kl_status kl_engine_randomize(kl_engine *e, uint64_t seed, float skew, kl_error *err);

/* ---- sequences ------------------------------------------------------------------------- */

/* A handle: slot and generation, so that a released one is recognised. 0 is no sequence. */
typedef uint64_t kl_seq;

kl_status kl_seq_new(kl_engine *e, kl_seq *out, kl_error *err);
/* KDA states and conv windows are copied; full MLA pages are shared, the last partial one is
 * copied when either side writes it. */
kl_status kl_seq_fork(kl_engine *e, kl_seq seq, kl_seq *out, kl_error *err);
kl_status kl_seq_release(kl_engine *e, kl_seq seq, kl_error *err);
kl_status kl_seq_length(const kl_engine *e, kl_seq seq, int64_t *out, kl_error *err);
/* What a KDA layer remembers of a sequence, between device and host: the state [H, V, K] and the
 * conv window [C, W-1], oldest first, as f32 (exact: a window of bf16 is widened and narrowed
 * again). Writing replaces both. */
kl_status kl_seq_read_kda(kl_engine *e, kl_seq seq, int64_t layer, float *state, float *window,
                          kl_error *err);
kl_status kl_seq_write_kda(kl_engine *e, kl_seq seq, int64_t layer, const float *state,
                           const float *window, kl_error *err);
/* Pages of a sequence in each MLA layer, and how many of them others hold too. */
kl_status kl_seq_pages(const kl_engine *e, kl_seq seq, int64_t *pages, int64_t *shared,
                       kl_error *err);
/* A copy to work on where a slot and pages are free for it to grow by n_tokens, so that a
 * failure leaves `seq` as it was; else seq itself. */
kl_status kl_seq_draft(kl_engine *e, kl_seq seq, int64_t n_tokens, kl_seq *out, kl_error *err);

/* All that is remembered of a sequence as one run of bytes, its image: of each KDA layer the
 * state [H, V, K] f32 and the conv window [C, W-1], then of each MLA layer the latents
 * [length, rank+rope], or as many 8-bit rows. Any part of it can be read; and written, where no
 * page is shared. */
uint64_t kl_seq_image_bytes(const kl_engine *e, int64_t length);
kl_status kl_seq_read_image(kl_engine *e, kl_seq seq, uint64_t offset, void *out, size_t bytes,
                            kl_error *err);
kl_status kl_seq_write_image(kl_engine *e, kl_seq seq, uint64_t offset, const void *in,
                             size_t bytes, kl_error *err);
/* A sequence of `length` tokens whose image the caller is about to write. */
kl_status kl_seq_restore(kl_engine *e, int64_t length, kl_seq *out, kl_error *err);
void kl_engine_usage(const kl_engine *e, int64_t *sequences, int64_t *pages_used);

/* ---- prefixes -------------------------------------------------------------------------- */

typedef struct {
    bool on;
    int64_t hits, cached_tokens, evicted; /* since the engine was made */
    int64_t snapshots;                    /* now */
    size_t bytes;                         /* that snapshots alone hold now */
} kl_prefix_stats;

/* Whether prompts begin with what others have read before them (prefix.h), to the bit what they
 * would compute. Off at first; switching off gives up all snapshots. */
kl_status kl_engine_keep_prefixes(kl_engine *e, bool on, kl_error *err);
void kl_engine_clear_prefixes(kl_engine *e);
void kl_engine_prefix_stats(const kl_engine *e, kl_prefix_stats *out);

/* ---- one step -------------------------------------------------------------------------- */

/* Guesses that a step takes of one sequence: with its certain token a tile of mla_prefill that is
 * computed as in mla_decode. */
#define KL_MAX_GUESSES (KL_MLA_FEW_TOKENS - 1)

typedef struct {
    kl_seq seq; /* each sequence at most once a step */
    const int32_t *tokens;
    int64_t n_tokens; /* >= 1 */
} kl_feed;

/* The residual stream after a layer, for every token of the step: out [T, hidden] f32, host. */
typedef struct {
    int64_t layer;
    float *out;
} kl_capture;

/* Host arrays; NULL for what is not wanted. Rows index the step's packed tokens. */
typedef struct {
    const kl_feed *feeds;
    int64_t n_feeds;
    const kl_capture *captures;
    int64_t n_captures;

    const int32_t *rows; /* tokens whose next-token distribution is wanted */
    int64_t n_rows;
    float *logits; /* [n_rows, vocab] */

    const int32_t *targets; /* [n_rows]: log-probabilities of these, see kl_token_logprobs */
    float *logprobs;        /* [n_rows] */
    uint8_t *greedy;        /* [n_rows] */

    const kl_sampling *sampling; /* [n_rows]: draw the next token; n_rows <= max_batch, but of
                                  * guesses 16 */
    const int32_t *seen;         /* [n_rows, ceil(vocab / 32)] bit sets, or NULL       */
    int32_t *ids;                /* [n_rows] */
    float *id_logprobs;          /* [n_rows] */

    /* Not NULL: a step of guesses. Of each feed the first token is certain, and up to
     * KL_MAX_GUESSES more are guesses of what follows it. Every token is a row, all are sampled,
     * and taken[i] becomes 1 and the number of guesses of feed i, up to the first wrong one, that
     * are what was drawn before them. Then the sequence has read these, each in the arithmetic
     * of a token step, and nothing else: the draws up to taken[i] are those of taken[i] steps. */
    int64_t *taken; /* [n_feeds], out */

    int top; /* alternatives, with targets or with sampling; 0 .. 256 */
    int32_t *top_ids;
    float *top_logprobs; /* [n_rows, top] */

    kl_poll_fn poll;
    void *poll_ctx;
} kl_step;

/* Run a step of at most plan.step_tokens tokens. Every argument is checked before any state
 * changes. If it fails or is cancelled later, the fed sequences are marked broken and only
 * kl_seq_release() takes them. */
kl_status kl_engine_step(kl_engine *e, const kl_step *step, kl_error *err);

/* Sample from logits of the host's (after a logits processor), same rules as in a step. */
kl_status kl_engine_sample(kl_engine *e, const float *logits, int64_t n_rows,
                           const kl_step *step, kl_error *err);

/* ---- generation ------------------------------------------------------------------------ */

typedef struct {
    const int32_t *prompt; /* copied */
    int64_t n_prompt;      /* >= 1 beyond the history, unless there are logits */
    int64_t max_new_tokens;
    kl_sampling sampling;    /* position 0 is this request's first draw */
    const int32_t *stop_ids; /* copied */
    int64_t n_stop_ids;
    int top; /* alternatives to report with every token */
    int64_t
        guesses; /* of the next tokens, verified in one step: 0 .. KL_MAX_GUESSES; draft.h */

    /* To continue a sequence. The tokens fed are prompt[n_history ..]; the history, which is
     * none or all that the sequence holds, is for penalties and processors only. */
    kl_seq seq;    /* 0: an empty one; else each request runs on a fork of it */
    bool in_place; /* no fork: seq itself grows, and stays the caller's       */
    int64_t n_history;
    const float *logits; /* copied [vocab], after seq: for a request that feeds no prompt */
    bool process;        /* its logits go through the processor of the run */
} kl_request;

typedef enum { KL_RUNNING, KL_FINISH_STOP, KL_FINISH_LENGTH, KL_FINISH_ERROR } kl_finish;

/* A token of a request. The stop token itself is reported, with KL_FINISH_STOP. A request of
 * max_new_tokens 0 ends with one event of id -1 and KL_FINISH_LENGTH; one that fails with one of
 * id -1 and KL_FINISH_ERROR. */
typedef struct {
    int64_t request;
    int64_t n_cached; /* tokens of the prompt that were not computed: others had read them */
    int64_t n_drafted, n_accepted; /* guesses so far, and those that were right */
    int32_t id;
    float logprob;
    kl_finish finish;
    kl_error error; /* of KL_FINISH_ERROR */
    int n_top;      /* request.top, 0 without an id */
    int32_t top_ids[256];
    float top_logprobs[256];
} kl_event;

/* Change a row of logits before it is sampled. ids: prompt and new tokens so far. Nonzero
 * stops the run with KL_ERR_CANCELLED. */
typedef int (*kl_logits_fn)(void *ctx, int64_t request, const int32_t *ids, int64_t n_ids,
                            float *logits);

typedef struct {
    int64_t prompt_tokens, prompt_done, new_tokens; /* of all requests so far */
    double prefill_s, decode_s;
    int64_t running, waiting; /* requests with a sequence, and those before them */
} kl_generation_stats;

typedef struct kl_generation kl_generation;

/* Requests over an engine; model/scheduler.c decides which run in each step. The first ones may
 * be none; their ids are 0, 1, ... A request that could never fit (context, pages) or whose
 * arguments are wrong is refused, by its id, and with it the whole. */
kl_status kl_generation_new(kl_engine *e, const kl_request *requests, int64_t n_requests,
                            kl_generation **out, kl_error *err);
/* One more, behind those that wait; ids count up and are never used again. A request's memory is
 * given back when it ends: what a step costs does not depend on how many there have been. */
kl_status kl_generation_submit(kl_generation *g, const kl_request *request, int64_t *id,
                               kl_error *err);
/* Release every sequence still held. */
void kl_generation_free(kl_generation *g);

/* Run steps until max_events events are stored, max_steps steps have run, or all requests
 * have finished (*n_events 0 then). What befalls one request (logits that are not finite, a
 * continued sequence that was changed, memory that others hold while nothing runs) ends that one
 * with an event; a failed step ends those that were in it. Returns KL_ERR_CANCELLED when poll or
 * process said so; the events of the interrupted step come with the next run. */
kl_status kl_generation_run(kl_generation *g, int64_t max_steps, kl_event *events,
                            int64_t max_events, int64_t *n_events, kl_logits_fn process,
                            void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err);
/* Nothing is left to run or to be reported. */
bool kl_generation_done(const kl_generation *g);
/* End one request (a stop string was seen, nobody wants it any more) without an event, though
 * tokens that were drawn before may still come; one that has ended is fine. */
kl_status kl_generation_finish(kl_generation *g, int64_t request, kl_error *err);
void kl_generation_get_stats(const kl_generation *g, kl_generation_stats *out);

#endif
