// A sample of memory: one cache line of each page.
#include <cstring>

#include "fastckpt.h"
#include "kernels.h"

using namespace fastckpt;

namespace {

constexpr size_t kLine = 64, kPage = 4096, kAhead = 16;  // 16 pages: what a core has under way at once
constexpr u64 kGolden = 0x9E3779B97F4A7C15ull;           // neighbours get lines far apart, and each of the 64 its turn

// Where the line of page `p` lies, the `k`th that is sampled.
size_t line_of(size_t p, u64 k, u64 seed, size_t n_bytes) {
    const size_t at = p * kPage + static_cast<size_t>(((seed + k) * kGolden) >> 58) * kLine;
    return at < n_bytes - kLine ? at : n_bytes - kLine;
}

}  // namespace

extern "C" size_t fastckpt_lines_bytes(const uint64_t* lengths, size_t n) {
    size_t total = 0;
    for (size_t i = 0; i < n; ++i) total += lengths[i] < FASTCKPT_WHOLE_BELOW ? lengths[i] : (lengths[i] + kPage - 1) / kPage * kLine;
    return total;
}

extern "C" int fastckpt_lines(const uint64_t* addresses, const uint64_t* lengths, size_t n, uint64_t seed, void* out, size_t out_bytes) {
    if (fastckpt_lines_bytes(lengths, n) != out_bytes) return FASTCKPT_BAD_LENGTH;
    auto* to = static_cast<u8*>(out);
    u64 k = 0;
    for (size_t i = 0; i < n; ++i) {
        const auto* from = reinterpret_cast<const u8*>(static_cast<uintptr_t>(addresses[i]));
        const size_t n_bytes = lengths[i];
        if (n_bytes < FASTCKPT_WHOLE_BELOW) {
            if (n_bytes) std::memcpy(to, from, n_bytes);
            to += n_bytes;
            continue;
        }
        const size_t pages = (n_bytes + kPage - 1) / kPage;
        for (size_t p = 0; p < pages; ++p, ++k, to += kLine) {
            if (p + kAhead < pages) __builtin_prefetch(from + line_of(p + kAhead, k + kAhead, seed, n_bytes));
            std::memcpy(to, from + line_of(p, k, seed, n_bytes), kLine);
        }
    }
    return FASTCKPT_OK;
}
