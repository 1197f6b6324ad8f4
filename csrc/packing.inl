// Seven bits of eight, and SUBPACK. Part of kernels.inl.

// The bits of x that `mask` names, together, and back: pext and pdep for masks that are the same in every byte.
template <unsigned bits, unsigned shift>
FC_INLINE u64 squeeze(u64 x) {
    [[maybe_unused]] constexpr u64 mask = 0x0101010101010101ull * (((1u << bits) - 1) << shift);
#ifdef __BMI2__
    return _pext_u64(x, mask);
#else
    u64 out = 0;
    x = (x & mask) >> shift;
    for (unsigned i = 0; i < 8; ++i) out |= (x >> (8 * i) & 0xff) << (bits * i);
    return out;
#endif
}
template <unsigned bits, unsigned shift>
FC_INLINE u64 spread(u64 x) {
    [[maybe_unused]] constexpr u64 mask = 0x0101010101010101ull * (((1u << bits) - 1) << shift);
#ifdef __BMI2__
    return _pdep_u64(x, mask);
#else
    u64 out = 0;
    for (unsigned i = 0; i < 8; ++i) out |= (x >> (bits * i) & ((1u << bits) - 1)) << (8 * i);
    return out << shift;
#endif
}

u8 pack7(const u8* bytes, size_t n, u8* packed) {
    u64 seen = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8, packed += 7) {  // the eighth byte of each store is overwritten by the next, or is slack
        const u64 x = load64(bytes + i);
        assert(packed <= bytes + i || packed >= bytes + n);  // in place: nothing is overwritten that was not read
        seen |= x;
        const u64 y = squeeze<7, 1>(x);
        std::memcpy(packed, &y, 8);
    }
    if (i < n) {
        u64 x = 0;
        std::memcpy(&x, bytes + i, n - i);
        seen |= x;
        const u64 y = squeeze<7, 1>(x);
        std::memcpy(packed, &y, (7 * (n - i) + 7) / 8);
    }
    seen |= seen >> 32;
    seen |= seen >> 16;
    seen |= seen >> 8;
    return static_cast<u8>(seen & 1);
}

void unpack7(const u8* packed, size_t n, u8* bytes) {
    size_t i = 0;
#if FASTCKPT_AVX512
    alignas(64) u8 sevens[64], shifts[64];  // each word: seven bytes, of which every seventh bit begins a value
    for (unsigned k = 0; k < 64; ++k) {
        sevens[k] = static_cast<u8>(k / 8 * 7 + k % 8);
        shifts[k] = static_cast<u8>(k % 8 * 7);
    }
    const __m512i words = _mm512_load_si512(sevens), shift = _mm512_load_si512(shifts);
    for (; i + 64 <= n; i += 64, packed += 56) {
        const __m512i x = _mm512_maskz_loadu_epi8(~u64{0} >> 8, packed);
        const __m512i values = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(words, x));
        _mm512_storeu_si512(bytes + i, _mm512_add_epi8(values, values));
    }
#endif
    for (; i + 16 <= n; i += 8, packed += 7) {  // 16: an 8-byte load here ends within the packed bytes
        const u64 y = spread<7, 1>(load64(packed));
        std::memcpy(bytes + i, &y, 8);
    }
    while (i < n) {
        const size_t m = n - i < 8 ? n - i : 8;
        u64 x = 0;
        std::memcpy(&x, packed, (7 * m + 7) / 8);
        const u64 y = spread<7, 1>(x);
        std::memcpy(bytes + i, &y, m);
        i += m;
        packed += 7;
    }
}

