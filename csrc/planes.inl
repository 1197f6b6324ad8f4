// Lanes to byte planes and back. Part of kernels.inl.

// ---- lane by lane ----

template <typename Lane, Map map>
FC_INLINE Lane mapped(Lane x, const u8* base) {
    if constexpr (map == Map::kRot) return rotated(x);
    if constexpr (map == Map::kSub) return difference(x, load_lane<Lane>(base));
    return x;
}

template <typename Lane, Map map>
FC_INLINE Lane unmapped(Lane y, const u8* base) {
    if constexpr (map == Map::kRot) return unrotated(y);
    if constexpr (map == Map::kSub) return undifference(y, load_lane<Lane>(base));
    return y;
}

template <typename Lane, Map map>
void split_lanes(const u8* raw, const u8* base, size_t from, size_t lanes, u8* const* planes) {
    constexpr unsigned w = sizeof(Lane);
    for (unsigned k = 0; k < w; ++k) {
        u8* __restrict plane = planes[k];
        for (size_t i = from; i < lanes; ++i)
            plane[i] = byte_of(mapped<Lane, map>(load_lane<Lane>(raw + i * w), base + i * w), k);
    }
}

template <typename Lane, Map map>
void merge_lanes(const u8* const* planes, const u8* base, size_t from, size_t lanes, u8* raw) {
    constexpr unsigned w = sizeof(Lane);
    for (size_t i = from; i < lanes; ++i) {
        Lane y = 0;
        for (unsigned k = 0; k < w; ++k)
            y = static_cast<Lane>(y | static_cast<Lane>(static_cast<Lane>(planes[k][i]) << (8 * (w - 1 - k))));
        const Lane x = unmapped<Lane, map>(y, base + i * w);
        std::memcpy(raw + i * w, &x, w);
    }
}

// ---- vectors ----

#if FASTCKPT_AVX512

template <Map map>
FC_INLINE __m512i map16(__m512i x, const u8* base) {
    if constexpr (map == Map::kRot) return _mm512_shldi_epi16(x, x, 1);
    if constexpr (map == Map::kSub) {
        const __m512i top = _mm512_set1_epi16(static_cast<short>(0x8000)), b = _mm512_loadu_si512(base);
        const __m512i mx = _mm512_xor_si512(x, _mm512_or_si512(_mm512_srai_epi16(x, 15), top));
        const __m512i mb = _mm512_xor_si512(b, _mm512_or_si512(_mm512_srai_epi16(b, 15), top));
        const __m512i d = _mm512_sub_epi16(mx, mb);
        return _mm512_xor_si512(_mm512_add_epi16(d, d), _mm512_srai_epi16(d, 15));
    }
    return x;
}
template <Map map>
FC_INLINE __m512i unmap16(__m512i y, const u8* base) {
    if constexpr (map == Map::kRot) return _mm512_shldi_epi16(y, y, 15);
    if constexpr (map == Map::kSub) {
        const __m512i top = _mm512_set1_epi16(static_cast<short>(0x8000)), b = _mm512_loadu_si512(base),
                      zero = _mm512_setzero_si512();
        const __m512i odd = _mm512_sub_epi16(zero, _mm512_and_si512(y, _mm512_set1_epi16(1)));
        const __m512i d = _mm512_xor_si512(_mm512_srli_epi16(y, 1), odd);
        const __m512i mb = _mm512_xor_si512(b, _mm512_or_si512(_mm512_srai_epi16(b, 15), top));
        const __m512i m = _mm512_add_epi16(d, mb);
        const __m512i not_sign = _mm512_xor_si512(_mm512_srai_epi16(m, 15), _mm512_set1_epi16(-1));
        return _mm512_xor_si512(m, _mm512_or_si512(not_sign, top));
    }
    return y;
}
template <Map map>
FC_INLINE __m512i map32(__m512i x, const u8* base) {
    if constexpr (map == Map::kRot) return _mm512_rol_epi32(x, 1);
    if constexpr (map == Map::kSub) {
        const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000u)), b = _mm512_loadu_si512(base);
        const __m512i mx = _mm512_xor_si512(x, _mm512_or_si512(_mm512_srai_epi32(x, 31), top));
        const __m512i mb = _mm512_xor_si512(b, _mm512_or_si512(_mm512_srai_epi32(b, 31), top));
        const __m512i d = _mm512_sub_epi32(mx, mb);
        return _mm512_xor_si512(_mm512_add_epi32(d, d), _mm512_srai_epi32(d, 31));
    }
    return x;
}
template <Map map>
FC_INLINE __m512i unmap32(__m512i y, const u8* base) {
    if constexpr (map == Map::kRot) return _mm512_ror_epi32(y, 1);
    if constexpr (map == Map::kSub) {
        const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000u)), b = _mm512_loadu_si512(base),
                      zero = _mm512_setzero_si512();
        const __m512i odd = _mm512_sub_epi32(zero, _mm512_and_si512(y, _mm512_set1_epi32(1)));
        const __m512i d = _mm512_xor_si512(_mm512_srli_epi32(y, 1), odd);
        const __m512i mb = _mm512_xor_si512(b, _mm512_or_si512(_mm512_srai_epi32(b, 31), top));
        const __m512i m = _mm512_add_epi32(d, mb);
        const __m512i not_sign = _mm512_xor_si512(_mm512_srai_epi32(m, 31), _mm512_set1_epi32(-1));
        return _mm512_xor_si512(m, _mm512_or_si512(not_sign, top));
    }
    return y;
}

