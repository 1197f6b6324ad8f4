// The fingerprint of a chunk: 128 bits that tell whether its bytes are those of another time. One text, four builds:
// a loop for the CPU (fingerprints.cpp), a kernel by NVRTC while a program runs (the native module carries this text),
// the same kernel by nvcc, and under the emulator of grids that tests use (tests/grid_emulator.h).
//
//     sums[s] = Σ mixed(word[i] ^ (key[s] + i · kStep[s]))  modulo 2^64, for s = 0 and 1
//
// word[0] is the number of bytes; word[1], word[2], … are the bytes in groups of 8, little-endian, the last group
// filled up with zeros. fastckpt/kernels/reference/memory.py defines the same. Addition has no order, so any grid gives
// the same bits.
//
// Why two contents have different fingerprints. `mixed` is a bijection in which each bit of its argument changes each
// bit of its result with a probability of about one half. So:
//   - If one word differs, both sums differ, always.
//   - If several words differ, each adds a difference that is not 0 and that depends on the word's place and on the
//     key, which is drawn at random for each process and which no content knows. A sum of such differences is 0 with a
//     probability of about 2^-64; signs, exponents, swapped words or a few changed bits give no better chance, because
//     no word's difference survives `mixed`. The two sums have keys and steps of their own: about 2^-128 for both.
// The second statement takes `mixed` for a random bijection; it is no proof against somebody who knows the key. Nobody
// who could choose contents is asked to be honest by this number: it compares a training state with itself.
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define FASTCKPT_BOTH __host__ __device__ __forceinline__
#define FASTCKPT_ANY_TYPE
#else
#define FASTCKPT_BOTH inline
#define FASTCKPT_ANY_TYPE [[gnu::may_alias]]
#endif

namespace fingerprint {

typedef unsigned long long word;
typedef unsigned char byte;

constexpr word kStepA = 0x9E3779B97F4A7C15ull, kStepB = 0xC2B2AE3D27D4EB4Full;  // odd: no place's key comes twice

// MurmurHash3's finaliser. The shift is 33, so that the signs of two float32 (bits 63 and 31) do not fall on each
// other.
FASTCKPT_BOTH word mixed(word x) {
    x ^= x >> 33;
    x *= 0xFF51AFD7ED558CCDull;
    x ^= x >> 33;
    x *= 0xC4CEB9FE1A85EC53ull;
    return x ^ (x >> 33);
}

struct Sums {
    word a, b;
};

FASTCKPT_BOTH void absorb(Sums& sums, Sums keys, word content, word place) {
    sums.a += mixed(content ^ (keys.a + place * kStepA));
    sums.b += mixed(content ^ (keys.b + place * kStepB));
}

// Fewer than 8 bytes, filled up with zeros.
FASTCKPT_BOTH word part_of_word(const byte* from, word n_bytes) {
    word content = 0;
    for (word i = 0; i < n_bytes; ++i) content |= static_cast<word>(from[i]) << (8 * i);
    return content;
}

// What does not come in whole words: the length, and the last bytes.
FASTCKPT_BOTH void absorb_ends(Sums& sums, Sums keys, const byte* from, word n_bytes) {
    absorb(sums, keys, n_bytes, 0);
    const word n_words = n_bytes / 8;
    if (n_bytes % 8) absorb(sums, keys, part_of_word(from + 8 * n_words, n_bytes % 8), n_words + 1);
}

#if defined(__CUDACC_RTC__) || defined(__CUDACC__) || defined(FASTCKPT_GRID_EMULATOR)

constexpr unsigned kThreads = 256;
constexpr word kSegmentWords = 8192;  // 64 KiB: what one block reads; 16 loads of 16 bytes for each thread

struct Chunk {
    word address, n_bytes;
};

struct alignas(16) FASTCKPT_ANY_TYPE Pair {
    word x, y;
};
using AnyWord FASTCKPT_ANY_TYPE = word;

// The words [first, end) of a chunk, as far as this thread has them.
FASTCKPT_BOTH void absorb_words(Sums& sums, Sums keys, word address, word first, word end, unsigned thread) {
    if (address % 16 == 0) {  // `first` is even
        const Pair* const pairs = reinterpret_cast<const Pair*>(address);
#ifdef __CUDACC__
#pragma unroll 4
#endif
        for (word i = first / 2 + thread; i < end / 2; i += kThreads) {
            const Pair pair = pairs[i];
            absorb(sums, keys, pair.x, 2 * i + 1);
            absorb(sums, keys, pair.y, 2 * i + 2);
        }
        if (end % 2 && thread == 0) absorb(sums, keys, pairs[end / 2].x, end);
        return;
    }
    for (word i = first + thread; i < end; i += kThreads) {
        const word content = address % 8 == 0 ? reinterpret_cast<const AnyWord*>(address)[i]
                                              : part_of_word(reinterpret_cast<const byte*>(address) + 8 * i, 8);
        absorb(sums, keys, content, i + 1);
    }
}

// chunks: as many as sums has pairs of words; sums: zeros. segments: of the longest chunk. Blocks: one for each segment
// of each chunk, the longest's number of segments for all; kThreads threads.
extern "C" __global__ void fastckpt_fingerprint_kernel(const Chunk* chunks, word* sums, word segments, word key_a,
                                                       word key_b) {
    __shared__ word a[kThreads];
    __shared__ word b[kThreads];
    const word number = blockIdx.x / segments, segment = blockIdx.x % segments;
    const Chunk chunk = chunks[number];
    const word n_words = chunk.n_bytes / 8, first = segment * kSegmentWords;
    if (segment && first >= n_words) return;  // the whole block
    const word end = n_words - first < kSegmentWords ? n_words : first + kSegmentWords;
    const Sums keys = {key_a, key_b};
    const unsigned thread = threadIdx.x;
    Sums mine = {0, 0};
    absorb_words(mine, keys, chunk.address, first, end, thread);
    if (segment == 0 && thread == 0)
        absorb_ends(mine, keys, reinterpret_cast<const byte*>(chunk.address), chunk.n_bytes);
    a[thread] = mine.a;
    b[thread] = mine.b;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
        if (thread < half) {
            a[thread] += a[thread + half];
            b[thread] += b[thread + half];
        }
        __syncthreads();
    }
    if (thread == 0) {  // of integers: the order of the blocks makes no difference
        atomicAdd(&sums[2 * number], a[0]);
        atomicAdd(&sums[2 * number + 1], b[0]);
    }
}

#endif

}  // namespace fingerprint
