/*
 * error.h -- the one error type of the C core.
 *
 * A function that can fail returns a kl_status and takes a kl_error as its last parameter.
 * The message is written once, where the cause is known, into a buffer of the caller's: no
 * allocation, no thread-local state, no Python, so it works without the GIL.
 *
 * A message reads "operation: what must hold, what was found".
 */
#ifndef KL_BASE_ERROR_H
#define KL_BASE_ERROR_H

typedef enum {
    KL_OK = 0,
    KL_ERR_VALUE,       /* a shape, a range or a combination of options is wrong   */
    KL_ERR_TYPE,        /* a dtype or a kind of object is wrong                     */
    KL_ERR_MEMORY,      /* host or device memory could not be had                   */
    KL_ERR_IO,          /* a file is missing, short or unreadable                   */
    KL_ERR_CONFIG,      /* the model's configuration is not one we can run          */
    KL_ERR_WEIGHTS,     /* a tensor is missing, misshapen or of the wrong dtype     */
    KL_ERR_NUMERICAL,   /* NaN or infinity where a finite number must be            */
    KL_ERR_DEVICE,      /* the device or its driver reported a failure              */
    KL_ERR_UNAVAILABLE, /* the backend is not built in, or lacks this operation     */
    KL_ERR_CANCELLED,   /* the caller's poll function asked to stop                 */
} kl_status;

typedef struct {
    kl_status status;
    char message[512];
} kl_error;

#if defined(__GNUC__)
#    define KL_PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))
#else
#    define KL_PRINTF(fmt, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

void kl_error_set(kl_error *err, kl_status status, const char *fmt, ...) KL_PRINTF(3, 4);

#ifdef __cplusplus
}
#endif

/* Record a failure and yield its status, so that a check is one line:
 *     if (n < 0) return kl_fail(err, KL_ERR_VALUE, "n must be >= 0, got %d", n);
 * A macro, so that a static analyser sees that the result is not KL_OK. */
#define kl_fail(err, status, ...) (kl_error_set((err), (status), __VA_ARGS__), (status))

/* Hand a failure up. */
#define KL_TRY(call)                                                                           \
    do {                                                                                       \
        const kl_status kl_try_status_ = (call);                                               \
        if (kl_try_status_ != KL_OK) return kl_try_status_;                                    \
    } while (0)

#endif
