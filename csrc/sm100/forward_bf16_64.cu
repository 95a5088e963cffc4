#include "launch.cuh"

GNA_SM100_KERNEL(bf16_64, __nv_bfloat16, 64)
