#include "launch.cuh"

GNA_SM90_KERNEL(fp16_64, __half, 64)
