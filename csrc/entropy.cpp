#include "entropy.h"

namespace fastckpt {
namespace {

// c log2 c of counts that samples reach: log2 itself took longer than the counting.
struct CountLogs {
    static constexpr u32 kSize = 16385;
    float of[kSize];
    CountLogs() {
        of[0] = 0;
        for (u32 c = 1; c < kSize; ++c) of[c] = static_cast<float>(c * std::log2(static_cast<double>(c)));
    }
};
const CountLogs kCountLogs;

}  // namespace

double count_log(u32 c) { return c < CountLogs::kSize ? kCountLogs.of[c] : c * std::log2(static_cast<double>(c)); }

void Histogram::sample(const u8* bytes, size_t n, size_t step) {
    // Four tables: equal neighbours would wait for each other's increments.
    u32 tables[4][256] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16 * step) {
        const u64 words[2] = {load64(bytes + i), load64(bytes + i + 8)};
        for (const u64 word : words)
            for (unsigned k = 0; k < 8; ++k) ++tables[k % 4][word >> (8 * k) & 0xff];
    }
    if (step == 1)
        for (; i < n; ++i) ++tables[0][bytes[i]];
    for (unsigned s = 0; s < 256; ++s) counts[s] = tables[0][s] + tables[1][s] + tables[2][s] + tables[3][s];
    finish();
}

void Histogram::finish() {
    total = distinct = 0;
    for (u32 c : counts) {
        total += c;
        distinct += c != 0;
    }
}

double Histogram::entropy() const {
    if (distinct < 2) return 0;
    double sum = 0;
    for (u32 c : counts) sum += count_log(c);
    return entropy_of(sum, total, distinct);
}

double Histogram::coded_bits() const {
    u32 most = 0;
    for (u32 c : counts) most = c > most ? c : most;
    const double p = static_cast<double>(most) / total;
    if (p <= 0.5) return entropy();
    return p < 1 ? entropy() + 1 + p * std::log2(p) + (1 - p) * std::log2(1 - p) : 1;
}

}  // namespace fastckpt
