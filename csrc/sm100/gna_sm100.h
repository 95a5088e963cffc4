/* The Blackwell kernel's C interface. Query tiles have 256 tokens, key tiles 128. */
#ifndef GNA_SM100_H
#define GNA_SM100_H

#include "gna/cuda/gna_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Why the kernel cannot read a tensor with these strides, or null if it can. */
GNA_CUDA_API const char* gna_sm100_declines(int32_t batch, int32_t heads, int32_t tokens,
                                           const gna_cuda_tensor* tensor);

/* output: like query. logsumexp: contiguous fp32 [batch, heads, tokens], natural, scale included. */
GNA_CUDA_API int32_t gna_sm100_forward(const gna_cuda_problem* problem, const gna_cuda_tensor* query,
                                      const gna_cuda_tensor* key, const gna_cuda_tensor* value,
                                      const gna_cuda_tensor* output, float* logsumexp, void* stream);

/* What went wrong in this thread's last call that failed. */
GNA_CUDA_API const char* gna_sm100_message(void);

#ifdef __cplusplus
}
#endif

#endif
