#include "launch.cuh"

GNA_SM100_KERNEL(fp16_128, __half, 128)
