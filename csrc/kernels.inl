// The inner loops. Included once for each instruction set, with FASTCKPT_ISA (a namespace), FASTCKPT_ISA_NAME, and FASTCKPT_AVX2 and
// FASTCKPT_AVX512 where they may be used. Only static functions and memcpy: nothing that the linker could take for another set.
#include <cstring>

#include "crc64.h"
#include "kernels.h"
#include "xxh3.h"

#ifndef FASTCKPT_AVX2
#define FASTCKPT_AVX2 0
#endif
#ifndef FASTCKPT_AVX512
#define FASTCKPT_AVX512 0
#endif

namespace fastckpt {
namespace FASTCKPT_ISA {
namespace {

#define FC_INLINE inline __attribute__((always_inline))

// ---- lanes ↔ integers ------------------------------------------------------------------------------------------------------------

template <typename Lane>
FC_INLINE Lane load_lane(const u8* p) {
    Lane x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <typename Lane>
constexpr Lane kTop = static_cast<Lane>(Lane{1} << (8 * sizeof(Lane) - 1));

template <typename Lane>
FC_INLINE Lane ordered(Lane x) {  // floats in integer order
    return static_cast<Lane>(x & kTop<Lane> ? ~x : x | kTop<Lane>);
}
template <typename Lane>
FC_INLINE Lane unordered(Lane m) {
    return static_cast<Lane>(m & kTop<Lane> ? m ^ kTop<Lane> : ~m);
}

template <typename Lane, Map map>
FC_INLINE Lane mapped(Lane x, const u8* base) {
    if constexpr (map == Map::kRot) return static_cast<Lane>(static_cast<Lane>(x << 1) | static_cast<Lane>(x >> (8 * sizeof(Lane) - 1)));
    if constexpr (map == Map::kSub) {
        const Lane d = static_cast<Lane>(ordered(x) - ordered(load_lane<Lane>(base)));
        return static_cast<Lane>(static_cast<Lane>(d << 1) ^ static_cast<Lane>(d & kTop<Lane> ? ~Lane{0} : Lane{0}));
    }
    return x;
}

template <typename Lane, Map map>
FC_INLINE Lane unmapped(Lane y, const u8* base) {
    if constexpr (map == Map::kRot) return static_cast<Lane>(static_cast<Lane>(y >> 1) | static_cast<Lane>(y << (8 * sizeof(Lane) - 1)));
    if constexpr (map == Map::kSub) {
        const Lane d = static_cast<Lane>(static_cast<Lane>(y >> 1) ^ static_cast<Lane>(y & 1 ? ~Lane{0} : Lane{0}));
        return unordered(static_cast<Lane>(d + ordered(load_lane<Lane>(base))));
    }
    return y;
}

template <typename Lane, Map map>
void split_lanes(const u8* raw, const u8* base, size_t from, size_t lanes, u8* const* planes) {
    constexpr unsigned w = sizeof(Lane);
    for (unsigned k = 0; k < w; ++k) {
        u8* __restrict plane = planes[k];
        for (size_t i = from; i < lanes; ++i)
            plane[i] = static_cast<u8>(mapped<Lane, map>(load_lane<Lane>(raw + i * w), base + i * w) >> (8 * (w - 1 - k)));
    }
}

template <typename Lane, Map map>
void merge_lanes(const u8* const* planes, const u8* base, size_t from, size_t lanes, u8* raw) {
    constexpr unsigned w = sizeof(Lane);
    for (size_t i = from; i < lanes; ++i) {
        Lane y = 0;
        for (unsigned k = 0; k < w; ++k) y = static_cast<Lane>(y | static_cast<Lane>(static_cast<Lane>(planes[k][i]) << (8 * (w - 1 - k))));
        const Lane x = unmapped<Lane, map>(y, base + i * w);
        std::memcpy(raw + i * w, &x, w);
    }
}

// ---- vectors ---------------------------------------------------------------------------------------------------------------------

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
        const __m512i top = _mm512_set1_epi16(static_cast<short>(0x8000)), b = _mm512_loadu_si512(base), zero = _mm512_setzero_si512();
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
        const __m512i top = _mm512_set1_epi32(static_cast<int>(0x80000000u)), b = _mm512_loadu_si512(base), zero = _mm512_setzero_si512();
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
        const __m256i h = _mm256_permute4x64_epi64(load256(planes[0] + i), 0xD8), l = _mm256_permute4x64_epi64(load256(planes[1] + i), 0xD8);
        store256(raw + 2 * i, unmap16<map>(_mm256_unpacklo_epi8(l, h), base + 2 * i));
        store256(raw + 2 * i + 32, unmap16<map>(_mm256_unpackhi_epi8(l, h), base + 2 * i + 32));
    }
    merge_lanes<u16, map>(planes, base, i, lanes, raw);
}

template <Map map>
void split4(const u8* raw, const u8* base, size_t lanes, u8* const* planes) {
    const __m256i in_lane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i across = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    size_t i = 0;
    for (; i + 32 <= lanes; i += 32) {
        __m256i v[4];
        for (unsigned k = 0; k < 4; ++k) {  // 8 bytes of each plane
            const size_t at = 4 * i + 32 * k;
            v[k] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(map32<map>(load256(raw + at), base + at), in_lane), across);
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
        const __m256i a = load256(planes[3] + i), b = load256(planes[2] + i), c = load256(planes[1] + i), d = load256(planes[0] + i);
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

// ---- bit packing -----------------------------------------------------------------------------------------------------------------

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
    seen |= seen >> 32, seen |= seen >> 16, seen |= seen >> 8;
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
        i += m, packed += 7;
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
                _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi16(far, _mm512_sub_epi16(v, e)));
                escapes += 2 * static_cast<unsigned>(__builtin_popcount(far));
            }
        if constexpr (w == 4)
            for (; i + 16 <= n; i += 16) {
                const __m512i v = _mm512_loadu_si512(z + i), e = _mm512_set1_epi32(static_cast<int>(esc));
                const __mmask16 far = _mm512_cmpge_epu32_mask(v, e);
                _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi32(far, _mm512_sub_epi32(v, e)));
                escapes += 4 * static_cast<unsigned>(__builtin_popcount(far));
            }
#endif
        for (; i < n; ++i) {  // no branch: whether a value escapes cannot be foreseen
            const Lane rest = static_cast<Lane>(z[i] - esc);
            std::memcpy(escapes, &rest, w);
            escapes += z[i] >= esc ? w : 0;
        }
    }
    return static_cast<size_t>(escapes - first) / w;
}

