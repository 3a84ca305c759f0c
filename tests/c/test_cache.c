/*
 * test_cache.c -- the cache against a model of it: every sequence remembers what was written
 * to it, whatever was forked, shared, copied, released and used again in between. Snapshots are
 * taken and given up all the time: they hold what they held, and no call fails because of them.
 */
#include "test.h"

#include "tiny_model.h"

enum {
    SLOTS = 5,
    EXTRA = 2,
    ALL = SLOTS + EXTRA,
    PAGES = 14,
    CONTEXT = 5 * KL_PAGE_TOKENS + 3,
    STEPS = 4000
};

static const kl_config config = {
    .vocab_size = 10,
    .hidden_size = 8,
    .n_layers = 4,
    .max_length = 4096,
    .mixer = {KL_MIXER_KDA, KL_MIXER_MLA, KL_MIXER_KDA, KL_MIXER_MLA},
    .kda_heads = 2,
    .kda_head_dim = 3,
    .conv_width = 4,
    .mla_heads = 1,
    .kv_rank = 2,
    .nope_dim = 1,
    .rope_dim = 1,
    .v_dim = 1,
};

/* What a sequence should hold. */
typedef struct {
    kl_seq seq; /* 0: none */
    int64_t length;
    float state;
    float rows[CONTEXT];
} shadow;

typedef struct {
    kl_backend *be;
    kl_cache c;
    void *block;
    size_t bytes;
    shadow shadows[SLOTS], snapshots[ALL];
    uint64_t seed, index;
    float next; /* a value never written before */
} world;

static int64_t draw(world *w, int64_t n)
{
    return (int64_t)(kl_rng_uniform(w->seed, w->index++) * (double)n);
}

static void open_world(world *w, uint64_t seed)
{
    const kl_cache_shape shape = {SLOTS, PAGES, CONTEXT, EXTRA, KL_LATENTS_ACT};
    memset(w, 0, sizeof *w);
    w->seed = seed;
    w->next = 1.0f;
    w->be = tiny_backend(1);
    w->block = tiny_cache(w->be, &config, &shape, &w->c, &w->bytes);
}

static void close_world(world *w)
{
    kl_cache_free(&w->c);
    kl_free(w->block);
    kl_backend_close(w->be);
}

/* ---- reading and writing what the layers would ----------------------------------------- */

static float *row_of(const world *w, int64_t layer, int64_t slot, int64_t position)
{
    const kl_tensor *t = &w->c.pages[layer];
    const int32_t page = kl_cache_table(&w->c, slot)[position / KL_PAGE_TOKENS];
    return (float *)t->data + page * t->stride[0] + position % KL_PAGE_TOKENS * t->stride[1];
}

static void write_state(world *w, int64_t slot, float value)
{
    for (int64_t i = 0; i < w->c.n_kda; i++) {
        const kl_tensor *tensors[] = {&w->c.states[i], &w->c.windows[i]};
        for (int k = 0; k < 2; k++)
            for (int64_t j = 0; j < tensors[k]->stride[0]; j++)
                ((float *)tensors[k]->data)[slot * tensors[k]->stride[0] + j] =
                    value + (float)i;
    }
}

/* A fresh sequence reads 0 everywhere; value 0 asks for that. */
static bool state_is(const world *w, int64_t slot, float value)
{
    for (int64_t i = 0; i < w->c.n_kda; i++) {
        const kl_tensor *tensors[] = {&w->c.states[i], &w->c.windows[i]};
        for (int k = 0; k < 2; k++)
            for (int64_t j = 0; j < tensors[k]->stride[0]; j++)
                if (((const float *)tensors[k]->data)[slot * tensors[k]->stride[0] + j] !=
                    (value == 0.0f ? 0.0f : value + (float)i))
                    return false;
    }
    return true;
}

