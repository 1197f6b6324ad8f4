// CRC-64/NVME: by table (portable) and by carry-less multiplication (x86-64 with PCLMULQDQ).
//
// All constants are computed from the polynomial when the library is loaded, so that there is no table to mistype.
#include "fastckpt.h"

#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTCKPT_HAVE_CLMUL 1
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kPolynomialReflected = 0x9A6C9329AC4BC9B5ull;  // 0xAD93D23594C93659 with its bits reversed

struct Tables {
    uint64_t slice[8][256];
    Tables() {
        for (unsigned byte = 0; byte < 256; ++byte) {
            uint64_t crc = byte;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomialReflected : 0);
            slice[0][byte] = crc;
        }
        for (unsigned byte = 0; byte < 256; ++byte)
            for (int k = 1; k < 8; ++k)
                slice[k][byte] = (slice[k - 1][byte] >> 8) ^ slice[0][slice[k - 1][byte] & 0xff];
    }
};

const Tables kTables;

uint64_t load64(const unsigned char* p) {
    uint64_t v;
    std::memcpy(&v, p, 8);  // fastckpt is little-endian only; setup.py refuses others
    return v;
}

// crc: the register itself, without the inversion before and after.
uint64_t update_by_table(uint64_t crc, const unsigned char* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        const uint64_t x = crc ^ load64(p);
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= kTables.slice[7 - k][(x >> (8 * k)) & 0xff];
    }
    for (; n; --n, ++p) crc = (crc >> 8) ^ kTables.slice[0][(crc ^ *p) & 0xff];
    return crc;
}

#ifdef FASTCKPT_HAVE_CLMUL

// x^n mod P in reflected bit order (bit 63 is x^0).
uint64_t power_of_x(unsigned n) {
    uint64_t r = 1ull << 63;
    while (n--) r = (r >> 1) ^ ((r & 1) ? kPolynomialReflected : 0);
    return r;
}

// Folding a 128-bit register over a distance of d bits. Its low half stands d + 64 bits before the target, its high half d bits;
// a reflected carry-less product comes out one bit too low, hence the - 1.
struct FoldConstants {
    uint64_t low, high;
    explicit FoldConstants(unsigned d) : low(power_of_x(d + 64 - 1)), high(power_of_x(d - 1)) {}
};

const FoldConstants kFold128(128), kFold512(512);
const bool kHaveClmul = [] {
    __builtin_cpu_init();  // needed in a static initialiser: libgcc's own may not have run yet
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}();

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i state, __m128i k, __m128i next) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(state, k, 0x00), _mm_clmulepi64_si128(state, k, 0x11)), next);
}

__attribute__((target("pclmul,sse4.1"))) uint64_t update_by_clmul(uint64_t crc, const unsigned char* p, size_t n) {
    const auto load = [](const unsigned char* q) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    };
    const __m128i k512 = _mm_set_epi64x(static_cast<long long>(kFold512.high), static_cast<long long>(kFold512.low));
    const __m128i k128 = _mm_set_epi64x(static_cast<long long>(kFold128.high), static_cast<long long>(kFold128.low));
    __m128i a = _mm_xor_si128(load(p), _mm_set_epi64x(0, static_cast<long long>(crc)));
    __m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        a = fold(a, k512, load(p));
        b = fold(b, k512, load(p + 16));
        c = fold(c, k512, load(p + 32));
        d = fold(d, k512, load(p + 48));
    }
    a = fold(a, k128, b);
    a = fold(a, k128, c);
    a = fold(a, k128, d);
    for (; n >= 16; p += 16, n -= 16) a = fold(a, k128, load(p));
    unsigned char rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
    return update_by_table(update_by_table(0, rest, 16), p, n);
}

#endif

}  // namespace

extern "C" uint64_t fastckpt_crc64nvme_portable(uint64_t crc, const void* data, size_t n_bytes) {
    return ~update_by_table(~crc, static_cast<const unsigned char*>(data), n_bytes);
}

extern "C" uint64_t fastckpt_crc64nvme(uint64_t crc, const void* data, size_t n_bytes) {
#ifdef FASTCKPT_HAVE_CLMUL
    if (kHaveClmul && n_bytes >= 64) return ~update_by_clmul(~crc, static_cast<const unsigned char*>(data), n_bytes);
#endif
    return fastckpt_crc64nvme_portable(crc, data, n_bytes);
}
