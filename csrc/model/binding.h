/*
 * binding.h -- which tensor of a checkpoint fills which rows of which weight.
 */
#ifndef KL_MODEL_BINDING_H
#define KL_MODEL_BINDING_H

#include "model/engine_struct.h"

typedef struct {
    kl_part part;            /* its names are gone */
    const kl_source *source; /* NULL: an optional tensor that is absent, zeros */
} kl_binding;

typedef struct {
    kl_binding *bindings; /* [n], in the order of the files, absent ones last */
    int64_t n, n_used;    /* n_used: sources that are bound */
} kl_bindings;

/* Look up every tensor of the weight table by name and compare its shape; all the missing ones
 * are counted and the first ones named. The sources are borrowed. */
kl_status kl_bindings_make(kl_engine *e, const kl_source *sources, int64_t n_sources,
                           kl_bindings *out, kl_error *err);
void kl_bindings_free(kl_bindings *b);

#endif
