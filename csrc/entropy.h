// How many bits a symbol of some bytes takes, from counts of all of them or of a sample.
#ifndef FASTCKPT_ENTROPY_H
#define FASTCKPT_ENTROPY_H

#include <cmath>

#include "kernels.h"

namespace fastckpt {

// Bits a symbol, order 0, with Miller's correction for symbols that a sample has missed: (distinct - 1) / (2 n ln 2).
// sum: of c log2 c over all counts c, which are `distinct` and `total` together; distinct >= 1.
inline double entropy_of(double sum, double total, unsigned distinct) {
    constexpr double kLn2 = 0.6931;  // no more digits: they would tip choices, and with them the bytes of frames
    return std::log2(total) - sum / total + (distinct - 1) / (2 * kLn2 * total);
}

// c log2 c; 0 of 0.
double count_log(u32 c);

// The bytes of a plane, counted.
struct Histogram {
    u32 counts[256] = {};
    u32 total = 0;
    unsigned distinct = 0;

    // 16 bytes of every 16 x step.
    void sample(const u8* bytes, size_t n, size_t step);
    // After counts were changed.
    void finish();
    double entropy() const;
    // Bits a symbol of a Huffman code, about: the commonest symbol takes one bit at least.
    double coded_bits() const;
};

}  // namespace fastckpt

#endif
