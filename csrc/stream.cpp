// Chunks to stored bytes and back, stripe by stripe: digest, transform, entropy coding and crc while a stripe is in the
// second-level cache.
//
//     raw ─→ Xxh3, planes (kernels.inl) ─→ FrameSink: one zstd block or more for each plane of a stripe ─→ stored, crc
#include "stream.h"

#include <cstring>

#include "fastckpt.h"

namespace fastckpt {

bool PlainSink::plane(unsigned, const u8* bytes, size_t n, bool, bool) {
    assert(n <= static_cast<size_t>(end_ - at_));  // begin() has seen how long the stream gets
    std::memcpy(at_, bytes, n);
    at_ += n;
    return true;
}

const u8* PlainSource::plane(unsigned, size_t n, u8*, bool) {
    if (static_cast<size_t>(end_ - at_) < n) return nullptr;
    const u8* found = at_;
    at_ += n;
    return found;
}

namespace {

size_t rotu_low_bytes(size_t lanes) { return (7 * lanes + 7) / 8; }

// Bytes of a ROTU stream.
size_t rotu_bytes(size_t lanes, unsigned w) {
    const size_t whole = lanes / kStripeLanes, rest = lanes % kStripeLanes;
    return lanes * (w - 1) + whole * rotu_low_bytes(kStripeLanes) + rotu_low_bytes(rest);
}

// How many lanes the stripe has that begins at lane `from`.
size_t stripe(const Chunk& chunk, size_t from) {
    return chunk.lanes - from < kStripeLanes ? chunk.lanes - from : kStripeLanes;
}

template <class Sink>
int write_planes(fastckpt_context& context, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    const Kernels& loops = kernels();
    const unsigned w = chunk.lane_bytes;
    const bool unsigned_ = chunk.transform == FASTCKPT_ROTU;
    const Map map = chunk.transform == FASTCKPT_SUB ? Map::kSub : Map::kRot;
    if (!sink.begin(unsigned_ ? rotu_bytes(chunk.lanes, w) : chunk.n_bytes)) return FASTCKPT_NO_ROOM;
    u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) planes[i] = context.planes[i];
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = stripe(chunk, from);
        if (digest) digest->advance((from + lanes) * w);  // brings the stripe into the cache
        loops.split(chunk.raw + from * w, chunk.base ? chunk.base + from * w : nullptr, lanes, w, map, planes);
        from += lanes;
        sink.read_soon(chunk.raw + from * w, chunk.base ? chunk.base + from * w : nullptr, stripe(chunk, from) * w);
        size_t low_bytes = lanes;
        if (unsigned_) {
            if (loops.pack7(planes[w - 1], lanes, planes[w - 1]))
                return FASTCKPT_UNFIT;  // in place: it writes behind what it has read
            low_bytes = rotu_low_bytes(lanes);
        }
        for (unsigned i = 0; i < w; ++i) {
            const bool lowest = i == w - 1;
            if (!sink.plane(i, planes[i], lowest ? low_bytes : lanes, i == 0, lowest && from == chunk.lanes))
                return FASTCKPT_NO_ROOM;
        }
    }
    return FASTCKPT_OK;
}

// The planes of z become those of the zigzag of -z's number.
void negate(const u8* const* planes, size_t lanes, unsigned w, u8* const* negated) {
    const u64 most = ~u64{0} >> (64 - 8 * w);
    for (size_t i = 0; i < lanes; ++i) {
        u64 z = 0;
        for (unsigned k = 0; k < w; ++k) z = z << 8 | planes[k][i];
        if (z && z != most) z = z & 1 ? z + 1 : z - 1;  // 0 and the lowest number are their own negatives
        for (unsigned k = 0; k < w; ++k) negated[k][i] = static_cast<u8>(z >> (8 * (w - 1 - k)));
    }
}

