/*
 * arrivals.h -- inputs that an operation reads word by word as they arrive.
 *
 * A token step is as long as its chain of operations, and on a device an operation sees the words
 * that the one before it has written sooner than that it has ended. But a rounding to bf16 makes
 * 0x7fff of every NaN: nobody writes the bits KL_BLANK. So words that were blank before their
 * operation began (kl_embedding makes them so) say of themselves whether they are there, and in no
 * order.
 *
 * An operation whose `arriving` is set reads its inputs so: x of linear; qkv, f_low, g_low and beta
 * of kda_mixer. They are bf16, of a single token, and memory of their own in the step; the operation
 * enqueued just before writes each word of them once. This is for a KDA layer's linear_pair,
 * kda_mixer and linear, enqueued one after the other: whatever else they read was complete before
 * the linear_pair, or is written by nobody. Likewise for an MLA layer's linear_pair, mla_decode and
 * linear; an mla_decode with `blanks` reads q and raw so, and what its own kernels tell each other
 * word by word goes there.
 *
 * kl_backend_vtbl.arrivals and mla_arrivals say which of these operations a backend runs so. It
 * refuses others that are told so; one without these entries finds all inputs complete anyway.
 */
#ifndef KL_BACKEND_ARRIVALS_H
#define KL_BACKEND_ARRIVALS_H

#include <stdbool.h>
#include <stddef.h>

#define KL_BLANK 0xffffu /* a word that is not there: 0xff in every byte */

/* Of a layer of a single token: which operations read their inputs as they arrive. */
typedef struct {
    bool mixer; /* kda_mixer, from linear_pair */
    bool out;   /* linear, from kda_mixer      */
} kl_arrivals;

/* The same of an MLA layer. */
typedef struct {
    size_t blanks; /* bytes of those of mla_decode, from linear_pair; 0: it has none */
    bool out;      /* linear, from mla_decode                                        */
} kl_mla_arrivals;

#endif
