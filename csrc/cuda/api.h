/* The C interface of each library of CUDA kernels: neighborhood attention, forward.
 *
 * Definitions: gna_compile/geometry/. Tensors are plain device pointers with strides in elements;
 * nothing is copied. A call launches on `stream` of the current device, synchronizes with nothing,
 * allocates nothing and may be captured in a CUDA graph. It may come from any thread.
 *
 * There is a library for each architecture. All export the same names: load each by itself, as dlopen
 * does without RTLD_GLOBAL.
 */
#ifndef GNA_CUDA_API_H
#define GNA_CUDA_API_H

#include <stdint.h>

#define GNA_CUDA_API __attribute__((visibility("default")))

enum { GNA_CUDA_BF16 = 1, GNA_CUDA_FP16 = 2 };

/* What a call returns; the library's message says more. */
enum {
  GNA_CUDA_OK = 0,
  GNA_CUDA_BAD_ARGUMENT = 1, /* a number in the problem breaks a rule below */
  GNA_CUDA_DRIVER = 2,       /* no driver, no device, or one that lacks what the kernel needs */
  GNA_CUDA_LAUNCH = 3
};

/* [batch, heads, tokens, head_dim], head_dim contiguous; address and strides multiples of 16 bytes. */
typedef struct {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
} gna_cuda_tensor;

/* 1 <= stride <= window, 1 <= dilation, window * dilation <= length. The boxes of a query tile and of
 * a key tile have 2^log2 tokens along the axis, in all as many as the kernel's tiles have. What is
 * loaded at once of a box, at most 128 tokens, either has one token along a dilated axis, or
 * dilation <= 8 and dilation * tokens <= 256. */
typedef struct {
  int32_t length, window, stride, dilation, causal, log2_query_box, log2_key_box;
} gna_cuda_axis;

typedef struct {
  int32_t type;                   /* GNA_CUDA_BF16 or GNA_CUDA_FP16 */
  int32_t batch, heads, kv_heads; /* kv_heads divides heads */
  int32_t head_dim;               /* a multiple of 8 up to 128 */
  int32_t axis_count;             /* 1 .. 3; the grid lies in raster order, last axis fastest */
  gna_cuda_axis axes[3];
  int32_t prefix, suffix; /* global tokens before and after the grid */
  /* Which of their rows to compute, counted over prefix, then suffix: 0 <= begin <= end <= prefix +
   * suffix. Query tiles are computed whole, so rows of global tokens beside these may be written too. */
  int32_t global_begin, global_end;
  const uint8_t* key_mask; /* [batch, prefix + suffix], 0 masks a global key; may be null */
  int64_t key_mask_batch_stride, key_mask_token_stride;
  float scale; /* positive */
} gna_cuda_problem;

/* Counts the changes of this interface. */
enum { GNA_CUDA_API_VERSION = 2 };

#ifdef __cplusplus
extern "C" {
#endif

/* GNA_CUDA_API_VERSION, then the sizes of gna_cuda_tensor, gna_cuda_axis and gna_cuda_problem. Whoever
 * declares these structs in another language compares. */
GNA_CUDA_API void gna_layout(int32_t layout[4]);

/* Why the kernel cannot read a tensor with these strides, or null if it can. */
GNA_CUDA_API const char* gna_declines(int32_t batch, int32_t heads, int32_t tokens,
                                      const gna_cuda_tensor* tensor);

/* output: like query. logsumexp: contiguous fp32 [batch, heads, tokens], natural, scale included. */
GNA_CUDA_API int32_t gna_forward(const gna_cuda_problem* problem, const gna_cuda_tensor* query,
                                 const gna_cuda_tensor* key, const gna_cuda_tensor* value,
                                 const gna_cuda_tensor* output, float* logsumexp, void* stream);

/* What went wrong in this thread's last call that failed. */
GNA_CUDA_API const char* gna_message(void);

#ifdef __cplusplus
}
#endif

#endif
