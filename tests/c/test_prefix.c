/*
 * test_prefix.c -- prompts that begin with what others have read: the tree against a search of
 * every snapshot there is, and the engine against itself without the tree.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/prompt.h"
#include "tiny_model.h"

#define PAGE KL_PAGE_TOKENS

/* ---- the tree in a small world --------------------------------------------------------- */

enum {
    SLOTS = 4,
    EXTRA = 1,
    ALL = SLOTS + EXTRA,
    PAGES = 40,
    CONTEXT = 10 * PAGE,
    PROMPTS = 6,
    STEPS = 10000
};

static const kl_config small = {
    .vocab_size = 10,
    .hidden_size = 8,
    .n_layers = 2,
    .max_length = 4096,
    .mixer = {KL_MIXER_KDA, KL_MIXER_MLA},
    .kda_heads = 1,
    .kda_head_dim = 2,
    .conv_width = 2,
    .mla_heads = 1,
    .kv_rank = 1,
    .nope_dim = 1,
    .rope_dim = 1,
    .v_dim = 1,
};

typedef struct {
    bool queued, running;
    int32_t ids[CONTEXT];
    int64_t n, fed, room;
    kl_prefix_place place;
    kl_seq seq;
} prompt;

typedef struct {
    kl_backend *be;
    kl_cache c;
    kl_prefix p;
    void *block;
    prompt prompts[PROMPTS];
    kl_seq others[SLOTS]; /* sequences that have nothing to do with prompts */
    uint64_t seed, index;
} world;

static int64_t draw(world *w, int64_t n)
{
    return (int64_t)(kl_rng_uniform(w->seed, w->index++) * (double)n);
}

static void open_world(world *w, uint64_t seed)
{
    const kl_cache_shape shape = {SLOTS, PAGES, CONTEXT, EXTRA, KL_LATENTS_ACT};
    size_t bytes;
    memset(w, 0, sizeof *w);
    w->seed = seed;
    w->be = tiny_backend(1);
    w->block = tiny_cache(w->be, &small, &shape, &w->c, &bytes);
    kl_prefix_init(&w->p, &w->c);
    w->p.on = true;
}

static void close_world(world *w)
{
    kl_prefix_free(&w->p);
    kl_cache_free(&w->c);
    kl_free(w->block);
    kl_backend_close(w->be);
}

/* What a state that has read `n` ids holds: exact in f32, other for other ids. */
static float digest(const int32_t *ids, int64_t n)
{
    uint64_t h = 1469598103934665603u;
    for (int64_t i = 0; i < n; i++) h = (h ^ (uint64_t)(uint32_t)ids[i]) * 1099511628211u;
    return (float)(h >> 40);
}

static float *state_of(const world *w, int64_t slot)
{
    return (float *)w->c.states[0].data + slot * w->c.states[0].stride[0];
}

static float *row_of(const world *w, int64_t slot, int64_t position)
{
    const kl_tensor *t = &w->c.pages[0];
    const int32_t page = kl_cache_table(&w->c, slot)[position / PAGE];
    return (float *)t->data + page * t->stride[0] + position % PAGE * t->stride[1];
}

static float row_value(const prompt *q, int64_t t)
{
    return (float)(q->ids[t] * CONTEXT + t);
}

static int64_t slot_of(const world *w, kl_seq seq)
{
    kl_error err;
    int64_t slot = -1;
    EXPECT(kl_cache_find(&w->c, seq, false, &slot, &err) == KL_OK);
    return slot;
}

/* What a step would do. */
static void read_more(world *w, prompt *q, int64_t count)
{
    kl_error err;
    const int64_t slot = slot_of(w, q->seq);
    EXPECT(kl_cache_check_growth(&w->c, &slot, &count, 1, &err) == KL_OK);
    EXPECT(kl_cache_grow(&w->c, &slot, &count, 1, &err) == KL_OK);
    for (int64_t t = q->fed; t < q->fed + count; t++) *row_of(w, slot, t) = row_value(q, t);
    q->fed += count;
    *state_of(w, slot) = digest(q->ids, q->fed);
    kl_cache_advance(&w->c, slot, count);
}

