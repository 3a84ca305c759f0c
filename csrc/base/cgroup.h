/*
 * cgroup.h -- what the control groups of this process leave it, on Linux. A container's limits
 * are nowhere else: the machine's own figures would promise it too much.
 *
 * Both versions, and every group from the process's own up to the root of what is mounted.
 */
#ifndef KL_BASE_CGROUP_H
#define KL_BASE_CGROUP_H

#include <stdint.h>

/* CPUs' worth of time, rounded up; 0 without a quota. */
int kl_cgroup_cpus(void);

/* Bytes allowed and bytes still free (a page cache that can be dropped counts as free) in the
 * tightest group; UINT64_MAX without a limit. */
void kl_cgroup_memory(uint64_t *limit, uint64_t *available);

#endif