// n values of less than 2^bits in a byte each -> packed. n: any.
template <unsigned bits>
FC_INLINE void pack_values(const u8* values, size_t n, u8* packed) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8, packed += bits) {
        const u64 y = squeeze<bits, 0>(load64(values + i));
        std::memcpy(packed, &y, bits);
    }
    if (i < n) {
        u64 x = 0;
        std::memcpy(&x, values + i, n - i);
        const u64 y = squeeze<bits, 0>(x);
        std::memcpy(packed, &y, (bits * (n - i) + 7) / 8);
    }
}
template <unsigned bits>
FC_INLINE void unpack_values(const u8* packed, size_t n, u8* values) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8, packed += bits) {
        u64 x = 0;
        std::memcpy(&x, packed, bits);
        const u64 y = spread<bits, 0>(x);
        std::memcpy(values + i, &y, 8);
    }
    if (i < n) {
        u64 x = 0;
        std::memcpy(&x, packed, (bits * (n - i) + 7) / 8);
        const u64 y = spread<bits, 0>(x);
        std::memcpy(values + i, &y, n - i);
    }
}

constexpr size_t kBlockLanes = 1024;  // of a pass: 8 KiB of the widest lanes, first-level cache

#if FASTCKPT_AVX512

// 64 values in a byte each -> 8 x bits bytes, and back.
template <unsigned bits>
FC_INLINE void pack64(__m512i values, u8* packed) {
    if constexpr (bits == 8) _mm512_storeu_si512(packed, values);
    if constexpr (bits == 4) {
        const __m512i twos = _mm512_maddubs_epi16(values, _mm512_set1_epi16(0x1001));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(twos));
    }
    if constexpr (bits == 2) {
        const __m512i twos = _mm512_maddubs_epi16(values, _mm512_set1_epi16(0x0401));
        const __m512i fours = _mm512_madd_epi16(twos, _mm512_set1_epi32(0x00100001));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(fours));
    }
    if constexpr (bits == 1) {
        const u64 mask = _mm512_test_epi8_mask(values, values);
        std::memcpy(packed, &mask, 8);
    }
}
template <unsigned bits>
FC_INLINE __m512i unpack64(const u8* packed) {
    if constexpr (bits == 8) return _mm512_loadu_si512(packed);
    if constexpr (bits == 4) {
        const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
        return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(15));
    }
    if constexpr (bits == 2) {
        const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const __m512i y = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));  // places 0 and 2
        return _mm512_and_si512(_mm512_or_si512(y, _mm512_slli_epi32(y, 6)), _mm512_set1_epi8(3));
    }
    if constexpr (bits == 1) return _mm512_maskz_set1_epi8(load64(packed), 1);
}

// Vectors of lanes: differences, what does not fit into `bits`, and what does as bytes.
template <unsigned bits>
FC_INLINE __m256i pack_some16(const u8* raw, const u8* base, u8*& escapes, [[maybe_unused]] const u8* end) {
    const __m512i z = map16<Map::kSub>(_mm512_loadu_si512(raw), base), esc = _mm512_set1_epi16((1 << bits) - 1);
    const __mmask32 far = _mm512_cmpge_epu16_mask(z, esc);
    if (far) {
        assert(end - escapes >= 64);
        _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi16(far, _mm512_sub_epi16(z, esc)));
        escapes += 2 * static_cast<unsigned>(__builtin_popcount(far));
    }
    return _mm512_cvtepi16_epi8(_mm512_min_epu16(z, esc));
}
template <unsigned bits>
FC_INLINE __m128i pack_some32(const u8* raw, const u8* base, u8*& escapes, [[maybe_unused]] const u8* end) {
    const __m512i z = map32<Map::kSub>(_mm512_loadu_si512(raw), base), esc = _mm512_set1_epi32((1 << bits) - 1);
    const __mmask16 far = _mm512_cmpge_epu32_mask(z, esc);
    if (far) {
        assert(end - escapes >= 64);
        _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi32(far, _mm512_sub_epi32(z, esc)));
        escapes += 4 * static_cast<unsigned>(__builtin_popcount(far));
    }
    return _mm512_cvtepi32_epi8(_mm512_min_epu32(z, esc));
}

