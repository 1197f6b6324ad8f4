// Chunks to stored bytes and back, stripe by stripe: digest, transform, entropy coding and crc while a stripe is in the second-level cache.
//
//     raw ─→ Xxh3, planes (kernels.inl) ─→ FrameSink: one zstd block for each plane of a stripe ─→ stored, crc
//
// A frame has blocks of three kinds: raw, RLE, and compressed ones that hold four Huffman streams of literals and no sequences.
#include <cmath>
#include <cstring>
#include <new>

#include "fastckpt.h"
#include "huffman.h"
#include "xxh3.h"

using namespace fastckpt;

namespace {

constexpr size_t kMaxRaw = FASTCKPT_MAX_RAW_BYTES;
constexpr size_t kBlock = kStripeLanes;  // bytes of the largest zstd block
constexpr size_t kFrameHeader = 9;

struct Slot {  // what is known about one plane of the stripes before
    HuffmanTable table;
    bool has_table;
};

struct Decoder {
    HuffmanDecoder table;
    u8 description[kMaxDescription];
    size_t description_bytes;  // 0: no table
};

}  // namespace

struct fastckpt_context {
    alignas(64) u8 planes[kMaxPlanes][kBlock + kSlack];
    alignas(64) u8 streams[4 * kStreamRoom];
    alignas(64) u8 packed[kMaxRaw / 2 + kSlack];
    alignas(64) u8 escapes[kMaxRaw + kSlack];
    alignas(64) u8 escape_planes[kMaxRaw + kSlack];
    Slot slots[kMaxPlanes + 1];
    Decoder decoders[kMaxPlanes + 1];
};

namespace {

// ---- entropy ----

// c log2 c of counts that samples reach.
struct CountLogs {
    static constexpr u32 kSize = 16385;
    float of[kSize];
    CountLogs() {
        of[0] = 0;
        for (u32 c = 1; c < kSize; ++c) of[c] = static_cast<float>(c * std::log2(static_cast<double>(c)));
    }
};
const CountLogs kCountLogs;

double count_log(u32 c) { return c < CountLogs::kSize ? kCountLogs.of[c] : c * std::log2(static_cast<double>(c)); }

struct Histogram {
    u32 counts[256] = {};
    u32 total = 0;
    unsigned distinct = 0;

    void finish() {
        total = distinct = 0;
        for (u32 c : counts) total += c, distinct += c != 0;
    }
    // Bits a symbol, order 0, with Miller's correction for symbols that a sample has missed.
    double entropy() const {
        if (distinct < 2) return 0;
        double sum = 0;
        for (u32 c : counts) sum += count_log(c);
        return std::log2(static_cast<double>(total)) - sum / total + (distinct - 1) / (2 * 0.6931 * total);
    }
    u32 largest() const {
        u32 most = 0;
        for (u32 c : counts) most = c > most ? c : most;
        return most;
    }
};

// 16 bytes of every 16 x step.
void sample(const u8* p, size_t n, size_t step, Histogram& h) {
    // Four tables: equal neighbours would wait for each other's increments.
    u32 t[4][256] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16 * step) {
        const u64 a = load64(p + i), b = load64(p + i + 8);
        for (unsigned k = 0; k < 8; k += 4) {
            ++t[0][a >> (8 * k) & 0xff], ++t[1][a >> (8 * k + 8) & 0xff], ++t[2][a >> (8 * k + 16) & 0xff], ++t[3][a >> (8 * k + 24) & 0xff];
            ++t[0][b >> (8 * k) & 0xff], ++t[1][b >> (8 * k + 8) & 0xff], ++t[2][b >> (8 * k + 16) & 0xff], ++t[3][b >> (8 * k + 24) & 0xff];
        }
    }
    if (step == 1)
        for (; i < n; ++i) ++t[0][p[i]];
    for (unsigned s = 0; s < 256; ++s) h.counts[s] = t[0][s] + t[1][s] + t[2][s] + t[3][s];
    h.finish();
}

size_t clamped(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }

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
        sample(p, n, clamped(n / 2048, 1, 64), h);
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
        sample(p, n, clamped(n / 2048, 1, top ? 16 : 32), h);
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
            sample(p, n, 1, h);
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

