#include "launch.cuh"

GNA_SM100_KERNEL(bf16_128, __nv_bfloat16, 128)