static bool holds(const world *w, const shadow *s)
{
    int64_t slot;
    kl_error err;
    if (kl_cache_find(&w->c, s->seq, false, &slot, &err) != KL_OK) return false;
    if (w->c.seqs[slot].length != s->length || !state_is(w, slot, s->state)) return false;
    for (int64_t t = 0; t < s->length; t++)
        for (int64_t layer = 0; layer < 2; layer++)
            if (row_of(w, layer, slot, t)[0] != s->rows[t] + (float)layer) return false;
    return true;
}

/* Pages in use are those that some table holds, with as many references. */
static bool pages_add_up(const world *w)
{
    const kl_cache *c = &w->c;
    uint32_t refs[PAGES] = {0}, snapshot_refs[PAGES] = {0};
    int64_t used = 0, spare = 0, alive = 0, snapshots = 0, reserved = 0;
    for (int64_t s = 0; s < ALL; s++) {
        const kl_cache_seq *seq = &c->seqs[s];
        snapshots += seq->snapshot;
        alive += (seq->generation & 1u) && !seq->snapshot;
        reserved += seq->reserved;
        for (int64_t p = 0; p < seq->n_pages; p++) {
            refs[kl_cache_table(c, s)[p]]++;
            snapshot_refs[kl_cache_table(c, s)[p]] += seq->snapshot;
        }
    }
    for (int p = 0; p < PAGES; p++) {
        if (refs[p] != c->refs[p] || snapshot_refs[p] != c->snapshot_refs[p]) return false;
        used += refs[p] > 0;
        spare += refs[p] > 0 && refs[p] == snapshot_refs[p];
    }
    return used == PAGES - c->n_free && spare == c->n_spare && alive == c->n_alive &&
           snapshots == c->n_snapshots && reserved == c->n_reserved &&
           c->n_free >= c->n_reserved && alive <= SLOTS;
}

/* ---- the moves ------------------------------------------------------------------------- */

static shadow *any(world *w, bool alive)
{
    for (int tries = 0; tries < 20; tries++) {
        shadow *s = &w->shadows[draw(w, SLOTS)];
        if ((s->seq != 0) == alive) return s;
    }
    return NULL;
}

static void move_new(world *w)
{
    kl_error err;
    shadow *s = any(w, false);
    if (s == NULL) return;
    memset(s, 0, sizeof *s);
    EXPECT(kl_cache_new(&w->c, &s->seq, &err) == KL_OK);
    EXPECT(holds(w, s)); /* zeros, though the slot was poisoned or used */
}

static void move_fork(world *w)
{
    kl_error err;
    shadow *from = any(w, true), *to = any(w, false);
    if (from == NULL || to == NULL) return;
    *to = *from;
    EXPECT(kl_cache_fork(&w->c, from->seq, &to->seq, &err) == KL_OK);
    EXPECT(to->seq != from->seq);
}

static void move_release(world *w)
{
    kl_error err;
    int64_t slot;
    shadow *s = any(w, true);
    if (s == NULL) return;
    EXPECT(kl_cache_release(&w->c, s->seq, &err) == KL_OK);
    EXPECT(kl_cache_find(&w->c, s->seq, true, &slot, &err) == KL_ERR_VALUE);
    EXPECT(kl_cache_release(&w->c, s->seq, &err) == KL_ERR_VALUE);
    s->seq = 0;
}

/* Of a sequence at the end of a page. */
static void move_snapshot(world *w)
{
    kl_error err;
    shadow *from = any(w, true), *to = &w->snapshots[draw(w, ALL)];
    if (from == NULL || kl_cache_is_alive(&w->c, to->seq)) return;
    const bool room = w->c.n_alive < ALL;
    kl_seq seq = 1;
    const kl_status status = kl_cache_snapshot(&w->c, from->seq, &seq, &err);
    EXPECT(status == (from->length % KL_PAGE_TOKENS == 0 ? KL_OK : KL_ERR_VALUE));
    EXPECT((seq != 0) == (status == KL_OK && room));
    if (seq == 0) return;
    *to = *from;
    to->seq = seq;
}

