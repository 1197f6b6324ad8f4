// The codec's part of the C interface: arguments are checked here, and nowhere behind it.
#include <cstring>

#include "arguments.h"
#include "fastckpt.h"
#include "stream.h"

using namespace fastckpt;

namespace {

// FASTCKPT_OK if such a chunk can be. raw: its bytes or the room for them; stored: the other side of the call.
int checked(const fastckpt_context* context, const Chunk& c, const void* raw, const void* stored, size_t stored_bytes) {
    const bool delta = c.transform == FASTCKPT_SUB || c.transform == FASTCKPT_SUBPACK;
    if (!context || (c.transform != FASTCKPT_ROT && c.transform != FASTCKPT_ROTU && !delta) || (delta && !c.base))
        return FASTCKPT_BAD_ARGUMENT;
    if (c.lane_bytes != 2 && c.lane_bytes != 4 && c.lane_bytes != 8) return FASTCKPT_BAD_LANE;
    if (c.transform == FASTCKPT_SUBPACK && c.pack_bits != 1 && c.pack_bits != 2 && c.pack_bits != 4 && c.pack_bits != 8)
        return FASTCKPT_BAD_LANE;
    if (c.n_bytes == 0 || c.n_bytes > kMaxRaw || c.n_bytes % c.lane_bytes) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(raw, c.n_bytes)) return status;
    return check_memory(stored, stored_bytes);
}

Chunk chunk_of(const void* raw, const void* base, size_t n_bytes, unsigned transform, unsigned lane_bytes,
               unsigned pack_bits) {
    const bool delta = transform == FASTCKPT_SUB || transform == FASTCKPT_SUBPACK;
    return {
        .raw = static_cast<const u8*>(raw),
        .base = delta ? static_cast<const u8*>(base) : nullptr,
        .n_bytes = n_bytes,
        .lanes = lane_bytes ? n_bytes / lane_bytes : 0,
        .transform = transform,
        .lane_bytes = lane_bytes,
        .pack_bits = pack_bits,
    };
}

// A copy, its crc and its digest, in pieces that the cache holds while three loops pass over them.
int encode_raw(const void* raw, size_t n_bytes, void* stored, size_t capacity, fastckpt_encoded* result) {
    if (n_bytes == 0 || n_bytes > kMaxRaw) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(raw, n_bytes)) return status;
    if (const int status = check_memory(stored, capacity)) return status;
    if (n_bytes > capacity) return FASTCKPT_NO_ROOM;
    const Kernels& loops = kernels();
    const auto* from = static_cast<const u8*>(raw);
    Xxh3 digest(from, n_bytes);
    const bool digested = n_bytes >= FASTCKPT_MIN_DIGEST_BYTES;
    u64 crc = ~u64{0};
    for (size_t done = 0; done < n_bytes;) {
        const size_t size = n_bytes - done < 2 * kBlock ? n_bytes - done : 2 * kBlock;
        if (digested) digest.advance(done + size);
        crc = loops.crc(crc, from + done, size);
        loops.copy(static_cast<u8*>(stored) + done, from + done, size);
        done += size;
    }
    if (digested) digest.finish(result->digest);
    result->stored_bytes = n_bytes;
    result->crc64nvme = ~crc;
    return FASTCKPT_OK;
}

}  // namespace

extern "C" size_t fastckpt_context_bytes(void) { return sizeof(fastckpt_context); }

extern "C" fastckpt_context* fastckpt_context_init(void* memory) {
    if (!memory || reinterpret_cast<uintptr_t>(memory) % alignof(fastckpt_context)) return nullptr;
    auto* context = static_cast<fastckpt_context*>(memory);  // nothing else in it is read before it is written
    for (Decoder& one : context->decoders) one.description_bytes = 0;
    return context;
}

extern "C" size_t fastckpt_encode_bound(size_t n_bytes) { return n_bytes > kMaxRaw ? 0 : 2 * n_bytes + 1024; }

extern "C" int fastckpt_encode(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes,
                               unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* stored,
                               size_t capacity, fastckpt_encoded* result) {
    if (!result) return FASTCKPT_BAD_ARGUMENT;
    std::memset(result, 0, sizeof *result);
    if (transform == FASTCKPT_RAW) return encode_raw(raw, n_bytes, stored, capacity, result);
    const Chunk chunk = chunk_of(raw, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk, raw, stored, capacity)) return status;
    // Second moments have another range in each row: blocks of 32 KiB make them 0.9 % smaller than blocks of 128 KiB.
    // Weights gain nothing from that, and the decoder, which makes as many tables, loses a tenth.
    const size_t part_bytes = transform == FASTCKPT_ROTU      ? kBlock / 4
                              : transform == FASTCKPT_SUBPACK ? kBlock / 2
                                                              : kBlock;
    Xxh3 digest(chunk.raw, n_bytes);
    const bool digested = n_bytes >= FASTCKPT_MIN_DIGEST_BYTES;
    FrameSink sink(*context, stored, capacity, part_bytes, chunk.base != nullptr);
    if (const int status = write_stream(*context, chunk, sink, digested ? &digest : nullptr)) return status;
    if (digested) digest.finish(result->digest);
    result->stored_bytes = sink.stored_bytes();
    result->crc64nvme = sink.crc();
    return FASTCKPT_OK;
}

extern "C" int fastckpt_decode(fastckpt_context* context, const void* stored, size_t stored_bytes, const void* base,
                               size_t n_bytes, unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw,
                               uint8_t digest_out[16]) {
    const Chunk chunk = chunk_of(nullptr, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk, raw, stored, stored_bytes)) return status;
    auto* to = static_cast<u8*>(raw);
    Xxh3 digest(to, n_bytes);
    const bool digested = digest_out && n_bytes >= FASTCKPT_MIN_DIGEST_BYTES;
    if (digest_out) std::memset(digest_out, 0, 16);
    FrameSource source(*context, stored, stored_bytes);
    if (const int status = read_stream(*context, chunk, source, to, digested ? &digest : nullptr)) return status;
    if (digested) digest.finish(digest_out);
    return FASTCKPT_OK;
}

extern "C" int fastckpt_split(fastckpt_context* context, const void* raw, const void* base, size_t n_bytes,
                              unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* stream,
                              size_t capacity, size_t* stream_bytes) {
    const Chunk chunk = chunk_of(raw, base, n_bytes, transform, lane_bytes, pack_bits);
    if (!stream_bytes) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = checked(context, chunk, raw, stream, capacity)) return status;
    PlainSink sink(stream, capacity);
    const int status = write_stream(*context, chunk, sink, nullptr);
    *stream_bytes = sink.stored_bytes();
    return status;
}

extern "C" int fastckpt_merge(fastckpt_context* context, const void* stream, size_t stream_bytes, const void* base,
                              size_t n_bytes, unsigned transform, unsigned lane_bytes, unsigned pack_bits, void* raw) {
    const Chunk chunk = chunk_of(nullptr, base, n_bytes, transform, lane_bytes, pack_bits);
    if (const int status = checked(context, chunk, raw, stream, stream_bytes)) return status;
    PlainSource source(stream, stream_bytes);
    return read_stream(*context, chunk, source, static_cast<u8*>(raw), nullptr);
}
