#include "frame_source.h"

#include <cstring>

namespace fastckpt {
namespace {

constexpr size_t kReadAhead = 320 << 10;

}  // namespace

size_t FrameSource::begin() {
    if (left() < kFrameHeader || load32(at_) != 0xFD2FB528u || at_[4] != 0xA0) return 0;
    const size_t content = load32(at_ + 5);
    at_ += kFrameHeader;
    return content;
}

const u8* FrameSource::plane(unsigned slot, size_t n, u8* room, bool last) {
    assert(slot <= kMaxPlanes && n <= kBlock);
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
                std::memset(room + done, *at_, size);
                ++at_;
                break;
            case 2:
                if (size > left()) return nullptr;
                found = literals(slot, at_, size, n - done, room + done);
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

size_t FrameSource::literals(unsigned slot, const u8* block, size_t size, size_t n, u8* out) {
    if (size < 6 || block[size - 1] != 0) return 0;  // the last byte: no sequences
    const unsigned kind = block[0] & 3, format = block[0] >> 2 & 3;
    if (kind < 2 || format < 2) return 0;
    const size_t header = format == 3 ? 5 : 4;
    const u64 bits = u64{load32(block)} | u64{block[4]} << 32;
    const size_t regenerated = bits >> 4 & (format == 3 ? 0x3ffff : 0x3fff);
    const size_t compressed = format == 3 ? bits >> 22 & 0x3ffff : bits >> 18 & 0x3fff;
    if (!regenerated || regenerated > n || header + compressed + 1 != size) return 0;
    const u8* from = block + header;
    size_t rest = compressed;
    if (kind == 2) {
        const size_t used = read_table(slot, from, rest);
        if (!used) return 0;
        from += used;
        rest -= used;
        current_ = static_cast<int>(slot);
    }
    // What follows: the stripe's other planes and the next one's codes; and where the stripe goes to.
    const size_t behind = static_cast<size_t>(end_ - (block + size));
    const Soon read = {.from = block + size, .n_bytes = behind < kReadAhead ? behind : kReadAhead}, write = soon_;
    soon_ = {.from = nullptr, .n_bytes = 0};
    if (current_ < 0) return 0;
    const HuffmanDecoder& table = context_.decoders[current_].table;
    return table.decode(from, rest, out, regenerated, read, write) ? regenerated : 0;
}

size_t FrameSource::read_table(unsigned slot, const u8* from, size_t n) {
    Decoder& decoder = context_.decoders[slot];
    // The same table as before, as usual: its bytes tell.
    const size_t known = decoder.description_bytes;
    if (known && known <= n && !std::memcmp(decoder.description, from, known)) return known;
    const size_t used = decoder.table.read(from, n);
    decoder.description_bytes = used <= kMaxDescription ? used : 0;
    if (used) std::memcpy(decoder.description, from, decoder.description_bytes);
    return used;
}

}  // namespace fastckpt
