// zstd frames as FrameSink writes them, read. Any bytes may come: all is checked before it is used.
#ifndef FASTCKPT_FRAME_SOURCE_H
#define FASTCKPT_FRAME_SOURCE_H

#include "context.h"

namespace fastckpt {

class FrameSource {
public:
    FrameSource(fastckpt_context& context, const void* stored, size_t n)
        : context_(context), at_(static_cast<const u8*>(stored)), end_(at_ + n) {}

    // Content of any frame header that fastckpt_encode writes; 0 for others.
    size_t begin();

    // The content of the next blocks, which together have exactly n bytes, in `room` (n and kSlack) or where it lies.
    // Null if there are no such blocks, or the last one says otherwise than `last`.
    const u8* plane(unsigned slot, size_t n, u8* room, bool last);

    // Where the caller writes this stripe to: fetched while its first plane is decoded.
    void write_soon(const u8* to, size_t n_bytes) { soon_ = {.from = to, .n_bytes = n_bytes}; }

    bool done() const { return at_ == end_; }

private:
    size_t left() const { return static_cast<size_t>(end_ - at_); }

    // Returns how many bytes the compressed block regenerates, at most n; 0 if it is none of ours.
    size_t compressed(unsigned slot, const u8* block, size_t size, size_t n, u8* out);
    // Literals of four streams, n of them. behind: what follows in the frame. False if they are none.
    bool literals(unsigned slot, bool treeless, const u8* from, size_t size, u8* out, size_t n, const u8* behind);
    // The table that a compressed block begins with. Returns its bytes, 0 if it is none.
    size_t read_table(unsigned slot, const u8* from, size_t n);

    fastckpt_context& context_;
    const u8 *at_, *end_;
    int current_ = -1;  // the slot of the table that a treeless block uses
    Soon soon_ = {.from = nullptr, .n_bytes = 0};
};

}  // namespace fastckpt

#endif
