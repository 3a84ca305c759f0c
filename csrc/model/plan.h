/*
 * plan.h -- parts of the planner that others use.
 */
#ifndef KL_MODEL_PLAN_H
#define KL_MODEL_PLAN_H

#include "model/pass.h"

#define KL_MAX_BATCH       4096
#define KL_MAX_STEP_TOKENS (INT64_C(1) << 20)

/* Bytes of the host's blocks of inputs and outputs, for any step of a plan. */
size_t kl_plan_host_bytes(const kl_config *config, const kl_plan *plan);

#endif
