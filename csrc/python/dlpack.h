/*
 * dlpack.h -- the structs of DLPack, declared here so that no header of another project is
 * needed to build. Layouts are those of DLPack 1.3; names are the specification's own.
 *
 * Producer and consumer agree through PyCapsules: "dltensor" holds a DLManagedTensor (before
 * 1.0), "dltensor_versioned" a DLManagedTensorVersioned. Whoever consumes a capsule renames it
 * to "used_..." and then calls the deleter once. The exchange API (1.3) does the same through
 * C functions found on the type of an array.
 */
#ifndef KL_PYTHON_DLPACK_H
#define KL_PYTHON_DLPACK_H

#include <stdint.h>

#define KL_DLPACK_MAJOR 1 /* another major means another layout */
#define KL_DLPACK_MINOR 1 /* what we write; a minor only adds values of the enums */

#define KL_CAPSULE_LEGACY         "dltensor"
#define KL_CAPSULE_LEGACY_USED    "used_dltensor"
#define KL_CAPSULE_VERSIONED      "dltensor_versioned"
#define KL_CAPSULE_VERSIONED_USED "used_dltensor_versioned"
#define KL_CAPSULE_EXCHANGE       "dlpack_exchange_api"

typedef enum {
    kDLCPU = 1,
    kDLCUDA = 2,
    kDLCUDAHost = 3,     /* page-locked host memory */
    kDLCUDAManaged = 13, /* reachable from the host and the devices */
} DLDeviceType;

typedef enum {
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
    kDLBfloat = 4,
    kDLComplex = 5,
    kDLBool = 6,
} DLDataTypeCode;

#define KL_DL_READ_ONLY UINT64_C(1)
#define KL_DL_IS_COPIED UINT64_C(2) /* a copy that only the consumer sees */

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

typedef struct {
    int32_t device_type; /* DLDeviceType */
    int32_t device_id;
} DLDevice;

typedef struct {
    uint8_t code; /* DLDataTypeCode */
    uint8_t bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL (before 1.2): dense, row-major */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self); /* may be NULL */
} DLManagedTensor;

typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self); /* may be NULL */
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api; /* an older major, or NULL */
} DLPackExchangeAPIHeader;

/* 0, or -1: the allocator reports through set_error, the others with a Python exception. */
typedef struct {
    DLPackExchangeAPIHeader header;
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out,
                                    void *error_ctx,
                                    void (*set_error)(void *error_ctx, const char *kind,
                                                      const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out);
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out); /* may be NULL */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
} DLPackExchangeAPI;

#endif
