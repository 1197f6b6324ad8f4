/* The C interface of fastckpt's native kernels and codec.
 *
 * Rules for every function: the caller owns all buffers and keeps them unchanged during the call; sources and
 * destinations do not overlap, but for a base that is decoded in place; bytes need no alignment, arrays of uint64_t
 * have theirs; nothing is allocated. Functions without a context may be called by any number of threads at once; a
 * context belongs to one thread at a time. Every status but FASTCKPT_OK leaves the destination undefined.
 *
 * Every number and pointer is checked before memory is touched, except that a buffer is trusted to be as long as the
 * caller says: null where bytes are expected is FASTCKPT_BAD_ARGUMENT, a length beyond PTRDIFF_MAX is
 * FASTCKPT_BAD_LENGTH. The exceptions, which have no status to give, are the two functions that return a crc.
 *
 * The meaning of each function is the NumPy code in fastckpt/kernels/reference.py; the bytes are specified in
 * docs/format.md, section 4.
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
    FASTCKPT_BAD_LANE = 1,     /* lane_bytes or pack_bits is not one that the transform knows */
    FASTCKPT_BAD_LENGTH = 2,   /* a length is 0, too large, or not a multiple of lane_bytes */
    FASTCKPT_BAD_ARGUMENT = 3, /* an unknown transform; a missing base, context or buffer */
    FASTCKPT_NO_ROOM = 4, /* the destination is too small: stored bytes would not be fewer than the caller allows */
    FASTCKPT_UNFIT = 5,   /* the chunk is not what the transform needs (ROTU: a sign bit is set) */
    FASTCKPT_FOREIGN = 6, /* not a frame as fastckpt_encode makes it: of another zstd encoder, or damaged */
    FASTCKPT_UNREAD = 7,  /* the stored bytes are not all there, or cannot be read */
    FASTCKPT_DAMAGED = 8, /* a crc or a digest differs */
    FASTCKPT_NO_BASE = 9, /* fastckpt_read_chunks: the base is a chunk of the same call that could not be read */
};

/* docs/format.md, section 4.1 */
enum fastckpt_transform {
    FASTCKPT_RAW = 1,
    FASTCKPT_CONST = 2, /* fastckpt_read_chunks only */
    FASTCKPT_ROT = 3,
    FASTCKPT_ROTU = 4,
    FASTCKPT_SUB = 5,
    FASTCKPT_SUBPACK = 6,
    FASTCKPT_CAST = 7, /* fastckpt_read_chunks only, as the next one */
    FASTCKPT_REF = 8,
};

/* Lanes in a stripe: one plane of a stripe is 128 KiB, exactly the largest zstd block (docs/format.md, section 4.3). */
#define FASTCKPT_STRIPE_LANES 131072u
#define FASTCKPT_MAX_RAW_BYTES (4u << 20)
/* Shorter chunks get no digest from here: XXH3 has other rules for them, and the Python package is fast enough. */
#define FASTCKPT_MIN_DIGEST_BYTES 241u

/* The instruction sets that this library can use on this machine, best first, as "avx512 avx2 scalar". */
const char* fastckpt_isas(void);
/* Use one of them (for tests; not while other threads are in a call). NULL: the best. FASTCKPT_BAD_ARGUMENT if it is
 * not there. */
int fastckpt_use_isa(const char* name);
/* The one in use. */
const char* fastckpt_isa(void);

/* CRC-64/NVME of data, continuing from crc (0 to start). */
uint64_t fastckpt_crc64nvme(uint64_t crc, const void* data, size_t n_bytes);
/* The same by table look-ups only; the definition for the other. */
uint64_t fastckpt_crc64nvme_portable(uint64_t crc, const void* data, size_t n_bytes);

/* The CRC-64/NVME of two stretches of bytes, one after the other, from the CRC of each: without the bytes. */
uint64_t fastckpt_crc64nvme_combine(uint64_t first, uint64_t second, uint64_t second_bytes);

/* XXH3-128 of data in canonical (big-endian) form. n_bytes >= FASTCKPT_MIN_DIGEST_BYTES, else FASTCKPT_BAD_LENGTH. */
int fastckpt_xxh3_128(const void* data, size_t n_bytes, uint8_t digest[16]);

