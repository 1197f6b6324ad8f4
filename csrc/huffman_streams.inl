// Huffman streams: the encoder's and the decoder's loops. Part of kernels.inl.

// Cache lines of `soon`, a few in each round of a loop that has so many.
class Prefetch {
public:
    FC_INLINE Prefetch(Soon soon, size_t rounds)
        : at_(soon.from),
          end_(soon.from + soon.n_bytes),
          step_(rounds ? (soon.n_bytes / rounds + 64) & ~size_t{63} : 0) {}
    FC_INLINE void for_reading() { some<0>(); }
    FC_INLINE void for_writing() { some<1>(); }

private:
    template <int write>
    FC_INLINE void some() {
        if (at_ >= end_) return;
        for (size_t i = 0; i < step_; i += 64) __builtin_prefetch(at_ + i, write, 2);
        at_ += step_;
    }

    const u8 *at_, *end_;
    size_t step_;
};

// Bits from the least significant end; codes are appended last symbol first, as the format has it. Nothing is cleared
// beforehand.
struct BitWriter {
    u64 waiting;
    unsigned n;  // fewer than 8 between calls
    u8* at;

    FC_INLINE void put(u64 bits, unsigned count) {  // count <= 56
        waiting |= bits << n;
        n += count;
        std::memcpy(at, &waiting, 8);
        at += n >> 3;
        waiting >>= n & 0x38;  // at most 63 bits: never a shift by 64
        n &= 7;
    }
    FC_INLINE u8* finish() {
        put(1, 1);
        if (!n) return at;
        *at = static_cast<u8>(waiting);
        return at + 1;
    }
};

struct Streams {
    const u8* from[4];
    size_t length[4];
    BitWriter to[4];
    u8* const scratch;

    Streams(const u8* symbols, size_t n, u8* its_scratch) : scratch(its_scratch) {
        const size_t part = (n + 3) / 4;
        for (unsigned k = 0; k < 4; ++k) {
            from[k] = symbols + k * part;
            length[k] = k < 3 ? part : n - 3 * part;
            to[k] = BitWriter{.waiting = 0, .n = 0, .at = scratch + k * kStreamRoom};
        }
    }
    // The last symbols of a stream, one by one, until `left` are left. False if one has no code.
    FC_INLINE bool reduce(const Codes& codes, unsigned k, size_t left) {
        bool good = true;
        while (length[k] > left) {
            const u8 s = from[k][--length[k]];
            good &= codes.length[s] != 0;
            assert(holds(k, to[k].at));
            to[k].put(codes.code[s], codes.length[s]);
        }
        return good;
    }
    // Whether stream k has room for the 8 bytes that a put or a flush stores, of which fewer stay.
    bool holds(unsigned k, const u8* at) const { return at + 8 <= scratch + (k + 1) * kStreamRoom; }

    size_t finish(u8* out, size_t room) {
        size_t size[4], total = 6;
        for (unsigned k = 0; k < 4; ++k) {
            assert(holds(k, to[k].at));
            size[k] = static_cast<size_t>(to[k].finish() - (scratch + k * kStreamRoom));
            total += size[k];
        }
        if (total > room) return kNoRoom;
        u8* at = out + 6;
        for (unsigned k = 0; k < 4; ++k) {
            std::memcpy(at, scratch + k * kStreamRoom, size[k]);
            if (k < 3) {
                const u16 entry = static_cast<u16>(size[k]);  // at most 45,057
                std::memcpy(out + 2 * k, &entry, 2);
            }
            at += size[k];
        }
        return total;
    }
};

#if FASTCKPT_AVX512

// Codes in vector registers: low byte, and high byte (3 bits) with the length above it.
struct VectorCodes {
    __m512i low[4], high[4];
    __m512i before;  // small: the symbol before the first of 63 that have codes

    // Whether all codes but that of symbol 0 lie within 63 neighbours: exponents do. Then one look-up serves.
    bool small;