// The first lanes, a multiple of 64; returns how many.
template <unsigned w, unsigned bits>
FC_INLINE size_t pack_many(const u8* raw, const u8* base, size_t lanes, u8* packed, u8*& escapes, const u8* end) {
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        const u8 *const x = raw + i * w, *const b = base + i * w;
        __m512i values;
        if constexpr (w == 2) {
            const __m256i low = pack_some16<bits>(x, b, escapes, end);
            values =
                _mm512_inserti64x4(_mm512_castsi256_si512(low), pack_some16<bits>(x + 64, b + 64, escapes, end), 1);
        } else {
            values = _mm512_castsi128_si512(pack_some32<bits>(x, b, escapes, end));
            values = _mm512_inserti32x4(values, pack_some32<bits>(x + 64, b + 64, escapes, end), 1);
            values = _mm512_inserti32x4(values, pack_some32<bits>(x + 128, b + 128, escapes, end), 2);
            values = _mm512_inserti32x4(values, pack_some32<bits>(x + 192, b + 192, escapes, end), 3);
        }
        pack64<bits>(values, packed + i * bits / 8);
    }
    return i;
}

template <unsigned bits>
FC_INLINE void unpack_some16(__m256i values, const u8* base, const u8*& escapes, u8* raw) {
    const __m512i v = _mm512_cvtepu8_epi16(values);
    const __mmask32 at = _mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16((1 << bits) - 1));
    const __m512i more = _mm512_maskz_expand_epi16(at, _mm512_loadu_si512(escapes));
    escapes += 2 * static_cast<unsigned>(__builtin_popcount(at));
    _mm512_storeu_si512(raw, unmap16<Map::kSub>(_mm512_add_epi16(v, more), base));
}
template <unsigned bits>
FC_INLINE void unpack_some32(__m128i values, const u8* base, const u8*& escapes, u8* raw) {
    const __m512i v = _mm512_cvtepu8_epi32(values);
    const __mmask16 at = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32((1 << bits) - 1));
    const __m512i more = _mm512_maskz_expand_epi32(at, _mm512_loadu_si512(escapes));
    escapes += 4 * static_cast<unsigned>(__builtin_popcount(at));
    _mm512_storeu_si512(raw, unmap32<Map::kSub>(_mm512_add_epi32(v, more), base));
}

// As pack_many. Behind the escapes lies slack.
template <unsigned w, unsigned bits>
FC_INLINE size_t unpack_many(const u8* packed, const u8* base, size_t lanes, const u8*& escapes,
                             [[maybe_unused]] const u8* end, u8* raw) {
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        assert(escapes <= end);
        const __m512i values = unpack64<bits>(packed + i * bits / 8);
        const u8* const b = base + i * w;
        u8* const x = raw + i * w;
        if constexpr (w == 2) {
            unpack_some16<bits>(_mm512_castsi512_si256(values), b, escapes, x);
            unpack_some16<bits>(_mm512_extracti64x4_epi64(values, 1), b + 64, escapes, x + 64);
        } else {
            unpack_some32<bits>(_mm512_castsi512_si128(values), b, escapes, x);
            unpack_some32<bits>(_mm512_extracti32x4_epi32(values, 1), b + 64, escapes, x + 64);
            unpack_some32<bits>(_mm512_extracti32x4_epi32(values, 2), b + 128, escapes, x + 128);
            unpack_some32<bits>(_mm512_extracti32x4_epi32(values, 3), b + 192, escapes, x + 192);
        }
    }
    return i;
}

#endif

