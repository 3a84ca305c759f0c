/*
 * read_ahead.h -- threads that read ranges of files ahead of the one who uses them.
 *
 * The ranges are begun in their order, several at a time, and used in their order by one
 * caller: kl_read_ahead_wait(i), then kl_read_ahead_release(i + 1) once the bytes are no longer
 * wanted where they are. Range i is begun only when all ranges up to i - window have been
 * released, so range i + window may go to the same memory as range i.
 *
 * Several threads, because one copies from the page cache at a tenth of what memory and a bus
 * can take; pread and no mapping, because a file that shrinks must be an error and no signal.
 */
#ifndef KL_BASE_READ_AHEAD_H
#define KL_BASE_READ_AHEAD_H

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KL_MAX_READERS 16

/* bytes [offset, offset + bytes) of a file, and where they go. */
typedef struct {
    const char *name; /* what it is, for messages */
    int fd;
    uint64_t offset;
    size_t bytes;
    void *to;
} kl_file_range;

typedef struct kl_read_ahead kl_read_ahead;

/* Start 1 to KL_MAX_READERS threads. The ranges are borrowed. */
kl_status kl_read_ahead_new(const kl_file_range *ranges, int64_t n_ranges, int64_t window,
                            int threads, kl_read_ahead **out, kl_error *err);

/* Wait for range i, `ms` milliseconds at most: *ready says whether its bytes are there. Its
 * failure, KL_ERR_IO naming it, is reported here. If no thread could be started, reads it. */
kl_status kl_read_ahead_wait(kl_read_ahead *r, int64_t i, int ms, bool *ready, kl_error *err);

/* The ranges below n, all of them waited for, have been used. */
void kl_read_ahead_release(kl_read_ahead *r, int64_t n);

/* Ends the threads, each after the range it is reading, and joins them. NULL is fine. */
void kl_read_ahead_free(kl_read_ahead *r);

#endif
