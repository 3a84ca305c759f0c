/*
 * plan.h -- parts of the planner that others use.
 */
#ifndef KL_MODEL_PLAN_H
#define KL_MODEL_PLAN_H

#include "base/memory.h"
#include "model/pass.h"

#define KL_MAX_BATCH       4096
#define KL_MAX_STEP_TOKENS (INT64_C(1) << 20)

/* Tokens of a step with guesses, at most: more would not be few, and take another arithmetic. */
static inline int64_t kl_plan_guessing(const kl_plan *plan)
{
    return kl_min_i64(KL_FEW_TOKENS, plan->step_tokens);
}

/* Rows that one step may draw tokens from. */
static inline int64_t kl_plan_draws(const kl_plan *plan)
{
    const int64_t guessing = kl_plan_guessing(plan);
    return plan->max_batch > guessing ? plan->max_batch : guessing;
}

/* Bytes of the host's blocks of inputs and outputs, for any step of a plan. */
size_t kl_plan_host_bytes(const kl_config *config, const kl_plan *plan);
/* The same for token steps ahead (kl_engine_launch). */
size_t kl_plan_flight_bytes(const kl_config *config, const kl_plan *plan);

#endif
