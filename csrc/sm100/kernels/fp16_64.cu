#include "../kernel.cuh"

#include "../../cuda/launch.cuh"

GNA_KERNEL(fp16_64, gna::sm100::Kernel, __half, 64)
