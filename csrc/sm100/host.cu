// The Blackwell kernels behind their C interface.
#include "gna/cuda/host.h"
#include "gna_sm100.h"

namespace gna::sm100 {

using namespace gna::cuda;

#define GNA_SM100_KERNEL(name)   \
  cudaError_t prepare_##name(); \
  cudaError_t launch_##name(const Parameters& parameters, int blocks, cudaStream_t stream);
GNA_SM100_KERNEL(bf16_64)
GNA_SM100_KERNEL(bf16_128)
GNA_SM100_KERNEL(fp16_64)
GNA_SM100_KERNEL(fp16_128)
#undef GNA_SM100_KERNEL

namespace {

// Rows are loaded and stored by halves.
constexpr Target target{8,
                        7,
                        7,
                        {{prepare_bf16_64, launch_bf16_64},
                         {prepare_bf16_128, launch_bf16_128},
                         {prepare_fp16_64, launch_fp16_64},
                         {prepare_fp16_128, launch_fp16_128}}};

}  // namespace
}  // namespace gna::sm100

const char* gna_sm100_declines(int32_t batch, int32_t heads, int32_t tokens,
                              const gna_cuda_tensor* tensor) {
  return gna::cuda::declines(batch, heads, tokens, *tensor);
}

int32_t gna_sm100_forward(const gna_cuda_problem* problem, const gna_cuda_tensor* query,
                         const gna_cuda_tensor* key, const gna_cuda_tensor* value,
                         const gna_cuda_tensor* output, float* logsumexp, void* stream) {
  return gna::cuda::run(gna::sm100::target, *problem, *query, *key, *value, *output, logsumexp,
                        static_cast<cudaStream_t>(stream));
}

const char* gna_sm100_message(void) { return gna::cuda::message.c_str(); }
