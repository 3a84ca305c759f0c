/*
 * cgroup.c -- see cgroup.h.
 *
 * Files that are missing, unreadable or not as expected mean "no limit".
 */
#include "base/cgroup.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define MOUNT      "/sys/fs/cgroup"
#define PATH_BYTES 1024

/* The process's group under one hierarchy, as /proc/self/cgroup tells: the unified one (v2,
 * controller NULL) or a controller's (v1). */
static bool own_group(const char *controller, char path[PATH_BYTES])
{
    FILE *f = fopen("/proc/self/cgroup", "re");
    char line[PATH_BYTES];
    bool found = false;
    if (f == NULL) return false;
    while (!found && fgets(line, sizeof line, f) != NULL) { /* id:controllers:path */
        line[strcspn(line, "\n")] = '\0';
        char *names = strchr(line, ':');
        char *group = names == NULL ? NULL : strchr(++names, ':');
        if (group == NULL) continue;
        *group++ = '\0';
        bool ours = controller == NULL && names[0] == '\0';
        for (char *rest = NULL, *name = strtok_r(names, ",", &rest);
             controller != NULL && name != NULL; name = strtok_r(NULL, ",", &rest))
            ours = ours || strcmp(name, controller) == 0;
        if (ours) found = snprintf(path, PATH_BYTES, "%s", group) < PATH_BYTES;
    }
    fclose(f);
    return found;
}

/* Two numbers of a file ("max" reads as UINT64_MAX); how many there were. */
static int read_numbers(const char *dir, const char *name, uint64_t out[2])
{
    char path[2 * PATH_BYTES], word[2][32];
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path) return 0;
    FILE *f = fopen(path, "re");
    if (f == NULL) return 0;
    const int n = fscanf(f, "%31s %31s", word[0], word[1]);
    fclose(f);
    for (int i = 0; i < n; i++)
        if (sscanf(word[i], "%" SCNu64, &out[i]) != 1) out[i] = UINT64_MAX;
    return n < 0 ? 0 : n;
}

static uint64_t read_stat(const char *dir, const char *key)
{
    char path[2 * PATH_BYTES], word[64];
    uint64_t value, result = 0;
    if (snprintf(path, sizeof path, "%s/memory.stat", dir) >= (int)sizeof path) return 0;
    FILE *f = fopen(path, "re");
    if (f == NULL) return 0;
    while (fscanf(f, "%63s %" SCNu64, word, &value) == 2)
        if (strcmp(word, key) == 0) result = value;
    fclose(f);
    return result;
}

/* Call visit for every group from the process's own up to the root of the mount. In a
 * container the path may name groups that are not mounted; their files are just missing. */
static void for_each_group(const char *mount, const char *controller,
                           void (*visit)(const char *dir, void *ctx), void *ctx)
{
    char group[PATH_BYTES], dir[PATH_BYTES + 64];
    if (!own_group(controller, group)) return;
    for (;;) {
        char *slash = strrchr(group, '/');
        if (slash != NULL && slash[1] == '\0') *slash = '\0'; /* "/" is the root itself */
        snprintf(dir, sizeof dir, "%s%s", mount, group);
        visit(dir, ctx);
        slash = strrchr(group, '/');
        if (slash == NULL) return;
        *slash = '\0';
    }
}

static void visit_cpu(const char *dir, void *ctx)
{
    uint64_t quota = UINT64_MAX, period = 0, v[2];
    if (read_numbers(dir, "cpu.max", v) == 2)
        quota = v[0], period = v[1];
    else if (read_numbers(dir, "cpu.cfs_quota_us", v) >= 1) {
        quota = v[0] > INT64_MAX ? UINT64_MAX : v[0]; /* v1 writes -1 for none */
        if (read_numbers(dir, "cpu.cfs_period_us", v) >= 1) period = v[0];
    }
    if (quota == UINT64_MAX || quota == 0 || period == 0) return;
    const uint64_t whole = quota / period + (quota % period != 0);
    int *cpus = ctx;
    if (whole < INT_MAX && (*cpus == 0 || (int)whole < *cpus)) *cpus = (int)whole;
}

int kl_cgroup_cpus(void)
{
    int cpus = 0;
    for_each_group(MOUNT, NULL, visit_cpu, &cpus);
    for_each_group(MOUNT "/cpu", "cpu", visit_cpu, &cpus);
    return cpus;
}

typedef struct {
    uint64_t limit, available;
} memory_figures;

static void visit_memory(const char *dir, void *ctx)
{
    uint64_t limit[2], used[2] = {0, 0}, cache;
    if (read_numbers(dir, "memory.max", limit) >= 1) {
        read_numbers(dir, "memory.current", used);
        cache = read_stat(dir, "inactive_file");
    } else if (read_numbers(dir, "memory.limit_in_bytes", limit) >= 1) {
        read_numbers(dir, "memory.usage_in_bytes", used);
        cache = read_stat(dir, "total_inactive_file");
    } else
        return;
    if (limit[0] >= INT64_MAX / 2) return; /* v1 writes a huge number for none */
    const uint64_t held = used[0] > cache ? used[0] - cache : 0;
    const uint64_t left = limit[0] > held ? limit[0] - held : 0;
    memory_figures *m = ctx;
    if (limit[0] < m->limit) m->limit = limit[0];
    if (left < m->available) m->available = left;
}

void kl_cgroup_memory(uint64_t *limit, uint64_t *available)
{
    memory_figures m = {UINT64_MAX, UINT64_MAX};
    for_each_group(MOUNT, NULL, visit_memory, &m);
    for_each_group(MOUNT "/memory", "memory", visit_memory, &m);
    *limit = m.limit;
    *available = m.available;
}
