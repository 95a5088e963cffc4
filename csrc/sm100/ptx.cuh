// The instructions of compute capability 10.0 and 10.3 that CUDA C++ has no words for: the matrix unit
// and its tensor memory.
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

// One warp; the address arrives in shared memory. The right to allocate is given up at once.
template <int columns>
__device__ __forceinline__ void allocate_tensor_memory(uint32_t* address) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(
                   shared_address(address)),
               "n"(columns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}

// The warp that has allocated it.
template <int columns>
__device__ __forceinline__ void free_tensor_memory(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(columns)
               : "memory");
}

// Orders this thread's tensor memory and matrix instructions before what other threads do after a
// barrier, and after what others did before one.
__device__ __forceinline__ void before_barrier() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}

__device__ __forceinline__ void after_barrier() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// Waits for what load_columns has been asked for; nothing reads the registers before.
template <int n>
__device__ __forceinline__ void wait_loads(float (&registers)[n]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
  for (float& x : registers) asm volatile("" : "+f"(x));
}

__device__ __forceinline__ void wait_stores() {
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

// A row a thread: 32 columns of it. The registers hold them after wait_loads().
__device__ __forceinline__ void load_columns(float* to, uint32_t address) {
#define GNA_WRITTEN(i) "=f"(to[i])
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {" GNA_NAMES_32 "}, [%32];"
               : GNA_LIST_32(GNA_WRITTEN)
               : "r"(address));
#undef GNA_WRITTEN
}

// They are in tensor memory after wait_stores().
#define GNA_READ(i) "r"(bits_of(from[i]))
template <typename T>
__device__ __forceinline__ void store_columns(uint32_t address, const T (&from)[32]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {" GNA_NAMES_32 "};" ::GNA_LIST_32(
                   GNA_READ),
               "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ void store_columns(uint32_t address, const T (&from)[16]) {
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

// The matrix unit ---------------------------------------------------------------------------------

// A tile in shared memory for the matrix unit: rows of 128 bytes, swizzled by 128 bytes, on a multiple
// of 1024 bytes, so that eight rows lie 1024 bytes apart. Where the rows run along the dimension that
// is summed over, `column_bytes` is the distance from 64 columns to the next 64; else it is not used.
//
// This is the lower half of the descriptor, to which 16-byte steps may be added; the upper half is the
// same for all: eight rows (bits 32 to 45), version 1 (bit 46), swizzle of 128 bytes (2 in bits 61 up).
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address, uint32_t column_bytes) {
  return (column_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

constexpr uint32_t descriptor_high = 2u << 29 | 1u << 14 | 1024 >> 4;

// Says of a product of 128 rows: fp32 accumulators, 16-bit factors, `columns` of the right one, whether
// its rows run along the dimension that is summed over.
template <typename Element, int columns, bool right_is_transposed>
constexpr uint32_t product_of = [] {
  constexpr uint32_t fp32 = 1, type = std::is_same_v<Element, __half> ? 0 : 1;
  return fp32 << 4 | type << 7 | type << 10 | (right_is_transposed ? 1u << 16 : 0u) |
         static_cast<uint32_t>(columns >> 3) << 17 | 128u >> 4 << 24;
}();

// to = a b, or to += a b with `add`; 16 is summed over. a and b are described. One thread.
__device__ __forceinline__ void multiply(uint32_t to, uint32_t a, uint32_t b, uint32_t product,
                                         bool add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %4, 0;\n"
      "mov.b64 a, {%1, %5};\nmov.b64 b, {%2, %5};\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], a, b, %3, add;\n}" ::"r"(to),
      "r"(a), "r"(b), "r"(product), "r"(static_cast<uint32_t>(add)), "n"(descriptor_high)
      : "memory");
}

// The same with a in tensor memory, two elements a column.
__device__ __forceinline__ void multiply_stored(uint32_t to, uint32_t a, uint32_t b,
                                                uint32_t product, bool add) {
  asm volatile(
      "{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %4, 0;\n"
      "mov.b64 b, {%2, %5};\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], b, %3, add;\n}" ::"r"(to),
      "r"(a), "r"(b), "r"(product), "r"(static_cast<uint32_t>(add)), "n"(descriptor_high)
      : "memory");
}

// The barrier gets an arrival when all products that this thread has asked for are done.
__device__ __forceinline__ void arrive_when_done(uint64_t* barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(
          shared_address(barrier))
      : "memory");
}

// True in one thread of the warp, always the same one; the compiler knows that it is one.
__device__ __forceinline__ bool elected() {
  uint32_t leads;
  asm volatile("{\n.reg .pred leads;\nelect.sync _|leads, 0xffffffff;\nselp.b32 %0, 1, 0, leads;\n}"
               : "=r"(leads));
  return leads != 0;
}

// Two numbers at a time ---------------------------------------------------------------------------

struct Pair {
  float low, high;
};

__device__ __forceinline__ uint64_t bits_of(Pair x) {
  uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(x.low), "f"(x.high));
  return bits;
}

__device__ __forceinline__ Pair pair_of(uint64_t bits) {
  Pair x;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(x.low), "=f"(x.high) : "l"(bits));
  return x;
}

__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
  uint64_t result;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(result)
      : "l"(bits_of(a)), "l"(bits_of(b)), "l"(bits_of(c)));
  return pair_of(result);
}

__device__ __forceinline__ Pair add(Pair a, Pair b) {
  uint64_t result;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(result) : "l"(bits_of(a)), "l"(bits_of(b)));
  return pair_of(result);
}

// The largest of three, or NaN if one is.
__device__ __forceinline__ float largest(float a, float b, float c) {
  float result;
  asm("max.NaN.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
  return result;
}

}  // namespace gna::sm100
