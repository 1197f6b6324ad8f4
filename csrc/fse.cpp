#include "fse.h"

#include <algorithm>
#include <cstring>

namespace fastckpt {

bool FseTable::build(const int16_t* norm, unsigned n_symbols, unsigned table_log) {
    log = table_log;
    const unsigned size = 1u << log, step = (size >> 1) + (size >> 3) + 3;
    unsigned next[kMaxFseSymbols], high = size;
    for (unsigned s = 0; s < n_symbols; ++s) {
        next[s] = norm[s] == -1 ? 1 : static_cast<unsigned>(norm[s]);
        if (norm[s] == -1) states[--high].symbol = static_cast<u8>(s);
    }
    unsigned at = 0;
    for (unsigned s = 0; s < n_symbols; ++s)
        for (int k = 0; k < norm[s]; ++k) {
            states[at].symbol = static_cast<u8>(s);
            do at = (at + step) & (size - 1);
            while (at >= high);
        }
    if (at != 0) return false;
    for (unsigned u = 0; u < size; ++u) {
        const unsigned x = next[states[u].symbol]++;
        const unsigned bits = log - highest_bit(x);
        states[u].bits = static_cast<u8>(bits);
        states[u].base = static_cast<u16>((x << bits) - size);
    }
    return true;
}

void normalise(const unsigned* counts, unsigned n_symbols, unsigned total, unsigned log, int16_t* norm) {
    int left = 1 << log;
    unsigned largest = 0;
    for (unsigned s = 0; s < n_symbols; ++s) {
        norm[s] = counts[s] ? static_cast<int16_t>(std::max(1u, (counts[s] << log) / total)) : 0;
        left -= norm[s];
        if (counts[s] > counts[largest]) largest = s;
    }
    norm[largest] = static_cast<int16_t>(norm[largest] + left);
    // Rounding up rare ones may have taken more than the largest had.
    while (norm[largest] < 1) {
        unsigned from = 0;
        for (unsigned s = 0; s < n_symbols; ++s)
            if (norm[s] > norm[from]) from = s;
        --norm[from];
        ++norm[largest];
    }
}

size_t write_probabilities(const int16_t* norm, unsigned n_symbols, unsigned log, u8* out) {
    ForwardBits to{out};
    to.put(log - 5, 4);
    int left = (1 << log) + 1;  // and one more: the range of a value is 0 … left
    unsigned last = n_symbols;
    while (!norm[last - 1]) --last;
    for (unsigned s = 0; s < last;) {
        const unsigned value = static_cast<unsigned>(norm[s] + 1);
        const unsigned bits = highest_bit(static_cast<u32>(left)) + 1, threshold = 1u << (bits - 1);
        const unsigned short_values = 2 * threshold - 1 - static_cast<unsigned>(left);  // values that take one bit less
        if (value < short_values)
            to.put(value, bits - 1);
        else if (value < threshold)
            to.put(value, bits);
        else
            to.put(value + short_values, bits);
        left -= norm[s];
        ++s;
        if (value == 1) {  // a 0: how many more follow, in twos of bits
            unsigned zeros = 0;
            for (; s < last && !norm[s]; ++s) ++zeros;
            for (; zeros >= 3; zeros -= 3) to.put(3, 2);
            to.put(zeros, 2);
        }
    }
    return to.finish();
}

size_t Probabilities::read(const u8* data, size_t n, unsigned max_symbols, unsigned max_log) {
    size_t at = 0;  // in bits
    const auto peek = [&](unsigned count) {
        u32 value = 0;
        for (unsigned i = 0; i < count; ++i) {
            const size_t bit = at + i;
            if (bit / 8 < n) value |= static_cast<u32>(data[bit / 8] >> (bit % 8) & 1) << i;
        }
        return value;
    };
    log = peek(4) + 5;
    at = 4;
    if (log > max_log) return 0;
    int left = (1 << log) + 1;
    std::memset(norm, 0, sizeof norm);
    n_symbols = 0;
    while (left > 1) {
        if (n_symbols >= max_symbols) return 0;
        const unsigned bits = highest_bit(static_cast<u32>(left)) + 1, threshold = 1u << (bits - 1);
        const unsigned short_values = 2 * threshold - 1 - static_cast<unsigned>(left);
        unsigned value = peek(bits) & (threshold - 1);
        if (value < short_values) {
            at += bits - 1;
        } else {
            value = peek(bits);
            at += bits;
            if (value >= threshold) value -= short_values;
        }
        const int probability = static_cast<int>(value) - 1;
        norm[n_symbols++] = static_cast<int16_t>(probability);
        left -= probability < 0 ? -probability : probability;
        if (probability == 0)
            for (unsigned more = 3; more == 3;) {
                more = peek(2);
                at += 2;
                n_symbols += more;
                if (n_symbols > max_symbols) return 0;
            }
    }
    const size_t bytes = (at + 7) / 8;
    return left == 1 && bytes <= n ? bytes : 0;
}

}  // namespace fastckpt
