// The inner loops. Included once for each instruction set, with FASTCKPT_ISA (a namespace), FASTCKPT_ISA_NAME, and
// FASTCKPT_AVX2 and FASTCKPT_AVX512 where they may be used. Only static functions and memcpy: nothing that the linker
// could take for another set.
#include <cstring>

#include "crc64.h"
#include "kernels.h"
#include "lanes.h"
#include "xxh3.h"

#ifndef FASTCKPT_AVX2
#define FASTCKPT_AVX2 0
#endif
#ifndef FASTCKPT_AVX512
#define FASTCKPT_AVX512 0
#endif

namespace fastckpt {
namespace FASTCKPT_ISA {
namespace {

#include "planes.inl"
#include "packing.inl"
#include "huffman_streams.inl"
#include "runs.inl"
#include "checksums.inl"

// By name: xxh3_blocks and xxh3_stripes, for one, have the same type and could change places unseen.
constexpr Kernels kKernels = {
    .name = FASTCKPT_ISA_NAME,
    .split = split,
    .merge = merge,
    .cast = cast,
    .cast_differs = cast_differs,
    .pack7 = pack7,
    .unpack7 = unpack7,
    .subpack = subpack,
    .count_escapes = count_escapes,
    .subunpack = subunpack,
    .huffman_encode = huffman_encode,
    .huffman_decode = huffman_decode,
    .find_runs = find_runs,
    .count_zeros = count_zeros,
    .xxh3_blocks = xxh3_blocks,
    .xxh3_stripes = xxh3_stripes,
    .crc = crc,
    .copy = copy,
    .all_equal = all_equal,
    .range = range,
};

}  // namespace
}  // namespace FASTCKPT_ISA
}  // namespace fastckpt
