// zstd frames, written: blocks are raw, RLE, or four Huffman streams of literals without sequences (RFC 8878, 3.1.1).
#ifndef FASTCKPT_FRAME_SINK_H
#define FASTCKPT_FRAME_SINK_H

#include "context.h"
#include "entropy.h"

namespace fastckpt {

class FrameSink {
public:
    // part_bytes: a plane that compresses is cut into blocks of so many bytes, each with a table of its own where that
    // pays. delta: rare symbols are counted with more care, and short parts are coded, too.
    FrameSink(fastckpt_context& context, void* stored, size_t capacity, size_t part_bytes, bool delta);

    // All of these: false if the frame would be longer than `capacity`.
    bool begin(size_t content_bytes);
    // A plane of a stripe, n: 1 to kBlock. slot: which plane, as the tables of equal ones resemble each other. top: the
    // one that is expected to compress. last: of the frame.
    bool plane(unsigned slot, const u8* bytes, size_t n, bool top, bool last);

    // What the caller reads after this stripe, and of its base: fetched while the next parts are coded.
    void read_soon(const u8* from, const u8* base, size_t n_bytes) {
        soon_ = {.from = from, .n_bytes = n_bytes};
        base_soon_ = {.from = base, .n_bytes = base ? n_bytes : 0};
    }

    size_t stored_bytes() const { return static_cast<size_t>(at_ - first_); }
    u64 crc() const { return ~crc_; }

private:
    // The plane as one block of runs of zeros. Returns false, and nothing is written, if there are too few of them, or
    // no room.
    bool runs(unsigned slot, const u8* bytes, size_t n, bool last);
    // One block.
    bool part(unsigned slot, const u8* bytes, size_t n, bool top, bool last);
    // kind 0: raw, n bytes; 1: RLE, one byte that stands for n.
    bool block(bool last, unsigned kind, size_t n, const u8* data, size_t data_bytes);
    // A table for these counts. False: none is possible.
    bool build(unsigned slot, const Histogram& histogram);
    // A table of this slot that fits some bytes, of which a sample takes `bits` a symbol: the one it has, or a new one.
    bool has_table(unsigned slot, Histogram& sample, double bits, const u8* bytes, size_t n);
    // A compressed block behind `at_`. Returns its bytes, 0 if a symbol has no code, kNoRoom if it is not shorter than
    // a raw one.
    size_t compressed(unsigned slot, const u8* bytes, size_t n, bool last);
    // Its literals section, by the table of the slot; `room`: what it must not exceed. Returns as `compressed`.
    size_t literals(unsigned slot, const u8* bytes, size_t n, u8* to, size_t room);
    // The decoder will not see the last literals section of this slot.
    void forget(unsigned slot);

    size_t capacity() const { return static_cast<size_t>(end_ - at_); }
    // Takes n bytes that were written at the cursor into the crc.
    void advance(size_t n);

    fastckpt_context& context_;
    size_t part_bytes_;
    bool delta_;
    const Kernels& kernels_;
    u8 *first_, *at_, *end_;
    u64 crc_ = ~u64{0};
    int current_ = -1;  // the slot whose table the decoder has
    Soon soon_ = {.from = nullptr, .n_bytes = 0}, base_soon_ = {.from = nullptr, .n_bytes = 0};
};

}  // namespace fastckpt

#endif