class StreamSink {
public:
    StreamSink(void* stream, size_t capacity) : first_(static_cast<u8*>(stream)), at_(first_), end_(first_ + capacity) {}
    bool begin(size_t n) { return n <= static_cast<size_t>(end_ - at_); }
    bool plane(unsigned, const u8* p, size_t n, bool, bool) {
        std::memcpy(at_, p, n);
        at_ += n;
        return true;
    }
    void read_soon(const u8*, size_t) {}
    size_t stored_bytes() const { return static_cast<size_t>(at_ - first_); }

private:
    u8 *first_, *at_, *end_;
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

class StreamSource {
public:
    StreamSource(const void* stream, size_t n) : at_(static_cast<const u8*>(stream)), end_(at_ + n), n_(n) {}
    size_t begin() const { return n_; }
    const u8* plane(unsigned, size_t n, u8*, bool) {
        if (static_cast<size_t>(end_ - at_) < n) return nullptr;
        const u8* found = at_;
        at_ += n;
        return found;
    }
    void write_soon(const u8*, size_t) {}
    bool done() const { return at_ == end_; }

private:
    const u8 *at_, *end_;
    size_t n_;
};

// ---- transforms ----

size_t rotu_low_bytes(size_t lanes) { return (7 * lanes + 7) / 8; }

// Bytes of a ROTU stream.
size_t rotu_bytes(size_t lanes, unsigned w) {
    const size_t whole = lanes / kStripeLanes, rest = lanes % kStripeLanes;
    return lanes * (w - 1) + whole * rotu_low_bytes(kStripeLanes) + rotu_low_bytes(rest);
}

struct Chunk {
    const u8* raw;
    const u8* base;
    size_t n_bytes, lanes;
    unsigned transform, w, pack;
};

template <class Sink>
int write_planes(fastckpt_context& c, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    const Kernels& k = kernels();
    const unsigned w = chunk.w;
    const bool unsigned_ = chunk.transform == FASTCKPT_ROTU;
    const Map map = chunk.transform == FASTCKPT_SUB ? Map::kSub : Map::kRot;
    if (!sink.begin(unsigned_ ? rotu_bytes(chunk.lanes, w) : chunk.n_bytes)) return FASTCKPT_NO_ROOM;
    u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) planes[i] = c.planes[i];
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
        if (digest) digest->advance((from + lanes) * w);  // brings the stripe into the cache
        k.split(chunk.raw + from * w, chunk.base ? chunk.base + from * w : nullptr, lanes, w, map, planes);
        from += lanes;
        const size_t more = chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
        sink.read_soon(chunk.raw + from * w, more * w);
        size_t low_bytes = lanes;
        if (unsigned_) {
            if (k.pack7(planes[w - 1], lanes, planes[w - 1])) return FASTCKPT_UNFIT;  // in place: it writes behind what it has read
            low_bytes = rotu_low_bytes(lanes);
        }
        for (unsigned i = 0; i < w; ++i) {
            const bool lowest = i == w - 1;
            if (!sink.plane(i, planes[i], lowest ? low_bytes : lanes, i == 0, lowest && from == chunk.lanes)) return FASTCKPT_NO_ROOM;
        }
    }
    return FASTCKPT_OK;
}

template <class Source>
int read_planes(fastckpt_context& c, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    const Kernels& k = kernels();
    const unsigned w = chunk.w;
    const bool unsigned_ = chunk.transform == FASTCKPT_ROTU;
    const Map map = chunk.transform == FASTCKPT_SUB ? Map::kSub : Map::kRot;
    if (source.begin() != (unsigned_ ? rotu_bytes(chunk.lanes, w) : chunk.n_bytes)) return FASTCKPT_FOREIGN;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
        const u8* planes[kMaxPlanes];
        source.write_soon(raw + from * w, lanes * w);
        for (unsigned i = 0; i < w; ++i) {
            const bool lowest = i == w - 1;
            const size_t n = lowest && unsigned_ ? rotu_low_bytes(lanes) : lanes;
            u8* room = lowest && unsigned_ ? c.packed : c.planes[i];
            planes[i] = source.plane(i, n, room, lowest && from + lanes == chunk.lanes);
            if (!planes[i]) return FASTCKPT_FOREIGN;
        }
        if (unsigned_) {
            const unsigned odd = 7 * lanes % 8;
            if (odd && planes[w - 1][rotu_low_bytes(lanes) - 1] >> odd) return FASTCKPT_FOREIGN;  // unused bits are 0
            k.unpack7(planes[w - 1], lanes, c.planes[w - 1]);
            planes[w - 1] = c.planes[w - 1];
        }
        k.merge(planes, chunk.base ? chunk.base + from * w : nullptr, lanes, w, map, raw + from * w);
        from += lanes;
        if (digest) digest->advance(from * w);
    }
    return source.done() ? FASTCKPT_OK : FASTCKPT_FOREIGN;
}