template <typename Lane, unsigned bits>
size_t subunpack_lanes(const u8* packed, const u8* base, size_t lanes, const u8* escapes, size_t n_escapes, u8* raw) {
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
        if (far > n_escapes - used) return n_escapes + 1;
        size_t i = 0;
#if FASTCKPT_AVX512
        if constexpr (w == 2)
            for (; i + 32 <= n; i += 32) {
                const __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)));
                const __mmask32 at = _mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16(static_cast<short>(esc)));
                const __m512i more = _mm512_maskz_expand_epi16(at, _mm512_loadu_si512(escapes + used * w));
                _mm512_storeu_si512(z + i, _mm512_add_epi16(v, more));
                used += static_cast<unsigned>(__builtin_popcount(at));
            }
        if constexpr (w == 4)
            for (; i + 16 <= n; i += 16) {
                const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
                const __mmask16 at = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(esc)));
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

size_t subunpack(const u8* packed, const u8* base, size_t lanes, unsigned w, unsigned bits, const u8* escapes, size_t n, u8* raw) {
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

// ---- Huffman streams -------------------------------------------------------------------------------------------------------------

// Cache lines of `soon`, a few in each round of a loop that has so many.
class Prefetch {
public:
    FC_INLINE Prefetch(Soon soon, size_t rounds) : at_(soon.from), end_(soon.from + soon.n_bytes), step_(rounds ? (soon.n_bytes / rounds + 64) & ~size_t{63} : 0) {}
    template <int for_writing>
    FC_INLINE void some() {
        if (at_ >= end_) return;
        for (size_t i = 0; i < step_; i += 64) __builtin_prefetch(at_ + i, for_writing, 2);
        at_ += step_;
    }

private:
    const u8 *at_, *end_;
    size_t step_;
};

// Bits from the least significant end; codes are appended last symbol first, as the format has it. Nothing is cleared beforehand.
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

    Streams(const u8* symbols, size_t n, u8* scratch) {
        const size_t part = (n + 3) / 4;
        for (unsigned k = 0; k < 4; ++k) {
            from[k] = symbols + k * part;
            length[k] = k < 3 ? part : n - 3 * part;
            to[k] = BitWriter{0, 0, scratch + k * kStreamRoom};
        }
    }
    // The last symbols of a stream, one by one, until `left` are left. False if one has no code.
    FC_INLINE bool reduce(const Codes& codes, unsigned k, size_t left) {
        bool good = true;
        while (length[k] > left) {
            const u8 s = from[k][--length[k]];
            good &= codes.length[s] != 0;
            to[k].put(codes.code[s], codes.length[s]);
        }
        return good;
    }
    size_t finish(u8* scratch, u8* out, size_t room) {
        size_t size[4], total = 6;
        for (unsigned k = 0; k < 4; ++k) total += size[k] = static_cast<size_t>(to[k].finish() - (scratch + k * kStreamRoom));
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
        alignas(64) u8 l[256], h[256];
        for (unsigned s = 0; s < 256; ++s) {
            l[s] = static_cast<u8>(codes.code[s]);
            h[s] = static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4);
        }
        unsigned first = 1, last = 255;
        while (first < 256 && !codes.length[first]) ++first;
        while (last > first && !codes.length[last]) --last;
        small = first < 256 && last - first <= 62;
        before = _mm512_set1_epi8(static_cast<char>(first - 1));
        if (small) {
            for (unsigned i = 1; i < 64; ++i) {
                const unsigned s = first - 1 + i;
                l[i] = s < 256 && s >= i ? static_cast<u8>(codes.code[s]) : 0;
                h[i] = s < 256 && s >= i ? static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4) : 0;
            }
        }
        for (unsigned k = 0; k < 4; ++k) low[k] = _mm512_load_si512(l + 64 * k), high[k] = _mm512_load_si512(h + 64 * k);
    }
};

