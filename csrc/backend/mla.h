/*
 * mla.h -- the kl_mla_append that a kl_mla_decode may begin with.
 */
#ifndef KL_BACKEND_MLA_H
#define KL_BACKEND_MLA_H

#include "backend/ops.h"

/* What mla_decode does with its `raw`. */
static inline kl_mla_append kl_mla_append_of(const kl_mla_decode *a)
{
    kl_mla_append append = {0};
    append.raw = a->raw;
    append.norm_weight = a->norm_weight;
    append.pages = a->pages;
    append.block_table = a->block_table;
    append.lengths = a->lengths;
    append.rank = a->w_kv_b.shape[2];
    append.eps = a->norm_eps;
    return append;
}

#endif
