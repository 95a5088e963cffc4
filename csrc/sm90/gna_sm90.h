/* The Hopper kernel's C interface: neighbourhood attention, forward.
 *
 * Definitions: gna_compile/geometry.py. Tensors are plain device pointers with strides in elements;
 * nothing is copied. A call launches one kernel on `stream` of the current device, synchronises with
 * nothing, allocates nothing and may be captured in a CUDA graph. It may come from any thread.
 */
#ifndef GNA_SM90_H
#define GNA_SM90_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GNA_SM90_API __attribute__((visibility("default")))

enum { GNA_SM90_BF16 = 1, GNA_SM90_FP16 = 2 };

/* What a call returns; gna_sm90_message says more. */
enum {
  GNA_SM90_OK = 0,
  GNA_SM90_BAD_ARGUMENT = 1, /* a number in the problem breaks a rule below */
  GNA_SM90_DRIVER = 2,       /* no driver, no device, or one that lacks what the kernel needs */
  GNA_SM90_LAUNCH = 3
};

/* [batch, heads, tokens, head_dim], head_dim contiguous; address and strides multiples of 16 bytes. */
typedef struct {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
} gna_sm90_tensor;

/* 1 <= stride <= window, 1 <= dilation, window * dilation <= length. The boxes of a query tile and of
 * a key tile have 2^log2 tokens along the axis, 7 in sum over the axes. Where dilation > 1 they
 * either have one token or dilation <= 8 and dilation * 2^log2 <= 256. */
typedef struct {
  int32_t length, window, stride, dilation, causal, log2_query_box, log2_key_box;
} gna_sm90_axis;

typedef struct {
  int32_t type;                   /* GNA_SM90_BF16 or GNA_SM90_FP16 */
  int32_t batch, heads, kv_heads; /* kv_heads divides heads */
  int32_t head_dim;               /* a multiple of 8 up to 128 */
  int32_t axis_count;             /* 1 .. 3; the grid lies in raster order, last axis fastest */
  gna_sm90_axis axes[3];
  int32_t prefix, suffix;  /* global tokens before and after the grid */
  const uint8_t* key_mask; /* [batch, prefix + suffix], 0 hides a global key; may be null */
  int64_t key_mask_batch_stride, key_mask_token_stride;
  float scale; /* positive */
} gna_sm90_problem;

/* Why the kernel cannot read a tensor with these strides, or null if it can. */
GNA_SM90_API const char* gna_sm90_declines(int32_t batch, int32_t heads, int32_t tokens,
                              const gna_sm90_tensor* tensor);

/* output: like query. logsumexp: contiguous fp32 [batch, heads, tokens], natural, scale included. */
GNA_SM90_API int32_t gna_sm90_forward(const gna_sm90_problem* problem, const gna_sm90_tensor* query,
                         const gna_sm90_tensor* key, const gna_sm90_tensor* value,
                         const gna_sm90_tensor* output, float* logsumexp, void* stream);

/* What went wrong in this thread's last call that failed. */
GNA_SM90_API const char* gna_sm90_message(void);

#ifdef __cplusplus
}
#endif

#endif
