#include "launch.cuh"

GNA_SM90_KERNEL(fp16_128, __half, 128)
