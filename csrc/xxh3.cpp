#include "xxh3.h"

#include <cstring>

#include "arguments.h"
#include "fastckpt.h"

namespace fastckpt {

const u8 kXxh3Secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

namespace {

constexpr u64 kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87ull, kPrime64_2 = 0xC2B2AE3D27D4EB4Full,
              kPrime64_3 = 0x165667B19E3779F9ull, kPrime64_4 = 0x85EBCA77C2B2AE63ull,
              kPrime64_5 = 0x27D4EB2F165667C5ull;

u64 folded_product(u64 a, u64 b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

u64 merged(const u64 acc[8], const u8* secret, u64 start) {
    u64 x = start;
    for (unsigned i = 0; i < 4; ++i)
        x += folded_product(acc[2 * i] ^ load64(secret + 16 * i), acc[2 * i + 1] ^ load64(secret + 16 * i + 8));
    x ^= x >> 37;
    x *= 0x165667919E3779F9ull;
    return x ^ (x >> 32);
}

}  // namespace

Xxh3::Xxh3(const u8* data, size_t n_bytes)
    : acc_{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kXxh3Prime32_1},
      data_(data),
      n_bytes_(n_bytes) {}

void Xxh3::advance(size_t end) {
    // The last block, even if it is a whole one, is not scrambled: it belongs to finish().
    const size_t last = (n_bytes_ - 1) / kXxh3BlockBytes * kXxh3BlockBytes;
    const size_t to = (end < last ? end : last) / kXxh3BlockBytes * kXxh3BlockBytes;
    if (to <= done_) return;
    kernels().xxh3_blocks(acc_, data_ + done_, (to - done_) / kXxh3BlockBytes);
    done_ = to;
}

void Xxh3::finish(u8 digest[16]) {
    advance(n_bytes_);
    kernels().xxh3_stripes(acc_, data_ + done_, (n_bytes_ - 1 - done_) / 64);
    // The last 64 bytes once more, with a key of their own.
    const u8 *tail = data_ + n_bytes_ - 64, *key = kXxh3Secret + 192 - 64 - 7;
    for (unsigned i = 0; i < 8; ++i) {
        const u64 value = load64(tail + 8 * i), keyed = value ^ load64(key + 8 * i);
        acc_[i ^ 1] += value;
        acc_[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
    const u64 n = n_bytes_;
    const u64 low = merged(acc_, kXxh3Secret + 11, n * kPrime64_1),
              high = merged(acc_, kXxh3Secret + 192 - 64 - 11, ~(n * kPrime64_2));
    for (unsigned i = 0; i < 8; ++i) {
        digest[i] = static_cast<u8>(high >> (56 - 8 * i));
        digest[8 + i] = static_cast<u8>(low >> (56 - 8 * i));
    }
}

}  // namespace fastckpt

extern "C" int fastckpt_xxh3_128(const void* data, size_t n_bytes, uint8_t digest[16]) {
    if (n_bytes < FASTCKPT_MIN_DIGEST_BYTES) return FASTCKPT_BAD_LENGTH;
    if (!digest) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = fastckpt::check_memory(data, n_bytes)) return status;
    fastckpt::Xxh3 state(static_cast<const uint8_t*>(data), n_bytes);
    state.finish(digest);
    return FASTCKPT_OK;
}
