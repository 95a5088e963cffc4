#include "../kernel.cuh"

#include "../../cuda/launch.cuh"

GNA_KERNEL(fp16_64, gna::sm90::Kernel, __half, 64)
