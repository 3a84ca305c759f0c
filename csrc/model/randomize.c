/*
 * randomize.c -- fill an engine's weights at random, on the device.
 *
 * Blocks are drawn as f32 into one buffer and stored from it. The device works in order, so
 * nothing waits for it but the end.
 */
#include "model/engine_struct.h"

#include "base/memory.h"
#include "base/rng.h"

#include <math.h>

/* Values drawn at a time: part of what a seed means. At least a row of the widest matrix that
 * a checked config allows. */
#define RANDOM_BLOCK (INT64_C(1) << 20)
#define BLOCK_BYTES  ((size_t)RANDOM_BLOCK * sizeof(float))

typedef struct {
    kl_backend *be;
    void *block; /* the device's, BLOCK_BYTES */
    uint64_t seed, n_parts;
    float skew;
} randomizer;

static kl_status fill_rows(const randomizer *z, const kl_part *part, int64_t first, int64_t n,
                           uint64_t seed, kl_error *err)
{
    const int64_t cols = part->dest->cols;
    kl_fill_normal fill = {.out = kl_tensor_2d(z->block, KL_F32, n, cols),
                           .seed = seed,
                           .mean = part->mean,
                           .std = part->std * (part->router_bias ? z->skew : 1)};
    KL_TRY(kl_run_fill_normal(z->be, &fill, err));
    kl_pack_weight pack = {
        .src = fill.out, .out = kl_weight_slice(part->dest, part->index, part->row + first, n)};
    return kl_run_pack_weight(z->be, &pack, err);
}

static kl_status randomize_part(void *ctx, const kl_part *part, kl_error *err)
{
    randomizer *z = ctx;
    const int64_t block = RANDOM_BLOCK / part->dest->cols;
    const uint64_t number = z->n_parts++;
    for (int64_t first = 0; first < part->rows; first += block) {
        const int64_t n = kl_min_i64(part->rows - first, block);
        uint32_t bits[4];
        kl_philox(z->seed, number << 32 | (uint64_t)(first / block), bits);
        KL_TRY(fill_rows(z, part, first, n, (uint64_t)bits[1] << 32 | bits[0], err));
    }
    return KL_OK;
}

kl_status kl_engine_randomize(kl_engine *e, uint64_t seed, float skew, kl_error *err)
{
    kl_backend *be = e->be;
    randomizer z = {.be = be, .seed = seed, .skew = skew};
    const kl_weight_visitor visitor = {.part = randomize_part, .ctx = &z};
    if (!isfinite(skew) || skew < 0)
        return kl_fail(err, KL_ERR_VALUE, "randomize: skew must be finite and >= 0, got %g",
                       (double)skew);
    kl_engine_unload(e);
    KL_TRY(be->vt->alloc(be, BLOCK_BYTES, &z.block, err));
    kl_status status = kl_weights_visit(&e->weights, &e->config, e->format, &visitor, err);
    if (status == KL_OK) status = be->vt->sync(be, err);
    e->loaded = status == KL_OK;
    be->vt->free(be, z.block, BLOCK_BYTES);
    return status;
}