template <typename Lane, unsigned bits>
size_t subpack_lanes(const u8* raw, const u8* base, size_t lanes, u8* packed, u8* escapes) {
    constexpr unsigned w = sizeof(Lane);
    constexpr Lane esc = static_cast<Lane>((1u << bits) - 1);
    Lane z[kBlockLanes];
    u8 values[kBlockLanes];
    u8* const first = escapes;
    [[maybe_unused]] const u8* const end = first + lanes * w + kSlack;
    size_t done = 0;
#if FASTCKPT_AVX512
    if constexpr (w < 8) done = pack_many<w, bits>(raw, base, lanes, packed, escapes, end);
#endif
    for (size_t from = done; from < lanes; from += kBlockLanes) {
        const size_t n = lanes - from < kBlockLanes ? lanes - from : kBlockLanes;
        for (size_t i = 0; i < n; ++i)
            z[i] = mapped<Lane, Map::kSub>(load_lane<Lane>(raw + (from + i) * w), base + (from + i) * w);
        for (size_t i = 0; i < n; ++i) values[i] = static_cast<u8>(z[i] < esc ? z[i] : esc);
        if constexpr (bits == 8)
            std::memcpy(packed + from, values, n);
        else
            pack_values<bits>(values, n, packed + from * bits / 8);
        for (size_t i = 0; i < n; ++i) {  // no branch: whether a value escapes cannot be foreseen
            const Lane rest = static_cast<Lane>(z[i] - esc);
            assert(end - escapes >= static_cast<ptrdiff_t>(w));
            std::memcpy(escapes, &rest, w);
            escapes += z[i] >= esc ? w : 0;
        }
    }
    return static_cast<size_t>(escapes - first) / w;
}

template <typename Lane, unsigned bits>
size_t subunpack_lanes(const u8* packed, const u8* base, size_t lanes, const u8* escapes,
                       [[maybe_unused]] size_t n_escapes, u8* raw) {
    constexpr unsigned w = sizeof(Lane);
    constexpr Lane esc = static_cast<Lane>((1u << bits) - 1);
    Lane z[kBlockLanes];
    u8 values[kBlockLanes];
    size_t used = 0, done = 0;
#if FASTCKPT_AVX512
    if constexpr (w < 8) {
        const u8* next = escapes;
        done = unpack_many<w, bits>(packed, base, lanes, next, escapes + n_escapes * w, raw);
        used = static_cast<size_t>(next - escapes) / w;
    }
#endif
    for (size_t from = done; from < lanes; from += kBlockLanes) {
        const size_t n = lanes - from < kBlockLanes ? lanes - from : kBlockLanes;
        if constexpr (bits == 8)
            std::memcpy(values, packed + from, n);
        else
            unpack_values<bits>(packed + from * bits / 8, n, values);
        size_t far = 0;
        for (size_t i = 0; i < n; ++i) far += values[i] == esc;
        assert(far <= n_escapes - used);
        size_t i = 0;
        if (far < n / 16) {  // rare enough to be foreseen
            for (size_t j = i; j < n; ++j) z[j] = values[j];
            for (; i < n; ++i)
                if (values[i] == esc) z[i] = static_cast<Lane>(z[i] + load_lane<Lane>(escapes + w * used++));
        }
        for (; i < n; ++i) {  // no branch: the next escape is read in any case, and lies in the buffer or its slack
            assert(used <= n_escapes);
            const Lane more = load_lane<Lane>(escapes + used * w);
            const bool at = values[i] == esc;
            z[i] = static_cast<Lane>(values[i] + (at ? more : Lane{0}));
            used += at;
        }
        for (size_t j = 0; j < n; ++j) {
            const Lane x = unmapped<Lane, Map::kSub>(z[j], base + (from + j) * w);
            std::memcpy(raw + (from + j) * w, &x, w);
        }
    }
    return used;
}

