/*
 * ragged.cuh -- which sequence of a ragged batch something belongs to.
 */
#ifndef KL_CUDA_DEVICE_RAGGED_H
#define KL_CUDA_DEVICE_RAGGED_H

/* The last n in [0, N) with begun(n), which holds for a first stretch of them: the sequence that
 * owns a token, for empty ones before it begin there too. */
template <class I, class F> __device__ I last_begun(I N, F begun)
{
    I low = 0, high = N;
    while (high - low > 1) {
        const I middle = (low + high) / 2;
        if (begun(middle))
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
