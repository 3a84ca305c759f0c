/*
 * engine_struct.h -- what an engine holds; for the files that implement engine.h.
 */
#ifndef KL_MODEL_ENGINE_STRUCT_H
#define KL_MODEL_ENGINE_STRUCT_H

#include "model/prefix.h"
#include "model/recording.h"

struct kl_engine {
    kl_backend *be; /* borrowed */
    kl_config config;
    kl_weight_format format;
    kl_plan plan;
    bool loaded;

    kl_weights weights;
    kl_cache cache;
    kl_prefix prefix;
    void *weight_block, *cache_block, *scratch; /* the device's, sizes in the plan */

    kl_recordings recordings;
    void *host; /* a step's inputs and outputs on their way: the backend's host memory */
    size_t host_bytes;
    int64_t *slots, *counts; /* [max_batch], of a step's feeds */
    kl_mark *marks[2];       /* of a pass                      */
};

/* A pass over the engine's memory. */
kl_pass kl_engine_pass(kl_engine *e);

/* The weights are about to change: there are none to compute with, and what prompts have read
 * with them goes. */
void kl_engine_unload(kl_engine *e);

/* For a step, refuse an engine without weights. */
kl_status kl_engine_check_loaded(const kl_engine *e, kl_error *err);

/* Every id must be a token; `op` and the position name it in the message. */
kl_status kl_check_ids(const char *op, const int32_t *ids, int64_t n, int64_t vocab,
                       kl_error *err);

/* Ranges of one row's sampling, NaN refused. */
kl_status kl_check_sampling(const char *op, const kl_sampling *sampling, kl_error *err);

#endif
