/*
 * rows.h -- cutting row-wise work into tasks.
 */
#ifndef KL_CPU_ROWS_H
#define KL_CPU_ROWS_H

#include "base/threads.h"

/* Elements of cheap row-wise work that are worth a task: about 10 us of one core. Work of a
 * task or less stays on the caller's thread, as decode steps do. */
#define KL_ROWS_TASK 32768

/* Rows of a task, of `width` elements each. */
static inline int64_t kl_rows_per_task(int64_t width)
{
    return width >= KL_ROWS_TASK ? 1 : KL_ROWS_TASK / (width > 0 ? width : 1);
}

#endif
