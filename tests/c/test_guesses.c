/*
 * test_guesses.c -- guesses of next tokens: where they come from, and a step that verifies some.
 * It must draw what single steps draw and leave the sequence as they do, to the bit, however many
 * of the guesses are right.
 */
#include "test.h"

#include "model/draft.h"
#include "model/engine_struct.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <math.h>

enum { VOCAB = 97, TOP = 3, LONGEST = 140, MOST = KL_MAX_GUESSES + 1, TAIL = 2, N_SEQS = 4 };

/* ---- where they come from -------------------------------------------------------------- */

/* As draft.h has it, looking at every place. */
static int64_t place_of(const int32_t *ids, int64_t n, int64_t *count)
{
    int64_t best = -1, longest = 1;
    for (int64_t place = n - 2; place >= 1; place--) {
        int64_t m = 0;
        while (m <= place && m < 32 && ids[place - m] == ids[n - 1 - m]) m++;
        if (m > longest) longest = m, best = place;
    }
    *count = best < 0 ? 0 : (longest + 1) / 2;
    return best;
}

static void guesses_follow_the_longest_match(void)
{
    static int32_t ids[400 + MOST];
    for (uint64_t seed = 0; seed < 40; seed++) {
        kl_draft d;
        kl_error err;
        /* So many different tokens that a pair has fewer places than are compared. */
        const double vocab = seed % 4 == 0 ? 5e8 : 16.0;
        EXPECT(kl_draft_init(&d, 400, &err) == KL_OK);
        for (int64_t t = 0; t < 400; t++) {
            const double u = kl_rng_uniform(seed, (uint64_t)t);
            ids[t] = t > 20 && u > 0.9 ? ids[t - 17] : (int32_t)(u * vocab);
            if (t % (int64_t)(1 + seed % 3) != 0) continue;
            int32_t behind[MOST + 400];
            const int64_t n = t + 1, most = 1 + t % 9;
            int64_t count;
            const int64_t place = place_of(ids, n, &count);
            if (count > most) count = most;
            memcpy(behind, ids, (size_t)n * sizeof *ids);
            for (int64_t i = 0; i < count; i++) behind[n + i] = behind[place + 1 + i];
            EXPECT(kl_draft_guess(&d, ids, n, most) == count);
            EXPECT(memcmp(ids, behind, (size_t)(n + count) * sizeof *ids) == 0);
        }
        kl_draft_free(&d);
    }
}

static void a_guess_goes_round(void)
{
    int32_t ids[20] = {1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2};
    static const int32_t want[5] = {1, 2, 1, 2, 1};
    kl_draft d;
    kl_error err;
    EXPECT(kl_draft_init(&d, 12, &err) == KL_OK);
    EXPECT(kl_draft_guess(&d, ids, 1, 8) == 0 && kl_draft_guess(&d, ids, 2, 8) == 0);
    EXPECT(kl_draft_guess(&d, ids, 12, 0) == 0);
    EXPECT(kl_draft_guess(&d, ids, 12, 8) == 5 && memcmp(ids + 12, want, sizeof want) == 0);
    kl_draft_free(&d);
}

/* ---- a step of them -------------------------------------------------------------------- */

/* A sequence, and what single steps make of it. */
typedef struct {
    kl_seq seq;
    int64_t length;
    kl_sampling sampling;
    int32_t ids[MOST + TAIL + 1]; /* the token to be fed, and all that are drawn one by one */
    float logprobs[MOST + TAIL], top[MOST + TAIL][TOP];
    unsigned char *images[MOST + TAIL]; /* after token t */
} course;

static unsigned char *image_of(kl_engine *e, kl_seq seq)
{
    kl_error err;
    int64_t length;
    EXPECT(kl_seq_length(e, seq, &length, &err) == KL_OK);
    const size_t bytes = (size_t)kl_seq_image_bytes(e, length);
    unsigned char *image = malloc(bytes);
    EXPECT(image != NULL && kl_seq_read_image(e, seq, 0, image, bytes, &err) == KL_OK);
    return image;
}

static bool has_image(kl_engine *e, kl_seq seq, int64_t length, const unsigned char *image)
{
    kl_error err;
    int64_t now, pages, shared;
    EXPECT(kl_seq_length(e, seq, &now, &err) == KL_OK && now == length);
    EXPECT(kl_seq_pages(e, seq, &pages, &shared, &err) == KL_OK);
    EXPECT(pages == (length + 63) / 64);
    unsigned char *mine = image_of(e, seq);
    const bool same = memcmp(mine, image, (size_t)kl_seq_image_bytes(e, length)) == 0;
    free(mine);
    return same;
}

