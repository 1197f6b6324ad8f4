// CRC-64/NVME by table, and the constants for carry-less multiplication (kernels.inl).
//
// All constants are computed from the polynomial when the library is loaded, so that there is no table to mistype.
#include "crc64.h"

#include "fastckpt.h"

namespace fastckpt {
namespace {

constexpr u64 kPolynomialReflected = 0x9A6C9329AC4BC9B5ull;  // 0xAD93D23594C93659 with its bits reversed

struct Tables {
    u64 slice[8][256];
    Tables() {
        for (unsigned byte = 0; byte < 256; ++byte) {
            u64 crc = byte;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomialReflected : 0);
            slice[0][byte] = crc;
        }
        for (unsigned byte = 0; byte < 256; ++byte)
            for (int k = 1; k < 8; ++k)
                slice[k][byte] = (slice[k - 1][byte] >> 8) ^ slice[0][slice[k - 1][byte] & 0xff];
    }
};

const Tables kTables;

// x^n mod P in reflected bit order (bit 63 is x^0).
u64 power_of_x(unsigned n) {
    u64 r = 1ull << 63;
    while (n--) r = (r >> 1) ^ ((r & 1) ? kPolynomialReflected : 0);
    return r;
}

// a * b mod P in reflected bit order.
u64 product(u64 a, u64 b) {
    u64 r = 0;
    for (; a; a <<= 1) {
        if (a >> 63) r ^= b;
        b = (b >> 1) ^ ((b & 1) ? kPolynomialReflected : 0);
    }
    return r;
}

}  // namespace

// The register's low half stands `bits` + 64 before the target, its high half `bits`; a reflected carry-less product
// comes out one bit too low, hence the - 1.
FoldConstants::FoldConstants(unsigned bits) : low(power_of_x(bits + 64 - 1)), high(power_of_x(bits - 1)) {}

const FoldConstants kFold128(128), kFold512(512), kFold2048(2048);

u64 crc_by_table(u64 crc, const u8* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        const u64 x = crc ^ load64(p);  // the first byte lowest: kernels.h asserts the byte order
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= kTables.slice[7 - k][(x >> (8 * k)) & 0xff];
    }
    for (; n; --n, ++p) crc = (crc >> 8) ^ kTables.slice[0][(crc ^ *p) & 0xff];
    return crc;
}

}  // namespace fastckpt

extern "C" uint64_t fastckpt_crc64nvme_portable(uint64_t crc, const void* data, size_t n_bytes) {
    return ~fastckpt::crc_by_table(~crc, static_cast<const uint8_t*>(data), n_bytes);
}

// The bytes of the second part move the first part's register on as so many zeros would, whatever they are.
extern "C" uint64_t fastckpt_crc64nvme_combine(uint64_t first, uint64_t second, uint64_t second_bytes) {
    uint64_t moved = first;
    for (uint64_t power = uint64_t{1} << (63 - 8); second_bytes; second_bytes >>= 1) {  // x^8, x^16, x^32, ...
        if (second_bytes & 1) moved = fastckpt::product(moved, power);
        power = fastckpt::product(power, power);
    }
    return moved ^ second;
}

extern "C" uint64_t fastckpt_crc64nvme(uint64_t crc, const void* data, size_t n_bytes) {
    return ~fastckpt::kernels().crc(~crc, static_cast<const uint8_t*>(data), n_bytes);
}
