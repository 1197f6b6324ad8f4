// XXH3, CRC-64, copies and looks at bytes. Part of kernels.inl.

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
        store256(reinterpret_cast<u8*>(acc + 4 * half),
                 _mm256_add_epi64(_mm256_add_epi64(a, _mm256_shuffle_epi32(d, 0x4E)), product));
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
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(state, k, 0x00), _mm_clmulepi64_si128(state, k, 0x11)),
                         next);
}
#if FASTCKPT_AVX512
FC_INLINE __m512i fold512(__m512i state, __m512i by, __m512i next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(state, by, 0x00),
                                     _mm512_clmulepi64_epi128(state, by, 0x11), next, 0x96);
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
        p += 256;
        n -= 256;
        for (; n >= 256; p += 256, n -= 256) {
            w = fold512(w, k2048, _mm512_loadu_si512(p));
            x = fold512(x, k2048, _mm512_loadu_si512(p + 64));
            y = fold512(y, k2048, _mm512_loadu_si512(p + 128));
            z = fold512(z, k2048, _mm512_loadu_si512(p + 192));
        }
        z = fold512(fold512(fold512(w, k, x), k, y), k, z);
        a = _mm512_extracti32x4_epi32(z, 0);
        b = _mm512_extracti32x4_epi32(z, 1);
        c = _mm512_extracti32x4_epi32(z, 2);
        d = _mm512_extracti32x4_epi32(z, 3);
    } else
#endif
    {
        a = _mm_xor_si128(load128(p), start);
        b = load128(p + 16);
        c = load128(p + 32);
        d = load128(p + 48);
        p += 64;
        n -= 64;
    }
    for (; n >= 64; p += 64, n -= 64) {
        a = fold(a, k512, load128(p));
        b = fold(b, k512, load128(p + 16));
        c = fold(c, k512, load128(p + 32));
        d = fold(d, k512, load128(p + 48));
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
    return {.first = most ? least + 1u : 1u, .last = most, .has_zero = zero != 0};
}
