// What each way of storing a chunk would cost, estimated from a small part of it.
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "context.h"
#include "entropy.h"
#include "fastckpt.h"
#include "kernels.h"
#include "lanes.h"

using namespace fastckpt;

namespace {

constexpr size_t kPiece = 64, kEvery = 4096;
constexpr size_t kDeltaPiece = 256, kDeltaEvery = 8192, kLineEvery = 1024;
constexpr unsigned kPackBits[4] = {1, 2, 4, 8};
constexpr size_t kManyBytes = 32768;                  // of a plane: counted by halves
constexpr double kRawBits = 7.6, kZeroPieces = 0.08;  // as in frame_sink.cpp
constexpr size_t kMinRow = 16;
constexpr size_t kAhead = 4;       // pieces: each lies in a page of its own, and mostly out of all caches
constexpr double kMostFar = 0.75;  // of the lanes: where more escape, packing gains nothing over SUB

// Bits a symbol as a block of literals has them: raw at most; a symbol in more than half of the places takes a bit all
// the same; nothing where there is one symbol only. sum: of c log2 c over all counts.
double symbol_bits(double sum, double total, unsigned distinct, double most) {
    if (distinct <= 1) return 0;
    double h = entropy_of(sum, total, distinct);
    const double p = most / total;
    if (p > 0.5) h += 1 + p * std::log2(p) + (1 - p) * std::log2(1 - p);
    return h > 8 ? 8 : h;
}

struct Counts {
    u32 of[256];
    u64 total;