static bool has_read(const world *w, const prompt *q, int64_t slot)
{
    bool same = w->c.seqs[slot].length == q->fed;
    if (q->fed > 0) same = same && *state_of(w, slot) == digest(q->ids, q->fed);
    for (int64_t t = 0; t < q->fed; t++) same = same && *row_of(w, slot, t) == row_value(q, t);
    return same;
}

/* The length of the longest snapshot that a prompt can begin with, by looking at all. */
static int64_t longest_snapshot(const world *w, const prompt *q)
{
    int64_t best = 0;
    for (int64_t s = 0; s < ALL; s++) {
        const kl_cache_seq *seq = &w->c.seqs[s];
        if (seq->snapshot && seq->length < q->n && seq->length > best &&
            *state_of(w, s) == digest(q->ids, seq->length))
            best = seq->length;
    }
    return best;
}

static int64_t common_blocks(const prompt *a, const prompt *b)
{
    const int64_t most = kl_min_i64(a->n - 1, b->n - 1) / PAGE;
    int64_t k = 0;
    while (k < most && memcmp(a->ids + k * PAGE, b->ids + k * PAGE, PAGE * sizeof *a->ids) == 0)
        k++;
    return k * PAGE;
}

/* Every edge is as long as it says, no two of a node's begin alike, a leaf has a reason to be
 * there, and every snapshot of the cache is one node's. */
static int64_t check_node(const world *w, const kl_prefix_node *node)
{
    int64_t snapshots = kl_cache_is_alive(&w->c, node->snapshot);
    for (const kl_prefix_node *child = node->child; child != NULL; child = child->next) {
        EXPECT(child->parent == node && child->depth > node->depth && child->depth % PAGE == 0);
        for (const kl_prefix_node *twin = child->next; twin != NULL; twin = twin->next)
            EXPECT(memcmp(child->ids, twin->ids, PAGE * sizeof *child->ids) != 0);
        snapshots += check_node(w, child);
    }
    if (w->p.n_evicted == w->c.n_evicted && node->parent != NULL && node->child == NULL)
        EXPECT(node->n_ends > 0 || snapshots == 1);
    return snapshots;
}

/* ---- its moves ------------------------------------------------------------------------- */

static prompt *any(world *w, bool queued, bool running)
{
    for (int tries = 0; tries < 20; tries++) {
        prompt *q = &w->prompts[draw(w, PROMPTS)];
        if (q->queued == queued && q->running == running) return q;
    }
    return NULL;
}

/* Of blocks of few kinds, so that many prompts begin alike, and sometimes a last token of its own. */
static void move_queue(world *w)
{
    kl_error err;
    prompt *q = any(w, false, false);
    if (q == NULL) return;
    memset(q, 0, sizeof *q);
    q->n = 1 + draw(w, CONTEXT - 1);
    for (int64_t t = 0; t < q->n; t++) {
        if (t % PAGE == 0) q->ids[t] = (int32_t)(draw(w, 8) == 0);
        if (t % PAGE != 0) q->ids[t] = q->ids[t - 1];
        if (t % PAGE == PAGE - 1 && draw(w, 8) == 0) q->ids[t] = 7; /* the last one differs */
    }
    if (draw(w, 3) == 0) q->ids[q->n - 1] = 5;
    q->room = q->n + draw(w, CONTEXT - q->n + 1);
    q->queued = true;
    EXPECT(kl_prefix_enter(&w->p, q->ids, q->n, &q->place, &err) == KL_OK);
}

