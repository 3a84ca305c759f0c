/*
 * plain_read.c -- reads every byte of a block once and does next to nothing with it: the
 * memory bandwidth that a kernel which must read its weights is measured against.
 *
 * Compiled by common.py for the machine it runs on (-O3 -march=native). Eight independent
 * sums, so that the loop waits for memory and never for an addition.
 */
#include <stddef.h>
#include <stdint.h>

uint64_t plain_read(const uint64_t *p, size_t words)
{
    uint64_t sum[64] = {0}, total = 0;
    for (size_t i = 0; i + 64 <= words; i += 64)
        for (size_t j = 0; j < 64; j++) sum[j] += p[i + j];
    for (size_t j = 0; j < 64; j++) total += sum[j];
    return total;
}