FC_INLINE __m512i join32(__m512i a, __m512i b, __m512i b_bits) { return _mm512_or_si512(b, _mm512_sllv_epi32(a, b_bits)); }
FC_INLINE __m512i join64(__m512i a, __m512i b, __m512i b_bits) { return _mm512_or_si512(b, _mm512_sllv_epi64(a, b_bits)); }

// 64 symbols to 16 groups of four: bits and lengths in 64-bit lanes; early[j] holds the first four of eight, late[j] the others.
template <bool small>
FC_INLINE void encode64(const VectorCodes& t, __m512i s, __m512i& early, __m512i& early_n, __m512i& late, __m512i& late_n, __mmask64& bad) {
    __m512i low, high;
    if constexpr (small) {
        const __m512i i = _mm512_subs_epu8(s, t.before);
        // Past the window, or below it but not 0.
        bad |= _mm512_cmpgt_epu8_mask(i, _mm512_set1_epi8(63)) | _mm512_mask_test_epi8_mask(_mm512_testn_epi8_mask(i, i), s, s);
        low = _mm512_permutexvar_epi8(i, t.low[0]);
        high = _mm512_permutexvar_epi8(i, t.high[0]);
    } else {
        const __mmask64 upper = _mm512_movepi8_mask(s);
        low = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(t.low[0], s, t.low[1]), upper, _mm512_permutex2var_epi8(t.low[2], s, t.low[3]));
        high = _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(t.high[0], s, t.high[1]), upper,
                                    _mm512_permutex2var_epi8(t.high[2], s, t.high[3]));
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
bool encode_common(const VectorCodes& t, Streams& s, size_t common, Soon soon) {
    alignas(64) u64 bits[4][8], counts[4][8];
    __mmask64 bad = 0;
    Prefetch to_read(soon, common / 64);
    for (size_t left = common; left; left -= 64) {
        to_read.some<0>();
        for (unsigned k = 0; k < 4; ++k) {
            __m512i early, early_n, late, late_n;
            encode64<small>(t, _mm512_loadu_si512(s.from[k] + left - 64), early, early_n, late, late_n, bad);
            const __m512i n = _mm512_add_epi64(early_n, late_n);
            if (__builtin_expect(_mm512_cmpgt_epu64_mask(n, _mm512_set1_epi64(56)) != 0, 0)) {
                alignas(64) u64 e[8], en[8], l[8], ln[8];
                _mm512_store_si512(e, early), _mm512_store_si512(en, early_n), _mm512_store_si512(l, late), _mm512_store_si512(ln, late_n);
                for (int j = 7; j >= 0; --j) {
                    s.to[k].put(l[j], static_cast<unsigned>(ln[j]));
                    s.to[k].put(e[j], static_cast<unsigned>(en[j]));
                }
                _mm512_store_si512(bits[k], _mm512_setzero_si512());
                _mm512_store_si512(counts[k], _mm512_setzero_si512());
            } else {
                _mm512_store_si512(bits[k], _mm512_or_si512(late, _mm512_sllv_epi64(early, late_n)));
                _mm512_store_si512(counts[k], n);
            }
        }
        // Four chains that do not wait for each other.
        BitWriter w0 = s.to[0], w1 = s.to[1], w2 = s.to[2], w3 = s.to[3];
        for (int j = 7; j >= 0; --j) {
            w0.put(bits[0][j], static_cast<unsigned>(counts[0][j]));
            w1.put(bits[1][j], static_cast<unsigned>(counts[1][j]));
            w2.put(bits[2][j], static_cast<unsigned>(counts[2][j]));
            w3.put(bits[3][j], static_cast<unsigned>(counts[3][j]));
        }
        s.to[0] = w0, s.to[1] = w1, s.to[2] = w2, s.to[3] = w3;
    }
    return bad == 0;
}