// Byte i of every second, for two vectors: what vpermt2b wants.
FC_INLINE __m512i every_second(unsigned first) {
    alignas(64) u8 index[64];
    for (unsigned i = 0; i < 64; ++i) index[i] = static_cast<u8>(2 * i + first);
    return _mm512_load_si512(index);
}
// Bytes of 16 lanes of 4, plane by plane, lowest first.
FC_INLINE __m512i by_plane() {
    alignas(64) u8 index[64];
    for (unsigned i = 0; i < 64; ++i) index[i] = static_cast<u8>(4 * (i % 16) + i / 16);
    return _mm512_load_si512(index);
}

template <Map map>
void split2(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    const __m512i odd = every_second(1), even = every_second(0);
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        const __m512i a = map16<map>(_mm512_loadu_si512(raw + 2 * i), base + 2 * i);
        const __m512i b = map16<map>(_mm512_loadu_si512(raw + 2 * i + 64), base + 2 * i + 64);
        _mm512_storeu_si512(planes[0] + i, _mm512_permutex2var_epi8(a, odd, b));
        _mm512_storeu_si512(planes[1] + i, _mm512_permutex2var_epi8(a, even, b));
    }
    split_lanes<u16, map>(raw, base, i, lanes, planes);
}

template <Map map>
void merge2(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        const __m512i high = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(planes[0] + i));
        const __m512i low = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(planes[1] + i));
        _mm512_storeu_si512(raw + 2 * i, unmap16<map>(_mm512_unpacklo_epi8(low, high), base + 2 * i));
        _mm512_storeu_si512(raw + 2 * i + 64, unmap16<map>(_mm512_unpackhi_epi8(low, high), base + 2 * i + 64));
    }
    merge_lanes<u16, map>(planes, base, i, lanes, raw);
}

template <Map map>
void split4(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    const __m512i gather = by_plane();
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        __m512i v[4];
        for (unsigned k = 0; k < 4; ++k) {
            const size_t at = 4 * i + 64 * k;
            v[k] = _mm512_permutexvar_epi8(gather, map32<map>(_mm512_loadu_si512(raw + at), base + at));
        }
        // Each v: 16 bytes of each plane; a transposition of 4 x 4 such groups.
        const __m512i t0 = _mm512_shuffle_i32x4(v[0], v[1], 0x44), t1 = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
        const __m512i t2 = _mm512_shuffle_i32x4(v[2], v[3], 0x44), t3 = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
        _mm512_storeu_si512(planes[3] + i, _mm512_shuffle_i32x4(t0, t2, 0x88));
        _mm512_storeu_si512(planes[2] + i, _mm512_shuffle_i32x4(t0, t2, 0xDD));
        _mm512_storeu_si512(planes[1] + i, _mm512_shuffle_i32x4(t1, t3, 0x88));
        _mm512_storeu_si512(planes[0] + i, _mm512_shuffle_i32x4(t1, t3, 0xDD));
    }
    split_lanes<u32, map>(raw, base, i, lanes, planes);
}