// SUB in place that turned out foreign after `done` lanes: they become the base's again. source: at its beginning.
template <class Source>
void take_back(fastckpt_context& context, const Chunk& chunk, Source source, u8* raw, size_t done) {
    const unsigned w = chunk.lane_bytes;
    (void)source.begin();
    for (size_t from = 0; from < done;) {
        const size_t lanes = stripe(chunk, from);
        const u8* planes[kMaxPlanes];
        u8* negated[kMaxPlanes];
        for (unsigned i = 0; i < w; ++i) {
            planes[i] = source.plane(i, lanes, context.planes[i], i == w - 1 && from + lanes == chunk.lanes);
            negated[i] = context.planes[i];
            if (!planes[i]) return assert(false);  // they were there before
        }
        negate(planes, lanes, w, negated);
        kernels().merge(negated, raw + from * w, lanes, w, Map::kSub, raw + from * w);
        from += lanes;
    }
}

template <class Source>
int read_planes(fastckpt_context& context, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    const Kernels& loops = kernels();
    const Source beginning = source;
    const auto foreign = [&](size_t done) {
        if (chunk.base == raw) take_back(context, chunk, beginning, raw, done);
        return FASTCKPT_FOREIGN;
    };
    const unsigned w = chunk.lane_bytes;
    const bool unsigned_ = chunk.transform == FASTCKPT_ROTU;
    const Map map = chunk.transform == FASTCKPT_SUB ? Map::kSub : Map::kRot;
    if (source.begin() != (unsigned_ ? rotu_bytes(chunk.lanes, w) : chunk.n_bytes)) return FASTCKPT_FOREIGN;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = stripe(chunk, from);
        const u8* planes[kMaxPlanes];
        source.write_soon(raw + from * w, lanes * w);
        for (unsigned i = 0; i < w; ++i) {
            const bool lowest = i == w - 1;
            const size_t n = lowest && unsigned_ ? rotu_low_bytes(lanes) : lanes;
            u8* room = lowest && unsigned_ ? context.packed : context.planes[i];
            planes[i] = source.plane(i, n, room, lowest && from + lanes == chunk.lanes);
            if (!planes[i]) return foreign(from);
        }
        if (unsigned_) {
            const unsigned odd = 7 * lanes % 8;
            if (odd && planes[w - 1][rotu_low_bytes(lanes) - 1] >> odd) return FASTCKPT_FOREIGN;  // unused bits are 0
            loops.unpack7(planes[w - 1], lanes, context.planes[w - 1]);
            planes[w - 1] = context.planes[w - 1];
        }
        loops.merge(planes, chunk.base ? chunk.base + from * w : nullptr, lanes, w, map, raw + from * w);
        from += lanes;
        if (digest) digest->advance(from * w);
    }
    return source.done() ? FASTCKPT_OK : foreign(chunk.lanes);
}

// Planes that are longer than a block, in pieces.
template <class Sink>
bool write_pieces(Sink& sink, unsigned slot, const u8* bytes, size_t n, bool top, bool last) {
    for (size_t done = 0; done < n;) {
        const size_t size = n - done < kBlock ? n - done : kBlock;
        if (!sink.plane(slot, bytes + done, size, top, last && done + size == n)) return false;
        done += size;
    }
    return true;
}

// out: room for n and kSlack.
template <class Source>
bool read_pieces(Source& source, unsigned slot, size_t n, u8* out, bool last) {
    for (size_t done = 0; done < n;) {
        const size_t size = n - done < kBlock ? n - done : kBlock;
        const u8* found = source.plane(slot, size, out + done, last && done + size == n);
        if (!found) return false;
        if (found != out + done) std::memcpy(out + done, found, size);
        done += size;
    }
    return true;
}

