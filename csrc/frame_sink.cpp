#include "frame_sink.h"

#include <cstring>

#include "runs.h"

namespace fastckpt {
namespace {

// A plane whose entropy is above this stays raw: 5 % of it is not worth the time.
constexpr double kRawBits = 7.6;
// So many symbols that a sample has missed are given a count of 1; if there may be more, all are counted.
constexpr unsigned kMostGuessed = 32;
constexpr size_t kMinCounted = 16384;
// Shorter parts are coded in less time than a stripe needs to come.
constexpr size_t kMinFetching = 16384;
// Planes in which so many pieces of 16 bytes are zeros are tried as runs.
constexpr double kZeroPieces = 0.08;

size_t clamped(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }

void put24(u8* to, size_t value) {
    to[0] = static_cast<u8>(value);
    to[1] = static_cast<u8>(value >> 8);
    to[2] = static_cast<u8>(value >> 16);
}

// Literals as they are, with the header of their section. Returns its bytes, 0 if there is no room.
size_t raw_literals(const u8* bytes, size_t n, u8* to, size_t room) {
    if (room < 3 || room - 3 < n) return 0;
    put24(to, 3u << 2 | n << 4);
    std::memcpy(to + 3, bytes, n);
    return 3 + n;
}

bool covers(const HuffmanTable& table, const Range& range) {
    bool all = !range.has_zero || table.codes.length[0];
    for (unsigned s = range.first; s <= range.last; ++s) all &= table.codes.length[s] != 0;
    return all;
}

// Every symbol of the part gets a count: those of its range that the sample has missed a small one, for a code of 11
// bits takes 1/2048 of the space. If that would be too many, or be felt among a handful of symbols, all are counted.
//
// delta: the planes of differences have many rare symbols; for these a quarter of all is counted.
void complete(Histogram& histogram, const Range& range, const u8* bytes, size_t n, bool delta) {
    unsigned missed = range.has_zero && !histogram.counts[0];
    for (unsigned s = range.first; s <= range.last; ++s) missed += !histogram.counts[s];
    if (missed && (missed > kMostGuessed || histogram.distinct < 8)) {
        histogram.sample(bytes, n, delta && histogram.distinct >= 8 && n >= kMinCounted ? 4 : 1);
        if (!delta) return;
    }
    if (range.has_zero && !histogram.counts[0]) histogram.counts[0] = 1;
    for (unsigned s = range.first; s <= range.last; ++s)
        if (!histogram.counts[s]) histogram.counts[s] = 1;
    histogram.finish();
}

}  // namespace

FrameSink::FrameSink(fastckpt_context& context, void* stored, size_t capacity, size_t part_bytes, bool delta)
    : context_(context),
      part_bytes_(part_bytes),
      delta_(delta),
      kernels_(kernels()),
      first_(static_cast<u8*>(stored)),
      at_(first_),
      end_(first_ + capacity) {}

bool FrameSink::begin(size_t content_bytes) {
    if (capacity() < kFrameHeader) return false;
    for (Slot& slot : context_.slots) slot.has_table = false;
    // Single segment, content size in 4 bytes, no checksum, no dictionary (RFC 8878, 3.1.1.1).
    const u8 header[kFrameHeader] = {0x28,
                                     0xB5,
                                     0x2F,
                                     0xFD,
                                     0xA0,
                                     static_cast<u8>(content_bytes),
                                     static_cast<u8>(content_bytes >> 8),
                                     static_cast<u8>(content_bytes >> 16),
                                     static_cast<u8>(content_bytes >> 24)};
    std::memcpy(at_, header, sizeof header);
    advance(sizeof header);
    return true;
}

bool FrameSink::plane(unsigned slot, const u8* bytes, size_t n, bool top, bool last) {
    assert(slot <= kMaxPlanes && n >= 1 && n <= kBlock);
    if (n >= kMinHuffman && runs(slot, bytes, n, last)) return true;
    if (n <= part_bytes_) return part(slot, bytes, n, top, last);
    Histogram histogram;
    histogram.sample(bytes, n, clamped(n / 2048, 1, 64));
    if (histogram.distinct <= 1 && kernels_.all_equal(bytes, n, bytes[0])) return block(last, 1, n, bytes, 1);
    if (histogram.entropy() > kRawBits) return block(last, 0, n, bytes, n);
    for (size_t done = 0; done < n;) {
        const size_t size = n - done < part_bytes_ ? n - done : part_bytes_;
        if (!part(slot, bytes + done, size, top, last && done + size == n)) return false;
        done += size;
    }
    return true;
}

bool FrameSink::part(unsigned slot, const u8* bytes, size_t n, bool top, bool last) {
    Histogram histogram;
    histogram.sample(bytes, n, clamped(n / 2048, 1, top ? 16 : 32));
    if (histogram.distinct <= 1 && kernels_.all_equal(bytes, n, bytes[0])) return block(last, 1, n, bytes, 1);
    const double bits = histogram.entropy();
    if (n < (delta_ ? kMinLiterals : kMinHuffman) || bits > kRawBits) return block(last, 0, n, bytes, n);
    if (!has_table(slot, histogram, bits, bytes, n)) return block(last, 0, n, bytes, n);
    const size_t size = compressed(slot, bytes, n, last);
    if (size == kNoRoom || size == 0) {  // does not pay
        forget(slot);
        return block(last, 0, n, bytes, n);
    }
    current_ = static_cast<int>(slot);
    advance(size);
    return true;
}

bool FrameSink::has_table(unsigned slot, Histogram& sample, double bits, const u8* bytes, size_t n) {
    const Slot& known = context_.slots[slot];
    const Range range = kernels_.range(bytes, n);
    // The table of the part before serves as long as it costs at most 1.5 % more than the entropy.
    const double most_bits = (bits * 1.015 + 0.01) * sample.total;
    if (known.has_table && covers(known.table, range) &&
        static_cast<double>(known.table.cost(sample.counts)) <= most_bits)
        return true;
    complete(sample, range, bytes, n, delta_);
    return build(slot, sample);
}

void FrameSink::forget(unsigned slot) {
    context_.slots[slot].has_table = false;
    if (current_ == static_cast<int>(slot)) current_ = -1;
}

bool FrameSink::runs(unsigned slot, const u8* bytes, size_t n, bool last) {
    const size_t step = clamped(n / (16 * 512), 1, 16);
    size_t pieces = 0, zeros = 0;
    for (size_t i = 0; i + 16 <= n; i += 16 * step, ++pieces) zeros += !(load64(bytes + i) | load64(bytes + i + 8));
    if (static_cast<double>(zeros) < kZeroPieces * static_cast<double>(pieces)) return false;
    size_t n_literals;
    const size_t n_runs = kernels_.find_runs(bytes, n, context_.runs, context_.literals, &n_literals);
    if (!n_runs || n_literals == 1) return false;  // all of it zeros
    Histogram histogram;
    histogram.sample(context_.literals, n_literals, clamped(n_literals / 2048, 1, 16));
    const double bits = histogram.entropy();
    Histogram of_all;
    of_all.sample(bytes, n, clamped(n / 2048, 1, 16));
    // What plain codes would take, and all that these literals take at least.
    const auto plain = static_cast<size_t>(static_cast<double>(n) * of_all.coded_bits() / 8);
    const size_t most = capacity() < plain ? capacity() : plain;
    if (static_cast<double>(n_literals) * bits / 8 + static_cast<double>(n_runs) > static_cast<double>(most))
        return false;
    size_t size = 0;
    const bool coded = n_literals >= kMinLiterals && bits <= kRawBits && histogram.distinct >= 2 &&
                       has_table(slot, histogram, bits, context_.literals, n_literals);
    if (coded) size = literals(slot, context_.literals, n_literals, at_ + 3, most > 3 ? most - 3 : 0);
    if (size == kNoRoom || !size) {
        if (coded) forget(slot);
        size = raw_literals(context_.literals, n_literals, at_ + 3, most > 3 ? most - 3 : 0);
        if (!size) return false;
    } else {
        current_ = static_cast<int>(slot);
    }
    const size_t sequences = write_runs(context_.runs, n_runs, at_ + 3 + size, most - 3 - size, context_.streams);
    if (sequences == kNoRoom) {
        if (current_ == static_cast<int>(slot)) forget(slot);
        return false;
    }
    put24(at_, (last ? 1 : 0) | 2u << 1 | (size + sequences) << 3);
    advance(3 + size + sequences);
    return true;
}

void FrameSink::advance(size_t n) {
    crc_ = kernels_.crc(crc_, at_, n);
    at_ += n;
}

bool FrameSink::block(bool last, unsigned kind, size_t n, const u8* data, size_t data_bytes) {
    if (capacity() < 3 + data_bytes) return false;
    put24(at_, (last ? 1 : 0) | kind << 1 | n << 3);
    advance(3);
    crc_ = kernels_.crc(crc_, data, data_bytes);
    kernels_.copy(at_, data, data_bytes);
    at_ += data_bytes;
    return true;
}

bool FrameSink::build(unsigned slot, const Histogram& histogram) {
    if (current_ == static_cast<int>(slot)) current_ = -1;
    Slot& known = context_.slots[slot];
    // Rare symbols of differences are counted as often as a code of 11 bits is worth: so hardly any code gets longer,
    // and cutting those that do took up to 14 % more.
    const u32 least = delta_ ? (histogram.total + 2047) / 2048 : 0;
    u32 counts[256];
    for (unsigned s = 0; s < 256; ++s) {
        const u32 c = histogram.counts[s];
        counts[s] = c && c < least ? least : c;
    }
    known.has_table = histogram.distinct >= 2 && known.table.build(counts);
    return known.has_table;
}

size_t FrameSink::compressed(unsigned slot, const u8* bytes, size_t n, bool last) {
    const size_t most = capacity() < n + 3 ? capacity() : n + 3;
    if (most < 3 + 1) return kNoRoom;
    const size_t size = literals(slot, bytes, n, at_ + 3, most - 3 - 1);
    if (size == 0 || size == kNoRoom) return size;
    at_[3 + size] = 0;  // no sequences
    put24(at_, (last ? 1 : 0) | 2u << 1 | (size + 1) << 3);
    return 3 + size + 1;
}

size_t FrameSink::literals(unsigned slot, const u8* bytes, size_t n, u8* to, size_t room) {
    const HuffmanTable& table = context_.slots[slot].table;
    const bool treeless = current_ == static_cast<int>(slot);
    const size_t header = n >= 16384 ? 5 : n >= 1024 ? 4 : 3;
    const size_t before = header + (treeless ? 0 : table.description_bytes);
    if (room < before + 7) return kNoRoom;
    const Soon none = {.from = nullptr, .n_bytes = 0};
    const bool fetches = n >= kMinFetching;
    const size_t streams = kernels_.huffman_encode(table.codes, bytes, n, to + before, room - before, context_.streams,
                                                   fetches ? soon_ : none);
    if (fetches) {
        soon_ = base_soon_;
        base_soon_ = none;
    }
    if (streams == 0 || streams == kNoRoom) return streams;
    if (!treeless) std::memcpy(to + header, table.description, table.description_bytes);
    const u64 size = before - header + streams;
    if (header == 3 && size >= 1024) return kNoRoom;
    // Its header (RFC 8878, 3.1.1.3.1.1): compressed or treeless, four streams, sizes of 10, 14 or 18 bits.
    const unsigned format = static_cast<unsigned>(header) - 2;
    const u64 bits = (treeless ? 3u : 2u) | format << 2 | u64{n} << 4 | size << (4 + 6 + 4 * format);
    for (size_t i = 0; i < header; ++i) to[i] = static_cast<u8>(bits >> (8 * i));
    assert(before + streams <= room);
    return before + streams;
}

}  // namespace fastckpt