template <Map map>
void merge4(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    size_t i = 0;
    for (; i + 64 <= lanes; i += 64) {
        const __m512i a = _mm512_loadu_si512(planes[3] + i), b = _mm512_loadu_si512(planes[2] + i);
        const __m512i c = _mm512_loadu_si512(planes[1] + i), d = _mm512_loadu_si512(planes[0] + i);
        const __m512i abl = _mm512_unpacklo_epi8(a, b), abh = _mm512_unpackhi_epi8(a, b);
        const __m512i cdl = _mm512_unpacklo_epi8(c, d), cdh = _mm512_unpackhi_epi8(c, d);
        const __m512i r0 = _mm512_unpacklo_epi16(abl, cdl), r1 = _mm512_unpackhi_epi16(abl, cdl);
        const __m512i r2 = _mm512_unpacklo_epi16(abh, cdh), r3 = _mm512_unpackhi_epi16(abh, cdh);
        const __m512i s0 = _mm512_shuffle_i32x4(r0, r1, 0x44), s1 = _mm512_shuffle_i32x4(r2, r3, 0x44);
        const __m512i s2 = _mm512_shuffle_i32x4(r0, r1, 0xEE), s3 = _mm512_shuffle_i32x4(r2, r3, 0xEE);
        const __m512i out[4] = {_mm512_shuffle_i32x4(s0, s1, 0x88), _mm512_shuffle_i32x4(s0, s1, 0xDD),
                                _mm512_shuffle_i32x4(s2, s3, 0x88), _mm512_shuffle_i32x4(s2, s3, 0xDD)};
        for (unsigned k = 0; k < 4; ++k) {
            const size_t at = 4 * i + 64 * k;
            _mm512_storeu_si512(raw + at, unmap32<map>(out[k], base + at));
        }
    }
    merge_lanes<u32, map>(planes, base, i, lanes, raw);
}

#elif FASTCKPT_AVX2

FC_INLINE __m256i load256(const u8* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FC_INLINE void store256(u8* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

template <Map map>
FC_INLINE __m256i map16(__m256i x, const u8* base) {
    if constexpr (map == Map::kRot) return _mm256_or_si256(_mm256_add_epi16(x, x), _mm256_srli_epi16(x, 15));
    if constexpr (map == Map::kSub) {
        const __m256i top = _mm256_set1_epi16(static_cast<short>(0x8000)), b = load256(base);
        const __m256i mx = _mm256_xor_si256(x, _mm256_or_si256(_mm256_srai_epi16(x, 15), top));
        const __m256i mb = _mm256_xor_si256(b, _mm256_or_si256(_mm256_srai_epi16(b, 15), top));
        const __m256i d = _mm256_sub_epi16(mx, mb);
        return _mm256_xor_si256(_mm256_add_epi16(d, d), _mm256_srai_epi16(d, 15));
    }
    return x;
}
template <Map map>
FC_INLINE __m256i unmap16(__m256i y, const u8* base) {
    if constexpr (map == Map::kRot) return _mm256_or_si256(_mm256_srli_epi16(y, 1), _mm256_slli_epi16(y, 15));
    if constexpr (map == Map::kSub) {
        const __m256i top = _mm256_set1_epi16(static_cast<short>(0x8000)), b = load256(base);
        const __m256i odd = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_and_si256(y, _mm256_set1_epi16(1)));
        const __m256i d = _mm256_xor_si256(_mm256_srli_epi16(y, 1), odd);
        const __m256i mb = _mm256_xor_si256(b, _mm256_or_si256(_mm256_srai_epi16(b, 15), top));
        const __m256i m = _mm256_add_epi16(d, mb);
        const __m256i not_sign = _mm256_xor_si256(_mm256_srai_epi16(m, 15), _mm256_set1_epi16(-1));
        return _mm256_xor_si256(m, _mm256_or_si256(not_sign, top));
    }
    return y;
}
template <Map map>
FC_INLINE __m256i map32(__m256i x, const u8* base) {
    if constexpr (map == Map::kRot) return _mm256_or_si256(_mm256_add_epi32(x, x), _mm256_srli_epi32(x, 31));
    if constexpr (map == Map::kSub) {
        const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u)), b = load256(base);
        const __m256i mx = _mm256_xor_si256(x, _mm256_or_si256(_mm256_srai_epi32(x, 31), top));
        const __m256i mb = _mm256_xor_si256(b, _mm256_or_si256(_mm256_srai_epi32(b, 31), top));
        const __m256i d = _mm256_sub_epi32(mx, mb);
        return _mm256_xor_si256(_mm256_add_epi32(d, d), _mm256_srai_epi32(d, 31));
    }
    return x;
}
template <Map map>
FC_INLINE __m256i unmap32(__m256i y, const u8* base) {
    if constexpr (map == Map::kRot) return _mm256_or_si256(_mm256_srli_epi32(y, 1), _mm256_slli_epi32(y, 31));
    if constexpr (map == Map::kSub) {
        const __m256i top = _mm256_set1_epi32(static_cast<int>(0x80000000u)), b = load256(base);
        const __m256i odd = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_and_si256(y, _mm256_set1_epi32(1)));
        const __m256i d = _mm256_xor_si256(_mm256_srli_epi32(y, 1), odd);
        const __m256i mb = _mm256_xor_si256(b, _mm256_or_si256(_mm256_srai_epi32(b, 31), top));
        const __m256i m = _mm256_add_epi32(d, mb);
        const __m256i not_sign = _mm256_xor_si256(_mm256_srai_epi32(m, 31), _mm256_set1_epi32(-1));
        return _mm256_xor_si256(m, _mm256_or_si256(not_sign, top));
    }
    return y;
}