static kl_sampling sampling_at(const course *c, int64_t t)
{
    kl_sampling s = c->sampling;
    s.position += (uint64_t)t;
    return s;
}

static void make_course(kl_engine *e, course *c, int64_t length, uint64_t seed)
{
    int32_t prompt[LONGEST], top_ids[TOP];
    kl_error err = {KL_OK, ""};
    kl_seq seq;
    *c = (course){.length = length};
    c->sampling = (kl_sampling){.temperature = seed % 2 ? 0.9f : 0.0f,
                                .top_p = 1.0f,
                                .repetition_penalty = 1.0f,
                                .seed = seed,
                                .position = 5};
    for (int64_t t = 0; t < length; t++)
        prompt[t] = (int32_t)(kl_rng_uniform(seed, (uint64_t)t) * VOCAB);
    EXPECT(kl_seq_new(e, &c->seq, &err) == KL_OK);
    const kl_prompt p = {.seq = c->seq, .ids = prompt, .n = length};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    c->ids[0] = 42;
    EXPECT(kl_seq_fork(e, c->seq, &seq, &err) == KL_OK);
    for (int64_t t = 0; t < MOST + TAIL; t++) {
        const kl_feed feed = {seq, &c->ids[t], 1};
        const kl_sampling sampling = sampling_at(c, t);
        const kl_step step = {.feeds = &feed,
                              .n_feeds = 1,
                              .rows = (const int32_t[]){0},
                              .n_rows = 1,
                              .sampling = &sampling,
                              .ids = &c->ids[t + 1],
                              .id_logprobs = &c->logprobs[t],
                              .top = TOP,
                              .top_ids = top_ids,
                              .top_logprobs = c->top[t]};
        EXPECT(kl_engine_step(e, &step, &err) == KL_OK);
        EXPECT_TEXT(err.message, "");
        c->images[t] = image_of(e, seq);
    }
    EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
}

static void end_course(kl_engine *e, course *c)
{
    kl_error err;
    EXPECT(kl_seq_release(e, c->seq, &err) == KL_OK);
    for (int64_t t = 0; t < MOST + TAIL; t++) free(c->images[t]);
}

typedef struct {
    const course *c;
    int64_t guesses, right; /* the first `right` of them are what will be drawn */
} bet;

static int64_t fill_feed(const bet *b, int32_t *tokens)
{
    for (int64_t t = 0; t <= b->guesses; t++)
        tokens[t] = t <= b->right ? b->c->ids[t] : (b->c->ids[t] + 1) % VOCAB;
    return b->guesses + 1;
}

/* A step over forks of n courses: its draws, then what it has made of the sequences, then that
 * they go on as if nothing had been guessed. */
