// zstd frames whose blocks are raw, RLE, or four Huffman streams of literals without sequences (RFC 8878, 3.1.1): written and read.
#ifndef FASTCKPT_FRAMES_H
#define FASTCKPT_FRAMES_H

#include <cstring>

#include "context.h"
#include "entropy.h"

namespace fastckpt {

constexpr size_t kFrameHeader = 9;

inline size_t clamped(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }

// ---- frames, out ----

// A plane whose entropy is above this stays raw: 5 % of it is not worth the time.
constexpr double kRawBits = 7.6;
constexpr unsigned kMostGuessed = 32;

class FrameSink {
public:
    // part_bytes: a plane that compresses is cut into blocks of so many bytes, each with a table of its own where that pays.
    FrameSink(fastckpt_context& context, void* stored, size_t capacity, size_t part_bytes)
        : context_(context), part_bytes_(part_bytes), k_(kernels()), first_(static_cast<u8*>(stored)), at_(first_), end_(first_ + capacity) {}

    bool begin(size_t content_bytes) {
        if (capacity() < kFrameHeader) return false;
        for (Slot& slot : context_.slots) slot.has_table = false;
        // Single segment, content size in 4 bytes, no checksum, no dictionary (RFC 8878, 3.1.1.1).
        const u8 header[kFrameHeader] = {0x28, 0xB5, 0x2F, 0xFD, 0xA0, static_cast<u8>(content_bytes), static_cast<u8>(content_bytes >> 8),
                                         static_cast<u8>(content_bytes >> 16), static_cast<u8>(content_bytes >> 24)};
        std::memcpy(at_, header, sizeof header);
        return advance(sizeof header);
    }

    // A plane of a stripe, n: 1 to kBlock. `top`: the one that is expected to compress.
    bool plane(unsigned slot_number, const u8* p, size_t n, bool top, bool last) {
        if (n <= part_bytes_) return part(slot_number, p, n, top, last);
        Histogram h;
        h.sample(p, n, clamped(n / 2048, 1, 64));
        if (h.distinct <= 1 && k_.all_equal(p, n, p[0])) return block(last, 1, n, p, 1);
        if (h.entropy() > kRawBits) return block(last, 0, n, p, n);
        for (size_t done = 0; done < n;) {
            const size_t m = n - done < part_bytes_ ? n - done : part_bytes_;
            if (!part(slot_number, p + done, m, top, last && done + m == n)) return false;
            done += m;
        }
        return true;
    }

    // What the caller reads after this stripe: fetched while the next part is coded.
    void read_soon(const u8* from, size_t n_bytes) { soon_ = {from, n_bytes}; }

    size_t stored_bytes() const { return static_cast<size_t>(at_ - first_); }
    u64 crc() const { return ~crc_; }

private:
    // One block.
    bool part(unsigned slot_number, const u8* p, size_t n, bool top, bool last) {
        Histogram h;
        h.sample(p, n, clamped(n / 2048, 1, top ? 16 : 32));
        if (h.distinct <= 1 && k_.all_equal(p, n, p[0])) return block(last, 1, n, p, 1);
        const double bits = h.entropy();
        if (n < kMinHuffman || bits > kRawBits) return block(last, 0, n, p, n);
        Slot& slot = context_.slots[slot_number];
        const Range range = k_.range(p, n);
        if (!slot.has_table || !covers(slot.table, range) || static_cast<double>(slot.table.cost(h.counts)) > (bits * 1.015 + 0.01) * h.total) {
            complete(h, range, p, n);
            if (!build(slot, slot_number, h)) return block(last, 0, n, p, n);
        }
        const size_t size = literals(slot, slot_number, p, n, last);
        if (size == kNoRoom || size == 0) {  // does not pay, and the decoder will not have seen this table
            slot.has_table = false;
            if (current_ == static_cast<int>(slot_number)) current_ = -1;
            return block(last, 0, n, p, n);
        }
        current_ = static_cast<int>(slot_number);
        return advance(size);
    }

    size_t capacity() const { return static_cast<size_t>(end_ - at_); }

    bool advance(size_t n) {
        crc_ = k_.crc(crc_, at_, n);
        at_ += n;
        return true;
    }