size_t huffman_encode(const Codes& codes, const u8* symbols, size_t n, u8* out, size_t room, u8* scratch, Soon soon) {
    Streams s(symbols, n, scratch);
    const size_t common = s.length[3] & ~size_t{63};
    bool good = true;
    for (unsigned k = 0; k < 4; ++k) good &= s.reduce(codes, k, common);
    const VectorCodes t(codes);
    good &= t.small ? encode_common<true>(t, s, common, soon) : encode_common<false>(t, s, common, soon);
    return good ? s.finish(scratch, out, room) : 0;
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
        alignas(32) u8 l[64], h[64];
        for (unsigned i = 0; i < 64; ++i) {
            const unsigned s = i ? first - 1 + i : 0;
            l[i] = s < 256 ? static_cast<u8>(codes.code[s]) : 0;
            h[i] = s < 256 ? static_cast<u8>(codes.code[s] >> 8 | codes.length[s] << 4) : 0;
        }
        for (unsigned k = 0; k < 4; ++k) {
            low[k] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(l + 16 * k)));
            high[k] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(h + 16 * k)));
        }
    }
};

FC_INLINE __m256i join32(__m256i a, __m256i b, __m256i b_bits) { return _mm256_or_si256(b, _mm256_sllv_epi32(a, b_bits)); }
FC_INLINE __m256i join64(__m256i a, __m256i b, __m256i b_bits) { return _mm256_or_si256(b, _mm256_sllv_epi64(a, b_bits)); }

