// The tensor core's instructions of compute capability 9.0.
//
// PTX ISA, section "wgmma".
#pragma once

#include "../cuda/ptx.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "this file needs the target sm_90a"
#endif

namespace gna::sm90 {

using namespace gna::cuda;

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are still running.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses to these registers across this point.
template <typename T, int n>
__device__ __forceinline__ void warpgroup_fence_operand(T (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// The upper half of a smem_descriptor: a swizzle of 128 bytes (1 << 62) and eight rows (1024 >> 4 << 32).
#define GNA_DESCRIPTOR_HIGH "0x40000040"

#define GNA_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GNA_F16(d, i) GNA_F4(d, i), GNA_F4(d, i + 4), GNA_F4(d, i + 8), GNA_F4(d, i + 12)
#define GNA_F32(d) GNA_F16(d, 0), GNA_F16(d, 16)
#define GNA_F64(d) GNA_F16(d, 0), GNA_F16(d, 16), GNA_F16(d, 32), GNA_F16(d, 48)
#define GNA_NAMES_32                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GNA_NAMES_64                                                                        \
  GNA_NAMES_32                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define GNA_WGMMA_SS(type)                                                                   \
  asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %66, 0;\n"            \
               "mov.b64 a, {%64, " GNA_DESCRIPTOR_HIGH "};\n"                                \
               "mov.b64 b, {%65, " GNA_DESCRIPTOR_HIGH "};\n"                                \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " GNA_NAMES_64 \
               "}, a, b, add, 1, 1, 0, 0;\n}"                                                \
               : GNA_F64(d)                                                                  \
               : "r"(a), "r"(b), "r"(add))

#define GNA_WGMMA_RS_128(type)                                                               \
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%68, " GNA_DESCRIPTOR_HIGH "};\n"              \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " GNA_NAMES_64 \
               "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"                                  \
               : GNA_F64(d)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b))

#define GNA_WGMMA_RS_64(type)                                                               \
  asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%36, " GNA_DESCRIPTOR_HIGH "};\n"             \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " GNA_NAMES_32 \
               "}, {%32, %33, %34, %35}, b, 1, 1, 1, 1;\n}"                                 \
               : GNA_F32(d)                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b))

// d = a b^T, or d += a b^T with `add`: a is 64x16, b is 128x16, both described, columns contiguous.
template <typename Element>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], uint32_t a, uint32_t b, int add) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_SS("f16");
  else
    GNA_WGMMA_SS("bf16");
}

// d = a b^T, or d += a b^T with `add`: a is 64x16 in registers, b is 128x16, described, columns
// contiguous; both bf16.
__device__ __forceinline__ void wgmma_rs_bf16(float (&d)[64], const uint32_t* a, uint32_t b, int add) {
  asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %69, 0;\n"
               "mov.b64 b, {%68, " GNA_DESCRIPTOR_HIGH "};\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " GNA_NAMES_64
               "}, {%64, %65, %66, %67}, b, add, 1, 1, 0;\n}"
               : GNA_F64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));
}

// d += a b: a is 64x16 in registers, b is 16 x (64 or 128), described, columns contiguous.
template <typename Element>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const uint32_t* a, uint32_t b) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_RS_128("f16");
  else
    GNA_WGMMA_RS_128("bf16");
}

template <typename Element>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t* a, uint32_t b) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_RS_64("f16");
  else
    GNA_WGMMA_RS_64("bf16");
}

#undef GNA_DESCRIPTOR_HIGH
#undef GNA_WGMMA_SS
#undef GNA_WGMMA_RS_128
#undef GNA_WGMMA_RS_64

}  // namespace gna::sm90
