// The loops with AVX-512 VBMI2: Ice Lake, Zen 4 and later.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#include <cstring>
#ifdef __clang__
#pragma clang attribute push(                                                                                        \
    __attribute__((target(                                                                                           \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt,pclmul,vpclmulqdq"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt,pclmul,vpclmulqdq")
#endif
#define FASTCKPT_AVX2 1
#define FASTCKPT_AVX512 1
#define FASTCKPT_ISA_NAME "avx512"
#define FASTCKPT_ISA avx512
#include "kernels.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const fastckpt::Kernels* fastckpt::avx512_kernels() {
    __builtin_cpu_init();
    const bool there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                       __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("bmi2");
    return there ? &fastckpt::avx512::kKernels : nullptr;
}
#else
const fastckpt::Kernels* fastckpt::avx512_kernels() { return nullptr; }
#endif