    explicit VectorCodes(const Codes& codes) {
        alignas(64) u8 low_bytes[256], high_bytes[256];
        for (unsigned s = 0; s < 256; ++s) {
            low_bytes[s] = static_cast<u8>(codes.code[s]);
            high_bytes[s] = static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4);
        }
        unsigned first = 1, last = 255;
        while (first < 256 && !codes.length[first]) ++first;
        while (last > first && !codes.length[last]) --last;
        small = first < 256 && last - first <= 62;
        before = _mm512_set1_epi8(static_cast<char>(first - 1));
        if (small) {
            for (unsigned i = 1; i < 64; ++i) {
                const unsigned s = first - 1 + i;
                low_bytes[i] = s < 256 && s >= i ? static_cast<u8>(codes.code[s]) : 0;
                high_bytes[i] = s < 256 && s >= i ? static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4) : 0;
            }
        }
        for (unsigned k = 0; k < 4; ++k) {
            low[k] = _mm512_load_si512(low_bytes + 64 * k);
            high[k] = _mm512_load_si512(high_bytes + 64 * k);
        }
    }
};

FC_INLINE __m512i join32(__m512i a, __m512i b, __m512i b_bits) {
    return _mm512_or_si512(b, _mm512_sllv_epi32(a, b_bits));
}
FC_INLINE __m512i join64(__m512i a, __m512i b, __m512i b_bits) {
    return _mm512_or_si512(b, _mm512_sllv_epi64(a, b_bits));
}

// 64 symbols to 16 groups of four: bits and lengths in 64-bit lanes; early[j] holds the first four of eight, late[j]
// the others.
template <bool small>
FC_INLINE void encode64(const VectorCodes& table, __m512i symbols, __m512i& early, __m512i& early_n, __m512i& late,
                        __m512i& late_n, __mmask64& bad) {
    __m512i low, high;
    if constexpr (small) {
        const __m512i index = _mm512_subs_epu8(symbols, table.before);
        // Past the window, or below it but not 0.
        bad |= _mm512_cmpgt_epu8_mask(index, _mm512_set1_epi8(63)) |
               _mm512_mask_test_epi8_mask(_mm512_testn_epi8_mask(index, index), symbols, symbols);
        low = _mm512_permutexvar_epi8(index, table.low[0]);
        high = _mm512_permutexvar_epi8(index, table.high[0]);
    } else {
        const __mmask64 upper = _mm512_movepi8_mask(symbols);
        low = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(table.low[0], symbols, table.low[1]), upper,
                                   _mm512_permutex2var_epi8(table.low[2], symbols, table.low[3]));
        high = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(table.high[0], symbols, table.high[1]), upper,
                                    _mm512_permutex2var_epi8(table.high[2], symbols, table.high[3]));
    }
    const __m512i n = _mm512_and_si512(_mm512_srli_epi16(high, 4), _mm512_set1_epi8(15));
    bad |= _mm512_testn_epi8_mask(n, n);
    high = _mm512_and_si512(high, _mm512_set1_epi8(15));
    // Neighbours join: the later symbol's bits come first, the earlier one's go above them.
    const __m512i byte = _mm512_set1_epi16(255), half = _mm512_set1_epi32(0xffff), word = _mm512_set1_epi64(0xffffffff);
    const __m512i c0 = _mm512_or_si512(_mm512_and_si512(low, byte), _mm512_slli_epi16(high, 8));
    const __m512i c1 = _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(byte, high));
    const __m512i n0 = _mm512_and_si512(n, byte), n1 = _mm512_srli_epi16(n, 8);
    const __m512i pair0 = join32(_mm512_and_si512(c0, half), _mm512_and_si512(c1, half), _mm512_and_si512(n1, half));
    const __m512i pair1 = join32(_mm512_srli_epi32(c0, 16), _mm512_srli_epi32(c1, 16), _mm512_srli_epi32(n1, 16));
    const __m512i sum = _mm512_add_epi16(n0, n1);
    const __m512i pair0_n = _mm512_and_si512(sum, half), pair1_n = _mm512_srli_epi32(sum, 16);
    early = join64(_mm512_and_si512(pair0, word), _mm512_and_si512(pair1, word), _mm512_and_si512(pair1_n, word));
    late = join64(_mm512_srli_epi64(pair0, 32), _mm512_srli_epi64(pair1, 32), _mm512_srli_epi64(pair1_n, 32));
    const __m512i quads = _mm512_add_epi32(pair0_n, pair1_n);
    early_n = _mm512_and_si512(quads, word);
    late_n = _mm512_srli_epi64(quads, 32);
}

