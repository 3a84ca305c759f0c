/*
 * box_map.cu -- maps for the copy engine, which the driver makes.
 */
#include "box_map.h"

#include "driver.h"

#ifdef KL_RACECHECK

kl_status kl_cuda_map_boxes(const box_matrix &of, box_map *map, kl_error *)
{
    *map = of;
    return KL_OK;
}

#else

namespace {

CUtensorMapSwizzle swizzle_of(const box_matrix &m)
{
    return !m.swizzled          ? CU_TENSOR_MAP_SWIZZLE_NONE
           : m.box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
           : m.box_bytes == 64  ? CU_TENSOR_MAP_SWIZZLE_64B
                                : CU_TENSOR_MAP_SWIZZLE_32B;
}

CUtensorMapDataType type_of(const box_matrix &m)
{
    return m.element_bytes == 4   ? CU_TENSOR_MAP_DATA_TYPE_UINT32
           : m.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

CUtensorMapL2promotion promotion_of(const box_matrix &m)
{
    return m.line_bytes == 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                               : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
}

} // namespace

kl_status kl_cuda_map_boxes(const box_matrix &of, box_map *map, kl_error *err)
{
    static const auto encode =
        kl_cuda_driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const unsigned each = static_cast<unsigned>(of.element_bytes);
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(of.row_bytes)};
    const cuuint64_t sizes[2] = {strides[0] / each, static_cast<cuuint64_t>(of.rows)};
    const cuuint32_t box[2] = {of.box_bytes / each, static_cast<cuuint32_t>(of.box_rows)};
    const cuuint32_t dense[2] = {1, 1};
    if (encode == nullptr)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: the driver has no cuTensorMapEncodeTiled: it is too old");
    const CUresult e = encode(
        map, type_of(of), 2, const_cast<void *>(of.data), sizes, strides, box, dense,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(of), promotion_of(of),
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e == CUDA_SUCCESS) return KL_OK;
    return kl_fail(err, KL_ERR_DEVICE,
                   "cuda: cuTensorMapEncodeTiled: error %d for %lld rows of %lld bytes",
                   static_cast<int>(e), static_cast<long long>(of.rows),
                   static_cast<long long>(of.row_bytes));
}

#endif
