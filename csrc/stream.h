// Chunks to streams and back, stripe by stripe (docs/format.md, sections 4.3 and 4.4), for a sink or a source that puts
// a frame around the stream or none.
#ifndef FASTCKPT_STREAM_H
#define FASTCKPT_STREAM_H

#include "frame_sink.h"
#include "frame_source.h"
#include "xxh3.h"

namespace fastckpt {

// A stream as it is, for coders of others. The same functions as FrameSink has.
class PlainSink {
public:
    PlainSink(void* stream, size_t capacity) : first_(static_cast<u8*>(stream)), at_(first_), end_(first_ + capacity) {}
    bool begin(size_t content_bytes) const { return content_bytes <= static_cast<size_t>(end_ - at_); }
    bool plane(unsigned slot, const u8* bytes, size_t n, bool top, bool last);
    void read_soon(const u8*, const u8*, size_t) {}
    size_t stored_bytes() const { return static_cast<size_t>(at_ - first_); }

private:
    u8 *first_, *at_, *end_;
};

class PlainSource {
public:
    PlainSource(const void* stream, size_t n) : at_(static_cast<const u8*>(stream)), end_(at_ + n), n_(n) {}
    size_t begin() const { return n_; }
    const u8* plane(unsigned slot, size_t n, u8* room, bool last);
    void write_soon(const u8*, size_t) {}
    bool done() const { return at_ == end_; }

private:
    const u8 *at_, *end_;
    size_t n_;
};

struct Chunk {
    const u8* raw;
    const u8* base;  // null where the transform has none
    size_t n_bytes, lanes;
    unsigned transform, lane_bytes, pack_bits;
};

// The statuses of fastckpt.h. digest: advanced as far as the stripes have got, so that they are in the cache; may be
// null.
template <class Sink>
int write_stream(fastckpt_context& context, const Chunk& chunk, Sink& sink, Xxh3* digest);
template <class Source>
int read_stream(fastckpt_context& context, const Chunk& chunk, Source& source, u8* raw, Xxh3* digest);

extern template int write_stream(fastckpt_context&, const Chunk&, FrameSink&, Xxh3*);
extern template int write_stream(fastckpt_context&, const Chunk&, PlainSink&, Xxh3*);
extern template int read_stream(fastckpt_context&, const Chunk&, FrameSource&, u8*, Xxh3*);
extern template int read_stream(fastckpt_context&, const Chunk&, PlainSource&, u8*, Xxh3*);

}  // namespace fastckpt

#endif
