// The Hopper kernels behind their C interface.
#include "gna/cuda/host.h"
#include "gna_sm90.h"

namespace gna::sm90 {

using namespace gna::cuda;

#define GNA_SM90_KERNEL(name)   \
  cudaError_t prepare_##name(); \
  cudaError_t launch_##name(const Parameters& parameters, int blocks, cudaStream_t stream);
GNA_SM90_KERNEL(bf16_64)
GNA_SM90_KERNEL(bf16_128)
GNA_SM90_KERNEL(fp16_64)
GNA_SM90_KERNEL(fp16_128)
#undef GNA_SM90_KERNEL

namespace {

// Rows are loaded for both computing warpgroups at once; each stores its own.
constexpr Target target{7,
                        7,
                        6,
                        {{prepare_bf16_64, launch_bf16_64},
                         {prepare_bf16_128, launch_bf16_128},
                         {prepare_fp16_64, launch_fp16_64},
                         {prepare_fp16_128, launch_fp16_128}}};

}  // namespace
}  // namespace gna::sm90

const char* gna_sm90_declines(int32_t batch, int32_t heads, int32_t tokens,
                              const gna_cuda_tensor* tensor) {
  return gna::cuda::declines(batch, heads, tokens, *tensor);
}

int32_t gna_sm90_forward(const gna_cuda_problem* problem, const gna_cuda_tensor* query,
                         const gna_cuda_tensor* key, const gna_cuda_tensor* value,
                         const gna_cuda_tensor* output, float* logsumexp, void* stream) {
  return gna::cuda::run(gna::sm90::target, *problem, *query, *key, *value, *output, logsumexp,
                        static_cast<cudaStream_t>(stream));
}

const char* gna_sm90_message(void) { return gna::cuda::message.c_str(); }
