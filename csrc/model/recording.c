/*
 * recording.c -- see recording.h.
 */
#include "model/recording.h"

static bool same_shape(const kl_pass_shape *a, const kl_pass_shape *b)
{
    return a->T == b->T && a->N == b->N && a->B == b->B && a->R == b->R &&
           a->decode == b->decode && a->verify == b->verify && a->all_rows == b->all_rows &&
           a->logits == b->logits && a->targets == b->targets && a->sampling == b->sampling &&
           a->seen == b->seen && a->greedy == b->greedy && a->top == b->top;
}

/* Prompts are too long for the host to be what they wait for, and their shapes too many; logits
 * and captures go to the caller's own memory in between. */
static bool can_record(const kl_pass *p)
{
    return p->be->vt->record_begin != NULL && (p->shape.decode || p->shape.verify) &&
           !p->shape.logits && p->step->n_captures == 0;
}

static void drop(kl_recorded_shape *s, kl_backend *be)
{
    if (s->recording != NULL) be->vt->free_recording(be, s->recording);
    *s = (kl_recorded_shape){0};
}

/* The place of a shape: its own, else that of the one not used for longest, emptied. */
static kl_recorded_shape *find(kl_recordings *r, const kl_pass *p)
{
    kl_recorded_shape *oldest = &r->shapes[0];
    for (int i = 0; i < KL_MAX_RECORDINGS; i++) {
        kl_recorded_shape *s = &r->shapes[i];
        if (s->last_use != 0 && same_shape(&s->shape, &p->shape)) return s;
        if (s->last_use < oldest->last_use) oldest = s;
    }
    drop(oldest, p->be);
    oldest->shape = p->shape;
    return oldest;
}

/* Without polls: the caller's code must not run between operations that are only noted. */
static kl_status compute_quietly(kl_pass *p, kl_error *err)
{
    const kl_step *const step = p->step;
    kl_step quiet = *step;
    quiet.poll = NULL;
    p->step = &quiet;
    const kl_status status = kl_pass_compute(p, err);
    p->step = step;
    return status;
}

static kl_status record(kl_pass *p, kl_recording **out, kl_error *err)
{
    const kl_backend_vtbl *const vt = p->be->vt;
    kl_error late;
    *out = NULL;
    KL_TRY(vt->record_begin(p->be, err));
    const kl_status status = compute_quietly(p, err);
    const kl_status ended = vt->record_end(p->be, out, status == KL_OK ? err : &late);
    if (status == KL_OK) return ended;
    if (*out != NULL) vt->free_recording(p->be, *out);
    *out = NULL;
    return status;
}

kl_status kl_recordings_compute(kl_recordings *r, kl_pass *p, kl_error *err)
{
    if (!can_record(p)) return kl_pass_compute(p, err);
    kl_recorded_shape *const s = find(r, p);
    const bool first = s->last_use == 0;
    s->last_use = ++r->uses;
    if (first) return kl_pass_compute(p, err);
    KL_TRY(kl_pass_poll(p, err));
    if (s->recording == NULL) KL_TRY(record(p, &s->recording, err));
    return p->be->vt->replay(p->be, s->recording, err);
}

void kl_recordings_free(kl_recordings *r, kl_backend *be)
{
    for (int i = 0; i < KL_MAX_RECORDINGS; i++) drop(&r->shapes[i], be);
}
