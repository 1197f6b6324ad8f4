// libFuzzer: fastckpt_merge of any bytes stays within its buffers, and what it accepts can be split and merged again.
//
// An input begins with the six bytes of decode_fuzzer.cpp; then comes the stream. Unless bit 7 of byte 0 is set, it is
// cut or continued with zeros to the length that such a stream has (SUBPACK: by as many escapes as its packed lanes ask
// for). There are at most 4,096 lanes unless bits 4-6 of byte 0 are all set: zeros for more take most of the time and
// show little.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../fastckpt.h"

namespace {

constexpr size_t kHead = 6, kMaxLanes = 140000;  // a stripe and some

void require(bool it, const char* what) {
    if (it) return;
    std::fprintf(stderr, "stream_fuzzer: %s\n", what);
    std::abort();
}

// Not a byte more than asked for.
std::unique_ptr<uint8_t[]> exactly(size_t n) { return std::unique_ptr<uint8_t[]>(new uint8_t[n]); }

size_t low_plane_bytes(size_t lanes) { return (7 * lanes + 7) / 8; }

void fit(std::vector<uint8_t>& stream, unsigned transform, unsigned w, unsigned pack_bits, size_t lanes) {
    if (transform == FASTCKPT_SUBPACK) {
        const size_t packed = (lanes * pack_bits + 7) / 8;
        const unsigned esc = (1u << pack_bits) - 1;
        stream.resize(std::max(stream.size(), 4 + packed));
        uint32_t escapes = 0;
        for (size_t i = 0; i < lanes; ++i)
            escapes += (stream[4 + i * pack_bits / 8] >> (i * pack_bits % 8) & esc) == esc;
        std::memcpy(stream.data(), &escapes, 4);
        stream.resize(4 + packed + escapes * size_t{w});
        if (const unsigned used = lanes * pack_bits % 8)
            stream[4 + packed - 1] &= static_cast<uint8_t>((1u << used) - 1);
    } else if (transform == FASTCKPT_ROTU) {
        const size_t whole = lanes / FASTCKPT_STRIPE_LANES, rest = lanes % FASTCKPT_STRIPE_LANES;
        stream.resize(lanes * (w - 1) + whole * low_plane_bytes(FASTCKPT_STRIPE_LANES) + low_plane_bytes(rest));
    } else {
        stream.resize(lanes * w);
    }
}

fastckpt_context* context_memory() {
    static void* const memory = std::aligned_alloc(64, (fastckpt_context_bytes() + 63) / 64 * 64);
    return fastckpt_context_init(memory);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < kHead) return 0;
    const unsigned transform = FASTCKPT_ROT + (data[0] & 0x7f) % 4, w = 2u << data[1] % 3,
                   pack_bits = 1u << data[2] % 4;
    const size_t lanes =
        1 + (data[3] | data[4] << 8 | size_t{data[5]} << 16) % ((data[0] & 0x70) == 0x70 ? kMaxLanes : 4096);
    const size_t n = lanes * w;
    std::vector<uint8_t> wanted(data + kHead, data + size);
    if (!(data[0] & 0x80)) fit(wanted, transform, w, pack_bits, lanes);
    const auto stream = exactly(wanted.size()), base = exactly(n), raw = exactly(n), second = exactly(n);
    std::copy(wanted.begin(), wanted.end(), stream.get());
    for (size_t done = 0; done < n; done += std::min(size, n - done))
        std::memcpy(base.get() + done, data, std::min(size, n - done));

    fastckpt_context* context = context_memory();
    const int status =
        fastckpt_merge(context, stream.get(), wanted.size(), base.get(), n, transform, w, pack_bits, raw.get());
    require(status == FASTCKPT_OK || status == FASTCKPT_FOREIGN, "a status that merge does not give");
    if (transform == FASTCKPT_SUB || transform == FASTCKPT_SUBPACK) {
        std::memcpy(second.get(), base.get(), n);
        require(fastckpt_merge(context, stream.get(), wanted.size(), second.get(), n, transform, w, pack_bits,
                               second.get()) == status,
                "another status in place");
        require(!std::memcmp(second.get(), status == FASTCKPT_OK ? raw.get() : base.get(), n), "other bytes in place");
    }
    if (status != FASTCKPT_OK) return 0;

    const size_t room = transform == FASTCKPT_SUBPACK ? 4 + lanes + n : n;
    const auto made = exactly(room);
    size_t n_made = 0;
    require(fastckpt_split(context, raw.get(), base.get(), n, transform, w, pack_bits, made.get(), room, &n_made) ==
                FASTCKPT_OK,
            "cannot split it");
    const auto copy = exactly(n_made);
    std::memcpy(copy.get(), made.get(), n_made);
    require(fastckpt_merge(context, copy.get(), n_made, base.get(), n, transform, w, pack_bits, second.get()) ==
                FASTCKPT_OK,
            "cannot merge its stream");
    require(!std::memcmp(raw.get(), second.get(), n), "its stream has other bytes");
    // Planes and lanes of these two correspond one to one.
    if (transform == FASTCKPT_ROT || transform == FASTCKPT_SUB)
        require(n_made == wanted.size() && !std::memcmp(copy.get(), stream.get(), n_made), "another stream");
    return 0;
}
