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

template <typename Lane, unsigned bits>
size_t subpack_lanes(const u8* raw, const u8* base, size_t lanes, u8* packed, u8* escapes) {
    constexpr unsigned w = sizeof(Lane);
    constexpr Lane esc = static_cast<Lane>((1u << bits) - 1);
    Lane z[kBlockLanes];
    u8 values[kBlockLanes];
    u8* const first = escapes;
    [[maybe_unused]] const u8* const end = first + lanes * w + kSlack;
    for (size_t from = 0; from < lanes; from += kBlockLanes) {
        const size_t n = lanes - from < kBlockLanes ? lanes - from : kBlockLanes;
        for (size_t i = 0; i < n; ++i)
            z[i] = mapped<Lane, Map::kSub>(load_lane<Lane>(raw + (from + i) * w), base + (from + i) * w);
        for (size_t i = 0; i < n; ++i) values[i] = static_cast<u8>(z[i] < esc ? z[i] : esc);
        if constexpr (bits == 8)
            std::memcpy(packed + from, values, n);
        else
            pack_values<bits>(values, n, packed + from * bits / 8);
        size_t i = 0;
#if FASTCKPT_AVX512
        if constexpr (w == 2)
            for (; i + 32 <= n; i += 32) {
                const __m512i v = _mm512_loadu_si512(z + i), e = _mm512_set1_epi16(static_cast<short>(esc));
                const __mmask32 far = _mm512_cmpge_epu16_mask(v, e);
                assert(end - escapes >= 64);
                _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi16(far, _mm512_sub_epi16(v, e)));
                escapes += 2 * static_cast<unsigned>(__builtin_popcount(far));
            }
        if constexpr (w == 4)
            for (; i + 16 <= n; i += 16) {
                const __m512i v = _mm512_loadu_si512(z + i), e = _mm512_set1_epi32(static_cast<int>(esc));
                const __mmask16 far = _mm512_cmpge_epu32_mask(v, e);
                assert(end - escapes >= 64);
                _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi32(far, _mm512_sub_epi32(v, e)));
                escapes += 4 * static_cast<unsigned>(__builtin_popcount(far));
            }
#endif
        for (; i < n; ++i) {  // no branch: whether a value escapes cannot be foreseen
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
    size_t used = 0;
    for (size_t from = 0; from < lanes; from += kBlockLanes) {
        const size_t n = lanes - from < kBlockLanes ? lanes - from : kBlockLanes;
        if constexpr (bits == 8)
            std::memcpy(values, packed + from, n);
        else
            unpack_values<bits>(packed + from * bits / 8, n, values);
        size_t far = 0;
        for (size_t i = 0; i < n; ++i) far += values[i] == esc;
        assert(far <= n_escapes - used);
        size_t i = 0;
#if FASTCKPT_AVX512
        if constexpr (w == 2)
            for (; i + 32 <= n; i += 32) {
                const __m512i v =
                    _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)));
                const __mmask32 at = _mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16(static_cast<short>(esc)));
                assert(used <= n_escapes);  // 64 bytes from there are escapes or their slack
                const __m512i more = _mm512_maskz_expand_epi16(at, _mm512_loadu_si512(escapes + used * w));
                _mm512_storeu_si512(z + i, _mm512_add_epi16(v, more));
                used += static_cast<unsigned>(__builtin_popcount(at));
            }
        if constexpr (w == 4)
            for (; i + 16 <= n; i += 16) {
                const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
                const __mmask16 at = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(esc)));
                assert(used <= n_escapes);  // 64 bytes from there are escapes or their slack
                const __m512i more = _mm512_maskz_expand_epi32(at, _mm512_loadu_si512(escapes + used * w));
                _mm512_storeu_si512(z + i, _mm512_add_epi32(v, more));
                used += static_cast<unsigned>(__builtin_popcount(at));
            }
#endif
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
    if (bits == 8) {
        for (size_t i = 0; i < n_bytes; ++i) found += packed[i] == 0xff;
        return found;
    }
    const u64 lowest = bits == 1 ? ~u64{0} : bits == 2 ? 0x5555555555555555ull : 0x1111111111111111ull;
    const auto in_word = [&](u64 x) {  // a value is an escape if all of its bits are set
        if (bits >= 2) x &= x >> 1;
        if (bits == 4) x &= x >> 2;
        return static_cast<size_t>(__builtin_popcountll(x & lowest));
    };
    size_t i = 0;
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
