// Instructions of compute capability 10.0 and 10.3 that CUDA C++ does not offer: the tensor core and its
// tensor memory.
//
// PTX ISA, section "tcgen05". Tensor memory has 128 lanes of 512 columns of 32 bits; an address is
// lane << 16 | column. A warp reads and writes the 32 lanes from 32 times its rank in its warpgroup on.
#pragma once

#include "../cuda/ptx.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM100_ALL) && \
    !(defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ == 1000)
#error "this file needs the target sm_100f"
#endif

namespace gna::sm100 {

using namespace gna::cuda;

// Tensor memory -----------------------------------------------------------------------------------

// One warp; writes the address to shared memory. Gives up the right to allocate at once.
template <int columns>
__device__ __forceinline__ void tmem_allocate(uint32_t* address) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(
                   shared_address(address)),
               "n"(columns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}

// The warp that has allocated it.
template <int columns>
__device__ __forceinline__ void tmem_free(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(columns)
               : "memory");
}

// Orders this thread's tensor memory accesses and MMAs before what other threads do after a
// barrier, and after what others did before one.
__device__ __forceinline__ void tcgen05_before_thread_sync() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}

__device__ __forceinline__ void tcgen05_after_thread_sync() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// Waits for all tmem_load of this warp; the compiler reads the registers only after it.
template <int n>
__device__ __forceinline__ void tmem_wait_load(float (&registers)[n]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
  for (float& x : registers) asm volatile("" : "+f"(x));
}

__device__ __forceinline__ void tmem_wait_store() {
  asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
}

#define GNA_LIST_8(x, i) x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define GNA_LIST_16(x) GNA_LIST_8(x, 0), GNA_LIST_8(x, 8)
#define GNA_LIST_32(x) GNA_LIST_16(x), GNA_LIST_8(x, 16), GNA_LIST_8(x, 24)
#define GNA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GNA_NAMES_32 \
  GNA_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

__device__ __forceinline__ uint32_t bits_of(uint32_t x) { return x; }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

// A row a thread: 32 columns of it. The registers hold them after tmem_wait_load().
__device__ __forceinline__ void tmem_load(float* to, uint32_t address) {
#define GNA_WRITTEN(i) "=f"(to[i])
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {" GNA_NAMES_32 "}, [%32];"
               : GNA_LIST_32(GNA_WRITTEN)
               : "r"(address));
#undef GNA_WRITTEN
}

// They are in tensor memory after tmem_wait_store().
#define GNA_READ(i) "r"(bits_of(from[i]))
template <typename T>
__device__ __forceinline__ void tmem_store(uint32_t address, const T (&from)[32]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {" GNA_NAMES_32 "};" ::GNA_LIST_32(
                   GNA_READ),
               "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ void tmem_store(uint32_t address, const T (&from)[16]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x16.b32 [%16], {" GNA_NAMES_16 "};" ::GNA_LIST_16(
                   GNA_READ),
               "r"(address)
               : "memory");
}
#undef GNA_READ

#undef GNA_LIST_8
#undef GNA_LIST_16
#undef GNA_LIST_32
#undef GNA_NAMES_16
#undef GNA_NAMES_32

// The tensor core ---------------------------------------------------------------------------------

// The upper half of a smem_descriptor: eight rows (bits 32 to 45), version 1 (bit 46), a swizzle of 128
// bytes (2 in bits 61 and up).
constexpr uint32_t descriptor_high = 2u << 29 | 1u << 14 | 1024 >> 4;

// Describes an MMA of 128 rows: fp32 accumulators, 16-bit operands, `columns` of the right one, whether its
// rows run along the dimension that is summed over.
template <typename Element, int columns, bool right_is_transposed>
constexpr uint32_t instruction_descriptor = [] {
  constexpr uint32_t fp32 = 1, type = std::is_same_v<Element, __half> ? 0 : 1;
  return fp32 << 4 | type << 7 | type << 10 | (right_is_transposed ? 1u << 16 : 0u) |
         static_cast<uint32_t>(columns >> 3) << 17 | 128u >> 4 << 24;
}();

// to = a b, or to += a b with `add`, summed over 16. a and b are descriptors. One thread.
__device__ __forceinline__ void mma_ss(uint32_t to, uint32_t a, uint32_t b, uint32_t instruction,
                                       bool add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %4, 0;\n"
      "mov.b64 a, {%1, %5};\nmov.b64 b, {%2, %5};\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], a, b, %3, add;\n}" ::"r"(to),
      "r"(a), "r"(b), "r"(instruction), "r"(static_cast<uint32_t>(add)), "n"(descriptor_high)
      : "memory");
}

// The same with a in tensor memory, two elements a column.
__device__ __forceinline__ void mma_ts(uint32_t to, uint32_t a, uint32_t b, uint32_t instruction,
                                       bool add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %4, 0;\n"
      "mov.b64 b, {%2, %5};\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], b, %3, add;\n}" ::"r"(to),
      "r"(a), "r"(b), "r"(instruction), "r"(static_cast<uint32_t>(add)), "n"(descriptor_high)
      : "memory");
}

// Arrives at the barrier when all MMAs that this thread has issued are done.
__device__ __forceinline__ void tcgen05_commit(uint64_t* barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(
          shared_address(barrier))
      : "memory");
}

// True in one thread of the warp, always the same one. The compiler knows that it is one thread.
__device__ __forceinline__ bool elect_one_sync() {
  uint32_t is_leader;
  asm volatile("{\n.reg .pred leads;\nelect.sync _|leads, 0xffffffff;\nselp.b32 %0, 1, 0, leads;\n}"
               : "=r"(is_leader));
  return is_leader != 0;
}

// Two numbers at a time ---------------------------------------------------------------------------

struct Float2 {
  float low, high;
};

__device__ __forceinline__ uint64_t bits_of(Float2 x) {
  uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(x.low), "f"(x.high));
  return bits;
}

__device__ __forceinline__ Float2 float2_of(uint64_t bits) {
  Float2 x;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(x.low), "=f"(x.high) : "l"(bits));
  return x;
}

__device__ __forceinline__ Float2 fma2(Float2 a, Float2 b, Float2 c) {
  uint64_t result;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(result)
      : "l"(bits_of(a)), "l"(bits_of(b)), "l"(bits_of(c)));
  return float2_of(result);
}

__device__ __forceinline__ Float2 add2(Float2 a, Float2 b) {
  uint64_t result;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(bits_of(a)), "l"(bits_of(b)));
  return float2_of(result);
}

// The largest of three, or NaN if one is NaN.
__device__ __forceinline__ float max3(float a, float b, float c) {
  float result;
  asm("max.NaN.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

}  // namespace gna::sm100
