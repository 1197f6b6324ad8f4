// The inner loops. Included once for each instruction set, with FASTCKPT_ISA (a namespace), FASTCKPT_ISA_NAME, and FASTCKPT_AVX2 and
// FASTCKPT_AVX512 where they may be used. Only static functions and memcpy: nothing that the linker could take for another set.
#include <cstring>

#include "crc64.h"
#include "kernels.h"
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

#define FC_INLINE inline __attribute__((always_inline))

#include "planes.inl"
#include "packing.inl"
#include "huffman_streams.inl"
#include "checksums.inl"

#undef FC_INLINE

constexpr Kernels kKernels = {FASTCKPT_ISA_NAME, split,          merge,       pack7,        unpack7, subpack,  subunpack,
                              huffman_encode, huffman_decode,   xxh3_blocks,    xxh3_stripes, crc,          copy,    all_equal, range};

}  // namespace
}  // namespace FASTCKPT_ISA
}  // namespace fastckpt