    static void put24(u8* to, size_t value) {
        to[0] = static_cast<u8>(value), to[1] = static_cast<u8>(value >> 8), to[2] = static_cast<u8>(value >> 16);
    }

    // kind 0: raw, n bytes; 1: RLE, one byte that stands for n.
    bool block(bool last, unsigned kind, size_t n, const u8* data, size_t data_bytes) {
        if (capacity() < 3 + data_bytes) return false;
        put24(at_, (last ? 1 : 0) | kind << 1 | n << 3);
        advance(3);
        crc_ = k_.crc(crc_, data, data_bytes);
        k_.copy(at_, data, data_bytes);
        at_ += data_bytes;
        return true;
    }

    static bool covers(const HuffmanTable& table, const Range& range) {
        bool all = !range.has_zero || table.codes.length[0];
        for (unsigned s = range.first; s <= range.last; ++s) all &= table.codes.length[s] != 0;
        return all;
    }

    // Every symbol of the part gets a count: those of its range that the sample has missed a small one, for a code of 11 bits takes
    // 1/2048 of the space. If that would be too many, or be felt among a handful of symbols, all are counted.
    static void complete(Histogram& h, const Range& range, const u8* p, size_t n) {
        unsigned missed = range.has_zero && !h.counts[0];
        for (unsigned s = range.first; s <= range.last; ++s) missed += !h.counts[s];
        if (missed && (missed > kMostGuessed || h.distinct < 8)) {
            h.sample(p, n, 1);
            return;
        }
        if (range.has_zero && !h.counts[0]) h.counts[0] = 1;
        for (unsigned s = range.first; s <= range.last; ++s)
            if (!h.counts[s]) h.counts[s] = 1;
        h.finish();
    }

    bool build(Slot& slot, unsigned slot_number, const Histogram& h) {
        if (current_ == static_cast<int>(slot_number)) current_ = -1;
        return slot.has_table = h.distinct >= 2 && slot.table.build(h.counts);
    }

    // A compressed block behind `at_`. Returns its bytes, 0 if a symbol has no code, kNoRoom if it is not shorter than a raw one.
    size_t literals(const Slot& slot, unsigned slot_number, const u8* p, size_t n, bool last) {
        const bool treeless = current_ == static_cast<int>(slot_number);
        const size_t header = n >= 16384 ? 5 : 4, before = 3 + header + (treeless ? 0 : slot.table.description_bytes);
        const size_t most = capacity() < n + 3 ? capacity() : n + 3;
        if (most < before + 8) return kNoRoom;
        const size_t streams = k_.huffman_encode(slot.table.codes, p, n, at_ + before, most - before - 1, context_.streams, soon_);
        soon_ = {nullptr, 0};
        if (streams == 0 || streams == kNoRoom) return streams;
        if (!treeless) std::memcpy(at_ + 3 + header, slot.table.description, slot.table.description_bytes);
        const u64 compressed = before - 3 - header + streams;
        // Literals section header (RFC 8878, 3.1.1.3.1.1): compressed or treeless, four streams, sizes of 14 or 18 bits.
        const u64 bits = (treeless ? 3u : 2u) | (header == 5 ? 3u : 2u) << 2 | u64{n} << 4 | compressed << (header == 5 ? 22 : 18);
        for (size_t i = 0; i < header; ++i) at_[3 + i] = static_cast<u8>(bits >> (8 * i));
        at_[before + streams] = 0;  // no sequences
        put24(at_, (last ? 1 : 0) | 2u << 1 | (before - 3 + streams + 1) << 3);
        return before + streams + 1;
    }

    fastckpt_context& context_;
    size_t part_bytes_;
    const Kernels& k_;
    u8 *first_, *at_, *end_;
    u64 crc_ = ~u64{0};
    int current_ = -1;  // the slot whose table the decoder has
    Soon soon_ = {nullptr, 0};
};

// ---- frames, in ----

class FrameSource {
public:
    FrameSource(fastckpt_context& context, const void* stored, size_t n) : context_(context), at_(static_cast<const u8*>(stored)), end_(at_ + n) {}

