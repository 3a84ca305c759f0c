/*
 * box_map.h -- what the copy engine takes boxes of a matrix by (device/barrier.cuh).
 */
#ifndef KL_CUDA_BOX_MAP_H
#define KL_CUDA_BOX_MAP_H

#include "cuda_backend.h"

#include <cuda.h>

/* Rows one behind the other, at multiples of 16 bytes, of elements of one byte, two or four, and boxes
 * of up to 256 by 256 of them, whose pieces of 16 bytes come to lie as they are or as swizzled()
 * has them. */
struct box_matrix {
    const void *data;
    int64_t rows, row_bytes;
    int box_rows, box_bytes, element_bytes;
    bool swizzled;
    int line_bytes = 256; /* the L2 brings at a time; or 128 */
};

#ifdef KL_RACECHECK /* boxes are copied by threads, who take them by this */
using box_map = box_matrix;
#else
using box_map = CUtensorMap;
#endif

kl_status kl_cuda_map_boxes(const box_matrix &of, box_map *map, kl_error *err);

#endif
