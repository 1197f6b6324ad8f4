// ROT: rotate each lane left by one bit, then byte planes, stripe by stripe (docs/format.md, section 4.3).
//
// Plain loops: the compiler makes AVX2 and AVX-512 clones of them and the loader picks one. A stripe (at most 1 MiB) stays in the
// second-level cache while its planes are written.
#include "fastckpt.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FASTCKPT_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define FASTCKPT_CLONES
#endif

namespace {

template <typename Lane>
inline Lane load(const unsigned char* p) {
    Lane x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <typename Lane>
inline __attribute__((always_inline)) void split_stripe(const unsigned char* __restrict raw, size_t lanes,
                                                        unsigned char* __restrict out) {
    constexpr unsigned w = sizeof(Lane);
    for (unsigned k = 0; k < w; ++k) {  // plane by plane: the stripe is in cache after the first
        unsigned char* __restrict plane = out + k * lanes;
        const unsigned shift = 8 * (w - 1 - k);
        for (size_t i = 0; i < lanes; ++i) {
            const Lane x = load<Lane>(raw + i * w);
            const Lane y = static_cast<Lane>(static_cast<Lane>(x << 1) | static_cast<Lane>(x >> (8 * w - 1)));
            plane[i] = static_cast<unsigned char>(y >> shift);
        }
    }
}

template <typename Lane>
inline __attribute__((always_inline)) void merge_stripe(const unsigned char* __restrict in, size_t lanes,
                                                        unsigned char* __restrict raw) {
    constexpr unsigned w = sizeof(Lane);
    for (size_t i = 0; i < lanes; ++i) {
        Lane y = 0;
        for (unsigned k = 0; k < w; ++k)
            y = static_cast<Lane>(y | static_cast<Lane>(static_cast<Lane>(in[k * lanes + i]) << (8 * (w - 1 - k))));
        const Lane x = static_cast<Lane>(static_cast<Lane>(y >> 1) | static_cast<Lane>(y << (8 * w - 1)));
        std::memcpy(raw + i * w, &x, w);
    }
}

FASTCKPT_CLONES void split2(const unsigned char* r, size_t n, unsigned char* o) { split_stripe<uint16_t>(r, n, o); }
FASTCKPT_CLONES void split4(const unsigned char* r, size_t n, unsigned char* o) { split_stripe<uint32_t>(r, n, o); }
FASTCKPT_CLONES void split8(const unsigned char* r, size_t n, unsigned char* o) { split_stripe<uint64_t>(r, n, o); }
FASTCKPT_CLONES void merge2(const unsigned char* i, size_t n, unsigned char* r) { merge_stripe<uint16_t>(i, n, r); }
FASTCKPT_CLONES void merge4(const unsigned char* i, size_t n, unsigned char* r) { merge_stripe<uint32_t>(i, n, r); }
FASTCKPT_CLONES void merge8(const unsigned char* i, size_t n, unsigned char* r) { merge_stripe<uint64_t>(i, n, r); }

using StripeKernel = void (*)(const unsigned char*, size_t, unsigned char*);

int for_each_stripe(const void* source, size_t n_bytes, unsigned w, void* target, StripeKernel k2, StripeKernel k4,
                    StripeKernel k8) {
    const StripeKernel kernel = w == 2 ? k2 : w == 4 ? k4 : w == 8 ? k8 : nullptr;
    if (!kernel) return FASTCKPT_BAD_LANE;
    if (n_bytes % w) return FASTCKPT_BAD_LENGTH;
    const auto* from = static_cast<const unsigned char*>(source);
    auto* to = static_cast<unsigned char*>(target);
    for (size_t done = 0; done < n_bytes;) {
        const size_t left = (n_bytes - done) / w;
        const size_t lanes = left < FASTCKPT_STRIPE_LANES ? left : FASTCKPT_STRIPE_LANES;
        kernel(from + done, lanes, to + done);
        done += lanes * w;
    }
    return FASTCKPT_OK;
}

}  // namespace

extern "C" int fastckpt_rot_split(const void* raw, size_t n_bytes, unsigned lane_bytes, void* stream) {
    return for_each_stripe(raw, n_bytes, lane_bytes, stream, split2, split4, split8);
}

extern "C" int fastckpt_rot_merge(const void* stream, size_t n_bytes, unsigned lane_bytes, void* raw) {
    return for_each_stripe(stream, n_bytes, lane_bytes, raw, merge2, merge4, merge8);
}
