// Instructions of compute capability 9.0 and later that CUDA C++ does not offer.
//
// PTX ISA, sections "mbarrier", "bar", "stmatrix" and "setmaxnreg".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gna::cuda {

constexpr unsigned full_warp = 0xffffffffu;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Lane 0's value for the whole warp. The compiler then knows that the value is uniform, and keeps what
// follows from it in uniform registers.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(full_warp, x, 0);
}

// Barriers in shared memory -----------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialized barriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase also wait until copies have brought `bytes`.
__device__ __forceinline__ void mbarrier_arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase with this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
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

// Arrives once for the whole warp, whose lanes have synchronized.
__device__ __forceinline__ void arrive_by_warp(uint64_t* barrier) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// Named barriers: `threads` of the block synchronize, or some of them only arrive.
template <int threads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

template <int threads>
__device__ __forceinline__ void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

// Synchronizes, and returns whether the predicate is true in any thread.
template <int threads>
__device__ __forceinline__ bool named_barrier_any(int id, bool predicate) {
  int any;
  asm volatile(
      "{\n.reg .pred says, any;\nsetp.ne.b32 says, %3, 0;\n"
      "bar.red.or.pred any, %1, %2, says;\nselp.b32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(id), "n"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

// Shared memory -----------------------------------------------------------------------------------

// Makes plain stores to shared memory visible to TMA and to the tensor core.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores four 8x8 blocks of 16-bit elements; each lane has the address of one row.
__device__ __forceinline__ void stmatrix(void* row, uint32_t a, uint32_t b, uint32_t c,
                                         uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The lower half of the descriptor of a tile in shared memory, for the tensor core. The tile has rows of
// 128 bytes, swizzled by 128 bytes, and begins at a multiple of 1024 bytes, so that eight rows lie 1024
// bytes apart. Where the rows run along the dimension that is summed over, `column_bytes` is the distance
// from 64 columns to the next 64; else it is not used.
//
// Steps of 16 bytes may be added to it. The upper half, the same for all tiles, is the architecture's.
__device__ __forceinline__ uint32_t smem_descriptor(uint32_t address, uint32_t column_bytes) {
  return (column_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Registers ---------------------------------------------------------------------------------------

template <int count>
__device__ __forceinline__ void reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Numbers -----------------------------------------------------------------------------------------

__device__ __forceinline__ float log2_approximate(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

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

}  // namespace gna::cuda