// 32 symbols to four groups of eight, each as two of four. Non-zero bytes in `bad`: a symbol without a code.
FC_INLINE void encode32(const VectorCodes& t, __m256i s, __m256i& early, __m256i& early_n, __m256i& late, __m256i& late_n, __m256i& bad) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i i = _mm256_subs_epu8(s, t.before);
    // A look-up of 64 is four of 16: a table's index saturates to 0x80 and more, which gives 0, where the symbol is another table's.
    __m256i low = zero, high = zero;
    for (unsigned k = 0; k < 4; ++k) {
        const __m256i at = _mm256_adds_epu8(_mm256_sub_epi8(i, _mm256_set1_epi8(static_cast<char>(16 * k))), _mm256_set1_epi8(0x70));
        low = _mm256_or_si256(low, _mm256_shuffle_epi8(t.low[k], at));
        high = _mm256_or_si256(high, _mm256_shuffle_epi8(t.high[k], at));
    }
    const __m256i n = _mm256_and_si256(_mm256_srli_epi16(high, 4), _mm256_set1_epi8(15));
    // No length: past the window, or a gap. Index 0 of another symbol than 0: below the window.
    bad = _mm256_or_si256(bad, _mm256_cmpeq_epi8(n, zero));
    bad = _mm256_or_si256(bad, _mm256_andnot_si256(_mm256_cmpeq_epi8(s, zero), _mm256_cmpeq_epi8(i, zero)));
    high = _mm256_and_si256(high, _mm256_set1_epi8(15));
    // As encode64 of AVX-512: neighbours join, the later symbol's bits below the earlier one's.
    const __m256i byte = _mm256_set1_epi16(255), half = _mm256_set1_epi32(0xffff), word = _mm256_set1_epi64x(0xffffffff);
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
bool encode_common(const VectorCodes& t, Streams& s, size_t common, Soon soon) {
    alignas(32) u64 bits[4][4], counts[4][4];
    __m256i bad = _mm256_setzero_si256();
    Prefetch to_read(soon, common / 32);
    for (size_t left = common; left; left -= 32) {
        to_read.some<0>();
        for (unsigned k = 0; k < 4; ++k) {
            __m256i early, early_n, late, late_n;
            encode32(t, load256(s.from[k] + left - 32), early, early_n, late, late_n, bad);
            const __m256i n = _mm256_add_epi64(early_n, late_n);
            if (__builtin_expect(_mm256_movemask_epi8(_mm256_cmpgt_epi64(n, _mm256_set1_epi64x(56))) != 0, 0)) {
                alignas(32) u64 e[4], en[4], l[4], ln[4];
                store256(reinterpret_cast<u8*>(e), early), store256(reinterpret_cast<u8*>(en), early_n);
                store256(reinterpret_cast<u8*>(l), late), store256(reinterpret_cast<u8*>(ln), late_n);
                for (int j = 3; j >= 0; --j) {
                    s.to[k].put(l[j], static_cast<unsigned>(ln[j]));
                    s.to[k].put(e[j], static_cast<unsigned>(en[j]));
                }
                store256(reinterpret_cast<u8*>(bits[k]), _mm256_setzero_si256());
                store256(reinterpret_cast<u8*>(counts[k]), _mm256_setzero_si256());
            } else {
                store256(reinterpret_cast<u8*>(bits[k]), join64(early, late, late_n));
                store256(reinterpret_cast<u8*>(counts[k]), n);
            }
        }
        BitWriter w0 = s.to[0], w1 = s.to[1], w2 = s.to[2], w3 = s.to[3];
        for (int j = 3; j >= 0; --j) {
            w0.put(bits[0][j], static_cast<unsigned>(counts[0][j]));
            w1.put(bits[1][j], static_cast<unsigned>(counts[1][j]));
            w2.put(bits[2][j], static_cast<unsigned>(counts[2][j]));
            w3.put(bits[3][j], static_cast<unsigned>(counts[3][j]));
        }
        s.to[0] = w0, s.to[1] = w1, s.to[2] = w2, s.to[3] = w3;
    }
    return _mm256_testz_si256(bad, bad) != 0;
}

#endif

// A code at the top of `word`, which holds `n` bits at its top; the oldest lie lowest.
FC_INLINE void append(u64 entry, u64& word, unsigned& n) {
    word = (word >> (entry & 63)) | (entry & ~u64{0xff});
    n += static_cast<unsigned>(entry);
}
// Write the whole bytes; up to 7 bits stay.
FC_INLINE void flush(u64 word, unsigned& n, u8*& to) {
    const u64 bits = word >> ((64 - n) & 63);  // n is 0 only if nothing was ever written: then nothing is kept
    std::memcpy(to, &bits, 8);
    to += n >> 3;
    n &= 7;
}

