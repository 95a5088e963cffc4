// All passes for the instruction set that GNA_ISA names; CMake compiles this file once for each.
#include "backward.hpp"
#include "forward.hpp"

namespace gna::GNA_ISA {

#if defined(__AVX512BF16__)
using Bf16Math = Pairs;
#else
using Bf16Math = Single;
#endif

#define GNA_STRING_OF(name) #name
#define GNA_STRING(name) GNA_STRING_OF(name)

// In the order of Type.
extern const Kernel kernel;
const Kernel kernel = {
    GNA_STRING(GNA_ISA),
    {forward_tile<Fp32, Single>, forward_tile<Bf16, Bf16Math>, forward_tile<Fp16, Single>},
    {query_gradient_tile<Fp32, Single>, query_gradient_tile<Bf16, Bf16Math>,
     query_gradient_tile<Fp16, Single>},
    {key_gradient_tile<Fp32, Single>, key_gradient_tile<Bf16, Bf16Math>,
     key_gradient_tile<Fp16, Single>},
};

}  // namespace gna::GNA_ISA