/* *constant is 1 if all lanes of the chunk are equal, else 0. lane_bytes: 1, 2, 4 or 8; n_bytes: a multiple of it, not
 * 0. */
int fastckpt_is_constant(const void* raw, size_t n_bytes, unsigned lane_bytes, int* constant);

/* Joins n stretches of memory: n_bytes[i] bytes from addresses[i]. FASTCKPT_BAD_LENGTH, and nothing written past
 * out_bytes, if they are not out_bytes together. FASTCKPT_BAD_ARGUMENT for a stretch at address 0 or past the last
 * address. */
int fastckpt_gather(const uint64_t* addresses, const uint64_t* n_bytes, size_t n, void* out, size_t out_bytes);

/* A sample of n stretches of memory, n_bytes[i] bytes from addresses[i]: those shorter than FASTCKPT_WHOLE_BELOW whole,
 * of the others 64 bytes of each 4 KiB; the seed decides which. FASTCKPT_BAD_LENGTH, and nothing written, if out_bytes
 * is not fastckpt_lines_bytes, which is SIZE_MAX if no memory can have so many bytes. Addresses: as for
 * fastckpt_gather. */
#define FASTCKPT_WHOLE_BELOW 65536u
size_t fastckpt_lines_bytes(const uint64_t* n_bytes, size_t n);
int fastckpt_lines(const uint64_t* addresses, const uint64_t* n_bytes, size_t n, uint64_t seed, void* out,
                   size_t out_bytes);

/* A number for each FASTCKPT_ROW_WORDS words of data, the last ones made up by zeros; keys: as many words.
 * FASTCKPT_BAD_LENGTH if n_out is not the number of such rows. */
#define FASTCKPT_ROW_WORDS 4096u
int fastckpt_rows(const void* data, size_t n_bytes, const uint64_t* keys, uint64_t* out, size_t n_out);

/* Two words that stand for all of data; keys: two as well. What they are: cuda/fingerprint.cuh, which computes the same
 * on a device. */
int fastckpt_fingerprint(const void* data, size_t n_bytes, const uint64_t* keys, uint64_t* out);

/* Memory of a context: caller-owned, fastckpt_context_bytes() long, 64-byte aligned, initialised once.
 * fastckpt_context_init returns null for memory that is null or aligned otherwise. */
typedef struct fastckpt_context fastckpt_context;
size_t fastckpt_context_bytes(void);
fastckpt_context* fastckpt_context_init(void* memory);

/* Streams, without a frame around them. raw: n_bytes, a multiple of lane_bytes in {2, 4, 8}; base: as many bytes, SUB
 * and SUBPACK only. pack_bits: SUBPACK, one of 1, 2, 4, 8.
 *
 * fastckpt_split: raw -> stream; *stream_bytes is set. FASTCKPT_NO_ROOM if capacity does not suffice: n_bytes does for
 * all but SUBPACK, which needs at most 4 + n_bytes / lane_bytes + n_bytes.
 *
 * fastckpt_merge: stream -> raw. FASTCKPT_FOREIGN if it cannot be a stream of such a chunk.
 *
 * Base and raw: of fastckpt_merge and fastckpt_decode they may be the very same memory, which then keeps the base's
 * bytes if the status is not FASTCKPT_OK. */
int fastckpt_split(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned transform,
                   unsigned lane_bytes, unsigned pack_bits, void* stream, size_t capacity, size_t* stream_bytes);
int fastckpt_merge(fastckpt_context* context, const void* stream, size_t stream_bytes, const void* base, size_t n_bytes,
                   unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw);

/* *equal is 1 if both have the same bytes, else 0. Ends at the first 64 KiB that differ. */
int fastckpt_equal(const void* a, const void* b, size_t n_bytes, int* equal);

/* *equal is 1 if each of n lanes of 2 bytes (bfloat16) is the float32 lane of `wide` rounded to nearest, ties to even
 * (CAST); else 0. */
int fastckpt_cast_equal(const void* narrow, const void* wide, size_t n_lanes, int* equal);
/* That rounding. */
int fastckpt_cast(const void* wide, size_t n_lanes, void* narrow);

