#include "runs.h"

#include <cstring>

#include "fse.h"

namespace fastckpt {
namespace {

constexpr size_t kScratch = 4 * kStreamRoom;
constexpr unsigned kPredefinedLog = 6;
constexpr size_t kFewRuns = 64;  // too few to pay for a description of their lengths

// Lengths as codes with more bits behind them (RFC 8878, 3.1.1.3.2.1.1).
struct Lengths {
    unsigned n_codes, first;
    u8 bits[kMaxFseSymbols];
    u32 base[kMaxFseSymbols];
    u8 code_of[128];  // of lengths that are less than 128 above the first
    int16_t predefined[kMaxFseSymbols];

    Lengths(unsigned codes, unsigned its_first, unsigned plain, const u8* more, const int16_t* its_predefined)
        : n_codes(codes), first(its_first) {
        u32 at = first;
        std::memset(code_of, 0, sizeof code_of);
        for (unsigned c = 0; c < codes; ++c) {
            bits[c] = c < plain ? u8{0} : more[c - plain];
            base[c] = at;
            predefined[c] = its_predefined[c];
            for (u32 k = 0; k < 1u << bits[c]; ++k, ++at)
                if (at - first < sizeof code_of) code_of[at - first] = static_cast<u8>(c);
        }
    }
    unsigned code(u32 length) const {
        const u32 x = length - first;  // from 128 above the first on, each code has one bit more than the one before
        return x < sizeof code_of ? code_of[x] : n_codes - 17 + highest_bit(x);
    }
};

constexpr u8 kLiteralBits[] = {1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr u8 kMatchBits[] = {1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr int16_t kLiteralDefault[] = {4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1,  1,  2,  2,
                                       2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1};
constexpr int16_t kMatchDefault[] = {1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1,  1,  1,  1,  1,  1,  1, 1,
                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,  1,  1,  1,  1,  1,  1, 1,
                                     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1};

const Lengths kLiterals(36, 0, 16, kLiteralBits, kLiteralDefault);
const Lengths kMatches(53, 3, 32, kMatchBits, kMatchDefault);

enum Mode : unsigned { kPredefined = 0, kOne = 1, kDescribed = 2 };

// ---- writing ----

// The states of one kind of lengths, from the last one to the first.
class Encoder {
public:
    // counts: of codes. Writes what describes the table behind `out` and advances it. False: no table is possible.
    bool build(const Lengths& lengths, const unsigned* counts, size_t total, u8*& out) {
        unsigned distinct = 0, only = 0;
        for (unsigned c = 0; c < lengths.n_codes; ++c)
            if (counts[c]) {
                ++distinct;
                only = c;
            }
        if (distinct == 1) {
            mode = kOne;
            log_ = 0;
            *out++ = static_cast<u8>(only);
            return true;
        }
        int16_t norm[kMaxFseSymbols];
        FseTable table;
        if (total < kFewRuns) {
            mode = kPredefined;
            log_ = kPredefinedLog;
            if (!table.build(lengths.predefined, lengths.n_codes, log_)) return false;
            std::memcpy(norm, lengths.predefined, sizeof norm);
        } else {
            mode = kDescribed;
            log_ = total < 512 ? 7 : total < 2048 ? 8 : kMaxFseLog;
            normalise(counts, lengths.n_codes, static_cast<unsigned>(total), log_, norm);
            if (!table.build(norm, lengths.n_codes, log_)) return false;
            out += write_probabilities(norm, lengths.n_codes, log_, out);
        }
        unsigned from = 0;
        for (unsigned c = 0; c < lengths.n_codes; ++c) {
            const unsigned n = norm[c] == -1 ? 1u : static_cast<unsigned>(norm[c]);
            first_[c] = from - n;  // states of code c come after those of the codes before it
            share_[c] = n;
            from += n;
        }
        unsigned seen[kMaxFseSymbols] = {};
        for (unsigned u = 0; u < 1u << log_; ++u) {
            const unsigned c = table.states[u].symbol;
            state_of_[first_[c] + share_[c] + seen[c]++] = static_cast<u16>(u + (1u << log_));
        }
        return true;
    }
    // The last code: a state that has it.
    void begin(unsigned code) {
        if (log_) state_ = state_of_[first_[code] + share_[code]];
    }
    // The code before: its state, and the bits that lead from it to the state so far.
    unsigned step(unsigned code, u64& bits) {
        if (!log_) return 0;
        const unsigned share = share_[code];
        unsigned count = log_ - highest_bit(share);
        count -= (state_ >> count) < share;
        bits = state_ & ((1u << count) - 1);
        state_ = state_of_[first_[code] + (state_ >> count)];
        return count;
    }
    u64 state() const { return log_ ? state_ - (1u << log_) : 0; }
    unsigned log() const { return log_; }

    Mode mode = kPredefined;

private:
    unsigned log_ = 0, state_ = 0;
    unsigned first_[kMaxFseSymbols], share_[kMaxFseSymbols];
    u16 state_of_[1 << kMaxFseLog];
};

struct Bits {
    u64 waiting = 0;
    unsigned n = 0;
    u8* at;
    explicit Bits(u8* to) : at(to) {}
    void put(u64 bits, unsigned count) {  // count <= 56
        waiting |= bits << n;
        n += count;
        std::memcpy(at, &waiting, 8);
        at += n >> 3;
        waiting >>= n & 0x38;
        n &= 7;
    }
};

}  // namespace

size_t write_runs(const Run* runs, size_t n_runs, u8* out, size_t room, u8* scratch) {
    assert(n_runs && n_runs <= kMaxRuns);
    constexpr size_t kHead = 4 + 2 * (2 * kMaxFseSymbols + 1) + 1;
    u8 head[kHead], *to = head;
    if (n_runs < 128) {
        *to++ = static_cast<u8>(n_runs);
    } else {
        static_assert(kMaxRuns < 0x7f00, "larger counts have another form");
        *to++ = static_cast<u8>((n_runs >> 8) + 128);
        *to++ = static_cast<u8>(n_runs);
    }
    unsigned literals[kMaxFseSymbols] = {}, matches[kMaxFseSymbols] = {};
    for (size_t i = 0; i < n_runs; ++i) {
        ++literals[kLiterals.code(runs[i].literals)];
        ++matches[kMatches.code(runs[i].match)];
    }
    Encoder literal, match;
    u8* const modes = to++;
    if (!literal.build(kLiterals, literals, n_runs, to)) return kNoRoom;
    *to++ = 0;  // the only offset code: the offset that was used last, which is 1 from the beginning of a frame on
    if (!match.build(kMatches, matches, n_runs, to)) return kNoRoom;
    *modes = static_cast<u8>(literal.mode << 6 | kOne << 4 | match.mode << 2);
    // Backwards, as the decoder reads from the end: the lengths' further bits, then those of the states.
    static_assert((kMaxRuns * (9 + 9 + 16 + 16) + 2 * kMaxFseLog + 1) / 8 + 9 <= kScratch, "all bits have room");
    Bits bits(scratch);
    for (size_t i = n_runs; i-- > 0;) {
        const unsigned l = kLiterals.code(runs[i].literals), m = kMatches.code(runs[i].match);
        if (i == n_runs - 1) {
            literal.begin(l);
            match.begin(m);
        } else {
            u64 l_bits = 0, m_bits = 0;
            const unsigned m_count = match.step(m, m_bits), l_count = literal.step(l, l_bits);
            bits.put(m_bits | l_bits << m_count, m_count + l_count);
        }
        bits.put((runs[i].literals - kLiterals.base[l]) | u64{runs[i].match - kMatches.base[m]} << kLiterals.bits[l],
                 kLiterals.bits[l] + kMatches.bits[m]);
    }
    bits.put(match.state() | literal.state() << match.log(), match.log() + literal.log());
    bits.put(1, 1);
    if (bits.n) *bits.at++ = static_cast<u8>(bits.waiting);
    const size_t n_head = static_cast<size_t>(to - head), n_bits = static_cast<size_t>(bits.at - scratch);
    if (n_head + n_bits > room) return kNoRoom;
    std::memcpy(out, head, n_head);
    std::memcpy(out + n_head, scratch, n_bits);
    return n_head + n_bits;
}

// ---- reading ----

namespace {

class Decoder {
public:
    struct State {
        u32 base;
        u16 next;
        u8 more, bits;  // of the length, of the next state
    };

    // The table of a mode; `at` is advanced behind its description. False if it is none.
    bool build(const Lengths& lengths, unsigned mode, const u8*& at, const u8* end) {
        FseTable table;
        if (mode == kOne) {
            if (at == end || *at >= lengths.n_codes) return false;
            log = 0;
            states[0] = {.base = lengths.base[*at], .next = 0, .more = lengths.bits[*at], .bits = 0};
            ++at;
            return true;
        }
        if (mode == kPredefined) {
            if (!table.build(lengths.predefined, lengths.n_codes, kPredefinedLog)) return false;
        } else if (mode == kDescribed) {
            Probabilities found;
            const size_t used = found.read(at, static_cast<size_t>(end - at), lengths.n_codes, kMaxFseLog);
            if (!used || !table.build(found.norm, found.n_symbols, found.log)) return false;
            at += used;
        } else {
            return false;  // the table of the block before: none of ours
        }
        log = table.log;
        for (unsigned u = 0; u < 1u << log; ++u) {
            const FseTable::State& from = table.states[u];
            states[u] = {.base = lengths.base[from.symbol],
                         .next = from.base,
                         .more = lengths.bits[from.symbol],
                         .bits = from.bits};
        }
        return true;
    }

    unsigned log;
    State states[1 << kMaxFseLog];
};

u64 low(u64 x, unsigned bits) { return x & ((u64{1} << bits) - 1); }

// n bytes, in pieces of which the last one may be longer than what is left: there is slack behind both.
FC_INLINE void copy_literals(u8* to, const u8* from, size_t n) {
    std::memcpy(to, from, 16);
    if (n > 16) std::memcpy(to, from, n);
}
FC_INLINE void repeat(u8* to, u8 value, size_t n) {
    const u64 word = 0x0101010101010101ull * value;
    for (unsigned k = 0; k < 8; ++k) std::memcpy(to + 8 * k, &word, 8);
    if (n > 64) std::memset(to + 64, value, n - 64);
}

}  // namespace

size_t read_runs(const u8* section, size_t n_bytes, u8* scratch, const u8* literals, size_t n_literals, u8* out,
                 size_t n) {
    const u8 *at = section, *const end = section + n_bytes;
    if (n_bytes < 4) return 0;
    size_t n_runs = *at++;
    if (n_runs >= 128) {
        if (n_runs == 255) return 0;  // more than fit a block of ours
        n_runs = (n_runs - 128) << 8 | *at++;
    }
    const unsigned modes = *at++;
    if (!n_runs || (modes & 3) || (modes >> 4 & 3) != kOne) return 0;
    Decoder literal, match;
    if (!literal.build(kLiterals, modes >> 6, at, end)) return 0;
    if (at == end || *at++ != 0) return 0;  // other offsets than the last one, which is 1
    if (!match.build(kMatches, modes >> 2 & 3, at, end)) return 0;
    const size_t n_bits = static_cast<size_t>(end - at);
    if (!n_bits || n_bits > kScratch - 8 || !end[-1]) return 0;
    std::memcpy(scratch, at, n_bits);  // behind which 8 bytes may be read
    std::memset(scratch + n_bits, 0, 8);
    long left = static_cast<long>(8 * n_bits) - 8 + static_cast<long>(highest_bit(end[-1]));
    const auto window = [&] { return load64(scratch + left / 8) >> (left % 8); };  // 57 bits at least
    left -= static_cast<long>(literal.log + match.log);
    if (left < 0) return 0;
    u64 bits = window();
    unsigned m_state = static_cast<unsigned>(low(bits, match.log));
    unsigned l_state = static_cast<unsigned>(low(bits >> match.log, literal.log));
    u8 *to = out, *const to_end = out + n;
    const u8* const literals_end = literals + n_literals;
    for (size_t i = n_runs; i > 0; --i) {
        const Decoder::State &l = literal.states[l_state], &m = match.states[m_state];
        const unsigned l_bits = i > 1 ? l.bits : 0, m_bits = i > 1 ? m.bits : 0;
        left -= static_cast<long>(l_bits + m_bits + l.more + m.more);  // at most 50
        if (left < 0) return 0;
        bits = window();
        m_state = static_cast<unsigned>(m.next + low(bits, m_bits));
        bits >>= m_bits;
        l_state = static_cast<unsigned>(l.next + low(bits, l_bits));
        bits >>= l_bits;
        const size_t n_l = l.base + low(bits, l.more), n_m = m.base + low(bits >> l.more, m.more);
        // Without literals, offset code 0 would mean the offset before the last one.
        if (!n_l || n_l > static_cast<size_t>(literals_end - literals)) return 0;
        if (n_l + n_m > static_cast<size_t>(to_end - to)) return 0;
        copy_literals(to, literals, n_l);
        to += n_l;
        literals += n_l;
        repeat(to, to[-1], n_m);
        to += n_m;
    }
    if (left != 0) return 0;
    const size_t rest = static_cast<size_t>(literals_end - literals);
    if (rest > static_cast<size_t>(to_end - to)) return 0;
    std::memcpy(to, literals, rest);
    return static_cast<size_t>(to + rest - out);
}

}  // namespace fastckpt
