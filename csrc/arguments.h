// What the C interface asks of memory and counts before it touches any.
#ifndef FASTCKPT_ARGUMENTS_H
#define FASTCKPT_ARGUMENTS_H

#include <cstddef>
#include <cstdint>

#include "fastckpt.h"

namespace fastckpt {

// No memory is longer: a larger count is a difference that went below 0, and pointers that it is added to would wrap.
constexpr size_t kMostBytes = PTRDIFF_MAX;

inline int check_memory(const void* data, size_t n_bytes) {
    if (n_bytes > kMostBytes) return FASTCKPT_BAD_LENGTH;
    return data || !n_bytes ? FASTCKPT_OK : FASTCKPT_BAD_ARGUMENT;
}

// n numbers of 8 bytes.
inline int check_words(const void* words, size_t n) {
    return n > kMostBytes / 8 ? FASTCKPT_BAD_LENGTH : check_memory(words, 8 * n);
}

// n stretches of memory, of which each is some: not at address 0, not past the last address.
inline int check_stretches(const uint64_t* addresses, const uint64_t* n_bytes, size_t n) {
    if (const int status = check_words(addresses, n)) return status;
    if (const int status = check_words(n_bytes, n)) return status;
    for (size_t i = 0; i < n; ++i) {
        if (n_bytes[i] > kMostBytes) return FASTCKPT_BAD_LENGTH;
        if (n_bytes[i] && (!addresses[i] || addresses[i] > UINTPTR_MAX - n_bytes[i])) return FASTCKPT_BAD_ARGUMENT;
    }
    return FASTCKPT_OK;
}

}  // namespace fastckpt

#endif
