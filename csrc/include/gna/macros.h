// GNA_HD: callable on the host and, where a CUDA compiler reads it, on the device.
#pragma once

#if defined(__CUDACC__)
#define GNA_HD __host__ __device__ __forceinline__
#else
#define GNA_HD inline
#endif