template <bool small>
bool encode_common(const VectorCodes& table, Streams& streams, size_t common, Soon soon) {
    alignas(64) u64 bits[4][8], counts[4][8];
    __mmask64 bad = 0;
    Prefetch to_read(soon, common / 64);
    for (size_t left = common; left; left -= 64) {
        to_read.for_reading();
        for (unsigned k = 0; k < 4; ++k) {
            __m512i early, early_n, late, late_n;
            encode64<small>(table, _mm512_loadu_si512(streams.from[k] + left - 64), early, early_n, late, late_n, bad);
            const __m512i n = _mm512_add_epi64(early_n, late_n);
            if (__builtin_expect(_mm512_cmpgt_epu64_mask(n, _mm512_set1_epi64(56)) != 0, 0)) {
                alignas(64) u64 early_bits[8], early_counts[8], late_bits[8], late_counts[8];
                _mm512_store_si512(early_bits, early);
                _mm512_store_si512(early_counts, early_n);
                _mm512_store_si512(late_bits, late);
                _mm512_store_si512(late_counts, late_n);
                for (int j = 7; j >= 0; --j) {
                    streams.to[k].put(late_bits[j], static_cast<unsigned>(late_counts[j]));
                    streams.to[k].put(early_bits[j], static_cast<unsigned>(early_counts[j]));
                }
                _mm512_store_si512(bits[k], _mm512_setzero_si512());
                _mm512_store_si512(counts[k], _mm512_setzero_si512());
            } else {
                _mm512_store_si512(bits[k], _mm512_or_si512(late, _mm512_sllv_epi64(early, late_n)));
                _mm512_store_si512(counts[k], n);
            }
        }
        // Four chains that do not wait for each other.
        BitWriter w0 = streams.to[0], w1 = streams.to[1], w2 = streams.to[2], w3 = streams.to[3];
        for (int j = 7; j >= 0; --j) {
            w0.put(bits[0][j], static_cast<unsigned>(counts[0][j]));
            w1.put(bits[1][j], static_cast<unsigned>(counts[1][j]));
            w2.put(bits[2][j], static_cast<unsigned>(counts[2][j]));
            w3.put(bits[3][j], static_cast<unsigned>(counts[3][j]));
        }
        streams.to[0] = w0;
        streams.to[1] = w1;
        streams.to[2] = w2;
        streams.to[3] = w3;
        for (unsigned k = 0; k < 4; ++k) assert(streams.holds(k, streams.to[k].at));
    }
    return bad == 0;
}

size_t huffman_encode(const Codes& codes, const u8* symbols, size_t n, u8* out, size_t room, u8* scratch, Soon soon) {
    Streams streams(symbols, n, scratch);
    const size_t common = streams.length[3] & ~size_t{63};
    bool good = true;
    for (unsigned k = 0; k < 4; ++k) good &= streams.reduce(codes, k, common);
    const VectorCodes table(codes);
    good &= table.small ? encode_common<true>(table, streams, common, soon)
                        : encode_common<false>(table, streams, common, soon);
    return good ? streams.finish(out, room) : 0;
}

#else

