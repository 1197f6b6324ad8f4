// Chunks from a file or from memory to where they belong: read, crc, decode and digest, one chunk after another,
// without anything in between that the caller would have to do.
#include <cerrno>
#include <chrono>
#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

#include "arguments.h"
#include "crc64.h"
#include "fastckpt.h"
#include "stream.h"

using namespace fastckpt;

namespace {

constexpr size_t kPiece = 256 << 10;  // stays in the second-level cache from one loop to the next
constexpr size_t kPage = 4096;
constexpr size_t kWorthAsking = 64 << 10;  // for less memory a system call costs as much as the faults do

// Stored bytes of a file, or of memory.
struct Stored {
    int file;
    const u8* memory;
    size_t memory_bytes;

    // The bytes from `offset` on in `to`. False if they are not all there, or cannot be read.
    bool read(u64 offset, u8* to, size_t n) const {
        if (file < 0) {
            if (offset > memory_bytes || memory_bytes - offset < n) return false;
            std::memcpy(to, memory + offset, n);
            return true;
        }
        while (n) {
            const ssize_t got = pread(file, to, n, static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return false;
            to += got;
            offset += static_cast<u64>(got);
            n -= static_cast<size_t>(got);
        }
        return true;
    }
    // The bytes where they lie, if they lie in memory.
    const u8* find(u64 offset, size_t n) const {
        return file < 0 && offset <= memory_bytes && memory_bytes - offset >= n ? memory + offset : nullptr;
    }
};

// Lets the kernel make all pages of fresh memory in one call: a page fault for each of them takes half as long again.
// It is a hint only: kernels before 5.14 do not know it.
void make_pages(u8* raw, size_t n) {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not have
    if (n < kWorthAsking) return;
    const auto first = reinterpret_cast<uintptr_t>(raw), start = (first + kPage - 1) & ~(kPage - 1);
    const auto stop = (first + n) & ~(kPage - 1);
    if (start < stop) (void)madvise(reinterpret_cast<void*>(start), stop - start, kPopulateWrite);
#else
    (void)raw;
    (void)n;
#endif
}

bool has_digest(const fastckpt_chunk& chunk, const u8 found[16]) { return !std::memcmp(found, chunk.digest, 16); }

int read_raw(const Stored& stored, const fastckpt_chunk& chunk, u8* raw) {
    if (chunk.stored_bytes != chunk.raw_bytes) return FASTCKPT_DAMAGED;
    const Kernels& loops = kernels();
    Xxh3 digest(raw, chunk.raw_bytes);
    u64 crc = ~u64{0};
    for (size_t done = 0; done < chunk.raw_bytes;) {
        const size_t size = chunk.raw_bytes - done < kPiece ? chunk.raw_bytes - done : kPiece;
        if (!stored.read(chunk.offset + done, raw + done, size)) return FASTCKPT_UNREAD;
        crc = loops.crc(crc, raw + done, size);
        done += size;
        digest.advance(done);
    }
    u8 found[16];
    digest.finish(found);
    return ~crc == chunk.crc64nvme && has_digest(chunk, found) ? FASTCKPT_OK : FASTCKPT_DAMAGED;
}

int read_constant(const fastckpt_chunk& chunk, u8* raw) {
    const size_t w = chunk.lane_bytes;
    if ((w != 1 && w != 2 && w != 4 && w != 8) || chunk.raw_bytes % w || chunk.stored_bytes) return FASTCKPT_DAMAGED;
    u8 lanes[1024];
    for (size_t i = 0; i < sizeof lanes; i += w) std::memcpy(lanes + i, chunk.parameter, w);
    Xxh3 digest(raw, chunk.raw_bytes);
    for (size_t done = 0; done < chunk.raw_bytes;) {
        const size_t size = chunk.raw_bytes - done < sizeof lanes ? chunk.raw_bytes - done : sizeof lanes;
        std::memcpy(raw + done, lanes, size);
        done += size;
        digest.advance(done);
    }
    u8 found[16];
    digest.finish(found);
    return has_digest(chunk, found) ? FASTCKPT_OK : FASTCKPT_DAMAGED;
}

// Into scratch, and its crc while each piece is in the cache. Null with a status if that fails.
const u8* read_frame(const Stored& stored, const fastckpt_chunk& chunk, u8* scratch, int* status) {
    const Kernels& loops = kernels();
    const u8* frame = stored.find(chunk.offset, chunk.stored_bytes);
    u64 crc = ~u64{0};
    if (frame) {
        crc = loops.crc(crc, frame, chunk.stored_bytes);
    } else if (stored.file < 0) {
        *status = FASTCKPT_UNREAD;
        return nullptr;
    } else {
        for (size_t done = 0; done < chunk.stored_bytes;) {
            const size_t size = chunk.stored_bytes - done < kPiece ? chunk.stored_bytes - done : kPiece;
            if (!stored.read(chunk.offset + done, scratch + done, size)) {
                *status = FASTCKPT_UNREAD;
                return nullptr;
            }
            crc = loops.crc(crc, scratch + done, size);
            done += size;
        }
        frame = scratch;
    }
    *status = ~crc == chunk.crc64nvme ? FASTCKPT_OK : FASTCKPT_DAMAGED;
    return *status ? nullptr : frame;
}

int read_chunk(fastckpt_context* context, const Stored& stored, u8* scratch, size_t scratch_bytes,
               const fastckpt_chunk& chunk) {
    if (chunk.raw_bytes < FASTCKPT_MIN_DIGEST_BYTES || chunk.raw_bytes > kMaxRaw) return FASTCKPT_BAD_LENGTH;
    if (!chunk.raw || chunk.raw > UINTPTR_MAX - chunk.raw_bytes) return FASTCKPT_BAD_ARGUMENT;
    if (chunk.offset > INT64_MAX - chunk.stored_bytes || chunk.stored_bytes > kMostBytes) return FASTCKPT_BAD_LENGTH;
    u8* const raw = reinterpret_cast<u8*>(static_cast<uintptr_t>(chunk.raw));
    if (chunk.is_fresh) make_pages(raw, chunk.raw_bytes);
    if (chunk.transform == FASTCKPT_RAW) return read_raw(stored, chunk, raw);
    if (chunk.transform == FASTCKPT_CONST) return read_constant(chunk, raw);
    if (chunk.transform != FASTCKPT_ROT && chunk.transform != FASTCKPT_ROTU) return FASTCKPT_BAD_ARGUMENT;
    if (stored.file >= 0 && chunk.stored_bytes > scratch_bytes) return FASTCKPT_NO_ROOM;
    int status;
    const u8* frame = read_frame(stored, chunk, scratch, &status);
    if (!frame) return status;
    u8 found[16];
    status = fastckpt_decode(context, frame, chunk.stored_bytes, nullptr, chunk.raw_bytes, chunk.transform,
                             chunk.lane_bytes, chunk.pack_bits, raw, found);
    if (status) return status;
    return has_digest(chunk, found) ? FASTCKPT_OK : FASTCKPT_DAMAGED;
}

}  // namespace

extern "C" int fastckpt_read_chunks(fastckpt_context* context, int file, const void* memory, size_t memory_bytes,
                                    void* scratch, size_t scratch_bytes, const fastckpt_chunk* chunks, size_t n,
                                    fastckpt_outcome* outcomes) {
    if (!context) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = check_memory(memory, memory_bytes)) return status;
    if (const int status = check_memory(scratch, scratch_bytes)) return status;
    if (n > kMostBytes / sizeof *chunks) return FASTCKPT_BAD_LENGTH;
    if (n && (!chunks || !outcomes)) return FASTCKPT_BAD_ARGUMENT;
    const Stored stored = {
        .file = file, .memory = static_cast<const u8*>(memory), .memory_bytes = file < 0 ? memory_bytes : 0};
    for (size_t i = 0; i < n; ++i) {
        const auto began = std::chrono::steady_clock::now();
        outcomes[i].status = read_chunk(context, stored, static_cast<u8*>(scratch), scratch_bytes, chunks[i]);
        const auto spent = std::chrono::steady_clock::now() - began;
        outcomes[i].seconds = std::chrono::duration<float>(spent).count();
    }
    return FASTCKPT_OK;
}
