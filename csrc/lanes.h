// Lanes as integers: what ROT, SUB and SUBPACK do to one of them (docs/format.md, sections 4.3 and 4.4).
//
// Everything is inlined always and has internal linkage: kernels.inl includes it for several instruction sets, and no
// copy that was made for one of them may serve the others.
#ifndef FASTCKPT_LANES_H
#define FASTCKPT_LANES_H

#include <cstring>

#include "kernels.h"

namespace fastckpt {
namespace {

template <typename Lane>
FC_INLINE Lane load_lane(const u8* p) {
    Lane x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <typename Lane>
constexpr Lane kTop = static_cast<Lane>(Lane{1} << (8 * sizeof(Lane) - 1));

// By one bit to the left, so that the sign is the lowest bit and the exponent fills the highest byte.
template <typename Lane>
FC_INLINE Lane rotated(Lane x) {
    return static_cast<Lane>(static_cast<Lane>(x << 1) | static_cast<Lane>(x >> (8 * sizeof(Lane) - 1)));
}
template <typename Lane>
FC_INLINE Lane unrotated(Lane y) {
    return static_cast<Lane>(static_cast<Lane>(y >> 1) | static_cast<Lane>(y << (8 * sizeof(Lane) - 1)));
}

// The bits of floats as integers in the same order.
template <typename Lane>
FC_INLINE Lane ordered(Lane x) {
    return static_cast<Lane>(x & kTop<Lane> ? ~x : x | kTop<Lane>);
}
template <typename Lane>
FC_INLINE Lane unordered(Lane m) {
    return static_cast<Lane>(m & kTop<Lane> ? m ^ kTop<Lane> : ~m);
}

// Differences of both signs as small numbers: 0, -1, 1, -2 … become 0, 1, 2, 3 …
template <typename Lane>
FC_INLINE Lane zigzag(Lane d) {
    return static_cast<Lane>(static_cast<Lane>(d << 1) ^ static_cast<Lane>(d & kTop<Lane> ? ~Lane{0} : Lane{0}));
}
template <typename Lane>
FC_INLINE Lane unzigzag(Lane z) {
    return static_cast<Lane>(static_cast<Lane>(z >> 1) ^ static_cast<Lane>(z & 1 ? ~Lane{0} : Lane{0}));
}

// SUB: how many floats x lies from the base.
template <typename Lane>
FC_INLINE Lane difference(Lane x, Lane base) {
    return zigzag(static_cast<Lane>(ordered(x) - ordered(base)));
}
template <typename Lane>
FC_INLINE Lane undifference(Lane z, Lane base) {
    return unordered(static_cast<Lane>(unzigzag(z) + ordered(base)));
}

// Byte k of a lane, the highest first: the order of planes.
template <typename Lane>
FC_INLINE u8 byte_of(Lane x, unsigned k) {
    return static_cast<u8>(x >> (8 * (sizeof(Lane) - 1 - k)));
}

}  // namespace
}  // namespace fastckpt

#endif