#if FASTCKPT_AVX2

// Codes of 64 neighbouring symbols in four tables of 16: low bytes, and high bytes (3 bits) with the length above them.
struct VectorCodes {
    __m256i low[4], high[4];
    __m256i before;  // the symbol before the first of 63 that have codes
    bool small;      // whether all codes but that of symbol 0 lie within 63 neighbours: exponents do

    explicit VectorCodes(const Codes& codes) {
        unsigned first = 1, last = 255;
        while (first < 256 && !codes.length[first]) ++first;
        while (last > first && !codes.length[last]) --last;
        small = first < 256 && last - first <= 62;
        if (!small) return;
        before = _mm256_set1_epi8(static_cast<char>(first - 1));
        alignas(32) u8 low_bytes[64], high_bytes[64];
        for (unsigned i = 0; i < 64; ++i) {
            const unsigned s = i ? first - 1 + i : 0;
            low_bytes[i] = s < 256 ? static_cast<u8>(codes.code[s]) : 0;
            high_bytes[i] = s < 256 ? static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4) : 0;
        }
        for (unsigned k = 0; k < 4; ++k) {
            low[k] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low_bytes + 16 * k)));
            high[k] =
                _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high_bytes + 16 * k)));
        }
    }
};

FC_INLINE __m256i join32(__m256i a, __m256i b, __m256i b_bits) {
    return _mm256_or_si256(b, _mm256_sllv_epi32(a, b_bits));
}
FC_INLINE __m256i join64(__m256i a, __m256i b, __m256i b_bits) {
    return _mm256_or_si256(b, _mm256_sllv_epi64(a, b_bits));
}

// 32 symbols to four groups of eight, each as two of four. Non-zero bytes in `bad`: a symbol without a code.
FC_INLINE void encode32(const VectorCodes& table, __m256i symbols, __m256i& early, __m256i& early_n, __m256i& late,
                        __m256i& late_n, __m256i& bad) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i index = _mm256_subs_epu8(symbols, table.before);
    // A look-up of 64 is four of 16: a table's index saturates to 0x80 and more, which gives 0, where the symbol is
    // another table's.
    __m256i low = zero, high = zero;
    for (unsigned k = 0; k < 4; ++k) {
        const __m256i at = _mm256_adds_epu8(_mm256_sub_epi8(index, _mm256_set1_epi8(static_cast<char>(16 * k))),
                                            _mm256_set1_epi8(0x70));
        low = _mm256_or_si256(low, _mm256_shuffle_epi8(table.low[k], at));
        high = _mm256_or_si256(high, _mm256_shuffle_epi8(table.high[k], at));
    }
    const __m256i n = _mm256_and_si256(_mm256_srli_epi16(high, 4), _mm256_set1_epi8(15));
    // No length: past the window, or a gap. Index 0 of another symbol than 0: below the window.
    bad = _mm256_or_si256(bad, _mm256_cmpeq_epi8(n, zero));
    bad = _mm256_or_si256(bad, _mm256_andnot_si256(_mm256_cmpeq_epi8(symbols, zero), _mm256_cmpeq_epi8(index, zero)));
    high = _mm256_and_si256(high, _mm256_set1_epi8(15));
    // As encode64 of AVX-512: neighbours join, the later symbol's bits below the earlier one's.
    const __m256i byte = _mm256_set1_epi16(255), half = _mm256_set1_epi32(0xffff),
                  word = _mm256_set1_epi64x(0xffffffff);
    const __m256i c0 = _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi16(high, 8));
    const __m256i c1 = _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(byte, high));
    const __m256i n0 = _mm256_and_si256(n, byte), n1 = _mm256_srli_epi16(n, 8);
    const __m256i pair0 = join32(_mm256_and_si256(c0, half), _mm256_and_si256(c1, half), _mm256_and_si256(n1, half));
    const __m256i pair1 = join32(_mm256_srli_epi32(c0, 16), _mm256_srli_epi32(c1, 16), _mm256_srli_epi32(n1, 16));
    const __m256i sum = _mm256_add_epi16(n0, n1);
    const __m256i pair0_n = _mm256_and_si256(sum, half), pair1_n = _mm256_srli_epi32(sum, 16);
    early = join64(_mm256_and_si256(pair0, word), _mm256_and_si256(pair1, word), _mm256_and_si256(pair1_n, word));
    late = join64(_mm256_srli_epi64(pair0, 32), _mm256_srli_epi64(pair1, 32), _mm256_srli_epi64(pair1_n, 32));
    const __m256i quads = _mm256_add_epi32(pair0_n, pair1_n);
    early_n = _mm256_and_si256(quads, word);
    late_n = _mm256_srli_epi64(quads, 32);
}