/* Room that fastckpt_encode never exceeds when it is given that much. 0 for more bytes than a chunk has. */
size_t fastckpt_encode_bound(size_t n_bytes);

typedef struct {
    size_t stored_bytes;
    uint64_t crc64nvme; /* of the stored bytes */
    uint8_t digest[16]; /* of the raw bytes; zeros if n_bytes < FASTCKPT_MIN_DIGEST_BYTES */
} fastckpt_encoded;

/* One chunk -> stored bytes (RAW: a copy; otherwise one zstd frame), its digest and crc in the same pass.
 * FASTCKPT_NO_ROOM: capacity is exceeded. FASTCKPT_UNFIT. */
int fastckpt_encode(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned transform,
                    unsigned lane_bytes, unsigned pack_bits, void* stored, size_t capacity, fastckpt_encoded* result);

/* A frame made by fastckpt_encode -> raw bytes, and their digest (zeros if short; null: it is not wanted). Reads and
 * writes within bounds whatever the bytes are. FASTCKPT_FOREIGN: not such a frame. */
int fastckpt_decode(fastckpt_context* context, const void* stored, size_t stored_bytes, const void* base,
                    size_t n_bytes, unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw,
                    uint8_t digest[16]);

/* A chunk to read: where its stored bytes are, and what they and the raw bytes must be. */
typedef struct {
    uint64_t offset; /* of the stored bytes, in the file or the memory */
    uint64_t stored_bytes;
    uint64_t raw; /* address of the room for the raw bytes */
    uint64_t raw_bytes;
    uint64_t crc64nvme;
    uint8_t digest[16];
    uint8_t parameter[8]; /* CONST: the lane */
    uint8_t transform, lane_bytes, pack_bits;
    uint8_t is_fresh; /* not 0: nobody has touched the memory yet, so its pages are made first */
    uint8_t is_base;  /* not 0: only a base of later chunks, so its digest is not looked at; its crc is */
    uint8_t zero[3];
    /* SUB, SUBPACK, REF: address of the base's raw_bytes bytes, which are `raw` itself or do not touch it. CAST: of
     * twice as many, which do not touch it. Other transforms have none. */
    uint64_t base;
} fastckpt_chunk;

typedef struct {
    int32_t status; /* of fastckpt_status */
    float seconds;
} fastckpt_outcome;

/* Reads n chunks one after another, each verified: its crc before it is decoded, its digest after. outcomes: of each; a
 * chunk whose status is not FASTCKPT_OK does not keep the others from being read, unless it was to become their base,
 * and its room holds anything, unless it was to be decoded in place: then FASTCKPT_FOREIGN and whatever is found before
 * decoding leave the base there. Only chunks of FASTCKPT_MIN_DIGEST_BYTES or more.
 *
 * file: a descriptor that is read by position; -1: the stored bytes are in memory. scratch: room for the longest frame
 * of a file. */
int fastckpt_read_chunks(fastckpt_context* context, int file, const void* memory, size_t memory_bytes, void* scratch,
                         size_t scratch_bytes, const fastckpt_chunk* chunks, size_t n, fastckpt_outcome* outcomes);

/* What each way of storing a chunk would cost, from samples: 64 bytes of every 4 KiB; with a base 256 of every 8 KiB,
 * in which runs of zeros can be seen. */
typedef struct {
    double rot_bits;        /* bits per lane of the ROT planes, each at the least of 8 and its order-0 entropy */
    double rotu_bits;       /* ROTU; negative if a sampled sign bit is set */
    double sub_bits;        /* SUB; negative without a base */
    double subpack_bits[4]; /* SUBPACK of 1, 2, 4, 8 bits; negative without a base */
    double rot_dominant;    /* share of the commonest byte in the highest ROT plane */
    double sub_dominant;    /* share of the commonest byte in the highest SUB plane */
    uint64_t lanes;         /* sampled */
} fastckpt_estimate;
int fastckpt_sample(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned lane_bytes,
                    fastckpt_estimate* estimate);

#ifdef __cplusplus
}
#endif
#endif
