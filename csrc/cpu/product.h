/*
 * product.h -- big matrix products on all threads, shared by the operations made of them.
 *
 * A batch of products runs as two parallel regions: pack the rows of x into panels, then one
 * task for each few rows of a weight. A task reads those rows where they lie when there are few
 * rows of x (decode: the weights' bytes are the cost), else dequantises them once into its
 * worker's scratch and passes all panels of x over them. Neither choice nor partition changes
 * a bit (cpu/product_kernels.h).
 */
#ifndef KL_CPU_PRODUCT_H
#define KL_CPU_PRODUCT_H

#include "base/arena.h"
#include "cpu/cpu_backend.h"

/* out [x.n, w.rows] = x w^T, or silu(x w^T) * (x up^T), rounded once to out_dtype. The caller
 * fills the first group. */
typedef struct {
    kl_rows x;
    kl_weight w, up; /* same shapes; up.data NULL: none */
    void *out;
    kl_dtype out_dtype;
    int64_t out_stride;
    void *panels; /* kl_product_panel_bytes() of memory */

    int64_t first_panel, first_task, task_rows;
} kl_product;

/* The most rows of x in one product, where the caller can choose; a multiple of every tile. */
#define KL_PRODUCT_ROWS 252

/* Packed x of n rows and K columns. */
size_t kl_product_panel_bytes(int64_t n, int64_t K);

/* Scratch of all workers for products of up to n rows of x with K columns. */
size_t kl_product_scratch_bytes(const kl_cpu *cpu, int64_t n, int64_t K);

/* Fill the panels of every product. */
void kl_products_pack(const kl_cpu *cpu, kl_product *p, int64_t n);

/* Compute every product from its panels. */
void kl_products_compute(const kl_cpu *cpu, kl_product *p, int64_t n, void *scratch);

/* Both. */
void kl_products_run(const kl_cpu *cpu, kl_product *p, int64_t n, void *scratch);

/* Rows [first, first + n) of a 2-D tensor. */
kl_rows kl_rows_of(const kl_tensor *t, int64_t first, int64_t n);

#endif
