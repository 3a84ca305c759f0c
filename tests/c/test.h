/*
 * test.h -- the little that the C tests share: a test is a function, a program lists its own.
 *
 *     static void name(void) { EXPECT(1 + 1 == 2); }
 *     int main(void) { RUN(name); return test_failures != 0; }
 *
 * KL_TEST=name in the environment: that one alone.
 */
#ifndef KL_TEST_H
#define KL_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_failures, test_failed_here;

#define EXPECT(condition)                                                                      \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            printf("  %s:%d: expected %s\n", __FILE__, __LINE__, #condition);                  \
            test_failed_here++;                                                                \
        }                                                                                      \
    } while (0)

#define EXPECT_TEXT(got, wanted)                                                               \
    do {                                                                                       \
        if (strcmp((got), (wanted)) != 0) {                                                    \
            printf("  %s:%d: expected '%s'\n  got '%s'\n", __FILE__, __LINE__, (wanted),       \
                   (got));                                                                     \
            test_failed_here++;                                                                \
        }                                                                                      \
    } while (0)

static inline int is_wanted(const char *test)
{
    const char *only = getenv("KL_TEST");
    return only == NULL || strcmp(only, test) == 0;
}

#define RUN(test)                                                                              \
    do {                                                                                       \
        if (!is_wanted(#test)) break;                                                          \
        test_failed_here = 0;                                                                  \
        test();                                                                                \
        printf("%s %s\n", test_failed_here == 0 ? "ok  " : "FAIL", #test);                     \
        fflush(stdout);                                                                        \
        test_failures += test_failed_here != 0;                                                \
    } while (0)

#endif
