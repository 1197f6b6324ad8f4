#include "frame_source.h"

#include <cstring>

#include "runs.h"

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
                found = compressed(slot, at_, size, n - done, room + done);
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

size_t FrameSource::compressed(unsigned slot, const u8* block, size_t size, size_t n, u8* out) {
    // The header of the literals section (RFC 8878, 3.1.1.3.1.1).
    if (size < 4) return 0;
    const unsigned kind = block[0] & 3, format = block[0] >> 2 & 3;
    const bool coded = kind >= 2;
    size_t header, regenerated, stored;
    if (coded) {
        if (format == 0 || size < 6) return 0;  // a single stream
        const unsigned bits = 6 + 4 * format;
        const u64 word = u64{load32(block)} | u64{block[4]} << 32, mask = (u64{1} << bits) - 1;
        header = 2 + format;
        regenerated = word >> 4 & mask;
        stored = word >> (4 + bits) & mask;
    } else {
        header = format == 1 ? 2 : format == 3 ? 3 : 1;
        const u32 word = static_cast<u32>(block[0] | block[1] << 8 | block[2] << 16);
        regenerated = header == 1 ? word >> 3 & 0x1f : header == 2 ? word >> 4 & 0xfff : word >> 4 & 0xfffff;
        stored = kind == 0 ? regenerated : 1;
    }
    if (!regenerated || regenerated > n || header + stored >= size) return 0;
    const u8 *const from = block + header, *const sequences = from + stored;
    const size_t n_sequences = size - header - stored;
    const bool alone = n_sequences == 1 && sequences[0] == 0;
    u8* const to = alone ? out : context_.literals;
    if (coded) {
        if (!literals(slot, kind == 3, from, stored, to, regenerated, block + size)) return 0;
    } else if (kind == 0) {
        std::memcpy(to, from, regenerated);
    } else {
        std::memset(to, from[0], regenerated);
    }
    if (alone) return regenerated;
    return read_runs(sequences, n_sequences, context_.streams, context_.literals, regenerated, out, n);
}

bool FrameSource::literals(unsigned slot, bool treeless, const u8* from, size_t size, u8* out, size_t n,
                           const u8* behind) {
    if (!treeless) {
        const size_t used = read_table(slot, from, size);
        if (!used) return false;
        from += used;
        size -= used;
        current_ = static_cast<int>(slot);
    }
    // What follows: the stripe's other planes and the next one's codes; and where the stripe goes to.
    const size_t rest = static_cast<size_t>(end_ - behind);
    const Soon read = {.from = behind, .n_bytes = rest < kReadAhead ? rest : kReadAhead}, write = soon_;
    soon_ = {.from = nullptr, .n_bytes = 0};
    return current_ >= 0 && context_.decoders[current_].table.decode(from, size, out, n, read, write);
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
