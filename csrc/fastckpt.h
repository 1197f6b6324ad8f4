/* The C interface of fastckpt's native kernels.
 *
 * Rules for every function: the caller owns all buffers and keeps them unchanged during the call; source and destination do
 * not overlap; no alignment is needed; nothing is allocated, nothing is thread-local: any number of threads may call at once.
 * A status of FASTCKPT_OK is 0, everything else leaves the destination undefined.
 * The meaning of each kernel is the NumPy code in fastckpt/codec/kernels/reference.py; the bytes are specified in docs/format.md.
 */
#ifndef FASTCKPT_H
#define FASTCKPT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum fastckpt_status {
    FASTCKPT_OK = 0,
    FASTCKPT_BAD_LANE = 1,   /* lane_bytes is not one of the widths that the kernel knows */
    FASTCKPT_BAD_LENGTH = 2, /* n_bytes is not a multiple of lane_bytes */
};

/* Lanes in a stripe: one plane of a stripe is 128 KiB, exactly the largest zstd block (docs/format.md, section 4.3). */
#define FASTCKPT_STRIPE_LANES 131072u

/* CRC-64/NVME of data, continuing from crc (0 to start). */
uint64_t fastckpt_crc64nvme(uint64_t crc, const void* data, size_t n_bytes);
/* The same by table look-ups only; the definition for the other. */
uint64_t fastckpt_crc64nvme_portable(uint64_t crc, const void* data, size_t n_bytes);

/* Raw bytes -> ROT stream: each lane rotated left by one bit, then byte planes, stripe by stripe, highest byte first.
 * lane_bytes: 2, 4 or 8. stream has room for n_bytes. */
int fastckpt_rot_split(const void* raw, size_t n_bytes, unsigned lane_bytes, void* stream);
/* ROT stream -> raw bytes: the inverse. */
int fastckpt_rot_merge(const void* stream, size_t n_bytes, unsigned lane_bytes, void* raw);

#ifdef __cplusplus
}
#endif
#endif