static void move_use_snapshot(world *w)
{
    kl_error err;
    const shadow *from = &w->snapshots[draw(w, ALL)];
    shadow *to = any(w, false);
    if (to == NULL || !kl_cache_is_alive(&w->c, from->seq)) return;
    const int64_t slot = (int64_t)(from->seq & 0xffffffffu) - 1, tokens = draw(w, CONTEXT + 1);
    const int64_t pages = kl_cache_fork_pages(&w->c, slot, tokens);
    const bool fits = tokens > from->length && pages <= kl_cache_available(&w->c);
    *to = *from;
    EXPECT(kl_cache_fork(&w->c, from->seq, &to->seq, &err) == KL_OK);
    EXPECT(to->seq != from->seq);
    if (fits) EXPECT(kl_cache_reserve(&w->c, to->seq, tokens, &err) == KL_OK);
}

static void move_reserve(world *w)
{
    kl_error err;
    shadow *s = any(w, true);
    if (s == NULL) return;
    const int64_t available = kl_cache_available(&w->c);
    const kl_status status = kl_cache_reserve(&w->c, s->seq, draw(w, CONTEXT) + 1, &err);
    EXPECT(status == KL_OK || status == KL_ERR_MEMORY);
    EXPECT(status == KL_OK || kl_cache_available(&w->c) == available);
}

static void append(world *w, shadow *s, int64_t slot, int64_t count)
{
    for (int64_t t = s->length; t < s->length + count; t++) {
        s->rows[t] = w->next++;
        for (int64_t layer = 0; layer < 2; layer++)
            row_of(w, layer, slot, t)[0] = s->rows[t] + (float)layer;
    }
    s->length += count;
    s->state = w->next++;
    write_state(w, slot, s->state);
    kl_cache_advance(&w->c, slot, count);
}

/* A step over several sequences at once, forks of one another among them. */
static void move_grow(world *w)
{
    shadow *fed[SLOTS];
    int64_t slots[SLOTS], counts[SLOTS], n = 0;
    kl_error err;
    const bool whole = draw(w, 2) == 0; /* to the end of a page, where snapshots are taken */
    for (int i = 0; i < SLOTS; i++) {
        if (w->shadows[i].seq == 0 || draw(w, 2) == 0) continue;
        EXPECT(kl_cache_find(&w->c, w->shadows[i].seq, false, &slots[n], &err) == KL_OK);
        fed[n] = &w->shadows[i];
        counts[n] = 1 + draw(w, draw(w, 2) == 0 ? 3 : 100);
        if (whole) counts[n] = KL_PAGE_TOKENS - fed[n]->length % KL_PAGE_TOKENS;
        n++;
    }
    const int64_t free_before = w->c.n_free;
    bool too_long = false;
    for (int64_t i = 0; i < n; i++) too_long |= fed[i]->length + counts[i] > CONTEXT;
    const kl_status status = kl_cache_check_growth(&w->c, slots, counts, n, &err);
    EXPECT(too_long ? status == KL_ERR_VALUE : status == KL_OK || status == KL_ERR_MEMORY);
    EXPECT(w->c.n_free == free_before);
    if (status != KL_OK) return;
    EXPECT(kl_cache_grow(&w->c, slots, counts, n, &err) == KL_OK);
    for (int64_t i = 0; i < n; i++) append(w, fed[i], slots[i], counts[i]);
}

static void every_sequence_keeps_its_own(void)
{
    static void (*const moves[])(world *) = {
        move_new,  move_fork, move_release, move_reserve,      move_grow,    move_grow,
        move_grow, move_grow, move_release, move_use_snapshot, move_snapshot};
    static world w;
    open_world(&w, 1);
    for (int step = 0; step < STEPS && test_failed_here == 0; step++) {
        moves[draw(&w, 11)](&w);
        EXPECT(pages_add_up(&w));
        for (int i = 0; i < SLOTS; i++)
            if (w.shadows[i].seq != 0) EXPECT(holds(&w, &w.shadows[i]));
        for (int i = 0; i < ALL; i++)
            if (kl_cache_is_alive(&w.c, w.snapshots[i].seq)) EXPECT(holds(&w, &w.snapshots[i]));
    }
    EXPECT(w.c.n_evicted > 50);
    close_world(&w);
}