template <class Sink>
int write_subpack(fastckpt_context& context, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    const Kernels& loops = kernels();
    const unsigned w = chunk.lane_bytes, bits = chunk.pack_bits;
    size_t n_escapes = 0;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = stripe(chunk, from);
        if (digest) digest->advance((from + lanes) * w);
        assert(n_escapes <= from && (from + lanes) * bits / 8 <= sizeof context.packed - kSlack);
        n_escapes += loops.subpack(chunk.raw + from * w, chunk.base + from * w, lanes, w, bits,
                                   context.packed + from * bits / 8, context.escapes + n_escapes * w);
        from += lanes;
    }
    const size_t packed_bytes = (chunk.lanes * bits + 7) / 8, total = 4 + packed_bytes + n_escapes * w;
    if (total > 2 * chunk.n_bytes + 64 || !sink.begin(total)) return FASTCKPT_NO_ROOM;
    assert(n_escapes <= chunk.lanes);
    u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) planes[i] = context.escape_planes + i * n_escapes;
    loops.split(context.escapes, nullptr, n_escapes, w, Map::kPlain, planes);
    const u8 head[4] = {static_cast<u8>(n_escapes), static_cast<u8>(n_escapes >> 8), static_cast<u8>(n_escapes >> 16),
                        static_cast<u8>(n_escapes >> 24)};
    bool fits = sink.plane(kMaxPlanes, head, 4, false, false);
    fits = fits && write_pieces(sink, kMaxPlanes, context.packed, packed_bytes, true, !n_escapes);
    for (unsigned i = 0; i < w && fits; ++i) fits = write_pieces(sink, i, planes[i], n_escapes, true, i == w - 1);
    return fits ? FASTCKPT_OK : FASTCKPT_NO_ROOM;
}

template <class Source>
int read_subpack(fastckpt_context& context, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    const Kernels& loops = kernels();
    const unsigned w = chunk.lane_bytes, bits = chunk.pack_bits;
    const size_t content = source.begin(), packed_bytes = (chunk.lanes * bits + 7) / 8;
    u8 head_room[4 + kSlack];
    const u8* head = content ? source.plane(kMaxPlanes, 4, head_room, false) : nullptr;
    if (!head) return FASTCKPT_FOREIGN;
    const size_t n_escapes = load32(head);
    if (n_escapes > chunk.lanes || content != 4 + packed_bytes + n_escapes * w || content > 2 * chunk.n_bytes + 64)
        return FASTCKPT_FOREIGN;
    if (!read_pieces(source, kMaxPlanes, packed_bytes, context.packed, !n_escapes)) return FASTCKPT_FOREIGN;
    assert(packed_bytes <= sizeof context.packed - kSlack);
    const u8* planes[kMaxPlanes];
    for (unsigned i = 0; i < w; ++i) {
        u8* plane = context.escape_planes + i * n_escapes;
        planes[i] = plane;
        if (!read_pieces(source, i, n_escapes, plane, i == w - 1)) return FASTCKPT_FOREIGN;
    }
    if (!source.done()) return FASTCKPT_FOREIGN;
    if (const unsigned odd = chunk.lanes * bits % 8; odd && context.packed[packed_bytes - 1] >> odd)
        return FASTCKPT_FOREIGN;  // unused bits are 0
    if (loops.count_escapes(context.packed, packed_bytes, bits) != n_escapes) return FASTCKPT_FOREIGN;
    loops.merge(planes, nullptr, n_escapes, w, Map::kPlain, context.escapes);
    size_t used = 0;
    for (size_t from = 0; from < chunk.lanes;) {
        const size_t lanes = stripe(chunk, from);
        used += loops.subunpack(context.packed + from * bits / 8, chunk.base + from * w, lanes, w, bits,
                                context.escapes + used * w, n_escapes - used, raw + from * w);
        assert(used <= n_escapes);
        from += lanes;
        if (digest) digest->advance(from * w);
    }
    assert(used == n_escapes);
    return FASTCKPT_OK;
}

}  // namespace

template <class Sink>
int write_stream(fastckpt_context& context, const Chunk& chunk, Sink& sink, Xxh3* digest) {
    return chunk.transform == FASTCKPT_SUBPACK ? write_subpack(context, chunk, sink, digest)
                                               : write_planes(context, chunk, sink, digest);
}
template <class Source>
int read_stream(fastckpt_context& context, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest) {
    return chunk.transform == FASTCKPT_SUBPACK ? read_subpack(context, chunk, source, raw, digest)
                                               : read_planes(context, chunk, source, raw, digest);
}

template int write_stream(fastckpt_context&, const Chunk&, FrameSink&, Xxh3*);
template int write_stream(fastckpt_context&, const Chunk&, PlainSink&, Xxh3*);
template int read_stream(fastckpt_context&, const Chunk&, FrameSource&, u8*, Xxh3*);
template int read_stream(fastckpt_context&, const Chunk&, PlainSource&, u8*, Xxh3*);

}  // namespace fastckpt
