// What the CRC loops share: tables and folding constants, computed from the polynomial when the library is loaded.
#ifndef FASTCKPT_CRC64_H
#define FASTCKPT_CRC64_H

#include "kernels.h"

namespace fastckpt {

// The register itself, without the inversion before and after.
u64 crc_by_table(u64 crc, const u8* data, size_t n);

// Folding a register over a distance of so many bits: multipliers for its low and its high half.
struct FoldConstants {
    u64 low, high;
    explicit FoldConstants(unsigned bits);
};
extern const FoldConstants kFold128, kFold512, kFold2048;

}  // namespace fastckpt

#endif
