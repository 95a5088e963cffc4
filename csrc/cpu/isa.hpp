// The kernels of this build that the processor can run.
#pragma once

#include <cstdint>

#include "kernel.hpp"

namespace gna {

// Best first; null from their number on.
const Kernel* kernel_at(int32_t index);

// By its instruction set's name, or the best for null; null if there is no such kernel here.
const Kernel* find_kernel(const char* isa);

}  // namespace gna