/* Three that share a partial page go on in one step: two copies are needed, not three, and the
 * pool has exactly two. */
static void shared_pages_are_copied_only_where_needed(void)
{
    static world w;
    const int64_t ten = 10;
    int64_t slots[SLOTS], three[] = {1, 1, 1};
    kl_seq a, b, c, filler[2];
    kl_error err;
    open_world(&w, 2);
    EXPECT(kl_cache_new(&w.c, &a, &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, a, false, &slots[0], &err) == KL_OK);
    EXPECT(kl_cache_grow(&w.c, slots, &ten, 1, &err) == KL_OK);
    kl_cache_advance(&w.c, slots[0], ten);
    EXPECT(kl_cache_fork(&w.c, a, &b, &err) == KL_OK &&
           kl_cache_fork(&w.c, b, &c, &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, b, false, &slots[1], &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, c, false, &slots[2], &err) == KL_OK);

    /* Others are promised all but two of the rest. */
    EXPECT(kl_cache_new(&w.c, &filler[0], &err) == KL_OK);
    EXPECT(kl_cache_reserve(&w.c, filler[0], 6 * KL_PAGE_TOKENS, &err) == KL_OK);
    EXPECT(kl_cache_new(&w.c, &filler[1], &err) == KL_OK);
    EXPECT(kl_cache_reserve(&w.c, filler[1], 5 * KL_PAGE_TOKENS, &err) == KL_OK);
    EXPECT(kl_cache_available(&w.c) == 2);
    EXPECT(kl_cache_check_growth(&w.c, slots, three, 3, &err) == KL_OK);
    const int64_t before = w.c.n_free;
    EXPECT(kl_cache_grow(&w.c, slots, three, 3, &err) == KL_OK);
    EXPECT(before - w.c.n_free == 2);
    EXPECT(pages_add_up(&w));
    close_world(&w);
}

/* A fork is promised the page it copies, too: others may take all the rest before it writes. */
static void a_promise_covers_the_copy(void)
{
    static world w;
    const int64_t ten = 10, one = 1;
    int64_t slot, fork_slot;
    kl_seq a, b, filler;
    kl_error err;
    open_world(&w, 4);
    EXPECT(kl_cache_new(&w.c, &a, &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, a, false, &slot, &err) == KL_OK);
    EXPECT(kl_cache_grow(&w.c, &slot, &ten, 1, &err) == KL_OK);
    kl_cache_advance(&w.c, slot, ten);
    EXPECT(kl_cache_fork(&w.c, a, &b, &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, b, false, &fork_slot, &err) == KL_OK);
    EXPECT(kl_cache_fork_pages(&w.c, slot, 11) == 1 &&
           kl_cache_fork_pages(&w.c, slot, 65) == 2);
    EXPECT(kl_cache_reserve(&w.c, b, 11, &err) == KL_OK);
    EXPECT(w.c.seqs[fork_slot].reserved == 1);
    for (int64_t left = kl_cache_available(&w.c); left > 0; left = kl_cache_available(&w.c)) {
        EXPECT(kl_cache_new(&w.c, &filler, &err) == KL_OK);
        const int64_t tokens = kl_min_i64(left, 5) * KL_PAGE_TOKENS;
        EXPECT(kl_cache_reserve(&w.c, filler, tokens, &err) == KL_OK);
    }
    EXPECT(kl_cache_check_growth(&w.c, &slot, &one, 1, &err) == KL_ERR_MEMORY);
    EXPECT(kl_cache_check_growth(&w.c, &fork_slot, &one, 1, &err) == KL_OK);
    EXPECT(kl_cache_grow(&w.c, &fork_slot, &one, 1, &err) == KL_OK);
    EXPECT(pages_add_up(&w));
    close_world(&w);
}

