#include "huffman.h"

#include <algorithm>
#include <cstring>

#include "fse.h"

namespace fastckpt {
namespace {

constexpr unsigned kMaxWeight = kMaxCodeBits;  // weights are 0 … 11
constexpr unsigned kWeights = kMaxWeight + 1;
constexpr unsigned kMinWeightLog = 5, kMaxWeightLog = 6;

// ---- lengths ----

// Optimal lengths by the two-queue method, then cut to kMaxCodeBits; returns the longest. `order`: the symbols in use,
// rarest first.
unsigned code_lengths(const u32 counts[256], const u8* order, unsigned n, u8 lengths[256]) {
    u32 weight[512];
    u16 parent[512];
    for (unsigned i = 0; i < n; ++i) weight[i] = counts[order[i]];
    unsigned leaf = 0, node = n, next = n;
    const auto take = [&] { return leaf < n && (node == next || weight[leaf] <= weight[node]) ? leaf++ : node++; };
    for (; next < 2 * n - 1; ++next) {
        const unsigned a = take(), b = take();
        weight[next] = weight[a] + weight[b];
        parent[a] = parent[b] = static_cast<u16>(next);
    }
    u8 depth[512];
    depth[2 * n - 2] = 0;
    unsigned at_depth[256] = {};
    unsigned deepest = 0;
    for (unsigned i = 2 * n - 2; i-- > 0;) {
        depth[i] = static_cast<u8>(depth[parent[i]] + 1);
        if (i >= n) continue;  // no leaf
        ++at_depth[depth[i]];
        deepest = std::max<unsigned>(deepest, depth[i]);
    }
    // Two leaves too deep: one takes their parent's place, the other goes below a leaf that is higher up.
    for (unsigned d = deepest; d > kMaxCodeBits; --d)
        while (at_depth[d]) {
            unsigned up = d - 2;
            while (!at_depth[up]) --up;
            at_depth[d] -= 2;
            at_depth[d - 1] += 1;
            at_depth[up] -= 1;
            at_depth[up + 1] += 2;
        }
    deepest = std::min<unsigned>(deepest, kMaxCodeBits);
    std::memset(lengths, 0, 256);
    unsigned i = 0;
    for (unsigned d = deepest; d; --d)
        for (unsigned k = at_depth[d]; k; --k) lengths[order[i++]] = static_cast<u8>(d);
    return deepest;
}

// Longest codes first, equal ones in the order of symbols: the code's value is its place among all codes of `bits`
// bits, cut.
void assign_codes(const u8 lengths[256], unsigned bits, u16 codes[256]) {
    std::memset(codes, 0, 256 * sizeof *codes);
    unsigned place = 0;
    for (unsigned d = bits; d; --d)
        for (unsigned s = 0; s < 256; ++s)
            if (lengths[s] == d) {
                codes[s] = static_cast<u16>(place >> (bits - d));
                place += 1u << (bits - d);
            }
}

// ---- FSE of the weights (RFC 8878, 4.2.1.2) ----

// Returns bytes, 0 if it does not pay or cannot be done. out: room for 128 + kSlack.
size_t write_fse(const u8* weights, unsigned n, u8* out) {
    unsigned counts[kWeights] = {}, distinct = 0;
    for (unsigned i = 0; i < n; ++i) distinct += counts[weights[i]]++ == 0;
    if (distinct < 2 || n < 2) return 0;
    const unsigned log = n <= 32 ? kMinWeightLog : kMaxWeightLog;
    int16_t norm[kWeights];
    normalise(counts, kWeights, n, log, norm);
    FseTable table;
    if (!table.build(norm, kWeights, log)) return 0;
    const size_t header = write_probabilities(norm, kWeights, log, out);
    // The decoder's steps backwards: from state y and the symbol before, the state that has that symbol and leads to y.
    u8 before[kWeights][1 << kMaxWeightLog], last[kWeights];
    // The last symbols' states: those that ask for the most bits, so that the decoder notices that there are none left.
    u8 most[kWeights] = {};
    for (unsigned u = 0; u < 1u << log; ++u) {
        const auto& state = table.states[u];
        if (state.bits > most[state.symbol]) {
            most[state.symbol] = state.bits;
            last[state.symbol] = static_cast<u8>(u);
        }
        for (unsigned y = state.base; y < state.base + (1u << state.bits); ++y)
            before[state.symbol][y] = static_cast<u8>(u);
    }
    ForwardBits to{out + header};
    unsigned state[2];
    bool begun[2] = {false, false};
    for (unsigned i = n; i-- > 0;) {  // even places are state 0's, odd ones state 1's
        unsigned& y = state[i & 1];
        if (!begun[i & 1]) {
            begun[i & 1] = true;
            y = last[weights[i]];
            continue;
        }
        const unsigned u = before[weights[i]][y];
        to.put(y - table.states[u].base, table.states[u].bits);
        y = u;
        if (header + to.bytes > 120) return 0;
    }
    to.put(state[1], log);
    to.put(state[0], log);
    to.put(1, 1);
    const size_t bytes = header + to.finish();
    assert(bytes <= 128 + kSlack);
    return bytes < 128 ? bytes : 0;
}

// At most 255 weights; returns how many, 0 if it is no such stream.
unsigned read_fse(const u8* data, size_t n, u8 weights[256]) {
    Probabilities found;
    const size_t header = found.read(data, n, kWeights, kMaxWeightLog);
    FseTable table;
    if (!header || header >= n || !data[n - 1] || !table.build(found.norm, found.n_symbols, found.log)) return 0;
    const unsigned log = found.log;
    // Backwards from the end mark. Bits before the first are 0, and end the stream once they are needed.
    long left = static_cast<long>(8 * (n - header)) - 8 + static_cast<long>(highest_bit(data[n - 1]));
    const auto take = [&](unsigned count) {
        unsigned value = 0;
        for (unsigned i = 0; i < count; ++i) {
            --left;
            value = 2 * value + (left >= 0 ? data[header + static_cast<size_t>(left) / 8] >> (left % 8) & 1u : 0u);
        }
        return value;
    };
    unsigned state[2];
    state[0] = take(log);
    state[1] = take(log);
    if (left < 0) return 0;
    for (unsigned i = 0; i < 254; ++i) {
        const auto& now = table.states[state[i & 1]];
        weights[i] = now.symbol;
        if (now.bits > left) {  // the other state's symbol is the last one
            weights[i + 1] = table.states[state[~i & 1]].symbol;
            return i + 2;
        }
        state[i & 1] = now.base + take(now.bits);
    }
    return 0;
}

}  // namespace

bool HuffmanTable::build(const u32 counts[256]) {
    u8 order[256];
    unsigned n = 0, last = 0;
    for (unsigned s = 0; s < 256; ++s)
        if (counts[s]) order[n++] = static_cast<u8>(last = s);
    std::stable_sort(order, order + n, [&](u8 a, u8 b) { return counts[a] < counts[b]; });
    const unsigned bits = code_lengths(counts, order, n, codes.length);
    assign_codes(codes.length, bits, codes.code);

    u8 weights[256];
    for (unsigned s = 0; s < last; ++s) weights[s] = static_cast<u8>(codes.length[s] ? bits + 1 - codes.length[s] : 0);
    u8 stream[128 + kSlack + 64];
    const size_t fse = write_fse(weights, last, stream), direct = (last + 1) / 2;
    if (fse && (last > 128 || fse < direct)) {
        description[0] = static_cast<u8>(fse);
        std::memcpy(description + 1, stream, fse);
        description_bytes = 1 + fse;
        return true;
    }
    if (last > 128) return false;
    description[0] = static_cast<u8>(127 + last);
    for (unsigned s = 0; s < last; s += 2)
        description[1 + s / 2] = static_cast<u8>(weights[s] << 4 | (s + 1 < last ? weights[s + 1] : 0));
    description_bytes = 1 + direct;
    return true;
}

u64 HuffmanTable::cost(const u32 counts[256]) const {
    u64 bits = 0;
    for (unsigned s = 0; s < 256; ++s) {
        if (counts[s] && !codes.length[s]) return ~u64{0} >> 8;
        bits += u64{counts[s]} * codes.length[s];
    }
    return bits;
}

// The look-up of r bits, for r = 1 … kMaxCodeBits: a first symbol, behind which stands the look-up of the bits that it
// leaves. Loops over neighbours without branches: a loop that follows each look-up symbol by symbol took 8 us, most of
// it mispredicted.
void HuffmanDecoder::fill(unsigned longest, unsigned n_symbols) {
    u8 order[256];
    unsigned n = 0;
    bool has_one_bit = false;
    for (unsigned d = longest; d; --d)
        for (unsigned s = 0; s < n_symbols; ++s)
            if (length[s] == d) {
                order[n++] = static_cast<u8>(s);
                has_one_bit |= d == 1;
            }
    u64 shorter[kDecodeEntries];  // the look-up of r bits begins at 2^r - 1
    shorter[0] = 0;
    for (unsigned r = 1; r <= kMaxCodeBits; ++r) {
        u64* const table = r == kMaxCodeBits ? entries : shorter + (size_t{1} << r) - 1;
        const size_t size = size_t{1} << r;
        size_t at = size;
        for (unsigned k = n; k-- > 0 && length[order[k]] <= r;) {  // shortest codes first, which lie at the end
            const unsigned d = length[order[k]];
            const u64* const rest = shorter + (size_t{1} << (r - d)) - 1;
            const size_t width = size_t{1} << (r - d);
            const u64 first = u64{order[k]} << 16 | 0x100 | d;
            at -= width;
            for (size_t i = 0; i < width; ++i)
                table[at + i] = ((rest[i] & ~u64{0xffff}) << 8) + (rest[i] & 0xffff) + first;
        }
        std::memset(table, 0, at * sizeof *table);  // the beginnings of longer codes
        if (has_one_bit)                            // only then are there seven symbols, of which the last has no room
            for (size_t i = at; i < size; ++i)
                if ((table[i] >> 8 & 0xff) > 6) {
                    unsigned bits = 0;
                    for (unsigned k = 0; k < 6; ++k) bits += length[table[i] >> (16 + 8 * k) & 0xff];
                    table[i] = (table[i] & ~u64{0xffff}) | 0x600 | bits;
                }
    }
}

size_t HuffmanDecoder::read(const u8* data, size_t n) {
    if (n < 2) return 0;
    u8 weights[256];
    unsigned count;
    size_t used;
    if (data[0] >= 128) {
        count = data[0] - 127u;
        used = 1 + (count + 1) / 2;
        if (used > n) return 0;
        for (unsigned i = 0; i < count; ++i)
            weights[i] = static_cast<u8>(i & 1 ? data[1 + i / 2] & 15 : data[1 + i / 2] >> 4);
    } else {
        used = 1 + size_t{data[0]};
        if (used > n || used < 3) return 0;
        count = read_fse(data + 1, data[0], weights);
        if (!count) return 0;
    }
    u32 total = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (weights[i] > kMaxWeight) return 0;
        total += weights[i] ? 1u << (weights[i] - 1) : 0;
    }
    if (!total) return 0;
    const unsigned bits = highest_bit(total) + 1;
    const u32 rest = (1u << bits) - total;  // the last symbol's, a power of two
    if (bits > kMaxCodeBits || (rest & (rest - 1))) return 0;
    weights[count] = static_cast<u8>(highest_bit(rest) + 1);
    std::memset(length, 0, sizeof length);
    unsigned longest = 0;
    for (unsigned s = 0; s <= count; ++s) {
        length[s] = static_cast<u8>(weights[s] ? bits + 1 - weights[s] : 0);
        longest += length[s] == bits;
    }
    if (longest < 2 || longest & 1) return 0;

    fill(bits, count + 1);
    return used;
}

}  // namespace fastckpt