    void add(unsigned byte) {
        ++of[byte];
        ++total;
    }
    double bits() const {
        double sum = 0;
        unsigned distinct = 0;
        u32 most = 0;
        for (u32 c : of) {
            sum += count_log(c);
            distinct += c != 0;
            most = c > most ? c : most;
        }
        return symbol_bits(sum, static_cast<double>(total), distinct, most);
    }
    double dominant() const {
        u32 most = 0;
        for (u32 c : of) most = c > most ? c : most;
        return total ? static_cast<double>(most) / static_cast<double>(total) : 0;
    }
};

// ---- without a base ----

struct Tally {
    Counts rot[8];
    u64 lanes;
    bool negative;
};

template <typename Lane>
void look(const u8* raw, size_t lanes, Tally& t) {
    constexpr unsigned w = sizeof(Lane);
    for (size_t i = 0; i < lanes; ++i) {
        const Lane x = load_lane<Lane>(raw + i * w), y = rotated(x);
        for (unsigned k = 0; k < w; ++k) t.rot[k].add(byte_of(y, k));
        t.negative |= (x & kTop<Lane>) != 0;
    }
    t.lanes += lanes;
}

void sample_alone(const u8* raw, size_t n_bytes, unsigned w, fastckpt_estimate* out) {
    Tally t;
    std::memset(&t, 0, sizeof t);
    const size_t every = n_bytes < 64 * kEvery ? (n_bytes < 64 * kPiece ? kPiece : kEvery / 8) : kEvery;
    for (size_t at = 0; at < n_bytes; at += every) {
        if (const size_t soon = at + 4 * kAhead * every; soon < n_bytes) __builtin_prefetch(raw + soon);
        const size_t n = n_bytes - at < kPiece ? n_bytes - at : kPiece;
        if (w == 2) look<u16>(raw + at, n / 2, t);
        if (w == 4) look<u32>(raw + at, n / 4, t);
        if (w == 8) look<u64>(raw + at, n / 8, t);
    }
    out->lanes = t.lanes;
    out->rot_bits = 0;
    for (unsigned k = 0; k < w; ++k) out->rot_bits += t.rot[k].bits();
    const double low = t.rot[w - 1].bits();
    out->rotu_bits = t.negative ? -1 : out->rot_bits - low + (low < 7 ? low : 7);
    out->rot_dominant = t.rot[0].dominant();
    out->sub_bits = -1;
    for (double& bits : out->subpack_bits) bits = -1;
    out->sub_dominant = 0;
}

// ---- with a base ----

double raw_if_many(double bits) { return bits > kRawBits ? 8 : bits; }

// Bits a symbol by codes of 1 to 11 bits, from the counts of all symbols but 0, and that of 0: the commonest one may be
// worth less than a bit, and rare ones take more of the codes than they are worth.
double code_bits(const u32* counts, double zero) {
    double total = zero, most = zero;
    unsigned distinct = zero > 0;
    for (unsigned s = 1; s < 256; ++s) {
        total += counts[s];
        most = counts[s] > most ? counts[s] : most;
        distinct += counts[s] != 0;
    }
    if (distinct <= 1) return 0;
    const double least = total / 2048;
    const bool capped = most > total / 2;
    double space = capped ? 0.5 : 1, middle = 0, sum = 0, bits = capped ? most : 0;
    bool seen = false;
    const auto take = [&](double c, double log) {
        if (c <= 0) return;
        if (capped && !seen && c == most) {
            seen = true;
        } else if (c < least) {
            space -= 1.0 / 2048;
            bits += 11 * c;
        } else {
            middle += c;
            sum += log;
        }
    };
    take(zero, zero > 0 ? zero * std::log2(zero) : 0);
    for (unsigned s = 1; s < 256; ++s) take(counts[s], count_log(counts[s]));
    if (middle > 0) bits += middle * std::log2(middle / space) - sum;
    bits = bits / total + (distinct - 1) / (2 * 0.6931 * total);
    return bits > 8 ? 8 : bits;
}

double geometric_bits(double mean) { return mean > 0 ? (mean + 1) * std::log2(mean + 1) - mean * std::log2(mean) : 0; }

Counts counted(const u8* bytes, size_t n) {
    Histogram histogram;
    histogram.sample(bytes, n, n < kManyBytes ? 1 : 2);
    Counts counts;
    std::memcpy(counts.of, histogram.counts, sizeof counts.of);
    counts.total = histogram.total;
    return counts;
}

// Bits a byte of a plane as runs of zeros, and literals between them.
double run_bits(const Counts& counts, const Zeros& zeros, double n, double places) {
    const double in_runs = static_cast<double>(zeros.n_bytes) / n;
    const double runs = places > 0 ? static_cast<double>(zeros.begun) / places : 0;
    const double literals = 1 - in_runs + runs;
    const double total = static_cast<double>(counts.total);
    const double zero = counts.of[0] - (in_runs - runs) * total;
    double bits = literals * raw_if_many(code_bits(counts.of, zero > 0 ? zero : 0));
    if (runs > 0) bits += runs * (geometric_bits(in_runs / runs - kMinRun) + geometric_bits(literals / runs - 2));
    return bits;
}

// Bits a byte of a plane: `plain` as codes, or less as runs of zeros. row: bytes that lie together.
double or_runs(double plain, const Counts& counts, const u8* bytes, size_t n, size_t row) {
    if (row < kMinRow || n < kMinHuffman) return plain;
    size_t pieces = 0, empty = 0;
    for (size_t i = 0; i + 16 <= n; i += 16, ++pieces) empty += !(load64(bytes + i) | load64(bytes + i + 8));
    if (static_cast<double>(empty) < kZeroPieces * static_cast<double>(pieces)) return plain;
    const double runs = run_bits(counts, kernels().count_zeros(bytes, n, row), static_cast<double>(n),
                                 static_cast<double>(n / row * (row - 1)));
    return runs < plain ? runs : plain;
}

// The same for a plane of a difference.
double plane_bits(const u8* bytes, size_t n, size_t row, double* dominant = nullptr) {
    if (!n) return 0;
    const Counts counts = counted(bytes, n);
    if (dominant) *dominant = counts.dominant();
    return or_runs(raw_if_many(code_bits(counts.of, counts.of[0])), counts, bytes, n, row);
}

// The pieces of raw and base, one after the other, in the context; returns their bytes.
size_t gather(fastckpt_context& context, const u8* raw, const u8* base, size_t n_bytes) {
    const size_t every =
        n_bytes < 64 * kDeltaEvery ? (n_bytes < 64 * kDeltaPiece ? kDeltaPiece : kDeltaEvery / 8) : kDeltaEvery;
    if (n_bytes < kDeltaPiece) {
        std::memcpy(context.escapes, raw, n_bytes);
        std::memcpy(context.escape_planes, base, n_bytes);
        return n_bytes;
    }
    size_t n = 0;
    for (size_t at = 0; at + kDeltaPiece <= n_bytes; at += every, n += kDeltaPiece) {
        if (const size_t soon = at + kAhead * every; soon + kDeltaPiece <= n_bytes)
            for (size_t i = 0; i < kDeltaPiece; i += kPiece) {
                __builtin_prefetch(raw + soon + i);
                __builtin_prefetch(base + soon + i);
            }
        std::memcpy(context.escapes + n, raw + at, kDeltaPiece);
        std::memcpy(context.escape_planes + n, base + at, kDeltaPiece);
    }
    return n;
}

// The share of lines of 64 bytes, one in `every` bytes, that are not the base's.
double changed_lines(const u8* raw, const u8* base, size_t n, size_t every) {
    size_t lines = 0, changed = 0;
    for (size_t at = 0; at + kPiece <= n; at += every, ++lines) {
        if (const size_t soon = at + 4 * kAhead * every; soon < n) {
            __builtin_prefetch(raw + soon);
            __builtin_prefetch(base + soon);
        }
        u64 differ = 0;
        for (size_t i = 0; i < kPiece; i += 8) differ |= load64(raw + at + i) ^ load64(base + at + i);
        changed += differ != 0;
    }
    return static_cast<double>(changed) / static_cast<double>(lines);
}

// Where rows change or do not, a sample of few pieces may have met too many of either: more lines, only compared, tell.
void correct(const u8* raw, const u8* base, size_t n_bytes, const u8* x, const u8* under, size_t n,
             fastckpt_estimate* out) {
    const double sampled = changed_lines(x, under, n, kPiece);
    if (n_bytes < 64 * kDeltaEvery || sampled <= 0 || sampled > 0.7) return;
    double factor = changed_lines(raw, base, n_bytes, kLineEvery) / sampled;
    factor = factor < 0.5 ? 0.5 : factor > 2 ? 2 : factor;
    out->sub_bits *= factor;
    for (double& bits : out->subpack_bits) bits *= factor;
}

void sample_delta(fastckpt_context& context, const u8* raw, const u8* base, size_t n_bytes, unsigned w,
                  fastckpt_estimate* out) {
    const Kernels& loops = kernels();
    const size_t n = gather(context, raw, base, n_bytes), lanes = n / w;
    const size_t row = (n < kDeltaPiece ? n : kDeltaPiece) / w;
    const u8 *const x = context.escapes, *const under = context.escape_planes;
    // Behind these two: escapes, and their planes.
    constexpr size_t kSampled = kMaxRaw / kDeltaEvery * kDeltaPiece;
    static_assert(2 * kSampled + kSlack <= kMaxRaw && kSampled <= kMaxRaw / 2, "both have room");
    static_assert(64 * kDeltaPiece * 8 <= kSampled && 64 * kDeltaPiece <= kSampled, "shorter chunks have fewer pieces");
    u8 *const escapes = context.escapes + kSampled, *const escape_planes = context.escape_planes + kSampled;
    u8* planes[kMaxPlanes];
    for (unsigned k = 0; k < w; ++k) planes[k] = context.planes[k];
    out->lanes = lanes;

    loops.split(x, nullptr, lanes, w, Map::kRot, planes);
    out->rot_bits = 0;
    double low = 0;
    for (unsigned k = 0; k < w; ++k) {
        const Counts counts = counted(planes[k], lanes);
        if (k == 0) out->rot_dominant = counts.dominant();
        low = or_runs(counts.bits(), counts, planes[k], lanes, row);
        out->rot_bits += low;
    }
    u8 signs = 0;
    for (size_t i = 0; i < lanes; ++i) signs |= planes[w - 1][i];
    const bool negative = signs & 1;
    out->rotu_bits = negative ? -1 : out->rot_bits - low + (low < 7 ? low : 7);

    loops.split(x, under, lanes, w, Map::kSub, planes);
    out->sub_bits = 0;
    for (unsigned k = 0; k < w; ++k)
        out->sub_bits += plane_bits(planes[k], lanes, row, k == 0 ? &out->sub_dominant : nullptr);

    for (unsigned p = 0; p < 4; ++p) {
        const unsigned bits = kPackBits[p];
        const size_t far = loops.subpack(x, under, lanes, w, bits, context.packed, escapes);
        if (static_cast<double>(far) > kMostFar * static_cast<double>(lanes)) {
            out->subpack_bits[p] = 8 * w;
            continue;
        }
        for (unsigned k = 0; k < w; ++k) planes[k] = escape_planes + k * far;
        loops.split(escapes, nullptr, far, w, Map::kPlain, planes);
        double escape_bits = 0;
        for (unsigned k = 0; k < w; ++k) escape_bits += plane_bits(planes[k], far, far);
        const double packed = plane_bits(context.packed, (lanes * bits + 7) / 8, (row * bits + 7) / 8);
        out->subpack_bits[p] = packed * bits / 8 + static_cast<double>(far) / static_cast<double>(lanes) * escape_bits;
    }
    correct(raw, base, n_bytes, x, under, n, out);
}

}  // namespace

extern "C" int fastckpt_sample(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned w,
                               fastckpt_estimate* out) {
    if (w != 2 && w != 4 && w != 8) return FASTCKPT_BAD_LANE;
    if (!n_bytes || n_bytes % w || (base && n_bytes > kMaxRaw)) return FASTCKPT_BAD_LENGTH;
    if (!out || (base && !context)) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = check_memory(raw, n_bytes)) return status;
    if (base)
        sample_delta(*context, static_cast<const u8*>(raw), static_cast<const u8*>(base), n_bytes, w, out);
    else
        sample_alone(static_cast<const u8*>(raw), n_bytes, w, out);
    return FASTCKPT_OK;
}
