// libFuzzer: fastckpt_decode of any bytes stays within its buffers, and what it accepts can be encoded and decoded
// again; a delta gives the same bytes in place of its base, and what is refused leaves the base there.
//
// An input: bytes 0-2 choose transform, lane bytes and pack bits, bytes 3-5 the lanes less 1; then the frame. Unless
// bit 7 of byte 0 is set, the frame's head is made right for that length (SUBPACK: but for the content size, which
// depends on the escapes).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../fastckpt.h"

namespace {

constexpr size_t kHead = 6, kMaxLanes = 140000;  // a stripe and some

void require(bool it, const char* what) {
    if (it) return;
    std::fprintf(stderr, "decode_fuzzer: %s\n", what);
    std::abort();
}

// Not a byte more than asked for.
std::unique_ptr<uint8_t[]> exactly(size_t n) { return std::unique_ptr<uint8_t[]>(new uint8_t[n]); }

size_t low_plane_bytes(size_t lanes) { return (7 * lanes + 7) / 8; }

size_t stream_bytes(unsigned transform, unsigned w, size_t lanes) {
    if (transform != FASTCKPT_ROTU) return lanes * w;
    const size_t whole = lanes / FASTCKPT_STRIPE_LANES, rest = lanes % FASTCKPT_STRIPE_LANES;
    return lanes * (w - 1) + whole * low_plane_bytes(FASTCKPT_STRIPE_LANES) + low_plane_bytes(rest);
}

fastckpt_context* context_memory() {
    static void* const memory = std::aligned_alloc(64, (fastckpt_context_bytes() + 63) / 64 * 64);
    return fastckpt_context_init(memory);  // and with it all that an earlier input has left
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < kHead) return 0;
    const unsigned transform = FASTCKPT_ROT + (data[0] & 0x7f) % 4, w = 2u << data[1] % 3,
                   pack_bits = 1u << data[2] % 4;
    const size_t lanes = 1 + (data[3] | data[4] << 8 | size_t{data[5]} << 16) % kMaxLanes, n = lanes * w,
                 n_frame = size - kHead;
    const auto frame = exactly(n_frame), base = exactly(n), raw = exactly(n);
    std::memcpy(frame.get(), data + kHead, n_frame);
    if (!(data[0] & 0x80) && n_frame >= 9) {
        const uint32_t content = static_cast<uint32_t>(stream_bytes(transform, w, lanes));
        std::memcpy(frame.get(), "\x28\xB5\x2F\xFD\xA0", 5);
        if (transform != FASTCKPT_SUBPACK) std::memcpy(frame.get() + 5, &content, 4);
    }
    for (size_t done = 0; done < n; done += std::min(size, n - done))
        std::memcpy(base.get() + done, data, std::min(size, n - done));

    fastckpt_context* context = context_memory();
    uint8_t digest[16], again[16];
    const int status =
        fastckpt_decode(context, frame.get(), n_frame, base.get(), n, transform, w, pack_bits, raw.get(), digest);
    require(status == FASTCKPT_OK || status == FASTCKPT_FOREIGN, "a status that decode does not give");
    const auto second = exactly(n);
    require(fastckpt_decode(context, frame.get(), n_frame, base.get(), n, transform, w, pack_bits, second.get(),
                            again) == status,
            "another status the second time");
    if (transform == FASTCKPT_SUB || transform == FASTCKPT_SUBPACK) {  // in place: the same, or the base is still there
        const auto both = exactly(n);
        std::memcpy(both.get(), base.get(), n);
        require(fastckpt_decode(context, frame.get(), n_frame, both.get(), n, transform, w, pack_bits, both.get(),
                                nullptr) == status,
                "another status in place");
        require(!std::memcmp(both.get(), status == FASTCKPT_OK ? raw.get() : base.get(), n), "other bytes in place");
    }
    if (status != FASTCKPT_OK) return 0;
    require(!std::memcmp(raw.get(), second.get(), n) && !std::memcmp(digest, again, 16), "other bytes the second time");
    std::memset(again, 0, sizeof again);
    if (n >= FASTCKPT_MIN_DIGEST_BYTES) require(fastckpt_xxh3_128(raw.get(), n, again) == FASTCKPT_OK, "no digest");
    require(!std::memcmp(digest, again, 16), "another digest than that of the bytes");

    const size_t room = fastckpt_encode_bound(n);
    const auto stored = exactly(room);
    fastckpt_encoded result;
    require(fastckpt_encode(context, raw.get(), base.get(), n, transform, w, pack_bits, stored.get(), room, &result) ==
                FASTCKPT_OK,
            "cannot encode it");
    require(result.stored_bytes <= room && !std::memcmp(digest, result.digest, 16), "encode's digest");
    require(result.crc64nvme == fastckpt_crc64nvme_portable(0, stored.get(), result.stored_bytes), "encode's crc");
    const auto copy = exactly(result.stored_bytes);
    std::memcpy(copy.get(), stored.get(), result.stored_bytes);
    std::memset(second.get(), 0xAA, n);
    require(fastckpt_decode(context, copy.get(), result.stored_bytes, base.get(), n, transform, w, pack_bits,
                            second.get(), again) == FASTCKPT_OK,
            "cannot decode its encoding");
    require(!std::memcmp(raw.get(), second.get(), n) && !std::memcmp(digest, again, 16),
            "its encoding has other bytes");
    return 0;
}