size_t huffman_encode(const Codes& codes, const u8* symbols, size_t n, u8* out, size_t room, u8* scratch, Soon soon) {
#if FASTCKPT_AVX2
    if (const VectorCodes t(codes); t.small) {
        Streams s(symbols, n, scratch);
        const size_t common = s.length[3] & ~size_t{31};
        bool good = true;
        for (unsigned k = 0; k < 4; ++k) good &= s.reduce(codes, k, common);
        good &= encode_common(t, s, common, soon);
        return good ? s.finish(scratch, out, room) : 0;
    }
#endif
    // A code at the top of a word, its length below: one look-up, one shift and one or a symbol. Bit 7: no code.
    u64 table[256];
    for (unsigned s = 0; s < 256; ++s)
        table[s] = codes.length[s] ? u64{codes.code[s]} << (64 - codes.length[s]) | codes.length[s] : 0x80;
    Streams s(symbols, n, scratch);
    const size_t common = s.length[3] / 5 * 5;
    bool good = true;
    for (unsigned k = 0; k < 4; ++k) good &= s.reduce(codes, k, common);
    u64 w[4];
    for (unsigned k = 0; k < 4; ++k) w[k] = s.to[k].n ? s.to[k].waiting << (64 - s.to[k].n) : 0;
    u64 w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    unsigned n0 = s.to[0].n, n1 = s.to[1].n, n2 = s.to[2].n, n3 = s.to[3].n;
    u8 *t0 = s.to[0].at, *t1 = s.to[1].at, *t2 = s.to[2].at, *t3 = s.to[3].at;
    const u8 *f0 = s.from[0] + common, *f1 = s.from[1] + common, *f2 = s.from[2] + common, *f3 = s.from[3] + common;
    Prefetch to_read(soon, common / 5);
    for (const u8* const end = s.from[0]; f0 != end; f0 -= 5, f1 -= 5, f2 -= 5, f3 -= 5) {  // 5 x 11 + 7 bits fit a word
#define FC_STEP(j)                                                                                         \
    append(table[f0[-j]], w0, n0), append(table[f1[-j]], w1, n1), append(table[f2[-j]], w2, n2), append(table[f3[-j]], w3, n3);
        FC_STEP(1) FC_STEP(2) FC_STEP(3) FC_STEP(4) FC_STEP(5)
#undef FC_STEP
        if ((n0 | n1 | n2 | n3) >= 0x80) return 0;  // a symbol without a code; before anything is written past its room
        flush(w0, n0, t0), flush(w1, n1, t1), flush(w2, n2, t2), flush(w3, n3, t3);
        to_read.some<0>();
    }
    if (!good) return 0;
    const u64 words[4] = {w0, w1, w2, w3};
    const unsigned counts[4] = {n0, n1, n2, n3};
    u8* const at[4] = {t0, t1, t2, t3};
    for (unsigned k = 0; k < 4; ++k) s.to[k] = BitWriter{counts[k] ? words[k] >> (64 - counts[k]) : 0, counts[k], at[k]};
    return s.finish(scratch, out, room);
}

#endif

FC_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// A stream read backwards: the next bits are the top ones of `bits`; its lowest set bit tells how many of the 64 are used up.
struct BackwardBits {
    u64 bits;
    const u8* at;     // the 8 bytes that were loaded
    const u8* first;  // of the stream
    u8* out;
    u8* end;

    FC_INLINE bool open(const u8* data, size_t n, u8* to, size_t n_symbols) {
        if (n < 8 || !data[n - 1]) return false;
        first = data, at = data + n - 8, out = to, end = to + n_symbols;
        bits = (load64(at) | 1) << (8 - (31 - __builtin_clz(data[n - 1])));
        return true;
    }
    // Rounds of five look-ups that stay within the stream and within the output: each uses at most 55 bits after at most 7 of the last
    // load, so `at` goes back by 7 bytes or fewer; each writes 8 bytes at a place that is at most 24 further, and advances by 30 or fewer.
    FC_INLINE size_t safe_rounds() const { return smaller(static_cast<size_t>(at - first) / 7, static_cast<size_t>(end - out) / 34); }
    FC_INLINE void refill() {
        const unsigned used = static_cast<unsigned>(__builtin_ctzll(bits));
        at -= used >> 3;
        bits = (load64(at) | 1) << (used & 7);
    }
};

FC_INLINE void look_up(const u64* entries, u64& bits, u8*& out) {
    const u64 entry = entries[bits >> (64 - kMaxCodeBits)], symbols = entry >> 16;
    std::memcpy(out, &symbols, 8);
    out += entry >> 8 & 0xff;
    bits <<= entry & 63;
}

