// A thread's scratch memory: what fastckpt.h calls a context.
#ifndef FASTCKPT_CONTEXT_H
#define FASTCKPT_CONTEXT_H

#include "fastckpt.h"
#include "huffman.h"

namespace fastckpt {

constexpr size_t kMaxRaw = FASTCKPT_MAX_RAW_BYTES;
constexpr size_t kBlock = kStripeLanes;  // bytes of the largest zstd block
constexpr size_t kFrameHeader = 9;       // magic, descriptor, content size in 4 bytes (RFC 8878, 3.1.1.1)

struct Slot {  // what is known about one plane of the stripes before
    HuffmanTable table;
    bool has_table;
};

struct Decoder {
    HuffmanDecoder table;
    u8 description[kMaxDescription];
    size_t description_bytes;  // 0: no table
};

}  // namespace fastckpt

struct fastckpt_context {
    alignas(64) uint8_t planes[fastckpt::kMaxPlanes][fastckpt::kBlock + fastckpt::kSlack];
    alignas(64) uint8_t streams[4 * fastckpt::kStreamRoom];
    alignas(64) uint8_t packed[fastckpt::kMaxRaw / 2 + fastckpt::kSlack];
    alignas(64) uint8_t escapes[fastckpt::kMaxRaw + fastckpt::kSlack];
    alignas(64) uint8_t escape_planes[fastckpt::kMaxRaw + fastckpt::kSlack];
    alignas(64) uint8_t literals[fastckpt::kBlock + fastckpt::kSlack];
    fastckpt::Run runs[fastckpt::kMaxRuns];
    fastckpt::Slot slots[fastckpt::kMaxPlanes + 1];
    fastckpt::Decoder decoders[fastckpt::kMaxPlanes + 1];
};

#endif
