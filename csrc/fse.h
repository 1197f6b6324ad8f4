// FSE tables (RFC 8878, section 4.1): of Huffman weights, and of the lengths of runs.
#ifndef FASTCKPT_FSE_H
#define FASTCKPT_FSE_H

#include "kernels.h"

namespace fastckpt {

constexpr unsigned kMaxFseSymbols = 53, kMaxFseLog = 9;

inline unsigned highest_bit(u32 x) { return 31u - static_cast<unsigned>(__builtin_clz(x)); }

// A decoder's states; an encoder goes through them backwards.
struct FseTable {
    unsigned log;
    struct State {
        u16 base;
        u8 bits, symbol;
    } states[1 << kMaxFseLog];

    // From probabilities that sum to 2^log, where -1 is less than one. False for numbers that no table has.
    bool build(const int16_t* norm, unsigned n_symbols, unsigned table_log);
};

// Counts to probabilities that sum to 2^log, none of them 0 where the count is not.
void normalise(const unsigned* counts, unsigned n_symbols, unsigned total, unsigned log, int16_t* norm);

struct ForwardBits {
    u8* out;
    u64 bits = 0;
    unsigned n = 0;
    size_t bytes = 0;
    void put(u64 value, unsigned count) {
        bits |= value << n;
        for (n += count; n >= 8; n -= 8, bits >>= 8) out[bytes++] = static_cast<u8>(bits);
    }
    size_t finish() {
        if (n) out[bytes++] = static_cast<u8>(bits);
        n = 0;
        return bytes;
    }
};

// Returns the bytes written: at most 2 for each symbol, and 1.
size_t write_probabilities(const int16_t* norm, unsigned n_symbols, unsigned log, u8* out);

struct Probabilities {
    int16_t norm[kMaxFseSymbols];
    unsigned n_symbols, log;

    // Returns bytes read, 0 if these are no probabilities of so many symbols.
    size_t read(const u8* data, size_t n, unsigned max_symbols, unsigned max_log);
};

}  // namespace fastckpt

#endif
