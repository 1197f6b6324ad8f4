// What each way of storing a chunk would cost, estimated from a 64th of it.
#include <cmath>
#include <cstring>

#include "arguments.h"
#include "entropy.h"
#include "fastckpt.h"
#include "kernels.h"
#include "lanes.h"

using namespace fastckpt;

namespace {

constexpr size_t kPiece = 64, kEvery = 4096;
constexpr unsigned kPackBits[4] = {1, 2, 4, 8};

struct Counts {
    u32 of[256];
    u64 total;

    void add(unsigned byte) {
        ++of[byte];
        ++total;
    }
    // Bits a symbol as a block of literals has them: raw at most; a symbol in more than half of the places takes a bit
    // all the same; nothing where there is one symbol only.
    double bits() const {
        if (!total) return 0;
        double sum = 0;
        unsigned distinct = 0;
        for (u32 c : of)
            if (c) {
                sum += c * std::log2(static_cast<double>(c));
                ++distinct;
            }
        if (distinct == 1) return 0;
        double h = entropy_of(sum, static_cast<double>(total), distinct);
        const double p = dominant();
        if (p > 0.5) h += 1 + p * std::log2(p) + (1 - p) * std::log2(1 - p);
        return h > 8 ? 8 : h;
    }
    double dominant() const {
        u32 most = 0;
        for (u32 c : of) most = c > most ? c : most;
        return total ? static_cast<double>(most) / static_cast<double>(total) : 0;
    }
};

struct Tally {
    Counts rot[8], low7, sub[8], packed[4], escapes[4][8];
    u64 lanes, n_escapes[4];
    bool negative;
};

template <typename Lane>
void look(const u8* raw, const u8* base, size_t lanes, Tally& t) {
    constexpr unsigned w = sizeof(Lane);
    Lane z[kPiece / w];
    for (size_t i = 0; i < lanes; ++i) {
        const Lane x = load_lane<Lane>(raw + i * w), y = rotated(x);
        for (unsigned k = 0; k < w; ++k) t.rot[k].add(byte_of(y, k));
        t.negative |= (x & kTop<Lane>) != 0;
        if (!base) continue;
        z[i] = difference(x, load_lane<Lane>(base + i * w));
        for (unsigned k = 0; k < w; ++k) t.sub[k].add(byte_of(z[i], k));
    }
    t.lanes += lanes;
    if (!base) return;
    for (unsigned p = 0; p < 4; ++p) {
        const unsigned bits = kPackBits[p], in_byte = 8 / bits;
        const Lane esc = static_cast<Lane>((1u << bits) - 1);
        for (size_t i = 0; i + in_byte <= lanes; i += in_byte) {
            unsigned byte = 0;
            for (unsigned j = 0; j < in_byte; ++j)
                byte |= static_cast<unsigned>(z[i + j] < esc ? z[i + j] : esc) << (bits * j);
            t.packed[p].add(byte);
        }
        for (size_t i = 0; i < lanes; ++i)
            if (z[i] >= esc) {
                ++t.n_escapes[p];
                const Lane rest = static_cast<Lane>(z[i] - esc);
                for (unsigned k = 0; k < w; ++k) t.escapes[p][k].add(byte_of(rest, k));
            }
    }
}

}  // namespace

extern "C" int fastckpt_sample(const void* raw, const void* base, size_t n_bytes, unsigned w, fastckpt_estimate* out) {
    if (w != 2 && w != 4 && w != 8) return FASTCKPT_BAD_LANE;
    if (!n_bytes || n_bytes % w) return FASTCKPT_BAD_LENGTH;
    if (!out) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = check_memory(raw, n_bytes)) return status;
    Tally t;  // 54 KiB
    std::memset(&t, 0, sizeof t);
    const auto* x = static_cast<const u8*>(raw);
    const auto* b = static_cast<const u8*>(base);
    const size_t every = n_bytes < 64 * kEvery ? (n_bytes < 64 * kPiece ? kPiece : kEvery / 8) : kEvery;
    for (size_t at = 0; at < n_bytes; at += every) {
        const size_t n = n_bytes - at < kPiece ? n_bytes - at : kPiece;
        const u8* base_at = b ? b + at : nullptr;
        if (w == 2) look<u16>(x + at, base_at, n / 2, t);
        if (w == 4) look<u32>(x + at, base_at, n / 4, t);
        if (w == 8) look<u64>(x + at, base_at, n / 8, t);
    }
    out->lanes = t.lanes;
    out->rot_bits = out->sub_bits = 0;
    for (unsigned k = 0; k < w; ++k) out->rot_bits += t.rot[k].bits();
    const double low = t.rot[w - 1].bits();
    out->rotu_bits = t.negative ? -1 : out->rot_bits - low + (low < 7 ? low : 7);
    out->rot_dominant = t.rot[0].dominant();
    for (unsigned k = 0; k < w; ++k) out->sub_bits += t.sub[k].bits();
    out->sub_dominant = t.sub[0].dominant();
    for (unsigned p = 0; p < 4; ++p) {
        double escape_bits = 0;
        for (unsigned k = 0; k < w; ++k) escape_bits += t.escapes[p][k].bits();
        const double rate = static_cast<double>(t.n_escapes[p]) / static_cast<double>(t.lanes);
        out->subpack_bits[p] = b ? t.packed[p].bits() * kPackBits[p] / 8 + rate * escape_bits : -1;
    }
    if (!b) out->sub_bits = -1;
    return FASTCKPT_OK;
}
