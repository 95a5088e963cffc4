#include "../kernel.cuh"

#include "../../cuda/launch.cuh"

GNA_KERNEL(bf16_128, gna::sm90::Kernel, __nv_bfloat16, 128)