// Planes that are longer than a block, in pieces.
template <class Sink>
bool write_pieces(Sink& sink, unsigned slot, const u8* p, size_t n, bool top, bool last) {
    for (size_t done = 0; done < n;) {
        const size_t m = n - done < kBlock ? n - done : kBlock;
        if (!sink.plane(slot, p + done, m, top, last && done + m == n)) return false;
        done += m;
    }
    return true;
}

template <class Source>
bool read_pieces(Source& source, unsigned slot, size_t n, u8* out, u8* room, bool last) {
    for (size_t done = 0; done < n;) {
        const size_t m = n - done < kBlock ? n - done : kBlock;
        const u8* found = source.plane(slot, m, room, last && done + m == n);
        if (!found) return false;
        std::memcpy(out + done, found, m);
        done += m;
    }
    return true;
}

template <class Sink>
int write_subpack(fastckpt_context& c, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    const Kernels& k = kernels();
    const unsigned w = chunk.w, bits = chunk.pack;
    size_t n_escapes = 0;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
        if (digest) digest->advance((from + lanes) * w);
        n_escapes += k.subpack(chunk.raw + from * w, chunk.base + from * w, lanes, w, bits, c.packed + from * bits / 8, c.escapes + n_escapes * w);
        from += lanes;
    }
    const size_t packed_bytes = (chunk.lanes * bits + 7) / 8, total = 4 + packed_bytes + n_escapes * w;
    if (total > 2 * chunk.n_bytes + 64 || !sink.begin(total)) return FASTCKPT_NO_ROOM;
    u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) planes[i] = c.escape_planes + i * n_escapes;
    k.split(c.escapes, nullptr, n_escapes, w, Map::kPlain, planes);
    const u8 head[4] = {static_cast<u8>(n_escapes), static_cast<u8>(n_escapes >> 8), static_cast<u8>(n_escapes >> 16), static_cast<u8>(n_escapes >> 24)};
    bool fits = sink.plane(kMaxPlanes, head, 4, false, false);
    fits = fits && write_pieces(sink, kMaxPlanes, c.packed, packed_bytes, true, !n_escapes);
    for (unsigned i = 0; i < w && fits; ++i) fits = write_pieces(sink, i, planes[i], n_escapes, true, i == w - 1);
    return fits ? FASTCKPT_OK : FASTCKPT_NO_ROOM;
}

template <class Source>
int read_subpack(fastckpt_context& c, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    const Kernels& k = kernels();
    const unsigned w = chunk.w, bits = chunk.pack;
    const size_t content = source.begin(), packed_bytes = (chunk.lanes * bits + 7) / 8;
    u8 head_room[4 + kSlack];
    const u8* head = content ? source.plane(kMaxPlanes, 4, head_room, false) : nullptr;
    if (!head) return FASTCKPT_FOREIGN;
    const size_t n_escapes = load32(head);
    if (n_escapes > chunk.lanes || content != 4 + packed_bytes + n_escapes * w || content > 2 * chunk.n_bytes + 64) return FASTCKPT_FOREIGN;
    if (!read_pieces(source, kMaxPlanes, packed_bytes, c.packed, c.planes[0], !n_escapes)) return FASTCKPT_FOREIGN;
    const u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) {
        u8* plane = c.escape_planes + i * n_escapes;
        planes[i] = plane;
        if (!read_pieces(source, i, n_escapes, plane, c.planes[0], i == w - 1)) return FASTCKPT_FOREIGN;
    }
    if (!source.done()) return FASTCKPT_FOREIGN;
    if (const unsigned odd = chunk.lanes * bits % 8; odd && c.packed[packed_bytes - 1] >> odd) return FASTCKPT_FOREIGN;  // unused bits are 0
    k.merge(planes, nullptr, n_escapes, w, Map::kPlain, c.escapes);
    size_t used = 0;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
        used += k.subunpack(c.packed + from * bits / 8, chunk.base + from * w, lanes, w, bits, c.escapes + used * w, n_escapes - used, raw + from * w);
        if (used > n_escapes) return FASTCKPT_FOREIGN;
        from += lanes;
        if (digest) digest->advance(from * w);
    }
    return used == n_escapes ? FASTCKPT_OK : FASTCKPT_FOREIGN;
}

