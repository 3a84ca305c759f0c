/*
 * cpu_backend.c -- memory and lifetime on the host; the operations are in their own files.
 *
 * Every call has run when it returns, so there is nothing to wait for.
 */
#include "cpu/cpu_backend.h"

#include "base/cgroup.h"
#include "base/memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- life ------------------------------------------------------------------------------ */

static kl_status cpu_open(const kl_backend_options *options, kl_backend **out, kl_error *err)
{
    *out = NULL;
    if (options->device != 0)
        return kl_fail(err, KL_ERR_VALUE, "cpu: device must be 0, got %d", options->device);
    const kl_cpu_kernels *kernels;
    KL_TRY(kl_cpu_kernels_choose(options->variant, &kernels, err));

    kl_cpu *self = kl_calloc(1, sizeof *self);
    if (self == NULL) return kl_fail(err, KL_ERR_MEMORY, "cpu: no memory for a backend");
    self->base.vt = &kl_cpu_vtbl;
    self->kernels = kernels;
    const kl_status status = kl_pool_new(options->threads, &self->pool, err);
    if (status != KL_OK) {
        kl_free(self);
        return status;
    }
    *out = &self->base;
    return KL_OK;
}

static void cpu_close(kl_backend *be)
{
    kl_cpu *self = (kl_cpu *)be;
    kl_pool_free(self->pool);
    kl_free(self);
}

static kl_status cpu_sync(kl_backend *be, kl_error *err)
{
    (void)be, (void)err;
    return KL_OK;
}

/* ---- info ------------------------------------------------------------------------------ */

static void read_cpu_name(char *name, size_t bytes)
{
    char line[256];
    snprintf(name, bytes, "unknown CPU");
    FILE *f = fopen("/proc/cpuinfo", "re");
    if (f == NULL) return;
    while (fgets(line, sizeof line, f) != NULL) {
        const char *colon = strchr(line, ':');
        if (colon == NULL || strncmp(line, "model name", 10) != 0) continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(name, bytes, "%s", colon + 1 + strspn(colon + 1, " \t"));
        break;
    }
    fclose(f);
}

/* What the kernel thinks can be had without swapping: free pages and droppable caches. */
static uint64_t read_available_memory(void)
{
    char line[128];
    uint64_t kib,
        available = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    FILE *f = fopen("/proc/meminfo", "re");
    if (f == NULL) return available;
    while (fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "MemAvailable: %" SCNu64, &kib) == 1) available = kib * 1024;
    fclose(f);
    return available;
}

static kl_status cpu_info(kl_backend *be, kl_backend_info *out, kl_error *err)
{
    const kl_cpu *self = (const kl_cpu *)be;
    (void)err;
    uint64_t limit, left;
    kl_cgroup_memory(&limit, &left);
    const uint64_t physical =
        (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t available = read_available_memory();

    *out = (kl_backend_info){.threads = kl_pool_size(self->pool), .batch_invariant = true};
    out->total_bytes = limit < physical ? limit : physical;
    out->free_bytes = left < available ? left : available;
    read_cpu_name(out->name, sizeof out->name);
    snprintf(out->variant, sizeof out->variant, "%s", self->kernels->name);
    return KL_OK;
}

/* ---- memory ---------------------------------------------------------------------------- */

static kl_status cpu_alloc(kl_backend *be, size_t bytes, void **out, kl_error *err)
{
    (void)be;
    *out = kl_aligned_alloc(bytes);
    if (*out == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "cpu: no %zu bytes of memory to be had", bytes);
    return KL_OK;
}

static void cpu_free(kl_backend *be, void *ptr, size_t bytes)
{
    (void)be, (void)bytes;
    kl_free(ptr);
}

static kl_status cpu_zero(kl_backend *be, void *ptr, size_t bytes, kl_error *err)
{
    (void)be, (void)err;
    if (bytes != 0) memset(ptr, 0, bytes);
    return KL_OK;
}

static kl_status cpu_copy(kl_backend *be, void *dst, const void *src, size_t bytes,
                          kl_error *err)
{
    (void)be, (void)err;
    if (bytes != 0) memmove(dst, src, bytes);
    return KL_OK;
}

/* Work has run when it is enqueued, so there is nothing to wait for. */
static kl_status cpu_new_mark(kl_backend *be, kl_mark **out, kl_error *err)
{
    (void)err;
    *out = (kl_mark *)be;
    return KL_OK;
}

static void cpu_free_mark(kl_backend *be, kl_mark *mark)
{
    (void)be, (void)mark;
}

static kl_status cpu_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)be, (void)mark, (void)err;
    return KL_OK;
}

const kl_backend_vtbl kl_cpu_vtbl = {
#define KL_ENTRY(op) .op = kl_cpu_##op, .op##_workspace = kl_cpu_##op##_workspace,
    KL_OPS(KL_ENTRY)
#undef KL_ENTRY
        .abi = KL_BACKEND_ABI,
    .name = "cpu",
    .formats = KL_CPU_FORMATS,
    .open = cpu_open,
    .close = cpu_close,
    .info = cpu_info,
    .sync = cpu_sync,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .zero = cpu_zero,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .copy = cpu_copy,
    .alloc_host = cpu_alloc,
    .free_host = cpu_free,
    .new_mark = cpu_new_mark,
    .free_mark = cpu_free_mark,
    .set_mark = cpu_mark,
    .wait_mark = cpu_mark,
};