// The last `common` symbols' worth of each stream, a multiple of 32. False: a symbol has no code.
bool encode_common(const VectorCodes& table, Streams& streams, size_t common, Soon soon) {
    alignas(32) u64 bits[4][4], counts[4][4];
    __m256i bad = _mm256_setzero_si256();
    Prefetch to_read(soon, common / 32);
    for (size_t left = common; left; left -= 32) {
        to_read.for_reading();
        for (unsigned k = 0; k < 4; ++k) {
            __m256i early, early_n, late, late_n;
            encode32(table, load256(streams.from[k] + left - 32), early, early_n, late, late_n, bad);
            const __m256i n = _mm256_add_epi64(early_n, late_n);
            if (__builtin_expect(_mm256_movemask_epi8(_mm256_cmpgt_epi64(n, _mm256_set1_epi64x(56))) != 0, 0)) {
                alignas(32) u64 early_bits[4], early_counts[4], late_bits[4], late_counts[4];
                store256(reinterpret_cast<u8*>(early_bits), early);
                store256(reinterpret_cast<u8*>(early_counts), early_n);
                store256(reinterpret_cast<u8*>(late_bits), late);
                store256(reinterpret_cast<u8*>(late_counts), late_n);
                for (int j = 3; j >= 0; --j) {
                    streams.to[k].put(late_bits[j], static_cast<unsigned>(late_counts[j]));
                    streams.to[k].put(early_bits[j], static_cast<unsigned>(early_counts[j]));
                }
                store256(reinterpret_cast<u8*>(bits[k]), _mm256_setzero_si256());
                store256(reinterpret_cast<u8*>(counts[k]), _mm256_setzero_si256());
            } else {
                store256(reinterpret_cast<u8*>(bits[k]), join64(early, late, late_n));
                store256(reinterpret_cast<u8*>(counts[k]), n);
            }
        }
        BitWriter w0 = streams.to[0], w1 = streams.to[1], w2 = streams.to[2], w3 = streams.to[3];
        for (int j = 3; j >= 0; --j) {
            w0.put(bits[0][j], static_cast<unsigned>(counts[0][j]));
            w1.put(bits[1][j], static_cast<unsigned>(counts[1][j]));
            w2.put(bits[2][j], static_cast<unsigned>(counts[2][j]));
            w3.put(bits[3][j], static_cast<unsigned>(counts[3][j]));
        }
        streams.to[0] = w0;
        streams.to[1] = w1;
        streams.to[2] = w2;
        streams.to[3] = w3;
        for (unsigned k = 0; k < 4; ++k) assert(streams.holds(k, streams.to[k].at));
    }
    return _mm256_testz_si256(bad, bad) != 0;
}

#endif

// As BitWriter, with the bits at the top of `word`, the oldest lowest: one shift a symbol.
struct TopWriter {
    u64 word;
    unsigned n;  // how many bits; fewer than 8 after a flush
    u8* at;

