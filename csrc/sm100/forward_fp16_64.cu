#include "launch.cuh"

GNA_SM100_KERNEL(fp16_64, __half, 64)
