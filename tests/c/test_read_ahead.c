/*
 * test_read_ahead.c -- every range whole and in turn, at any window and number of threads;
 * nothing read over what is in use; failures by name, in turn; an end at any moment.
 */
#include "test.h"

#include "base/memory.h"
#include "base/read_ahead.h"

#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define N_RANGES   200
#define MAX_RANGE  5000
#define FILE_BYTES 100000
#define MAX_WINDOW 7

/* Neither sanitizer lives under a limit of the address space. */
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#    define SANITIZED 1
#else
#    define SANITIZED 0
#endif

/* What the file holds at `at`: no two of its stretches look alike. */
static unsigned char byte_at(uint64_t at)
{
    return (unsigned char)((at * at * 31 + at * 7 + at / 251) % 253);
}

typedef struct {
    FILE *file;
    kl_file_range ranges[N_RANGES];
    unsigned char ring[MAX_WINDOW][MAX_RANGE];
    int64_t window;
} setting;

/* Ranges of all sizes, 0 and the largest among them, from all over the file, over a ring. */
static setting *make_setting(int64_t window)
{
    setting *s = calloc(1, sizeof *s);
    s->file = tmpfile();
    s->window = window;
    for (uint64_t at = 0; at < FILE_BYTES; at++) fputc(byte_at(at), s->file);
    fflush(s->file);
    for (uint64_t i = 0; i < N_RANGES; i++) {
        const size_t bytes = i % 50 == 7 ? MAX_RANGE : (size_t)(i * 37 % 900);
        s->ranges[i] = (kl_file_range){.name = "a tensor",
                                       .fd = fileno(s->file),
                                       .offset = i * 7919 % (FILE_BYTES - MAX_RANGE),
                                       .bytes = bytes,
                                       .to = s->ring[i % (uint64_t)window]};
    }
    return s;
}

static void free_setting(setting *s)
{
    fclose(s->file);
    free(s);
}

static kl_read_ahead *start(const setting *s, int threads)
{
    kl_read_ahead *r = NULL;
    EXPECT(kl_read_ahead_new(s->ranges, N_RANGES, s->window, threads, &r, NULL) == KL_OK);
    return r;
}

static kl_status wait_long(kl_read_ahead *r, int64_t i, kl_error *err)
{
    bool ready = false;
    kl_status status = KL_OK;
    for (int tries = 0; status == KL_OK && !ready && tries < 1000; tries++)
        status = kl_read_ahead_wait(r, i, 20, &ready, err);
    return ready ? status : KL_ERR_VALUE;
}

static int wrong_bytes(const kl_file_range *range)
{
    int wrong = 0;
    for (size_t k = 0; k < range->bytes; k++)
        wrong += ((unsigned char *)range->to)[k] != byte_at(range->offset + k);
    return wrong;
}

/* The bytes are overwritten before they are given back: without atomics, so that a missing edge
 * between caller and threads is a race. */
static void use(const kl_file_range *range)
{
    memset(range->to, 0xff, range->bytes);
}

static void every_range_in_turn(void)
{
    static const int threads[] = {1, 2, 7};
    static const int64_t windows[] = {1, 2, 5, MAX_WINDOW};
    for (int w = 0; w < 4; w++)
        for (int t = 0; t < 3; t++) {
            setting *s = make_setting(windows[w]);
            kl_read_ahead *r = start(s, threads[t]);
            int wrong = 0;
            for (int64_t i = 0; i < N_RANGES; i++) {
                wrong += wait_long(r, i, NULL) != KL_OK || wrong_bytes(&s->ranges[i]) != 0;
                use(&s->ranges[i]);
                kl_read_ahead_release(r, i + 1);
            }
            EXPECT(wrong == 0);
            kl_read_ahead_free(r);
            free_setting(s);
        }
}

/* Several ranges at once, released together. */
static void ranges_in_groups(void)
{
    setting *s = make_setting(6);
    kl_read_ahead *r = start(s, 3);
    int wrong = 0;
    for (int64_t first = 0; first < N_RANGES; first += 4) {
        for (int64_t i = first; i < first + 4; i++) wrong += wait_long(r, i, NULL) != KL_OK;
        for (int64_t i = first; i < first + 4; i++) wrong += wrong_bytes(&s->ranges[i]);
        kl_read_ahead_release(r, first + 4);
    }
    EXPECT(wrong == 0);
    kl_read_ahead_free(r);
    free_setting(s);
}