bool huffman_decode(const u64* entries, const u8* length, const u8* data, size_t n_bytes, u8* out, size_t n, Soon read, Soon write) {
    if (n_bytes < 6 || n < 4) return false;
    const size_t size[3] = {size_t(data[0] | data[1] << 8), size_t(data[2] | data[3] << 8), size_t(data[4] | data[5] << 8)};
    const size_t used = 6 + size[0] + size[1] + size[2], part = (n + 3) / 4;
    if (used >= n_bytes || 3 * part >= n) return false;
    BackwardBits s[4];
    const u8* from = data + 6;
    for (unsigned k = 0; k < 4; ++k) {
        const size_t stream = k < 3 ? size[k] : n_bytes - used;
        if (!s[k].open(from, stream, out + k * part, k < 3 ? part : n - 3 * part)) return false;
        from += stream;
    }
    // Some 70 symbols a round.
    Prefetch to_read(read, n / 80), to_write(write, n / 80);
    for (;;) {  // all four together: none waits for another
        size_t rounds = s[0].safe_rounds();
        for (unsigned k = 1; k < 4; ++k) rounds = smaller(rounds, s[k].safe_rounds());
        if (!rounds) break;
        BackwardBits s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
        do {
            for (int j = 0; j < 5; ++j) {
                look_up(entries, s0.bits, s0.out);
                look_up(entries, s1.bits, s1.out);
                look_up(entries, s2.bits, s2.out);
                look_up(entries, s3.bits, s3.out);
            }
            s0.refill(), s1.refill(), s2.refill(), s3.refill();
            to_read.some<0>();
            to_write.some<1>();
        } while (--rounds);
        s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
    }
    for (BackwardBits& one : s) {
        while (one.safe_rounds()) {
            for (int j = 0; j < 5; ++j) look_up(entries, one.bits, one.out);
            one.refill();
        }
        // The rest symbol by symbol, counting bits.
        long left = 8 * (one.at - one.first) + 64 - __builtin_ctzll(one.bits);
        while (one.out < one.end) {
            u64 window = 0;
            const long bytes = (left + 7) / 8;
            if (bytes >= 8)
                window = load64(one.first + bytes - 8);
            else if (bytes > 0) {
                std::memcpy(reinterpret_cast<u8*>(&window) + 8 - bytes, one.first, static_cast<size_t>(bytes));
            }
            if (left < 0) return false;
            window <<= static_cast<unsigned>(8 * bytes - left);
            const u8 symbol = static_cast<u8>(entries[window >> (64 - kMaxCodeBits)] >> 16);
            *one.out++ = symbol;
            left -= length[symbol];
        }
        if (left != 0) return false;
    }
    return true;
}

// ---- checksums, copies -----------------------------------------------------------------------------------------------------------

FC_INLINE void accumulate(u64* acc, const u8* data, const u8* secret) {
#if FASTCKPT_AVX512
    const __m512i a = _mm512_loadu_si512(acc), d = _mm512_loadu_si512(data);
    const __m512i keyed = _mm512_xor_si512(d, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    _mm512_storeu_si512(acc, _mm512_add_epi64(_mm512_add_epi64(a, _mm512_shuffle_epi32(d, _MM_PERM_BADC)), product));
#elif FASTCKPT_AVX2
    for (unsigned half = 0; half < 2; ++half) {
        const __m256i a = load256(reinterpret_cast<const u8*>(acc + 4 * half)), d = load256(data + 32 * half);
        const __m256i keyed = _mm256_xor_si256(d, load256(secret + 32 * half));
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        store256(reinterpret_cast<u8*>(acc + 4 * half), _mm256_add_epi64(_mm256_add_epi64(a, _mm256_shuffle_epi32(d, 0x4E)), product));
    }
#else
    for (unsigned i = 0; i < 8; ++i) {
        const u64 value = load64(data + 8 * i), keyed = value ^ load64(secret + 8 * i);
        acc[i ^ 1] += value;
        acc[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
#endif
}

void xxh3_stripes(u64* acc, const u8* data, size_t n) {
    for (size_t i = 0; i < n; ++i) accumulate(acc, data + 64 * i, kXxh3Secret + 8 * i);
}

void xxh3_blocks(u64* acc, const u8* data, size_t n_blocks) {
    alignas(64) u64 a[8];
    std::memcpy(a, acc, sizeof a);
    for (; n_blocks; --n_blocks, data += kXxh3BlockBytes) {
        for (unsigned i = 0; i < 16; ++i) accumulate(a, data + 64 * i, kXxh3Secret + 8 * i);
        for (unsigned i = 0; i < 8; ++i) {
            a[i] ^= a[i] >> 47;
            a[i] ^= load64(kXxh3Secret + 128 + 8 * i);
            a[i] *= kXxh3Prime32_1;
        }
    }
    std::memcpy(acc, a, sizeof a);
}

#if FASTCKPT_AVX2

FC_INLINE __m128i fold(__m128i state, __m128i k, __m128i next) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(state, k, 0x00), _mm_clmulepi64_si128(state, k, 0x11)), next);
}
#if FASTCKPT_AVX512
FC_INLINE __m512i fold512(__m512i state, __m512i by, __m512i next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(state, by, 0x00), _mm512_clmulepi64_epi128(state, by, 0x11), next, 0x96);
}
#endif
FC_INLINE __m128i load128(const u8* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
FC_INLINE __m128i multipliers(const FoldConstants& k) {
    return _mm_set_epi64x(static_cast<long long>(k.high), static_cast<long long>(k.low));
}

u64 crc(u64 register_, const u8* p, size_t n) {
    if (n < 64) return crc_by_table(register_, p, n);
    const __m128i k128 = multipliers(kFold128), k512 = multipliers(kFold512);
    const __m128i start = _mm_set_epi64x(0, static_cast<long long>(register_));
    __m128i a, b, c, d;
#if FASTCKPT_AVX512
    if (n >= 512) {
        const __m512i k2048 = _mm512_broadcast_i32x4(multipliers(kFold2048)), k = _mm512_broadcast_i32x4(k512);
        __m512i w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_inserti32x4(_mm512_setzero_si512(), start, 0));
        __m512i x = _mm512_loadu_si512(p + 64), y = _mm512_loadu_si512(p + 128), z = _mm512_loadu_si512(p + 192);
        for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
            w = fold512(w, k2048, _mm512_loadu_si512(p));
            x = fold512(x, k2048, _mm512_loadu_si512(p + 64));
            y = fold512(y, k2048, _mm512_loadu_si512(p + 128));
            z = fold512(z, k2048, _mm512_loadu_si512(p + 192));
        }
        z = fold512(fold512(fold512(w, k, x), k, y), k, z);
        a = _mm512_extracti32x4_epi32(z, 0), b = _mm512_extracti32x4_epi32(z, 1);
        c = _mm512_extracti32x4_epi32(z, 2), d = _mm512_extracti32x4_epi32(z, 3);
    } else
