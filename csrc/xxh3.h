// XXH3-128, seed 0, of more than 240 bytes, in pieces that stay in cache (the algorithm: xxHash's doc/xxhash_spec.md).
#ifndef FASTCKPT_XXH3_H
#define FASTCKPT_XXH3_H

#include "kernels.h"

namespace fastckpt {

constexpr size_t kXxh3BlockBytes = 1024;
constexpr u64 kXxh3Prime32_1 = 0x9E3779B1u;
extern const u8 kXxh3Secret[192];

// Digests one buffer, as far as the caller has got. The last bytes of a buffer are treated apart, so its length is
// known from the start.
class Xxh3 {
public:
    Xxh3(const u8* data, size_t n_bytes);
    // Everything up to `end` is readable (and in cache).
    void advance(size_t end);
    // All of it is. Call once.
    void finish(u8 digest[16]);

private:
    alignas(64) u64 acc_[8];
    const u8* data_;
    size_t n_bytes_, done_ = 0;
};

}  // namespace fastckpt

#endif