    explicit TopWriter(const BitWriter& other)
        : word(other.n ? other.waiting << (64 - other.n) : 0), n(other.n), at(other.at) {}
    BitWriter bottom() const { return BitWriter{.waiting = n ? word >> (64 - n) : 0, .n = n, .at = at}; }

    // entry: a code at the top, its length below.
    FC_INLINE void append(u64 entry) {
        word = (word >> (entry & 63)) | (entry & ~u64{0xff});
        n += static_cast<unsigned>(entry);
    }
    // Writes the whole bytes; up to 7 bits stay.
    FC_INLINE void flush() {
        const u64 bits = word >> ((64 - n) & 63);  // n is 0 only if nothing was ever written: then nothing is kept
        std::memcpy(at, &bits, 8);
        at += n >> 3;
        n &= 7;
    }
};

size_t huffman_encode(const Codes& codes, const u8* symbols, size_t n, u8* out, size_t room, u8* scratch, Soon soon) {
#if FASTCKPT_AVX2
    if (const VectorCodes table(codes); table.small) {
        Streams streams(symbols, n, scratch);
        const size_t common = streams.length[3] & ~size_t{31};
        bool good = true;
        for (unsigned k = 0; k < 4; ++k) good &= streams.reduce(codes, k, common);
        good &= encode_common(table, streams, common, soon);
        return good ? streams.finish(out, room) : 0;
    }
#endif
    // A code at the top of a word, its length below: one look-up, one shift and one or a symbol. Bit 7: no code.
    u64 table[256];
    for (unsigned s = 0; s < 256; ++s)
        table[s] = codes.length[s] ? u64{codes.code[s]} << (64 - codes.length[s]) | codes.length[s] : 0x80;
    Streams streams(symbols, n, scratch);
    constexpr size_t kRound = 5;  // 5 x 11 + 7 bits fit a word
    const size_t common = streams.length[3] / kRound * kRound;
    bool good = true;
    for (unsigned k = 0; k < 4; ++k) good &= streams.reduce(codes, k, common);
    // Four chains that do not wait for each other.
    TopWriter w0(streams.to[0]), w1(streams.to[1]), w2(streams.to[2]), w3(streams.to[3]);
    const u8 *from0 = streams.from[0] + common, *from1 = streams.from[1] + common;
    const u8 *from2 = streams.from[2] + common, *from3 = streams.from[3] + common;
    Prefetch to_read(soon, common / kRound);
    for (const u8* const end = streams.from[0]; from0 != end;) {
        for (size_t j = 0; j < kRound; ++j) {
            w0.append(table[*--from0]);
            w1.append(table[*--from1]);
            w2.append(table[*--from2]);
            w3.append(table[*--from3]);
        }
        // A symbol without a code: seen before anything is written past its room.
        if ((w0.n | w1.n | w2.n | w3.n) >= 0x80) return 0;
        assert(streams.holds(0, w0.at) && streams.holds(1, w1.at));
        assert(streams.holds(2, w2.at) && streams.holds(3, w3.at));
        w0.flush();
        w1.flush();
        w2.flush();
        w3.flush();
        to_read.for_reading();
    }
    if (!good) return 0;
    streams.to[0] = w0.bottom();
    streams.to[1] = w1.bottom();
    streams.to[2] = w2.bottom();
    streams.to[3] = w3.bottom();
    return streams.finish(out, room);
}

#endif

FC_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// A stream read backwards: the next bits are the top ones of `bits`; its lowest set bit tells how many of the 64 are
// used up.
struct BackwardBits {
    u64 bits;
    const u8* at;     // the 8 bytes that were loaded
    const u8* first;  // of the stream
    u8* out;
    u8* end;

