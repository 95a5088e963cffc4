// Lets the host's compiler read the kernels' headers, so that a test can call what they compute with.
//
// One thread runs at a time, that of `threadIdx`. Inline PTX does nothing but leave its text; a test replaces
// the functions that consist of it where their arguments or results matter. Include it after everything but
// the kernels' headers.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace gna::device {

struct Index {
  unsigned x;
};
inline Index thread;
inline std::string last_asm;  // its arguments, as they stand in the source

inline int note_asm(const char* text) {
  last_asm = text;
  return 0;
}

// The shared memory of a block, which begins at a multiple of 1024.
constexpr unsigned shared_size = 228 * 1024;
alignas(1024) inline uint8_t shared_memory[shared_size];

}  // namespace gna::device

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - gna::device::shared_memory;
}

#define threadIdx gna::device::thread
#define blockIdx gna::device::thread
#define gridDim gna::device::thread

// Values of other lanes are this lane's.
template <typename T>
T __shfl_sync(unsigned, T x, int, int = 32) {
  return x;
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int, int = 32) {
  return x;
}
inline unsigned __ballot_sync(unsigned, bool predicate) { return predicate ? ~0u : 0; }
inline bool __all_sync(unsigned, bool predicate) { return predicate; }
inline bool __any_sync(unsigned, bool predicate) { return predicate; }
inline void __syncwarp() {}
inline void __syncthreads() {}
inline uint32_t atomicAdd(uint32_t* to, uint32_t by) { return (*to += by) - by; }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `asm volatile(...)` and `asm(...)`; a `volatile` without parentheses stays what it is.
#define GNA_NOTE_ASM(...) "" : : "r"(gna::device::note_asm(#__VA_ARGS__))
#define GNA_NOTE_VOLATILE(...) (GNA_NOTE_ASM(__VA_ARGS__))
#define volatile(...) GNA_NOTE_VOLATILE(__VA_ARGS__)
#define asm(...) gna::device::note_asm(#__VA_ARGS__)
