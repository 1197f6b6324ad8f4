// Huffman codes of zstd's literals (RFC 8878, section 4.2): lengths, codes, their description, and the decoder.
#ifndef FASTCKPT_HUFFMAN_H
#define FASTCKPT_HUFFMAN_H

#include "kernels.h"

namespace fastckpt {

constexpr size_t kMaxDescription = 129;  // a byte and 127 of an FSE stream, or 64 of 128 four-bit weights

// A code and the bytes that describe it.
struct HuffmanTable {
    Codes codes;
    u8 description[kMaxDescription];
    size_t description_bytes;

    // From counts, of which at least two are not 0. False: no description is possible (never for exponents: it takes
    // more than 128 symbols of one weight).
    bool build(const u32 counts[256]);
    // Bits that symbols of these counts take; a large number if one of them has no code.
    u64 cost(const u32 counts[256]) const;
};

// Look-ups of kMaxCodeBits bits, and each symbol's length.
struct HuffmanDecoder {
    u64 entries[kDecodeEntries];
    u8 length[256];

    // Reads a description. Returns its bytes, 0 if it is none.
    size_t read(const u8* data, size_t n);
    // Four streams behind a jump table into exactly n symbols. `out` has room for n and kSlack. False: not such
    // streams.
    bool decode(const u8* data, size_t n_bytes, u8* out, size_t n, Soon read, Soon write) const {
        return kernels().huffman_decode(entries, length, data, n_bytes, out, n, read, write);
    }

private:
    void fill(unsigned longest, unsigned n_symbols);
};

}  // namespace fastckpt

#endif
