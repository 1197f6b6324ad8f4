// The loops with AVX2 and BMI2: Haswell, Zen and later.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
// Headers first, so that nothing of theirs is compiled for this instruction set and then taken by the linker for all.
#include <immintrin.h>

#include <cstring>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt,pclmul"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt,pclmul")
#endif
#define FASTCKPT_AVX2 1
#define FASTCKPT_ISA_NAME "avx2"
#define FASTCKPT_ISA avx2
#include "kernels.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const fastckpt::Kernels* fastckpt::avx2_kernels() {
    __builtin_cpu_init();
    const bool there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                       __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                       __builtin_cpu_supports("pclmul");
    return there ? &fastckpt::avx2::kKernels : nullptr;
}
#else
const fastckpt::Kernels* fastckpt::avx2_kernels() { return nullptr; }
#endif
