// torch's allocators for both kinds of memory.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include "device.h"

namespace fakegpu {

c10::DeviceAllocator& device_allocator();
at::HostAllocator& pinned_allocator();
// The stream uses the block's memory, whoever frees it.
void note_use(const void* p, int stream);

}  // namespace fakegpu