static void what_is_in_use_stays(void)
{
    setting *s = make_setting(3);
    kl_read_ahead *r = start(s, 2);
    bool ready = true;
    for (int64_t i = 0; i < 3; i++) EXPECT(wait_long(r, i, NULL) == KL_OK);
    EXPECT(kl_read_ahead_wait(r, 3, 30, &ready, NULL) == KL_OK && !ready);
    for (int64_t i = 0; i < 3; i++) EXPECT(wrong_bytes(&s->ranges[i]) == 0);
    kl_read_ahead_release(r, 1);
    EXPECT(wait_long(r, 3, NULL) == KL_OK && wrong_bytes(&s->ranges[3]) == 0);
    EXPECT(wrong_bytes(&s->ranges[1]) == 0 && wrong_bytes(&s->ranges[2]) == 0);
    kl_read_ahead_free(r);
    free_setting(s);
}

static void failures_are_named_in_turn(void)
{
    setting *s = make_setting(5);
    kl_error err = {KL_OK, ""};
    s->ranges[2].name = "short", s->ranges[2].bytes = 100;
    s->ranges[2].offset = FILE_BYTES - 60;
    s->ranges[3].name = "closed", s->ranges[3].bytes = 1, s->ranges[3].fd = 9999;
    kl_read_ahead *r = start(s, 4);
    EXPECT(wait_long(r, 0, &err) == KL_OK && wait_long(r, 1, &err) == KL_OK);
    EXPECT(wait_long(r, 2, &err) == KL_ERR_IO);
    EXPECT_TEXT(err.message, "read: the file ends within short, 40 bytes are missing (has it "
                             "changed?)");
    EXPECT(wait_long(r, 3, &err) == KL_ERR_IO);
    EXPECT_TEXT(err.message, "read: closed: Bad file descriptor");
    EXPECT(wait_long(r, 2, NULL) == KL_ERR_IO);
    EXPECT(wait_long(r, 4, &err) == KL_OK && wrong_bytes(&s->ranges[4]) == 0);
    kl_read_ahead_free(r);
    free_setting(s);
}

/* With threads that read, that wait for their place, and that have nothing left to do. */
static void ends_at_any_moment(void)
{
    for (int64_t used = 0; used < N_RANGES; used += 13) {
        setting *s = make_setting(4);
        kl_read_ahead *r = start(s, 6);
        for (int64_t i = 0; i < used; i++) {
            EXPECT(wait_long(r, i, NULL) == KL_OK);
            kl_read_ahead_release(r, i + 1);
        }
        kl_read_ahead_free(r);
        use(&s->ranges[used]); /* nobody writes there any more */
        free_setting(s);
    }
    kl_read_ahead_free(NULL);
}

/* In a child, so that the limit ends with it: no room for a stack. */
static void goes_on_without_threads(void)
{
    const pid_t child = fork();
    int status = -1;
    if (child == 0) {
        alarm(60);
        const struct rlimit none = {0, 0};
        setting *s = make_setting(2);
        kl_read_ahead *r = NULL;
        if (setrlimit(RLIMIT_AS, &none) != 0) _exit(2);
        if (kl_read_ahead_new(s->ranges, N_RANGES, 2, 8, &r, NULL) != KL_OK) _exit(3);
        int wrong = 0;
        for (int64_t i = 0; i < N_RANGES; i++) {
            wrong += wait_long(r, i, NULL) != KL_OK || wrong_bytes(&s->ranges[i]) != 0;
            kl_read_ahead_release(r, i + 1);
        }
        kl_read_ahead_free(r);
        _exit(wrong != 0);
    }
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void refuses_what_cannot_be(void)
{
    setting *s = make_setting(1);
    kl_read_ahead *r = NULL;
    kl_error err;
    EXPECT(kl_read_ahead_new(s->ranges, 1, 1, 17, &r, &err) == KL_ERR_VALUE && r == NULL);
    EXPECT_TEXT(err.message, "read: needs a window and 1 .. 16 threads, got 1 and 17");
    EXPECT(kl_read_ahead_new(s->ranges, 1, 0, 1, &r, &err) == KL_ERR_VALUE && r == NULL);
    for (int k = 1; k <= 2; k++) {
        kl_fault_arm(k);
        EXPECT(kl_read_ahead_new(s->ranges, 1, 1, 1, &r, &err) == KL_ERR_MEMORY && r == NULL);
    }
    kl_fault_arm(0);
    free_setting(s);
}

int main(void)
{
    RUN(every_range_in_turn);
    RUN(ranges_in_groups);
    RUN(what_is_in_use_stays);
    RUN(failures_are_named_in_turn);
    RUN(ends_at_any_moment);
    RUN(refuses_what_cannot_be);
    if (!SANITIZED) RUN(goes_on_without_threads);
    return test_failures != 0;
}
