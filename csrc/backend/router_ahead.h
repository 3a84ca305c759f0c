/*
 * router_ahead.h -- a router's work, done by the operation before its layer of experts.
 *
 * A token step is as long as its chain of kernels, and a router's few bytes are a kernel of their
 * own. But its logits are sums over the numbers of the residual that the linear before it makes. So
 * a single token's linear with a residual r may also leave, in `sums`, what a kl_moe whose x is r
 * makes these logits and its h from, in a form of the backend's own:
 *     rms = sqrt(mean(r^2) + norm_eps);  logits[e] = (sum_i router[e, i] norm_weight[i] r[i]) / rms
 *     h = norm_weight r, rounded to act, the results of w1 and w3 divided by rms
 * The logits are those of an h that was not rounded: two experts that almost tie may fall otherwise
 * than without `sums`. An r past what the sums can hold makes every result NaN.
 *
 * kl_backend_vtbl.router_sums says of which linear and layer a backend does this, and in how many
 * bytes. These are aligned to KL_SUMS_ALIGNMENT, zeros before linear (kl_embedding clears them,
 * or zero()), and after it for one kl_moe alone.
 */
#ifndef KL_BACKEND_ROUTER_AHEAD_H
#define KL_BACKEND_ROUTER_AHEAD_H

#include "base/tensor.h"
#include "base/weight.h"

#define KL_SUMS_ALIGNMENT 64

typedef struct {
    kl_weight router;      /* [E, D] f32, count 1; D that of the residual */
    kl_tensor norm_weight; /* [D] f32; as unsettled as the router          */
    void *sums;            /* NULL: no such work                           */
    kl_tensor bias;        /* [E] f32, or absent; for a guess of the experts, */
    float norm_eps;
    int top_k;             /* 0: no guess is made                          */
} kl_router_ahead;

#endif