    // Content of any frame header that fastckpt_encode writes; 0 for others.
    size_t begin() {
        if (left() < kFrameHeader || load32(at_) != 0xFD2FB528u || at_[4] != 0xA0) return 0;
        const size_t content = load32(at_ + 5);
        at_ += kFrameHeader;
        return content;
    }

    // The content of the next blocks, which together have exactly n bytes, in `room` (n and kSlack) or where it lies. Null if there are no
    // such blocks, or the last one says otherwise than `last`.
    const u8* plane(unsigned slot_number, size_t n, u8* room, bool last) {
        for (size_t done = 0; done < n;) {
            if (left() < 3) return nullptr;
            const u32 head = static_cast<u32>(at_[0] | at_[1] << 8 | at_[2] << 16);
            const size_t size = head >> 3;
            at_ += 3;
            size_t found = size;
            switch (head >> 1 & 3) {
                case 0:
                    if (size > n - done || left() < size) return nullptr;
                    at_ += size;
                    if (size == n) {
                        if ((head & 1) != (last ? 1u : 0u)) return nullptr;
                        return at_ - size;
                    }
                    std::memcpy(room + done, at_ - size, size);
                    break;
                case 1:
                    if (size > n - done || left() < 1) return nullptr;
                    std::memset(room + done, *at_++, size);
                    break;
                case 2:
                    if (size > left()) return nullptr;
                    found = literals(slot_number, at_, size, n - done, room + done);
                    at_ += size;
                    break;
                default: return nullptr;
            }
            if (!found) return nullptr;  // nor are empty blocks ours
            done += found;
            if ((head & 1) != (last && done == n ? 1u : 0u)) return nullptr;
        }
        return room;
    }

    // Where the caller writes this stripe to: fetched while its first plane is decoded.
    void write_soon(const u8* to, size_t n_bytes) { soon_ = {to, n_bytes}; }

    bool done() const { return at_ == end_; }

private:
    static constexpr size_t kReadAhead = 320 << 10;

    size_t left() const { return static_cast<size_t>(end_ - at_); }

    // Returns how many bytes the block regenerates, at most n; 0 if it is none of ours.
    size_t literals(unsigned slot_number, const u8* p, size_t size, size_t n, u8* out) {
        if (size < 6 || p[size - 1] != 0) return 0;  // the last byte: no sequences
        const unsigned kind = p[0] & 3, format = p[0] >> 2 & 3;
        if (kind < 2 || format < 2) return 0;
        const size_t header = format == 3 ? 5 : 4;
        const u64 bits = u64{load32(p)} | u64{p[4]} << 32;
        const size_t regenerated = bits >> 4 & (format == 3 ? 0x3ffff : 0x3fff);
        const size_t compressed = format == 3 ? bits >> 22 & 0x3ffff : bits >> 18 & 0x3fff;
        if (!regenerated || regenerated > n || header + compressed + 1 != size) return 0;
        const u8* from = p + header;
        size_t rest = compressed;
        if (kind == 2) {
            Decoder& slot = context_.decoders[slot_number];
            // The same table as before, as usual: its bytes tell.
            const size_t known = slot.description_bytes;
            if (known && known <= rest && !std::memcmp(slot.description, from, known)) {
                from += known, rest -= known;
            } else {
                const size_t used = slot.table.read(from, rest);
                slot.description_bytes = used <= kMaxDescription ? used : 0;
                if (!used) return 0;
                std::memcpy(slot.description, from, slot.description_bytes);
                from += used, rest -= used;
            }
            current_ = static_cast<int>(slot_number);
        }
        // What follows: the stripe's other planes and the next one's codes; and where the stripe goes to.
        const size_t behind = static_cast<size_t>(end_ - (p + size)), ahead = behind < kReadAhead ? behind : kReadAhead;
        const Soon read = {p + size, ahead}, write = soon_;
        soon_ = {nullptr, 0};
        const bool decoded = current_ >= 0 && context_.decoders[current_].table.decode(from, rest, out, regenerated, read, write);
        return decoded ? regenerated : 0;
    }

    fastckpt_context& context_;
    const u8 *at_, *end_;
    int current_ = -1;
    Soon soon_ = {nullptr, 0};
};

}  // namespace fastckpt

#endif