template <Map map>
void split2(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    const __m256i low = _mm256_set1_epi16(255);
    size_t i = 0;
    for (; i + 32 <= lanes; i += 32) {
        const __m256i a = map16<map>(load256(raw + 2 * i), base + 2 * i);
        const __m256i b = map16<map>(load256(raw + 2 * i + 32), base + 2 * i + 32);
        const __m256i h = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        const __m256i l = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        store256(planes[0] + i, _mm256_permute4x64_epi64(h, 0xD8));
        store256(planes[1] + i, _mm256_permute4x64_epi64(l, 0xD8));
    }
    split_lanes<u16, map>(raw, base, i, lanes, planes);
}

template <Map map>
void merge2(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    size_t i = 0;
    for (; i + 32 <= lanes; i += 32) {
        const __m256i h = _mm256_permute4x64_epi64(load256(planes[0] + i), 0xD8),
                      l = _mm256_permute4x64_epi64(load256(planes[1] + i), 0xD8);
        store256(raw + 2 * i, unmap16<map>(_mm256_unpacklo_epi8(l, h), base + 2 * i));
        store256(raw + 2 * i + 32, unmap16<map>(_mm256_unpackhi_epi8(l, h), base + 2 * i + 32));
    }
    merge_lanes<u16, map>(planes, base, i, lanes, raw);
}

template <Map map>
void split4(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    const __m256i in_lane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                             13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i across = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    size_t i = 0;
    for (; i + 32 <= lanes; i += 32) {
        __m256i v[4];
        for (unsigned k = 0; k < 4; ++k) {  // 8 bytes of each plane
            const size_t at = 4 * i + 32 * k;
            v[k] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(map32<map>(load256(raw + at), base + at), in_lane),
                                               across);
        }
        const __m256i a = _mm256_unpacklo_epi64(v[0], v[1]), b = _mm256_unpackhi_epi64(v[0], v[1]);
        const __m256i c = _mm256_unpacklo_epi64(v[2], v[3]), d = _mm256_unpackhi_epi64(v[2], v[3]);
        store256(planes[3] + i, _mm256_permute2x128_si256(a, c, 0x20));
        store256(planes[2] + i, _mm256_permute2x128_si256(b, d, 0x20));
        store256(planes[1] + i, _mm256_permute2x128_si256(a, c, 0x31));
        store256(planes[0] + i, _mm256_permute2x128_si256(b, d, 0x31));
    }
    split_lanes<u32, map>(raw, base, i, lanes, planes);
}

