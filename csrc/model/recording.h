/*
 * recording.h -- decode steps that a device repeats from a recording.
 *
 * A token step of the model is some hundred small operations: to enqueue them one by one takes
 * the host longer than the device needs to run them. Everything that changes from step to step
 * lies in the block of inputs, and the arena gives a shape the same addresses each time, so the
 * part between the copies can be recorded once for a shape and replayed. Same operations, same
 * arguments: a replayed step has the bits of an enqueued one.
 */
#ifndef KL_MODEL_RECORDING_H
#define KL_MODEL_RECORDING_H

#include "model/pass.h"

/* Batch sizes times widths of the page table that a server meets in turn. A recording of five
 * layers takes 0.25 MB of an H100. */
#define KL_MAX_RECORDINGS 64

typedef struct {
    kl_pass_shape shape;
    kl_recording *recording; /* NULL: seen once, not recorded yet */
    uint64_t last_use;       /* 0: an empty place                 */
} kl_recorded_shape;

typedef struct {
    kl_recorded_shape shapes[KL_MAX_RECORDINGS];
    uint64_t uses;
} kl_recordings; /* zeroed: none */

/* kl_pass_compute() of a started pass, from a recording where that is possible. The first step
 * of a shape is enqueued, so that whatever the backend sets up at a first use is there when the
 * second is recorded; and most shapes of prompts of a single token come once. */
kl_status kl_recordings_compute(kl_recordings *r, kl_pass *p, kl_error *err);
/* Only when nothing runs on the device any more. */
void kl_recordings_free(kl_recordings *r, kl_backend *be);

#endif