    FC_INLINE bool open(const u8* data, size_t n, u8* to, size_t n_symbols) {
        if (n < 8 || !data[n - 1]) return false;
        first = data;
        at = data + n - 8;
        out = to;
        end = to + n_symbols;
        bits = (load64(at) | 1) << (8 - (31 - __builtin_clz(data[n - 1])));
        return true;
    }
    // Rounds of five look-ups that stay within the stream and within the output: each uses at most 55 bits after at
    // most 7 of the last load, so `at` goes back by 7 bytes or fewer; each writes 8 bytes at a place that is at most 24
    // further, and advances by 30 or fewer.
    FC_INLINE size_t safe_rounds() const {
        return smaller(static_cast<size_t>(at - first) / 7, static_cast<size_t>(end - out) / 34);
    }
    FC_INLINE void look_up(const u64* entries) {
        const u64 entry = entries[bits >> (64 - kMaxCodeBits)], symbols = entry >> 16;
        assert(end - out >= 8);
        std::memcpy(out, &symbols, 8);
        out += entry >> 8 & 0xff;
        bits <<= entry & 63;
    }
    FC_INLINE void refill() {
        const unsigned used = static_cast<unsigned>(__builtin_ctzll(bits));
        assert(static_cast<size_t>(at - first) >= used >> 3);
        at -= used >> 3;
        bits = (load64(at) | 1) << (used & 7);
    }
};

bool huffman_decode(const u64* entries, const u8* length, const u8* data, size_t n_bytes, u8* out, size_t n, Soon read,
                    Soon write) {
    if (n_bytes < 6 || n < 4) return false;
    const size_t size[3] = {size_t(data[0] | data[1] << 8), size_t(data[2] | data[3] << 8),
                            size_t(data[4] | data[5] << 8)};
    const size_t used = 6 + size[0] + size[1] + size[2], part = (n + 3) / 4;
    if (used >= n_bytes || 3 * part >= n) return false;
    BackwardBits streams[4];
    const u8* from = data + 6;
    for (unsigned k = 0; k < 4; ++k) {
        const size_t stream = k < 3 ? size[k] : n_bytes - used;
        if (!streams[k].open(from, stream, out + k * part, k < 3 ? part : n - 3 * part)) return false;
        from += stream;
    }
    // Some 70 symbols a round.
    Prefetch to_read(read, n / 80), to_write(write, n / 80);
    for (;;) {  // all four together: none waits for another
        size_t rounds = streams[0].safe_rounds();
        for (unsigned k = 1; k < 4; ++k) rounds = smaller(rounds, streams[k].safe_rounds());
        if (!rounds) break;
        BackwardBits s0 = streams[0], s1 = streams[1], s2 = streams[2], s3 = streams[3];
        do {
            for (int j = 0; j < 5; ++j) {
                s0.look_up(entries);
                s1.look_up(entries);
                s2.look_up(entries);
                s3.look_up(entries);
            }
            s0.refill();
            s1.refill();
            s2.refill();
            s3.refill();
            to_read.for_reading();
            to_write.for_writing();
        } while (--rounds);
        streams[0] = s0;
        streams[1] = s1;
        streams[2] = s2;
        streams[3] = s3;
    }
    for (BackwardBits& one : streams) {
        while (one.safe_rounds()) {
            for (int j = 0; j < 5; ++j) one.look_up(entries);
            one.refill();
        }
        // The rest symbol by symbol, counting bits.
        long left = 8 * (one.at - one.first) + 64 - __builtin_ctzll(one.bits);
        while (one.out < one.end) {
            u64 window = 0;
            const long bytes = (left + 7) / 8;
            if (bytes >= 8)
                window = load64(one.first + bytes - 8);
            else if (bytes > 0)
                std::memcpy(reinterpret_cast<u8*>(&window) + 8 - bytes, one.first, static_cast<size_t>(bytes));
            if (left < 0) return false;
            window <<= static_cast<unsigned>(8 * bytes - left);
            const u8 symbol = static_cast<u8>(entries[window >> (64 - kMaxCodeBits)] >> 16);
            *one.out = symbol;
            ++one.out;
            left -= length[symbol];
        }
        if (left != 0) return false;
    }
    return true;
}