static void verify(kl_engine *e, const bet *bets, int64_t n)
{
    int32_t tokens[MOST * N_SEQS], rows[MOST * N_SEQS], ids[MOST * N_SEQS];
    int32_t top_ids[MOST * N_SEQS * TOP];
    float logprobs[MOST * N_SEQS], top[MOST * N_SEQS * TOP];
    kl_sampling sampling[MOST * N_SEQS];
    kl_feed feeds[N_SEQS];
    int64_t taken[N_SEQS], total = 0;
    kl_error err = {KL_OK, ""};
    for (int64_t i = 0; i < n; i++) {
        feeds[i].tokens = tokens + total;
        feeds[i].n_tokens = fill_feed(&bets[i], tokens + total);
        EXPECT(kl_seq_fork(e, bets[i].c->seq, &feeds[i].seq, &err) == KL_OK);
        for (int64_t t = 0; t < feeds[i].n_tokens; t++, total++)
            rows[total] = (int32_t)total, sampling[total] = sampling_at(bets[i].c, t);
    }
    kl_step step = {.feeds = feeds,
                    .n_feeds = n,
                    .rows = rows,
                    .n_rows = total,
                    .sampling = sampling,
                    .ids = ids,
                    .id_logprobs = logprobs,
                    .taken = taken,
                    .top = TOP,
                    .top_ids = top_ids,
                    .top_logprobs = top};
    EXPECT(kl_engine_step(e, &step, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    for (int64_t i = 0, row = 0; i < n; row += feeds[i++].n_tokens) {
        const course *c = bets[i].c;
        EXPECT(taken[i] == bets[i].right + 1);
        EXPECT(memcmp(ids + row, c->ids + 1, (size_t)taken[i] * sizeof *ids) == 0);
        EXPECT(memcmp(logprobs + row, c->logprobs, (size_t)taken[i] * sizeof *logprobs) == 0);
        EXPECT(memcmp(top + row * TOP, c->top, (size_t)(taken[i] * TOP) * sizeof *top) == 0);
        EXPECT(has_image(e, feeds[i].seq, c->length + taken[i], c->images[taken[i] - 1]));
        for (int64_t t = taken[i]; t < taken[i] + TAIL; t++) {
            const kl_feed one = {feeds[i].seq, &c->ids[t], 1};
            const kl_step plain = {.feeds = &one, .n_feeds = 1};
            EXPECT(kl_engine_step(e, &plain, &err) == KL_OK);
            EXPECT(has_image(e, feeds[i].seq, c->length + t + 1, c->images[t]));
        }
        EXPECT(kl_seq_release(e, feeds[i].seq, &err) == KL_OK);
    }
}

static kl_engine *open_engine(kl_backend **be, kl_weight_format format)
{
    kl_engine_options o = tiny_options;
    o.max_batch = 2 * N_SEQS;
    o.format = format;
    return tiny_engine(be, &o);
}

/* Over the ends of pages and in the middle of one, any number of guesses, any of them right. */
static void a_sequence_is_as_after_single_steps(void)
{
    static const int64_t lengths[] = {1, 30, 49, 63, 64, 127};
    for (int f = 0; f < 2; f++) {
        kl_backend *be;
        kl_engine *e = open_engine(&be, f == 0 ? KL_W_F32 : KL_W_BF16);
        for (int i = 0; i < 6 && test_failed_here == 0; i++) {
            course c;
            make_course(e, &c, lengths[i], 70 + (uint64_t)i);
            for (int64_t guesses = 0; guesses <= KL_MAX_GUESSES; guesses += 1 + guesses / 3)
                for (int64_t right = 0; right <= guesses; right += 1 + right / 2)
                    verify(e, &(bet){&c, guesses, right}, 1);
            end_course(e, &c);
        }
        tiny_engine_close(e, be);
    }
}

static void several_sequences_in_a_step(void)
{
    static const int64_t lengths[N_SEQS] = {60, 3, 64, 100};
    kl_backend *be;
    kl_engine *e = open_engine(&be, KL_W_F32);
    course c[N_SEQS];
    for (int i = 0; i < N_SEQS; i++) make_course(e, &c[i], lengths[i], 90 + (uint64_t)i);
    for (uint64_t seed = 0; seed < 60 && test_failed_here == 0; seed++) {
        bet bets[N_SEQS];
        const int64_t n = 1 + (int64_t)(seed % N_SEQS);
        for (int64_t i = 0; i < n; i++) {
            const uint64_t at = (uint64_t)i * 2;
            const int64_t guesses = (int64_t)(kl_rng_uniform(seed, at) * (double)(16 / n));
            bets[i] = (bet){&c[((uint64_t)i + seed) % N_SEQS], guesses, 0};
            bets[i].right = (int64_t)(kl_rng_uniform(seed, at + 1) * (double)(guesses + 1));
        }
        verify(e, bets, n);
    }
    for (int i = 0; i < N_SEQS; i++) end_course(e, &c[i]);
    tiny_engine_close(e, be);
}

/* ---- whole answers ---------------------------------------------------------------------- */

enum { N_NEW = 190 };

typedef struct {
    int32_t ids[N_NEW];
    float logprobs[N_NEW];
    int64_t n, n_drafted, n_accepted, n_steps;
} answer;

static void ask(kl_engine *e, const kl_request *r, int64_t n, answer *out)
{
    static kl_event events[64];
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t n_events, steps = 0;
    EXPECT(kl_generation_new(e, r, n, &g, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    for (int64_t i = 0; i < n; i++) out[i] = (answer){0};
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1, events, 64, &n_events, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        steps++;
        for (int64_t k = 0; k < n_events; k++) {
            answer *a = &out[events[k].request];
            a->ids[a->n] = events[k].id;
            a->logprobs[a->n++] = events[k].logprob;
            a->n_drafted = events[k].n_drafted;
            a->n_accepted = events[k].n_accepted;
            a->n_steps = steps;
        }
    }
    kl_generation_free(g);
}

/* A text that goes round, whose answers do so, too; drawn greedily and not, with a penalty. Alone
 * and beside others an answer is what it is without guesses. */
static void answers_are_the_same(void)
{
    enum { N = 3, LENGTH = 48 };
    static answer plain[N], guessed[N];
    int32_t prompt[LENGTH];
    kl_request r[N];
    kl_backend *be;
    kl_engine *e = open_engine(&be, KL_W_F32);
    int64_t accepted = 0;
    for (int t = 0; t < LENGTH; t++) prompt[t] = 5 + t % 4;
    for (int i = 0; i < N; i++) {
        r[i] = (kl_request){.prompt = prompt,
                            .n_prompt = LENGTH,
                            .max_new_tokens = N_NEW - 40 * i,
                            .sampling = {.temperature = i == 1 ? 0.05f : 0.0f,
                                         .top_p = 1.0f,
                                         .repetition_penalty = i == 2 ? 1.1f : 1.0f,
                                         .seed = 3}};
    }
    ask(e, r, N, plain);
    for (int i = 0; i < N; i++) r[i].guesses = 15 - 6 * i;
    for (int beside = 0; beside < 2; beside++) {
        for (int i = 0; i < N && !beside; i++) ask(e, &r[i], 1, &guessed[i]);
        if (beside) ask(e, r, N, guessed);
        for (int i = 0; i < N; i++) {
            const size_t n = (size_t)plain[i].n;
            EXPECT(plain[i].n == r[i].max_new_tokens && guessed[i].n == plain[i].n);
            EXPECT(memcmp(guessed[i].ids, plain[i].ids, n * sizeof(int32_t)) == 0);
            EXPECT(memcmp(guessed[i].logprobs, plain[i].logprobs, n * sizeof(float)) == 0);
            EXPECT(plain[i].n_drafted == 0 && guessed[i].n_drafted >= guessed[i].n_accepted);
            if (!beside) EXPECT(guessed[i].n_steps == plain[i].n - guessed[i].n_accepted);
            accepted += guessed[i].n_accepted;
        }
    }
    EXPECT(accepted > 100);
    tiny_engine_close(e, be);
}

/* ---- what is refused ------------------------------------------------------------------- */

static void wrong_steps_are_named(void)
{
    static const int32_t tokens[32] = {0};
    int32_t rows[32], ids[32];
    float logprobs[32];
    kl_sampling sampling[32];
    int64_t taken[2];
    kl_backend *be;
    kl_engine *e = open_engine(&be, KL_W_F32);
    kl_error err = {KL_OK, ""};
    kl_seq seq;
    EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
    for (int i = 0; i < 32; i++) {
        rows[i] = i;
        sampling[i] = (kl_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
    }
    kl_feed feed = {seq, tokens, 4};
    kl_step step = {.feeds = &feed,
                    .n_feeds = 1,
                    .rows = rows,
                    .n_rows = 3,
                    .sampling = sampling,
                    .ids = ids,
                    .id_logprobs = logprobs,
                    .taken = taken};
    EXPECT(kl_engine_step(e, &step, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "step: guesses need sampling after each of the 4 tokens, in order, got 3 rows");
    step.n_rows = 4;
    rows[2] = 1;
    EXPECT(kl_engine_step(e, &step, &err) == KL_ERR_VALUE);
    rows[2] = 2;
    step.sampling = NULL;
    EXPECT(kl_engine_step(e, &step, &err) == KL_ERR_VALUE);
    step.sampling = sampling;
    feed.n_tokens = step.n_rows = 17;
    EXPECT(kl_engine_step(e, &step, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "step: rows to sample must number 1 to 16, got 17");
    feed.n_tokens = step.n_rows = 16;
    EXPECT(kl_engine_step(e, &step, &err) == KL_OK);
    EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
    tiny_engine_close(e, be);
}

int main(void)
{
    RUN(guesses_follow_the_longest_match);
    RUN(a_guess_goes_round);
    RUN(a_sequence_is_as_after_single_steps);
    RUN(several_sequences_in_a_step);
    RUN(answers_are_the_same);
    RUN(wrong_steps_are_named);
    return test_failures != 0;
}