static void move_start(world *w)
{
    kl_error err;
    prompt *q = any(w, true, false);
    if (q == NULL) return;
    const int64_t best = w->p.on ? longest_snapshot(w, q) : 0;
    const int64_t available = kl_cache_available(&w->c);
    for (int i = 0; i < PROMPTS; i++) {
        const prompt *other = &w->prompts[i];
        if (!other->running) continue;
        const bool comes = kl_prefix_comes(&w->p, &q->place, &other->place, other->fed);
        const int64_t common = common_blocks(q, other);
        if (w->p.on && q->place.end != NULL && other->place.end != NULL)
            EXPECT(comes == (common > other->fed && common > best));
        if (comes && draw(w, 4) > 0) return;
    }
    const int64_t pages = kl_prefix_pages(&w->p, &q->place, q->room);
    const int64_t alone = kl_cache_pages_for(&small, q->room);
    EXPECT(pages <= alone); /* nobody is refused for a snapshot's sake */
    if (kl_cache_free_seqs(&w->c) == 0 || pages > available) return;
    EXPECT(kl_prefix_start(&w->p, &q->place, &q->seq, &q->fed, &err) == KL_OK);
    EXPECT(q->fed == (q->place.end == NULL ? 0 : best));
    EXPECT(has_read(w, q, slot_of(w, q->seq)));
    EXPECT(kl_cache_reserve(&w->c, q->seq, q->room, &err) == KL_OK);
    q->running = true;
}

/* Some way on, as a step would: to a multiple of a page, to the cut, or to the end. */
static void move_on(world *w)
{
    kl_error err;
    prompt *q = any(w, true, true);
    if (q == NULL || q->fed == q->n) return;
    const int64_t cut = kl_prefix_cut(&w->p, &q->place, q->fed);
    const int64_t rest = (cut > 0 ? cut : q->n) - q->fed, some = (1 + draw(w, 6)) * PAGE;
    EXPECT(cut % PAGE == 0 && cut < q->n && (cut == 0 || cut > q->fed));
    read_more(w, q, kl_min_i64(rest, some));
    EXPECT(has_read(w, q, slot_of(w, q->seq)));
    EXPECT(kl_prefix_keep(&w->p, &q->place, q->seq, q->fed, &err) == KL_OK);
    if (cut == q->fed && w->c.n_alive < ALL) EXPECT(longest_snapshot(w, q) >= cut);
}

static void end_prompt(world *w, prompt *q)
{
    kl_error err;
    if (q->running) EXPECT(kl_cache_release(&w->c, q->seq, &err) == KL_OK);
    if (draw(w, 10) == 0) kl_prefix_distrust(&w->p, &q->place);
    kl_prefix_leave(&w->p, &q->place);
    q->queued = q->running = false;
}

static void move_end(world *w)
{
    prompt *q = any(w, true, draw(w, 4) > 0);
    if (q != NULL) end_prompt(w, q);
}

/* States that a caller keeps come and go, and take room. */
static void move_other(world *w)
{
    kl_error err;
    kl_seq *seq = &w->others[draw(w, SLOTS)];
    if (*seq != 0) {
        EXPECT(kl_cache_release(&w->c, *seq, &err) == KL_OK);
        *seq = 0;
    } else if (draw(w, 3) == 0 && kl_cache_free_seqs(&w->c) > 0) {
        EXPECT(kl_cache_new(&w->c, seq, &err) == KL_OK);
        const int64_t pages = kl_min_i64(kl_cache_available(&w->c), draw(w, 10));
        EXPECT(kl_cache_reserve(&w->c, *seq, pages * PAGE, &err) == KL_OK);
    }
}

static void move_switch(world *w)
{
    if (draw(w, 20) > 0) return;
    w->p.on = draw(w, 3) > 0;
    kl_prefix_clear(&w->p);
    EXPECT(w->c.n_snapshots == 0 && w->c.n_spare == 0);
}

static void every_prefix_is_found(void)
{
    static void (*const moves[])(world *) = {move_queue, move_queue, move_start, move_start,
                                             move_on,    move_on,    move_on,    move_end,
                                             move_other, move_switch};
    static world w;
    open_world(&w, 1);
    for (int step = 0; step < STEPS && test_failed_here == 0; step++) {
        moves[draw(&w, 10)](&w);
        EXPECT(check_node(&w, &w.p.root) == w.c.n_snapshots);
    }
    EXPECT(w.p.hits > 100 && w.c.n_evicted > 200);
    for (int i = 0; i < PROMPTS; i++)
        if (w.prompts[i].queued) end_prompt(&w, &w.prompts[i]);
    kl_error err;
    for (int i = 0; i < SLOTS; i++)
        if (w.others[i] != 0) EXPECT(kl_cache_release(&w.c, w.others[i], &err) == KL_OK);
    EXPECT(w.c.n_alive == 0 && kl_cache_available(&w.c) == PAGES);
    kl_prefix_clear(&w.p);
    EXPECT(w.p.root.child == NULL && w.c.n_snapshots == 0 && w.c.n_free == PAGES);
    close_world(&w);
}

