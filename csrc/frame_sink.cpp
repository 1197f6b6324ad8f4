#include "frame_sink.h"

#include <cstring>

namespace fastckpt {
namespace {

// A plane whose entropy is above this stays raw: 5 % of it is not worth the time.
constexpr double kRawBits = 7.6;
// So many symbols that a sample has missed are given a count of 1; if there may be more, all are counted.
constexpr unsigned kMostGuessed = 32;

size_t clamped(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }

void put24(u8* to, size_t value) {
    to[0] = static_cast<u8>(value);
    to[1] = static_cast<u8>(value >> 8);
    to[2] = static_cast<u8>(value >> 16);
}

bool covers(const HuffmanTable& table, const Range& range) {
    bool all = !range.has_zero || table.codes.length[0];
    for (unsigned s = range.first; s <= range.last; ++s) all &= table.codes.length[s] != 0;
    return all;
}

// Every symbol of the part gets a count: those of its range that the sample has missed a small one, for a code of 11
// bits takes 1/2048 of the space. If that would be too many, or be felt among a handful of symbols, all are counted.
void complete(Histogram& histogram, const Range& range, const u8* bytes, size_t n) {
    unsigned missed = range.has_zero && !histogram.counts[0];
    for (unsigned s = range.first; s <= range.last; ++s) missed += !histogram.counts[s];
    if (missed && (missed > kMostGuessed || histogram.distinct < 8)) {
        histogram.sample(bytes, n, 1);
        return;
    }
    if (range.has_zero && !histogram.counts[0]) histogram.counts[0] = 1;
    for (unsigned s = range.first; s <= range.last; ++s)
        if (!histogram.counts[s]) histogram.counts[s] = 1;
    histogram.finish();
}

}  // namespace

FrameSink::FrameSink(fastckpt_context& context, void* stored, size_t capacity, size_t part_bytes)
    : context_(context),
      part_bytes_(part_bytes),
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
    if (n < kMinHuffman || bits > kRawBits) return block(last, 0, n, bytes, n);
    Slot& known = context_.slots[slot];
    const Range range = kernels_.range(bytes, n);
    // The table of the part before serves as long as it costs at most 1.5 % more than the entropy.
    const double most_bits = (bits * 1.015 + 0.01) * histogram.total;
    const bool serves = known.has_table && covers(known.table, range) &&
                        static_cast<double>(known.table.cost(histogram.counts)) <= most_bits;
    if (!serves) {
        complete(histogram, range, bytes, n);
        if (!build(slot, histogram)) return block(last, 0, n, bytes, n);
    }
    const size_t size = literals(slot, bytes, n, last);
    if (size == kNoRoom || size == 0) {  // does not pay, and the decoder will not have seen this table
        known.has_table = false;
        if (current_ == static_cast<int>(slot)) current_ = -1;
        return block(last, 0, n, bytes, n);
    }
    current_ = static_cast<int>(slot);
    advance(size);
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
    known.has_table = histogram.distinct >= 2 && known.table.build(histogram.counts);
    return known.has_table;
}

size_t FrameSink::literals(unsigned slot, const u8* bytes, size_t n, bool last) {
    const HuffmanTable& table = context_.slots[slot].table;
    const bool treeless = current_ == static_cast<int>(slot);
    const size_t header = n >= 16384 ? 5 : 4;
    const size_t before = 3 + header + (treeless ? 0 : table.description_bytes);
    const size_t most = capacity() < n + 3 ? capacity() : n + 3;
    if (most < before + 8) return kNoRoom;
    const size_t streams =
        kernels_.huffman_encode(table.codes, bytes, n, at_ + before, most - before - 1, context_.streams, soon_);
    soon_ = {.from = nullptr, .n_bytes = 0};
    if (streams == 0 || streams == kNoRoom) return streams;
    if (!treeless) std::memcpy(at_ + 3 + header, table.description, table.description_bytes);
    const u64 compressed = before - 3 - header + streams;
    // Literals section header (RFC 8878, 3.1.1.3.1.1): compressed or treeless, four streams, sizes of 14 or 18 bits.
    const u64 bits =
        (treeless ? 3u : 2u) | (header == 5 ? 3u : 2u) << 2 | u64{n} << 4 | compressed << (header == 5 ? 22 : 18);
    for (size_t i = 0; i < header; ++i) at_[3 + i] = static_cast<u8>(bits >> (8 * i));
    assert(before + streams + 1 <= most);
    at_[before + streams] = 0;  // no sequences
    put24(at_, (last ? 1 : 0) | 2u << 1 | (before - 3 + streams + 1) << 3);
    return before + streams + 1;
}

}  // namespace fastckpt
