// The instructions of compute capability 9.0 that CUDA C++ has no words for.
//
// PTX ISA, sections "mbarrier", "cp.async.bulk.tensor", "wgmma" and "setmaxnreg".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "this file needs the target sm_90a"
#endif

namespace gna::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value for the whole warp: lane 0's. Tells the compiler so, too, which then keeps what
// follows from it in uniform registers.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// Barriers in shared memory -----------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase also wait for so many bytes of copies.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase with this parity is over.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra end;\n"
      "bra retry;\n"
      "end:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Named barriers, for warpgroups among themselves.
template <int threads>
__device__ __forceinline__ void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

template <int threads>
__device__ __forceinline__ void named_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

// The same, and whether any thread says so.
template <int threads>
__device__ __forceinline__ bool named_any(int id, bool says) {
  int any;
  asm volatile(
      "{\n.reg .pred says, any;\nsetp.ne.b32 says, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, says;\nselp.b32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(id), "n"(threads), "r"(static_cast<int>(says))
      : "memory");
  return any != 0;
}

// The copy engine ---------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies one box to shared memory; tokens outside the tensor arrive as zeros.
__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t* barrier, void* to, int c0,
                                         int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies one box to global memory; tokens outside the tensor are left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int c0, int c1,
                                          int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
          "l"(&map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the stores have read shared memory.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Shared memory written by plain stores is about to be read by the copy engine or the matrix unit.
__device__ __forceinline__ void fence_shared_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores four 8x8 blocks of 16-bit elements; each lane gives the address of one row.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Registers ---------------------------------------------------------------------------------------

template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// The matrix unit ---------------------------------------------------------------------------------

__device__ __forceinline__ void matrix_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void matrix_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are still running.
template <int pending>
__device__ __forceinline__ void matrix_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses of these registers across this point.
template <typename T, int n>
__device__ __forceinline__ void pin(T (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// A tile in shared memory for the matrix unit: rows of 128 bytes, swizzled by 128 bytes, on a multiple
// of 1024 bytes. Eight such rows lie 1024 bytes apart; where the rows run along the dimension that is
// summed over, `column_bytes` is the distance from 64 columns to the next 64.
//
// This is the lower half of the descriptor, to which 16-byte steps may be added; the upper half is
// the same for all.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address, uint32_t column_bytes) {
  return (column_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Swizzle of 128 bytes (1 << 62) and eight rows (1024 >> 4 << 32).
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
__device__ __forceinline__ void multiply(float (&d)[64], uint32_t a, uint32_t b, int add) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_SS("f16");
  else
    GNA_WGMMA_SS("bf16");
}

// d += a b: a is 64x16 in registers, b is 16 x (64 or 128), described, columns contiguous.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&d)[64], const uint32_t* a, uint32_t b) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_RS_128("f16");
  else
    GNA_WGMMA_RS_128("bf16");
}

template <typename Element>
__device__ __forceinline__ void multiply_add(float (&d)[32], const uint32_t* a, uint32_t b) {
  if constexpr (std::is_same_v<Element, __half>)
    GNA_WGMMA_RS_64("f16");
  else
    GNA_WGMMA_RS_64("bf16");
}

#undef GNA_DESCRIPTOR_HIGH
#undef GNA_WGMMA_SS
#undef GNA_WGMMA_RS_128
#undef GNA_WGMMA_RS_64

// Two floats as 16-bit elements in one register, `low` in the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<Element, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace gna::sm90
