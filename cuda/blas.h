/*
 * blas.h -- matrix products by NVIDIA's cuBLASLt, opened when the first of them is asked for.
 */
#ifndef KL_CUDA_BLAS_H
#define KL_CUDA_BLAS_H

#include "product.h"

/* Of a kl_cuda_backend; NULL until the first product. */
typedef struct kl_cuda_blas kl_cuda_blas;

/* Scratch memory of any product; what cuBLASLt itself advises on these devices. */
#define KL_CUDA_BLAS_BYTES ((size_t)32 << 20)

/* Whether cuBLASLt takes it: f32 or bf16 throughout, one weight, 16-byte alignment. */
bool kl_cuda_blas_takes(const kl_cuda_product *p);

kl_status kl_cuda_blas_run(kl_backend *be, const kl_cuda_product *p, kl_workspace ws,
                           kl_error *err);
void kl_cuda_blas_free(kl_cuda_blas *blas); /* NULL is fine */

#endif