static void restored_sequences_have_their_pages(void)
{
    static world w;
    kl_seq seq;
    kl_error err;
    int64_t slot;
    open_world(&w, 5);
    EXPECT(kl_cache_restore(&w.c, 2 * KL_PAGE_TOKENS + 1, &seq, &err) == KL_OK);
    EXPECT(kl_cache_find(&w.c, seq, false, &slot, &err) == KL_OK);
    EXPECT(w.c.seqs[slot].length == 2 * KL_PAGE_TOKENS + 1 && w.c.seqs[slot].n_pages == 3);
    EXPECT(pages_add_up(&w));
    EXPECT(kl_cache_restore(&w.c, CONTEXT + 1, &seq, &err) == KL_ERR_MEMORY);
    EXPECT_TEXT(err.message, "sequence: it has 324 tokens, the model has room for 323 "
                             "(max_context); load it with more");
    EXPECT(kl_cache_restore(&w.c, CONTEXT, &seq, &err) == KL_OK);
    EXPECT(kl_cache_restore(&w.c, CONTEXT, &seq, &err) == KL_ERR_MEMORY);
    EXPECT_TEXT(err.message,
                "sequence: its 323 tokens need 6 pages of 64, 5 of 14 are available; release a "
                "sequence or plan for more cache");
    EXPECT(kl_cache_restore(&w.c, 0, &seq, &err) == KL_OK);
    EXPECT(w.c.n_alive == 3 && pages_add_up(&w));
    close_world(&w);
}

static kl_seq fed(world *w, int64_t tokens)
{
    kl_error err;
    kl_seq seq = 0;
    int64_t slot;
    EXPECT(kl_cache_new(&w->c, &seq, &err) == KL_OK);
    EXPECT(kl_cache_find(&w->c, seq, false, &slot, &err) == KL_OK);
    EXPECT(kl_cache_grow(&w->c, &slot, &tokens, 1, &err) == KL_OK);
    kl_cache_advance(&w->c, slot, tokens);
    return seq;
}

/* The one used longest ago goes first; one whose pages others hold has none to give. */
static void snapshots_go_in_the_order_of_their_use(void)
{
    static world w;
    kl_error err;
    kl_seq seq[3], snapshot[3], more;
    open_world(&w, 6);
    for (int i = 0; i < 3; i++) {
        seq[i] = fed(&w, 2 * KL_PAGE_TOKENS);
        EXPECT(kl_cache_snapshot(&w.c, seq[i], &snapshot[i], &err) == KL_OK);
    }
    EXPECT(w.c.n_snapshots == 3 && kl_cache_available(&w.c) == PAGES - 6);
    for (int i = 1; i < 3; i++) EXPECT(kl_cache_release(&w.c, seq[i], &err) == KL_OK);
    EXPECT(kl_cache_available(&w.c) == PAGES - 2 && w.c.n_free == PAGES - 6);
    EXPECT(kl_cache_fork(&w.c, snapshot[1], &more, &err) == KL_OK);
    EXPECT(kl_cache_release(&w.c, more, &err) == KL_OK);

    /* 9 pages of 8 that are free: snapshot 0 is the oldest, but its pages are seq[0]'s. */
    more = fed(&w, 4 * KL_PAGE_TOKENS);
    EXPECT(kl_cache_reserve(&w.c, fed(&w, 0), 5 * KL_PAGE_TOKENS, &err) == KL_OK);
    EXPECT(kl_cache_is_alive(&w.c, snapshot[0]) && kl_cache_is_alive(&w.c, snapshot[1]) &&
           !kl_cache_is_alive(&w.c, snapshot[2]));
    EXPECT(pages_add_up(&w));
    for (int i = 0; i < 2; i++) fed(&w, 0); /* 5 alive and 2 snapshots */
    EXPECT(w.c.n_evicted == 1 && kl_cache_free_seqs(&w.c) == 0);
    close_world(&w);
}

