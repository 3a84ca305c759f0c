/*
 * plan.h -- parts of the planner that others use.
 */
#ifndef KL_MODEL_PLAN_H
#define KL_MODEL_PLAN_H

#include "model/pass.h"

#define KL_MAX_BATCH       4096
#define KL_MAX_STEP_TOKENS (INT64_C(1) << 20)

/* The largest pass that a plan allows; its integers are what the host block holds. */
kl_pass_shape kl_plan_shape(const kl_config *config, const kl_plan *plan);

#endif