size_t count_escapes(const u8* packed, size_t n_bytes, unsigned bits) {
    size_t found = 0;
    size_t i = 0;
#if FASTCKPT_AVX512
    for (; bits == 4 && i + 64 <= n_bytes; i += 64) {
        const __m512i x = _mm512_loadu_si512(packed + i), low = _mm512_set1_epi8(15);
        const u64 one = _mm512_cmpeq_epi8_mask(_mm512_and_si512(x, low), low);
        const u64 other = _mm512_cmpge_epu8_mask(x, _mm512_set1_epi8(static_cast<char>(0xf0)));
        found += static_cast<size_t>(__builtin_popcountll(one) + __builtin_popcountll(other));
    }
#endif
    if (bits == 8) {
        for (; i < n_bytes; ++i) found += packed[i] == 0xff;
        return found;
    }
    const u64 lowest = bits == 1 ? ~u64{0} : bits == 2 ? 0x5555555555555555ull : 0x1111111111111111ull;
    const auto in_word = [&](u64 x) {  // a value is an escape if all of its bits are set
        if (bits >= 2) x &= x >> 1;
        if (bits == 4) x &= x >> 2;
        return static_cast<size_t>(__builtin_popcountll(x & lowest));
    };
    for (; i + 8 <= n_bytes; i += 8) found += in_word(load64(packed + i));
    u64 rest = 0;
    std::memcpy(&rest, packed + i, n_bytes - i);
    return found + in_word(rest);
}

size_t subpack(const u8* raw, const u8* base, size_t lanes, unsigned w, unsigned bits, u8* packed, u8* escapes) {
    switch (w * 16 + bits) {
        case 2 * 16 + 1: return subpack_lanes<u16, 1>(raw, base, lanes, packed, escapes);
        case 2 * 16 + 2: return subpack_lanes<u16, 2>(raw, base, lanes, packed, escapes);
        case 2 * 16 + 4: return subpack_lanes<u16, 4>(raw, base, lanes, packed, escapes);
        case 2 * 16 + 8: return subpack_lanes<u16, 8>(raw, base, lanes, packed, escapes);
        case 4 * 16 + 1: return subpack_lanes<u32, 1>(raw, base, lanes, packed, escapes);
        case 4 * 16 + 2: return subpack_lanes<u32, 2>(raw, base, lanes, packed, escapes);
        case 4 * 16 + 4: return subpack_lanes<u32, 4>(raw, base, lanes, packed, escapes);
        case 4 * 16 + 8: return subpack_lanes<u32, 8>(raw, base, lanes, packed, escapes);
        case 8 * 16 + 1: return subpack_lanes<u64, 1>(raw, base, lanes, packed, escapes);
        case 8 * 16 + 2: return subpack_lanes<u64, 2>(raw, base, lanes, packed, escapes);
        case 8 * 16 + 4: return subpack_lanes<u64, 4>(raw, base, lanes, packed, escapes);
        default: return subpack_lanes<u64, 8>(raw, base, lanes, packed, escapes);
    }
}

size_t subunpack(const u8* packed, const u8* base, size_t lanes, unsigned w, unsigned bits, const u8* escapes, size_t n,
                 u8* raw) {
    switch (w * 16 + bits) {
        case 2 * 16 + 1: return subunpack_lanes<u16, 1>(packed, base, lanes, escapes, n, raw);
        case 2 * 16 + 2: return subunpack_lanes<u16, 2>(packed, base, lanes, escapes, n, raw);
        case 2 * 16 + 4: return subunpack_lanes<u16, 4>(packed, base, lanes, escapes, n, raw);
        case 2 * 16 + 8: return subunpack_lanes<u16, 8>(packed, base, lanes, escapes, n, raw);
        case 4 * 16 + 1: return subunpack_lanes<u32, 1>(packed, base, lanes, escapes, n, raw);
        case 4 * 16 + 2: return subunpack_lanes<u32, 2>(packed, base, lanes, escapes, n, raw);
        case 4 * 16 + 4: return subunpack_lanes<u32, 4>(packed, base, lanes, escapes, n, raw);
        case 4 * 16 + 8: return subunpack_lanes<u32, 8>(packed, base, lanes, escapes, n, raw);
        case 8 * 16 + 1: return subunpack_lanes<u64, 1>(packed, base, lanes, escapes, n, raw);
        case 8 * 16 + 2: return subunpack_lanes<u64, 2>(packed, base, lanes, escapes, n, raw);
        case 8 * 16 + 4: return subunpack_lanes<u64, 4>(packed, base, lanes, escapes, n, raw);
        default: return subunpack_lanes<u64, 8>(packed, base, lanes, escapes, n, raw);
    }
}
