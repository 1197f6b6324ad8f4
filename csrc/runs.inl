// Runs of zeros in a plane. Part of kernels.inl.

// Bit i: byte i of 64 is not 0.
FC_INLINE u64 others_of(const u8* bytes) {
#if FASTCKPT_AVX512
    const __m512i x = _mm512_loadu_si512(bytes);
    return _mm512_test_epi8_mask(x, x);
#elif FASTCKPT_AVX2
    const __m256i zero = _mm256_setzero_si256();
    const u64 low = static_cast<u32>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load256(bytes), zero)));
    const u64 high = static_cast<u32>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load256(bytes + 32), zero)));
    return ~(low | high << 32);
#else
    u64 mask = 0;
    for (unsigned k = 0; k < 8; ++k) {
        const u64 x = load64(bytes + 8 * k), low = 0x7f7f7f7f7f7f7f7full;
        const u64 some = (((x & low) + low) | x) & ~low;  // the highest bit of each byte that is not 0
        mask |= (some >> 7) * 0x0102040810204080ull >> 56 << (8 * k);
    }
    return mask;
#endif
}

// Literals, in pieces of 16 bytes as long as they are few: most are. Slack lies behind both.
FC_INLINE void copy_literals(u8* to, const u8* from, size_t n) {
    if (n > 256) {
        std::memcpy(to, from, n);
        return;
    }
    for (size_t i = 0; i < n; i += 16) std::memcpy(to + i, from + i, 16);
}

size_t find_runs(const u8* bytes, size_t n, Run* runs, u8* literals, size_t* n_literals) {
    Run* run = runs;
    u8* to = literals;
    size_t start = 0, next = 0;  // of what is not copied yet; behind the last byte that is not 0
    const auto end_run = [&](size_t at) {
        if (at - next < kMinRun) return;
        const size_t size = next + 1 - start;
        assert(run < runs + kMaxRuns);
        copy_literals(to, bytes + start, size);
        to += size;
        *run++ = {.literals = static_cast<u32>(size), .match = static_cast<u32>(at - next - 1)};
        start = at;
    };
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const u64 others = others_of(bytes + i);
        if (!others) continue;
        end_run(i + static_cast<unsigned>(__builtin_ctzll(others)));
        const unsigned behind = 64 - static_cast<unsigned>(__builtin_clzll(others));  // the last other byte
        // Bit k: eight zeros from byte k on, and an other byte behind them. Shorter runs are passed over at once.
        static_assert(kMinRun == 8, "three steps");
        const u64 zeros = ~others & (~u64{0} >> (64 - behind)) & (~u64{0} << __builtin_ctzll(others));
        u64 eight = zeros & zeros >> 1;
        eight &= eight >> 2;
        eight &= eight >> 4;
        while (eight) {
            const unsigned from = static_cast<unsigned>(__builtin_ctzll(eight));
            const unsigned end = from + static_cast<unsigned>(__builtin_ctzll(others >> from));
            next = i + from;
            end_run(i + end);
            eight = eight >> end << end;  // end < 64: an other byte
        }
        next = i + behind;
    }
    for (; i < n; ++i)
        if (bytes[i]) {
            end_run(i);
            next = i + 1;
        }
    end_run(n);
    std::memcpy(to, bytes + start, n - start);
    *n_literals = static_cast<size_t>(to - literals) + n - start;
    return static_cast<size_t>(run - runs);
}

Zeros count_zeros(const u8* bytes, size_t n, size_t row) {
    Zeros found = {.begun = 0, .n_bytes = 0};
    for (size_t first = 0; first < n; first += row) {
        const u8* const at = bytes + first;
        size_t next = 0;  // behind the last byte that is not 0
        const auto end_run = [&](size_t end) {
            const size_t size = end - next, least = next == 0 || end == row ? kMinRun / 2 : kMinRun;
            if (size < least) return;
            found.n_bytes += size;
            found.begun += next != 0;
        };
        size_t i = 0;
        for (; i + 64 <= row; i += 64)
            for (u64 mask = others_of(at + i); mask;) {
                const unsigned here = static_cast<unsigned>(__builtin_ctzll(mask));
                const u64 behind = ~(mask >> here);
                const unsigned together = behind ? static_cast<unsigned>(__builtin_ctzll(behind)) : 64;
                end_run(i + here);
                next = i + here + together;
                mask = here + together < 64 ? mask >> (here + together) << (here + together) : 0;
            }
        for (; i < row; ++i)
            if (at[i]) {
                end_run(i);
                next = i + 1;
            }
        end_run(row);
    }
    return found;
}