/* ---- which borders are kept ------------------------------------------------------------ */

/* Queue a prompt of `shared` ids of kind 0 and `own` of another, and read it; returns what it
 * need not compute. */
static int64_t read_prompt(world *w, prompt *q, int64_t shared, int64_t own, int32_t kind)
{
    kl_error err;
    memset(q, 0, sizeof *q);
    q->n = q->room = shared + own;
    for (int64_t t = shared; t < q->n; t++) q->ids[t] = kind;
    EXPECT(kl_prefix_enter(&w->p, q->ids, q->n, &q->place, &err) == KL_OK);
    EXPECT(kl_prefix_start(&w->p, &q->place, &q->seq, &q->fed, &err) == KL_OK);
    const int64_t cached = q->fed;
    while (q->fed < q->n) {
        const int64_t cut = kl_prefix_cut(&w->p, &q->place, q->fed);
        read_more(w, q, (cut > 0 ? cut : q->n) - q->fed);
        EXPECT(kl_prefix_keep(&w->p, &q->place, q->seq, q->fed, &err) == KL_OK);
    }
    EXPECT(kl_cache_release(&w->c, q->seq, &err) == KL_OK);
    kl_prefix_leave(&w->p, &q->place);
    return cached;
}

static void borders(void)
{
    static world w;
    static prompt q;
    open_world(&w, 2);
    /* A conversation: each turn begins where the one before ended, whole blocks of it. */
    EXPECT(read_prompt(&w, &q, 100, 0, 0) == 0);
    EXPECT(read_prompt(&w, &q, 193, 0, 0) == 64);
    EXPECT(read_prompt(&w, &q, 193, 0, 0) == 192);
    EXPECT(read_prompt(&w, &q, 192, 0, 0) == 64); /* a token is left to be read */
    EXPECT(read_prompt(&w, &q, 192, 1, 1) == 192);
    kl_prefix_clear(&w.p);
    EXPECT(w.p.root.child == NULL);

    /* Questions on a document: the second shows where it ends. */
    EXPECT(read_prompt(&w, &q, 300, 90, 1) == 0);
    EXPECT(read_prompt(&w, &q, 300, 70, 2) == 0);
    EXPECT(read_prompt(&w, &q, 300, 80, 3) == 256);
    EXPECT(w.c.n_snapshots == 4); /* three ends and the document's */
    kl_prefix_clear(&w.p);
    close_world(&w);
}

/* ---- the engine ------------------------------------------------------------------------ */

enum { N = 6, MAX_EVENTS = 64, LONGEST = 1400, MAX_NEW = 3 };

typedef struct {
    kl_request requests[N];
    int32_t ids[N][LONGEST];
    int32_t out[N][MAX_NEW];
    float logprobs[N][MAX_NEW];
    int64_t n_out[N], cached[N];
} load;

static kl_engine *open_engine(kl_backend **be, int64_t max_batch, int64_t max_context, bool on)
{
    kl_engine_options o = tiny_options;
    kl_error err = {KL_OK, ""};
    o.max_batch = max_batch;
    o.max_context = max_context;
    o.step_tokens = 256;
    kl_engine *e = tiny_engine(be, &o);
    EXPECT(kl_engine_keep_prefixes(e, on, &err) == KL_OK);
    return e;
}

