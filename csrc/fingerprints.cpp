// What tells whether memory has changed: a sample of it, one cache line of each page; numbers that stand for all of it,
// one for 32 KiB, or two for all of a chunk.
#include <cstring>

#include "arguments.h"
#include "cuda/fingerprint.cuh"
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

// Every word times its own upper half, made another number first by the key of its place. No change of a sign or an
// exponent in all words gets lost in it, as it may in any sum of words times constants.
u64 mixed(u64 word, u64 key) {
    const u64 x = word ^ key;
    return x * static_cast<u64>(static_cast<int64_t>(x) >> 32);
}

}  // namespace

extern "C" int fastckpt_rows(const void* data, size_t n_bytes, const uint64_t* keys, uint64_t* out, size_t n_out) {
    constexpr size_t row = FASTCKPT_ROW_WORDS * 8;
    if (n_bytes / row + (n_bytes % row != 0) != n_out) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(data, n_bytes)) return status;
    if (const int status = check_words(keys, FASTCKPT_ROW_WORDS)) return status;
    if (const int status = check_words(out, n_out)) return status;
    const auto* from = static_cast<const u8*>(data);
    for (size_t i = 0; i < n_out; ++i, from += row) {
        const size_t left = n_bytes - i * row, n = left < row ? left / 8 : FASTCKPT_ROW_WORDS;
        u64 sum = 0;
        for (size_t w = 0; w < n; ++w) sum += mixed(load64(from + 8 * w), keys[w]);
        if (left < row) {  // the rest of the row is zeros
            u64 last = 0;
            std::memcpy(&last, from + 8 * n, left % 8);
            sum += mixed(last, keys[n]);
            for (size_t w = n + 1; w < FASTCKPT_ROW_WORDS; ++w) sum += mixed(0, keys[w]);
        }
        out[i] = sum;
    }
    return FASTCKPT_OK;
}

extern "C" int fastckpt_fingerprint(const void* data, size_t n_bytes, const uint64_t* keys, uint64_t* out) {
    if (const int status = check_memory(data, n_bytes)) return status;
    if (const int status = check_words(keys, 2)) return status;
    if (const int status = check_words(out, 2)) return status;
    const auto* from = static_cast<const u8*>(data);
    const fingerprint::Sums key = {keys[0], keys[1]};
    fingerprint::Sums sums = {0, 0};
    for (size_t i = 0; i < n_bytes / 8; ++i) fingerprint::absorb(sums, key, load64(from + 8 * i), i + 1);
    fingerprint::absorb_ends(sums, key, from, n_bytes);
    out[0] = sums.a;
    out[1] = sums.b;
    return FASTCKPT_OK;
}

extern "C" size_t fastckpt_lines_bytes(const uint64_t* lengths, size_t n) {
    if (check_words(lengths, n)) return SIZE_MAX;
    size_t total = 0;
    for (size_t i = 0; i < n; ++i) {
        if (lengths[i] > kMostBytes) return SIZE_MAX;
        total += lengths[i] < FASTCKPT_WHOLE_BELOW ? lengths[i] : (lengths[i] + kPage - 1) / kPage * kLine;
        if (total > kMostBytes) return SIZE_MAX;  // so that no sum wraps: each step adds less than that
    }
    return total;
}

extern "C" int fastckpt_lines(const uint64_t* addresses, const uint64_t* lengths, size_t n, uint64_t seed, void* out,
                              size_t out_bytes) {
    if (const int status = check_stretches(addresses, lengths, n)) return status;
    if (fastckpt_lines_bytes(lengths, n) != out_bytes) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(out, out_bytes)) return status;
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
