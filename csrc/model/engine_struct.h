/*
 * engine_struct.h -- what an engine holds; for the files that implement engine.h.
 */
#ifndef KL_MODEL_ENGINE_STRUCT_H
#define KL_MODEL_ENGINE_STRUCT_H

#include "model/prefix.h"
#include "model/recording.h"

/* A step that runs while the host looks at the one before it. */
typedef struct {
    void *host;    /* its inputs and outputs on their way: the backend's host memory */
    kl_mark *mark; /* the end of the last step whose blocks these were */
    kl_pass_shape shape;
    size_t in_bytes;
} kl_flight;

struct kl_engine {
    kl_backend *be; /* borrowed */
    kl_config config;
    kl_weight_format format;
    kl_plan plan;
    bool loaded;
    bool batch_invariant; /* the backend */

    kl_weights weights;
    kl_cache cache;
    kl_prefix prefix;
    void *weight_block, *cache_block, *scratch; /* the device's, sizes in the plan */

    kl_recordings recordings;
    void *host; /* a step's inputs and outputs on their way: the backend's host memory */
    size_t host_bytes;
    int64_t *slots, *counts; /* [max_batch], of a step's feeds */
    kl_mark *marks[2];       /* of a pass                      */

    /* Those under way, from first_flight on: one, and while it lands the next. */
    kl_flight flights[2];
    int first_flight, n_flights;
    size_t flight_bytes;               /* 0: the backend does not record its steps */
    uint64_t n_passes, pass_of_flight; /* so far; the one that was the last flight */
};

/* Enqueue a token step that samples every row, without penalties, and return: its results come
 * with kl_engine_land(), its sequences are longer at once. Checked like kl_engine_step(), and for
 * more than its host blocks have room for. follows: it feeds what the last flight draws, and the
 * feeds have no tokens; only if kl_engine_can_follow(). Two may be under way, of one caller:
 * whoever finds none may begin. If it fails, the fed sequences are broken, and those under way are
 * as they were. */
kl_status kl_engine_launch(kl_engine *e, const kl_step *step, bool follows, kl_error *err);
/* One is under way, and what it draws is still where the next step would look for it. */
bool kl_engine_can_follow(const kl_engine *e);
/* Wait for the first one under way: its results go where `step` says. */
kl_status kl_engine_land(kl_engine *e, const kl_step *step, kl_error *err);
/* Nobody wants the results of those under way. They run to their end, and so nothing that they
 * write can reach what is enqueued after them. */
void kl_engine_abandon(kl_engine *e);

/* A pass over the engine's memory. */
kl_pass kl_engine_pass(kl_engine *e);

/* The weights are about to change: there are none to compute with, and what prompts have read
 * with them goes. */
void kl_engine_unload(kl_engine *e);

/* kl_sched_lead(), where its bits are promised: else nothing, for a step more takes its time. */
int64_t kl_engine_lead(const kl_engine *e, int64_t before, int64_t n);

/* For a step, refuse an engine without weights. */
kl_status kl_engine_check_loaded(const kl_engine *e, kl_error *err);

/* Every id must be a token; `op` and the position name it in the message. */
kl_status kl_check_ids(const char *op, const int32_t *ids, int64_t n, int64_t vocab,
                       kl_error *err);

/* Ranges of one row's sampling, NaN refused. */
kl_status kl_check_sampling(const char *op, const kl_sampling *sampling, kl_error *err);

#endif
