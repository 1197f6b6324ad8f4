// Functions of the C interface that copy, compare or round bytes, without a stream.
#include <cstring>

#include "arguments.h"
#include "fastckpt.h"
#include "kernels.h"

using namespace fastckpt;

extern "C" int fastckpt_gather(const uint64_t* addresses, const uint64_t* n_bytes, size_t n, void* out,
                               size_t out_bytes) {
    if (const int status = check_stretches(addresses, n_bytes, n)) return status;
    if (const int status = check_memory(out, out_bytes)) return status;
    uint8_t* to = static_cast<uint8_t*>(out);
    size_t left = out_bytes;
    for (size_t i = 0; i < n; ++i) {
        if (n_bytes[i] > left) return FASTCKPT_BAD_LENGTH;
        if (n_bytes[i])
            std::memcpy(to, reinterpret_cast<const void*>(static_cast<uintptr_t>(addresses[i])), n_bytes[i]);
        to += n_bytes[i];
        left -= n_bytes[i];
    }
    return left ? FASTCKPT_BAD_LENGTH : FASTCKPT_OK;
}

extern "C" int fastckpt_is_constant(const void* raw, size_t n_bytes, unsigned lane_bytes, int* constant) {
    if (!constant) return FASTCKPT_BAD_ARGUMENT;
    if (lane_bytes != 1 && lane_bytes != 2 && lane_bytes != 4 && lane_bytes != 8) return FASTCKPT_BAD_LANE;
    if (n_bytes == 0 || n_bytes % lane_bytes) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(raw, n_bytes)) return status;
    // Equal lanes: each byte equals the one a lane before it. memcmp of overlapping stretches only reads.
    const auto* p = static_cast<const u8*>(raw);
    const size_t pairs = n_bytes - lane_bytes,
                 first = pairs < 64 ? pairs : 64;  // the usual answer, without a pass over the chunk
    *constant = std::memcmp(p, p + lane_bytes, first) == 0 && std::memcmp(p, p + lane_bytes, pairs) == 0;
    return FASTCKPT_OK;
}

extern "C" int fastckpt_equal(const void* a, const void* b, size_t n_bytes, int* equal) {
    if (!equal) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = check_memory(a, n_bytes)) return status;
    if (const int status = check_memory(b, n_bytes)) return status;
    constexpr size_t kStep = 64 << 10;
    const auto *x = static_cast<const u8*>(a), *y = static_cast<const u8*>(b);
    *equal = 0;
    for (size_t from = 0; from < n_bytes; from += kStep) {
        const size_t n = n_bytes - from < kStep ? n_bytes - from : kStep;
        if (std::memcmp(x + from, y + from, n) != 0) return FASTCKPT_OK;
    }
    *equal = 1;
    return FASTCKPT_OK;
}

namespace {

int check_lanes(const void* narrow, const void* wide, size_t n_lanes) {
    if (n_lanes > kMostBytes / 4) return FASTCKPT_BAD_LENGTH;
    if (const int status = check_memory(narrow, 2 * n_lanes)) return status;
    return check_memory(wide, 4 * n_lanes);
}

}  // namespace

extern "C" int fastckpt_cast(const void* wide, size_t n_lanes, void* narrow) {
    if (const int status = check_lanes(narrow, wide, n_lanes)) return status;
    kernels().cast(static_cast<const u8*>(wide), n_lanes, static_cast<u8*>(narrow));
    return FASTCKPT_OK;
}

extern "C" int fastckpt_cast_equal(const void* narrow, const void* wide, size_t n_lanes, int* equal) {
    if (!equal) return FASTCKPT_BAD_ARGUMENT;
    if (const int status = check_lanes(narrow, wide, n_lanes)) return status;
    constexpr size_t kStep = 4096;
    const auto *x = static_cast<const u8*>(narrow), *from = static_cast<const u8*>(wide);
    *equal = 0;
    for (size_t at = 0; at < n_lanes; at += kStep) {
        const size_t n = n_lanes - at < kStep ? n_lanes - at : kStep;
        if (kernels().cast_differs(x + 2 * at, from + 4 * at, n)) return FASTCKPT_OK;
    }
    *equal = 1;
    return FASTCKPT_OK;
}
