#include "../kernel.cuh"

#include "../../cuda/launch.cuh"

GNA_KERNEL(bf16_64, gna::sm100::Kernel, __nv_bfloat16, 64)