/* Where no other slot is left, a snapshot that is forked becomes the fork. */
static void the_last_slot_comes_alive(void)
{
    static world w;
    const kl_cache_shape shape = {2, PAGES, CONTEXT, 0, KL_LATENTS_ACT};
    kl_error err;
    kl_seq seq, snapshot, fork, none;
    int64_t slot;
    kl_arena a;
    open_world(&w, 7);
    kl_cache_free(&w.c);
    kl_arena_init(&a, w.block, w.bytes);
    EXPECT(kl_cache_init(&w.c, w.be, &config, KL_F32, &shape, &a, &err) == KL_OK);
    seq = fed(&w, KL_PAGE_TOKENS);
    EXPECT(kl_cache_snapshot(&w.c, seq, &snapshot, &err) == KL_OK);
    EXPECT(kl_cache_fork(&w.c, snapshot, &fork, &err) == KL_OK && fork != snapshot);
    EXPECT(!kl_cache_is_alive(&w.c, snapshot) && w.c.n_snapshots == 0 && w.c.n_alive == 2);
    EXPECT(kl_cache_find(&w.c, fork, false, &slot, &err) == KL_OK && slot == 1);
    EXPECT(w.c.seqs[1].length == KL_PAGE_TOKENS && w.c.refs[kl_cache_table(&w.c, 1)[0]] == 2);
    EXPECT(w.c.snapshot_refs[kl_cache_table(&w.c, 1)[0]] == 0 && w.c.n_evicted == 1);
    EXPECT(kl_cache_snapshot(&w.c, seq, &none, &err) == KL_OK && none == 0);
    EXPECT(kl_cache_release(&w.c, seq, &err) == KL_OK && w.c.n_spare == 0);
    EXPECT(kl_cache_release(&w.c, fork, &err) == KL_OK && w.c.n_free == PAGES);
    close_world(&w);
}

static void limits_have_names(void)
{
    static world w;
    kl_seq seq[SLOTS + 1];
    kl_error err;
    int64_t slot, count = CONTEXT + 1;
    open_world(&w, 3);
    for (int i = 0; i < SLOTS; i++) EXPECT(kl_cache_new(&w.c, &seq[i], &err) == KL_OK);
    EXPECT(kl_cache_new(&w.c, &seq[SLOTS], &err) == KL_ERR_MEMORY);
    EXPECT_TEXT(err.message,
                "sequence: all 5 are in use (max_batch); release one or plan for more");
    EXPECT(kl_cache_fork(&w.c, seq[0], &seq[SLOTS], &err) == KL_ERR_MEMORY);
    EXPECT(kl_cache_find(&w.c, 0, false, &slot, &err) == KL_ERR_VALUE);
    EXPECT(kl_cache_find(&w.c, seq[1] + ((kl_seq)2 << 32), false, &slot, &err) == KL_ERR_VALUE);
    EXPECT(kl_cache_find(&w.c, 77, false, &slot, &err) == KL_ERR_VALUE);
    EXPECT(kl_cache_find(&w.c, seq[0], false, &slot, &err) == KL_OK);
    EXPECT(kl_cache_check_growth(&w.c, &slot, &count, 1, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "sequence: 0 tokens and 324 more must be at most 323 (max_context)");
    close_world(&w);
}

int main(void)
{
    RUN(every_sequence_keeps_its_own);
    RUN(shared_pages_are_copied_only_where_needed);
    RUN(a_promise_covers_the_copy);
    RUN(restored_sequences_have_their_pages);
    RUN(snapshots_go_in_the_order_of_their_use);
    RUN(the_last_slot_comes_alive);
    RUN(limits_have_names);
    return test_failures != 0;
}
