// Streams and events as torch sees them.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "device.h"

namespace fakegpu {

c10::Stream as_torch(int stream);
void order(int first, int then);  // what `then` is given from now on comes after what `first` was given
void synchronize(int stream);
void synchronize_device(int device);
const c10::impl::DeviceGuardImplInterface& guard();

}  // namespace fakegpu