// FASTCKPT_OK if such a chunk can be.
int checked(const fastckpt_context* context, const Chunk& c) {
    const bool delta = c.transform == FASTCKPT_SUB || c.transform == FASTCKPT_SUBPACK;
    if (!context || (c.transform != FASTCKPT_ROT && c.transform != FASTCKPT_ROTU && !delta) || (delta && !c.base)) return FASTCKPT_BAD_ARGUMENT;
    if (c.w != 2 && c.w != 4 && c.w != 8) return FASTCKPT_BAD_LANE;
    if (c.transform == FASTCKPT_SUBPACK && c.pack != 1 && c.pack != 2 && c.pack != 4 && c.pack != 8) return FASTCKPT_BAD_LANE;
    if (c.n_bytes == 0 || c.n_bytes > kMaxRaw || c.n_bytes % c.w) return FASTCKPT_BAD_LENGTH;
    return FASTCKPT_OK;
}

Chunk chunk_of(const void* raw, const void* base, size_t n_bytes, unsigned transform, unsigned w, unsigned pack) {
    const bool delta = transform == FASTCKPT_SUB || transform == FASTCKPT_SUBPACK;
    return {static_cast<const u8*>(raw), delta ? static_cast<const u8*>(base) : nullptr, n_bytes, w ? n_bytes / w : 0, transform, w, pack};
}

template <class Sink>
int write_stream(fastckpt_context& c, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    return chunk.transform == FASTCKPT_SUBPACK ? write_subpack(c, chunk, sink, digest) : write_planes(c, chunk, sink, digest);
}
template <class Source>
int read_stream(fastckpt_context& c, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    return chunk.transform == FASTCKPT_SUBPACK ? read_subpack(c, chunk, source, raw, digest) : read_planes(c, chunk, source, raw, digest);
}

}  // namespace

// ---- the C interface ----

extern "C" size_t fastckpt_context_bytes(void) { return sizeof(fastckpt_context); }

extern "C" fastckpt_context* fastckpt_context_init(void* memory) {
    auto* context = static_cast<fastckpt_context*>(memory);  // nothing else in it is read before it is written
    for (Decoder& one : context->decoders) one.description_bytes = 0;
    return context;
}

extern "C" size_t fastckpt_encode_bound(size_t n_bytes) { return 2 * n_bytes + 1024; }

extern "C" int fastckpt_encode(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned transform,
                               unsigned lane_bytes, unsigned pack_bits, void* stored, size_t capacity, fastckpt_encoded* result) {
    const auto* from = static_cast<const u8*>(raw);
    Xxh3 digest(from, n_bytes);
    const bool digested = n_bytes >= FASTCKPT_MIN_DIGEST_BYTES;
    std::memset(result, 0, sizeof *result);
    if (transform == FASTCKPT_RAW) {
        if (n_bytes == 0 || n_bytes > kMaxRaw) return FASTCKPT_BAD_LENGTH;
        if (n_bytes > capacity) return FASTCKPT_NO_ROOM;
        const Kernels& k = kernels();
        u64 crc = ~u64{0};
        for (size_t done = 0; done < n_bytes;) {  // in pieces that the cache holds while three loops pass over them
            const size_t n = n_bytes - done < 2 * kBlock ? n_bytes - done : 2 * kBlock;
            if (digested) digest.advance(done + n);
            crc = k.crc(crc, from + done, n);
            k.copy(static_cast<u8*>(stored) + done, from + done, n);
            done += n;
        }
        if (digested) digest.finish(result->digest);
        result->stored_bytes = n_bytes, result->crc64nvme = ~crc;
        return FASTCKPT_OK;
    }
    const Chunk chunk = chunk_of(raw, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk)) return status;
    // Second moments have another range in each row: blocks of 32 KiB make them 0.9 % smaller than blocks of 128 KiB. Weights gain nothing
    // from that, and the decoder, which makes as many tables, loses a tenth.
    const size_t part_bytes = transform == FASTCKPT_ROT ? kBlock : transform == FASTCKPT_ROTU ? kBlock / 4 : kBlock / 2;
    FrameSink sink(*context, stored, capacity, part_bytes);
    if (const int status = write_stream(*context, chunk, sink, digested ? &digest : nullptr)) return status;
    if (digested) digest.finish(result->digest);
    result->stored_bytes = sink.stored_bytes(), result->crc64nvme = sink.crc();
    return FASTCKPT_OK;
}

