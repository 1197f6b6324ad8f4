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

// The digest of raw bytes that appear from the front; of a chunk that is only a base there is none.
class Check {
public:
    Check(const fastckpt_chunk& chunk, const u8* raw)
        : expected_(chunk.digest), wanted_(!chunk.is_base), digest_(raw, chunk.raw_bytes) {}
    void advance(size_t done) {
        if (wanted_) digest_.advance(done);
    }
    int finish() {
        if (!wanted_) return FASTCKPT_OK;
        u8 found[16];
        digest_.finish(found);
        return std::memcmp(found, expected_, 16) ? FASTCKPT_DAMAGED : FASTCKPT_OK;
    }

private:
    const u8* expected_;
    bool wanted_;
    Xxh3 digest_;
};

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

const u8* at(u64 address) { return reinterpret_cast<const u8*>(static_cast<uintptr_t>(address)); }

int read_raw(const Stored& stored, const fastckpt_chunk& chunk, u8* raw) {
    if (chunk.stored_bytes != chunk.raw_bytes) return FASTCKPT_DAMAGED;
    const Kernels& loops = kernels();
    Check check(chunk, raw);
    u64 crc = ~u64{0};
    for (size_t done = 0; done < chunk.raw_bytes;) {
        const size_t size = smaller(chunk.raw_bytes - done, kPiece);
        if (!stored.read(chunk.offset + done, raw + done, size)) return FASTCKPT_UNREAD;
        crc = loops.crc(crc, raw + done, size);
        done += size;
        check.advance(done);
    }
    return ~crc == chunk.crc64nvme ? check.finish() : FASTCKPT_DAMAGED;
}

int read_constant(const fastckpt_chunk& chunk, u8* raw) {
    const size_t w = chunk.lane_bytes;
    if ((w != 1 && w != 2 && w != 4 && w != 8) || chunk.raw_bytes % w || chunk.stored_bytes) return FASTCKPT_DAMAGED;
    u8 lanes[1024];
    for (size_t i = 0; i < sizeof lanes; i += w) std::memcpy(lanes + i, chunk.parameter, w);
    Check check(chunk, raw);
    for (size_t done = 0; done < chunk.raw_bytes;) {
        const size_t size = smaller(chunk.raw_bytes - done, sizeof lanes);
        std::memcpy(raw + done, lanes, size);
        done += size;
        check.advance(done);
    }
    return check.finish();
}

// REF and CAST, from the base alone.
int read_from_base(const fastckpt_chunk& chunk, u8* raw) {
    const bool is_cast = chunk.transform == FASTCKPT_CAST;
    if (chunk.stored_bytes || (is_cast && chunk.raw_bytes % 2)) return FASTCKPT_DAMAGED;
    const u8* base = at(chunk.base);
    Check check(chunk, raw);
    for (size_t done = 0; done < chunk.raw_bytes;) {
        const size_t size = smaller(chunk.raw_bytes - done, kPiece);
        if (is_cast)
            (void)fastckpt_cast(base + 2 * done, size / 2, raw + done);
        else if (base != raw)
            std::memcpy(raw + done, base + done, size);
        done += size;
        check.advance(done);
    }
    return check.finish();
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
            const size_t size = smaller(chunk.stored_bytes - done, kPiece);
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

bool has_base(const fastckpt_chunk& chunk) {
    return chunk.transform >= FASTCKPT_SUB && chunk.transform <= FASTCKPT_REF;
}
size_t base_bytes(const fastckpt_chunk& chunk) {
    return chunk.transform == FASTCKPT_CAST ? 2 * chunk.raw_bytes : chunk.raw_bytes;
}
bool touch(u64 a, size_t a_bytes, u64 b, size_t b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

int check_base(const fastckpt_chunk& chunk) {
    const size_t n = base_bytes(chunk);
    if (!chunk.base || chunk.base > UINTPTR_MAX - n) return FASTCKPT_BAD_ARGUMENT;
    const bool in_place = chunk.base == chunk.raw && chunk.transform != FASTCKPT_CAST;
    return !in_place && touch(chunk.base, n, chunk.raw, chunk.raw_bytes) ? FASTCKPT_BAD_ARGUMENT : FASTCKPT_OK;
}

// Whether a chunk of this call has left in the base's memory what is not the base.
bool has_lost_base(const fastckpt_chunk* chunks, const fastckpt_outcome* outcomes, size_t i) {
    const fastckpt_chunk& chunk = chunks[i];
    for (size_t k = i; k-- > 0;)
        if (chunks[k].raw == chunk.base && chunks[k].raw_bytes >= base_bytes(chunk))
            return outcomes[k].status != FASTCKPT_OK;  // the last one that was to fill it
        else if (outcomes[k].status != FASTCKPT_OK &&
                 touch(chunks[k].raw, chunks[k].raw_bytes, chunk.base, base_bytes(chunk)))
            return true;
    return false;
}

int read_chunk(fastckpt_context* context, const Stored& stored, u8* scratch, size_t scratch_bytes,
               const fastckpt_chunk& chunk) {
    if (chunk.raw_bytes < FASTCKPT_MIN_DIGEST_BYTES || chunk.raw_bytes > kMaxRaw) return FASTCKPT_BAD_LENGTH;
    if (!chunk.raw || chunk.raw > UINTPTR_MAX - chunk.raw_bytes) return FASTCKPT_BAD_ARGUMENT;
    if (chunk.offset > INT64_MAX - chunk.stored_bytes || chunk.stored_bytes > kMostBytes) return FASTCKPT_BAD_LENGTH;
    u8* const raw = reinterpret_cast<u8*>(static_cast<uintptr_t>(chunk.raw));
    if (chunk.transform < FASTCKPT_RAW || chunk.transform > FASTCKPT_REF) return FASTCKPT_BAD_ARGUMENT;
    if (has_base(chunk))
        if (const int status = check_base(chunk)) return status;
    if (chunk.is_fresh) make_pages(raw, chunk.raw_bytes);
    if (chunk.transform == FASTCKPT_RAW) return read_raw(stored, chunk, raw);
    if (chunk.transform == FASTCKPT_CONST) return read_constant(chunk, raw);
    if (chunk.transform == FASTCKPT_CAST || chunk.transform == FASTCKPT_REF) return read_from_base(chunk, raw);
    if (stored.file >= 0 && chunk.stored_bytes > scratch_bytes) return FASTCKPT_NO_ROOM;
    int status;
    const u8* frame = read_frame(stored, chunk, scratch, &status);
    if (!frame) return status;
    u8 found[16];
    status =
        fastckpt_decode(context, frame, chunk.stored_bytes, has_base(chunk) ? at(chunk.base) : nullptr, chunk.raw_bytes,
                        chunk.transform, chunk.lane_bytes, chunk.pack_bits, raw, chunk.is_base ? nullptr : found);
    if (status || chunk.is_base) return status;
    return std::memcmp(found, chunk.digest, 16) ? FASTCKPT_DAMAGED : FASTCKPT_OK;
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
    bool all_read = true;
    for (size_t i = 0; i < n; ++i) {
        const auto began = std::chrono::steady_clock::now();
        outcomes[i].status = !all_read && has_base(chunks[i]) && has_lost_base(chunks, outcomes, i)
                                 ? FASTCKPT_NO_BASE
                                 : read_chunk(context, stored, static_cast<u8*>(scratch), scratch_bytes, chunks[i]);
        all_read &= outcomes[i].status == FASTCKPT_OK;
        const auto spent = std::chrono::steady_clock::now() - began;
        outcomes[i].seconds = std::chrono::duration<float>(spent).count();
    }
    return FASTCKPT_OK;
}