#endif
    {
        a = _mm_xor_si128(load128(p), start), b = load128(p + 16), c = load128(p + 32), d = load128(p + 48);
        p += 64, n -= 64;
    }
    for (; n >= 64; p += 64, n -= 64) {
        a = fold(a, k512, load128(p)), b = fold(b, k512, load128(p + 16));
        c = fold(c, k512, load128(p + 32)), d = fold(d, k512, load128(p + 48));
    }
    a = fold(fold(fold(a, k128, b), k128, c), k128, d);
    for (; n >= 16; p += 16, n -= 16) a = fold(a, k128, load128(p));
    u8 rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
    return crc_by_table(crc_by_table(0, rest, 16), p, n);
}

#else

u64 crc(u64 register_, const u8* p, size_t n) { return crc_by_table(register_, p, n); }

#endif

void copy(u8* to, const u8* from, size_t n) {
#if FASTCKPT_AVX2
    constexpr size_t v = FASTCKPT_AVX512 ? 64 : 32;
    if (n >= 4096) {
        const size_t head = (v - (reinterpret_cast<uintptr_t>(to) & (v - 1))) & (v - 1);
        std::memcpy(to, from, head);
        size_t i = head;
        for (; i + v <= n; i += v) {
#if FASTCKPT_AVX512
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load256(from + i));
#endif
        }
        std::memcpy(to + i, from + i, n - i);
        _mm_sfence();
        return;
    }
#endif
    std::memcpy(to, from, n);
}

bool all_equal(const u8* bytes, size_t n, u8 value) {
    const u64 word = 0x0101010101010101ull * value;
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        u64 differ = 0;
        for (unsigned k = 0; k < 8; ++k) differ |= load64(bytes + i + 8 * k) ^ word;
        if (differ) return false;
    }
    for (; i < n; ++i)
        if (bytes[i] != value) return false;
    return true;
}

Range range(const u8* bytes, size_t n) {
    u8 least = 255, most = 0;  // of byte - 1, where a zero becomes 255; of byte
    u8 zero = 0;
    for (size_t i = 0; i < n; ++i) {
        const u8 x = bytes[i], y = static_cast<u8>(x - 1);
        least = y < least ? y : least;
        most = x > most ? x : most;
        zero |= static_cast<u8>(x == 0);
    }
    return {most ? least + 1u : 1u, most, zero != 0};
}

#undef FC_INLINE

constexpr Kernels kKernels = {FASTCKPT_ISA_NAME, split,          merge,       pack7,        unpack7, subpack,  subunpack,
                              huffman_encode, huffman_decode,   xxh3_blocks,    xxh3_stripes, crc,          copy,    all_equal, range};

}  // namespace
}  // namespace FASTCKPT_ISA
}  // namespace fastckpt