template <Map map>
void merge4(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    size_t i = 0;
    for (; i + 32 <= lanes; i += 32) {
        const __m256i a = load256(planes[3] + i), b = load256(planes[2] + i), c = load256(planes[1] + i),
                      d = load256(planes[0] + i);
        const __m256i abl = _mm256_unpacklo_epi8(a, b), abh = _mm256_unpackhi_epi8(a, b);
        const __m256i cdl = _mm256_unpacklo_epi8(c, d), cdh = _mm256_unpackhi_epi8(c, d);
        const __m256i r0 = _mm256_unpacklo_epi16(abl, cdl), r1 = _mm256_unpackhi_epi16(abl, cdl);
        const __m256i r2 = _mm256_unpacklo_epi16(abh, cdh), r3 = _mm256_unpackhi_epi16(abh, cdh);
        const __m256i out[4] = {_mm256_permute2x128_si256(r0, r1, 0x20), _mm256_permute2x128_si256(r2, r3, 0x20),
                                _mm256_permute2x128_si256(r0, r1, 0x31), _mm256_permute2x128_si256(r2, r3, 0x31)};
        for (unsigned k = 0; k < 4; ++k) {
            const size_t at = 4 * i + 32 * k;
            store256(raw + at, unmap32<map>(out[k], base + at));
        }
    }
    merge_lanes<u32, map>(planes, base, i, lanes, raw);
}

#else

template <Map map>
void split2(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    split_lanes<u16, map>(raw, base, 0, lanes, planes);
}
template <Map map>
void merge2(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    merge_lanes<u16, map>(planes, base, 0, lanes, raw);
}
template <Map map>
void split4(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    split_lanes<u32, map>(raw, base, 0, lanes, planes);
}
template <Map map>
void merge4(const u8* const* planes, const u8* base, size_t lanes, u8* raw) {
    merge_lanes<u32, map>(planes, base, 0, lanes, raw);
}

#endif

template <Map map>
void split_width(const u8* raw, const u8* base, size_t lanes, unsigned w, u8* const* planes) {
    if (!base) base = raw;  // never read, but never null either
    if (w == 2) split2<map>(raw, base, lanes, planes);
    if (w == 4) split4<map>(raw, base, lanes, planes);
    if (w == 8) split_lanes<u64, map>(raw, base, 0, lanes, planes);
}
template <Map map>
void merge_width(const u8* const* planes, const u8* base, size_t lanes, unsigned w, u8* raw) {
    if (!base) base = raw;
    if (w == 2) merge2<map>(planes, base, lanes, raw);
    if (w == 4) merge4<map>(planes, base, lanes, raw);
    if (w == 8) merge_lanes<u64, map>(planes, base, 0, lanes, raw);
}

void split(const u8* raw, const u8* base, size_t lanes, unsigned w, Map map, u8* const* planes) {
    if (map == Map::kRot) split_width<Map::kRot>(raw, base, lanes, w, planes);
    if (map == Map::kSub) split_width<Map::kSub>(raw, base, lanes, w, planes);
    if (map == Map::kPlain) split_width<Map::kPlain>(raw, base, lanes, w, planes);
}
void merge(const u8* const* planes, const u8* base, size_t lanes, unsigned w, Map map, u8* raw) {
    if (map == Map::kRot) merge_width<Map::kRot>(planes, base, lanes, w, raw);
    if (map == Map::kSub) merge_width<Map::kSub>(planes, base, lanes, w, raw);
    if (map == Map::kPlain) merge_width<Map::kPlain>(planes, base, lanes, w, raw);
}

// ---- CAST ----

FC_INLINE u16 rounded(u32 u) {
    const u32 nearest = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x0040;
    return static_cast<u16>((u & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}

void cast(const u8* __restrict wide, size_t lanes, u8* __restrict narrow) {
    for (size_t i = 0; i < lanes; ++i) {
        const u16 x = rounded(load32(wide + 4 * i));
        std::memcpy(narrow + 2 * i, &x, 2);
    }
}

bool cast_differs(const u8* narrow, const u8* wide, size_t lanes) {
    u32 differ = 0;
    for (size_t i = 0; i < lanes; ++i) differ |= u32{load_lane<u16>(narrow + 2 * i)} ^ rounded(load32(wide + 4 * i));
    return differ != 0;
}
