// The inner loops, one set for each instruction set, and which set is in use.
#ifndef FASTCKPT_KERNELS_H
#define FASTCKPT_KERNELS_H

#include <cassert>
#include <cstddef>
#include <cstdint>

#define FC_INLINE inline __attribute__((always_inline))

// Lanes, digests, streams and frames are read and written as the machine's own integers.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "fastckpt runs on little-endian machines only");

namespace fastckpt {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr size_t kStripeLanes = 131072;
constexpr unsigned kMaxPlanes = 8;
constexpr unsigned kMaxCodeBits = 11;
// Room behind a plane or a Huffman stream that wide loads and stores may touch. What relies on it says so in an assert,
// which is compiled into the driver of csrc/tests, the fuzzers and builds with sanitizers, not into others.
constexpr size_t kSlack = 64;
static_assert(kSlack >= 64, "the widest store, of AVX-512");
// One of four streams of a block: 32,768 symbols of at most 11 bits, and the end mark.
constexpr size_t kStreamRoom = kStripeLanes / 4 * kMaxCodeBits / 8 + 8 + kSlack;
static_assert(kStreamRoom >= (kStripeLanes / 4 * kMaxCodeBits + 1) / 8 + 8, "each put stores 8 bytes at its cursor");

constexpr size_t kMinHuffman = 1024;
constexpr size_t kMinLiterals =
    256;  // of literals between runs: each of four streams has 8 bytes, as the decoder wants
constexpr size_t kNoRoom = ~size_t{0};

// How a lane becomes the integer whose bytes are the planes (docs/format.md, sections 4.3 and 4.4).
enum class Map { kRot, kSub, kPlain };

// A prefix code as the encoder wants it: code[s] has length[s] bits, 0 where s has no code.
struct Codes {
    u8 length[256];
    u16 code[256];
};

// A decoder's look-up of kMaxCodeBits bits: their number in byte 0 (a shift takes it from there as it is), how many
// symbols in byte 1, the symbols in bytes 2-7.
constexpr size_t kDecodeEntries = size_t{1} << kMaxCodeBits;

struct Range {
    unsigned first, last;
    bool has_zero;
};

struct Soon {
    const u8* from;
    size_t n_bytes;
};

// So many literals, of which the last one, a zero, comes `match` times more.
struct Run {
    u32 literals, match;
};
constexpr size_t kMinRun = 8;  // zeros: for fewer of them a sequence takes more bits than their codes
constexpr size_t kMaxRuns = kStripeLanes / kMinRun;

// Long runs of zeros in samples of a plane, each a row: how many begin within one, and how many zeros are in all of
// them. Long are those of kMinRun, and of half as many where a row's end cuts them off.
struct Zeros {
    size_t begun, n_bytes;
};

struct Kernels {
    const char* name;

    // planes[k] gets byte w - 1 - k of every mapped lane. base: kSub only; of merge it may be the same as raw.
    void (*split)(const u8* raw, const u8* base, size_t lanes, unsigned w, Map map, u8* const* planes);
    void (*merge)(const u8* const* planes, const u8* base, size_t lanes, unsigned w, Map map, u8* raw);

    // float32 to bfloat16: to nearest, ties to even; NaNs stay NaNs. And whether some lanes are not those.
    void (*cast)(const u8* wide, size_t lanes, u8* narrow);
    bool (*cast_differs)(const u8* narrow, const u8* wide, size_t lanes);

    // Bits 1-7 of every byte, least significant first: (7n + 7) / 8 bytes. Returns the OR of all bits 0.
    u8 (*pack7)(const u8* bytes, size_t n, u8* packed);
    void (*unpack7)(const u8* packed, size_t n, u8* bytes);

    // SUBPACK of lanes: min(z, 2^bits - 1) into `packed`, z - esc of the others into `escapes` (as lanes of w bytes);
    // returns how many. escapes has room for all lanes and kSlack; packed for its bytes and kSlack. lanes: at most
    // kStripeLanes; a multiple of 8 but at the end.
    size_t (*subpack)(const u8* raw, const u8* base, size_t lanes, unsigned w, unsigned bits, u8* packed, u8* escapes);
    // How many of some packed values are 2^bits - 1.
    size_t (*count_escapes)(const u8* packed, size_t n_bytes, unsigned bits);
    // The inverse of subpack; base and raw may be the same. n_escapes: how many there are at `escapes`, with kSlack
    // readable behind them: at least as many as these lanes need. Returns how many they needed.
    size_t (*subunpack)(const u8* packed, const u8* base, size_t lanes, unsigned w, unsigned bits, const u8* escapes,
                        size_t n_escapes, u8* raw);

    // Four Huffman streams and their jump table (RFC 8878, 4.2.2). Returns the bytes written, 0 if a symbol has no
    // code, kNoRoom. kMinLiterals <= n <= kStripeLanes. soon: what the caller reads next, fetched into the cache
    // meanwhile.
    size_t (*huffman_encode)(const Codes& codes, const u8* symbols, size_t n, u8* out, size_t room,
                             u8* scratch /* 4 x kStreamRoom */, Soon soon);

    // The inverse, into exactly n symbols; `out` has room for n and kSlack. entries: kDecodeEntries; lengths: each
    // symbol's. False: not such streams. Reads and writes within bounds whatever the bytes are. soon: what the caller
    // reads and writes next, fetched into the cache meanwhile.
    bool (*huffman_decode)(const u64* entries, const u8* lengths, const u8* data, size_t n_bytes, u8* out, size_t n,
                           Soon read, Soon write);

    // The runs of at least kMinRun zeros, and what lies between and behind them: `literals` has room for n and kSlack,
    // and kSlack can be read behind the bytes. Returns how many runs there are. n: at most kStripeLanes.
    size_t (*find_runs)(const u8* bytes, size_t n, Run* runs, u8* literals, size_t* n_literals);

    // Zeros in rows of `row` bytes; see Zeros. n: a multiple of row.
    Zeros (*count_zeros)(const u8* bytes, size_t n, size_t row);

    // acc += whole blocks of 1024 bytes.
    void (*xxh3_blocks)(u64* acc, const u8* data, size_t n_blocks);
    // acc += n stripes of 64 bytes, fewer than a block.
    void (*xxh3_stripes)(u64* acc, const u8* data, size_t n);
    // CRC-64/NVME; the register itself.
    u64 (*crc)(u64 crc, const u8* data, size_t n);
    // Past the caches where that is faster.
    void (*copy)(u8* to, const u8* from, size_t n);
    bool (*all_equal)(const u8* bytes, size_t n, u8 value);
    // The smallest and the largest byte, zeros apart; first > last if all are zeros.
    Range (*range)(const u8* bytes, size_t n);
};

const Kernels& kernels();

// Null where the compiler or the machine cannot.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

inline u64 load64(const u8* p) {
    u64 v;
    __builtin_memcpy(&v, p, 8);
    return v;
}
inline u32 load32(const u8* p) {
    u32 v;
    __builtin_memcpy(&v, p, 4);
    return v;
}

}  // namespace fastckpt

#endif
