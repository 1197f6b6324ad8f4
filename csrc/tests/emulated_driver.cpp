// Three functions of CUDA's driver, as much of them as fastckpt calls: whatever module is loaded, its kernel is the one
// of cuda/fingerprint.cuh, and runs at once under the grid emulator. So the way of the arguments from Python to the
// kernel can be tested without a device. Built by tests/native as a library of its own.
#include <string_view>

#include "grid_emulator.h"

#include "../cuda/fingerprint.cuh"

using fingerprint::Chunk;
using fingerprint::word;

extern "C" int cuModuleLoadData(void** module, const void* image) {
    *module = const_cast<void*>(image);
    return image ? 0 : 1;
}

extern "C" int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = module;
    return std::string_view(name) == "fastckpt_fingerprint_kernel" ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}

extern "C" int cuGetErrorString(int status, const char** text) {
    *text = status == 500 ? "named symbol not found" : "invalid argument";
    return 0;
}

extern "C" int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                              void** extra) {
    if (!function || grid_y != 1 || grid_z != 1 || block_x != fingerprint::kThreads || block_y != 1 || block_z != 1 ||
        shared_bytes || stream != reinterpret_cast<void*>(0x5) || extra)
        return 1;  // CUDA_ERROR_INVALID_VALUE
    grid_emulator::launch(fingerprint::fastckpt_fingerprint_kernel, grid_x, block_x, 1,
                          *static_cast<const Chunk**>(arguments[0]), *static_cast<word**>(arguments[1]),
                          *static_cast<word*>(arguments[2]), *static_cast<word*>(arguments[3]),
                          *static_cast<word*>(arguments[4]));
    return 0;
}