/* `shared` ids of one document, then `own` of a question's own. */
static void make_request(load *l, int i, int64_t shared, int64_t own)
{
    for (int64_t t = 0; t < shared + own; t++) {
        const uint64_t seed = t < shared ? 1 : 100 + (uint64_t)i;
        l->ids[i][t] = (int32_t)(kl_rng_uniform(seed, (uint64_t)t) * 97);
    }
    l->requests[i] = (kl_request){
        .prompt = l->ids[i],
        .n_prompt = shared + own,
        .max_new_tokens = MAX_NEW,
        .sampling = {
            .temperature = 0.9f, .top_p = 1.0f, .repetition_penalty = 1.0f, .seed = 3}};
}

static void run_load(kl_engine *e, load *l, int first, int n)
{
    static kl_event events[MAX_EVENTS];
    kl_error err = {KL_OK, ""};
    int64_t n_events;
    kl_generation *g = NULL;
    EXPECT(kl_generation_new(e, l->requests + first, n, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 2, events, MAX_EVENTS, &n_events, NULL, NULL, NULL, NULL,
                                 &err) == KL_OK);
        for (int64_t k = 0; k < n_events; k++) {
            const int64_t i = first + events[k].request;
            l->cached[i] = events[k].n_cached;
            l->out[i][l->n_out[i]] = events[k].id;
            l->logprobs[i][l->n_out[i]++] = events[k].logprob;
        }
    }
    kl_generation_stats stats;
    kl_generation_get_stats(g, &stats);
    EXPECT(stats.prompt_done == stats.prompt_tokens);
    kl_generation_free(g);
}

static void close_engine(kl_engine *e, kl_backend *be)
{
    int64_t sequences, pages;
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0 && e->cache.n_reserved == 0);
    kl_engine_clear_prefixes(e);
    EXPECT(e->cache.n_snapshots == 0 && e->cache.n_free == e->cache.n_pages);
    EXPECT(e->prefix.root.child == NULL);
    kl_engine_free(e);
    kl_backend_close(be);
}

static bool same(const load *a, const load *b)
{
    return memcmp(a->out, b->out, sizeof a->out) == 0 &&
           memcmp(a->logprobs, b->logprobs, sizeof a->logprobs) == 0;
}

/* All questions at once, or one by one: the document is read once, or once and an eighth. With
 * few slots, too: in the end there is one for every question. */
static void questions_on_a_document(void)
{
    static load want, got;
    kl_backend *be;
    for (int i = 0; i < N; i++) make_request(&want, i, 1200, 70 + 9 * i);
    kl_engine *e = open_engine(&be, 2, LONGEST, false);
    run_load(e, &want, 0, N);
    close_engine(e, be);
    for (int64_t max_batch = 1; max_batch <= 4; max_batch += 3) {
        for (int together = 0; together < 2; together++) {
            memset(&got, 0, sizeof got);
            for (int i = 0; i < N; i++) make_request(&got, i, 1200, 70 + 9 * i);
            e = open_engine(&be, max_batch, LONGEST, true);
            for (int i = 0; i < N; i += together ? N : 1)
                run_load(e, &got, i, together ? N : 1);
            EXPECT(same(&want, &got));
            EXPECT(got.cached[0] == 0);
            for (int i = 1; i < N; i++)
                EXPECT(got.cached[i] == (together || i > 1 ? 1152 : 1024));
            kl_prefix_stats stats;
            kl_engine_prefix_stats(e, &stats);
            EXPECT(stats.on && stats.hits == N - 1 && stats.snapshots > 0);
            EXPECT(stats.bytes > 0);
            close_engine(e, be);
        }
    }
}

/* What other weights have read is not what these would read. */
static void other_weights(void)
{
    static load l;
    kl_backend *be;
    kl_error err;
    kl_engine *e = open_engine(&be, 2, LONGEST, true);
    make_request(&l, 0, 300, 20);
    run_load(e, &l, 0, 1);
    EXPECT(e->cache.n_snapshots > 0);
    EXPECT(kl_engine_randomize(e, 8, 1, &err) == KL_OK && e->cache.n_snapshots == 0);
    close_engine(e, be);
}

int main(void)
{
    RUN(every_prefix_is_found);
    RUN(borders);
    RUN(questions_on_a_document);
    RUN(other_weights);
    return test_failures != 0;
}
