#include "isa.hpp"

#include <cstring>

namespace gna {

namespace baseline {
extern const Kernel kernel;
}

#if defined(GNA_X86)
namespace avx2 {
extern const Kernel kernel;
}
namespace avx512 {
extern const Kernel kernel;
}
namespace avx512_bf16 {
extern const Kernel kernel;
}
#endif

const Kernel* kernel_at(int32_t index) {
  const Kernel* usable[4];
  int32_t count = 0;
#if defined(GNA_X86)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) usable[count++] = &avx512_bf16::kernel;
  if (has_avx512) usable[count++] = &avx512::kernel;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    usable[count++] = &avx2::kernel;
#endif
  usable[count++] = &baseline::kernel;
  return index >= 0 && index < count ? usable[index] : nullptr;
}

const Kernel* find_kernel(const char* isa) {
  for (int32_t index = 0; const Kernel* const kernel = kernel_at(index); ++index)
    if (!isa || !std::strcmp(isa, kernel->isa)) return kernel;
  return nullptr;
}

}  // namespace gna