extern "C" int fastckpt_decode(fastckpt_context* context, const void* stored, size_t stored_bytes, const void* base, size_t n_bytes,
                               unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw, uint8_t digest_out[16]) {
    const Chunk chunk = chunk_of(nullptr, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk)) return status;
    auto* to = static_cast<u8*>(raw);
    Xxh3 digest(to, n_bytes);
    const bool digested = n_bytes >= FASTCKPT_MIN_DIGEST_BYTES;
    std::memset(digest_out, 0, 16);
    FrameSource source(*context, stored, stored_bytes);
    if (const int status = read_stream(*context, chunk, source, to, digested ? &digest : nullptr)) return status;
    if (digested) digest.finish(digest_out);
    return FASTCKPT_OK;
}

extern "C" int fastckpt_split(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes, unsigned transform,
                              unsigned lane_bytes, unsigned pack_bits, void* stream, size_t capacity, size_t* stream_bytes) {
    const Chunk chunk = chunk_of(raw, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk)) return status;
    StreamSink sink(stream, capacity);
    const int status = write_stream(*context, chunk, sink, nullptr);
    *stream_bytes = sink.stored_bytes();
    return status;
}

extern "C" int fastckpt_merge(fastckpt_context* context, const void* stream, size_t stream_bytes, const void* base, size_t n_bytes,
                              unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw) {
    const Chunk chunk = chunk_of(nullptr, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk)) return status;
    StreamSource source(stream, stream_bytes);
    return read_stream(*context, chunk, source, static_cast<u8*>(raw), nullptr);
}

extern "C" int fastckpt_is_constant(const void* raw, size_t n_bytes, unsigned lane_bytes) {
    const auto* p = static_cast<const u8*>(raw);
    if (n_bytes < lane_bytes || !lane_bytes) return 0;
    // Equal lanes: each byte equals the one a lane before it. memcmp of overlapping stretches only reads.
    return std::memcmp(p, p + lane_bytes, n_bytes < 64 ? n_bytes - lane_bytes : 64 - lane_bytes) == 0 &&
           std::memcmp(p, p + lane_bytes, n_bytes - lane_bytes) == 0;
}

namespace {
u16 rounded(u32 u) {
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<u16>(u >> 16 | 0x0040);
    return static_cast<u16>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace

extern "C" void fastckpt_cast(const void* wide, size_t n_lanes, void* narrow) {
    for (size_t i = 0; i < n_lanes; ++i) {
        const u16 x = rounded(load32(static_cast<const u8*>(wide) + 4 * i));
        std::memcpy(static_cast<u8*>(narrow) + 2 * i, &x, 2);
    }
}

extern "C" int fastckpt_cast_equal(const void* narrow, const void* wide, size_t n_lanes) {
    constexpr size_t kStep = 4096;
    for (size_t from = 0; from < n_lanes; from += kStep) {
        const size_t n = n_lanes - from < kStep ? n_lanes - from : kStep;
        unsigned differ = 0;
        for (size_t i = from; i < from + n; ++i) {
            u16 x;
            std::memcpy(&x, static_cast<const u8*>(narrow) + 2 * i, 2);
            differ |= x ^ rounded(load32(static_cast<const u8*>(wide) + 4 * i));
        }
        if (differ) return 0;
    }
    return 1;
}
