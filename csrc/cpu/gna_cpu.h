/* The CPU kernel's C interface: neighborhood attention, forward and backward.
 *
 * Definitions: gna_compile/geometry/. Tensors are plain pointers with strides in elements, any
 * strides (0 and negative too); nothing is copied but a tile at a time. Calls may come from several
 * threads at once and from a forked process. Results are the same bits from call to call and for any
 * number of threads.
 */
#ifndef GNA_CPU_H
#define GNA_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { GNA_FP32 = 0, GNA_BF16 = 1, GNA_FP16 = 2 };

/* What a call returns. */
enum {
  GNA_OK = 0,
  GNA_BAD_ARGUMENT = 1, /* a number in the problem breaks a rule below */
  GNA_NO_MEMORY = 2,
  GNA_NO_SUCH_ISA = 3 /* this processor or this build lacks the instruction set */
};

/* [batch, heads, tokens, head_dim] */
typedef struct {
  void* data;
  int64_t batch_stride, head_stride, token_stride, dim_stride;
} gna_tensor;

/* 1 <= stride <= window, 1 <= dilation, window * dilation <= length */
typedef struct {
  int32_t length, window, stride, dilation, causal;
} gna_axis;

typedef struct {
  int32_t type;                 /* GNA_FP32, ... of all tensors but logsumexp */
  int32_t batch, heads, kv_heads; /* kv_heads divides heads */
  int32_t head_dim;             /* 1 .. 1024 */
  int32_t axis_count;           /* 1 .. 3; the grid lies in raster order, last axis fastest */
  gna_axis axes[3];
  int32_t prefix, suffix;       /* global tokens before and after the grid */
  const uint8_t* key_mask;      /* [batch, prefix + suffix], 0 masks a global key; may be null */
  int64_t key_mask_batch_stride, key_mask_token_stride;
  float scale;
  /* The box of tokens of one tile, log2 of its extent per axis; they add up to 4, 5 or 6. */
  int32_t log2_query_box[3]; /* forward, and the gradient of the queries */
  int32_t log2_key_box[3];   /* the gradients of the keys and values */
  int32_t threads;           /* at most this many, at least 1 */
  const char* isa;           /* one of gna_cpu_isa, or null for the best */
} gna_problem;

/* The names of the instruction sets that run here, best first; null from `index` = their number on. */
const char* gna_cpu_isa(int32_t index);

/* output: like query. logsumexp: contiguous [batch, heads, tokens], natural, scale included; -inf,
 * with an output of 0, where all logits of a row are -inf. */
int32_t gna_cpu_forward(const gna_problem* problem, const gna_tensor* query, const gna_tensor* key,
                        const gna_tensor* value, const gna_tensor* output, float* logsumexp);

/* output and logsumexp: the forward's. grad_logsumexp: fp32 [batch, heads, tokens], dim_stride
 * unused, or null. Writes the last three. */
int32_t gna_cpu_backward(const gna_problem* problem, const gna_tensor* grad_output,
                         const gna_tensor* grad_logsumexp, const gna_tensor* query,
                         const gna_tensor* key, const gna_tensor* value, const gna_tensor* output,
                         const float* logsumexp, const gna_tensor* grad_query,
                         const gna_tensor* grad_key, const gna_tensor* grad_value);

/* Sum over the boxes of 2^log2_box tokens of an axis, all its dilation groups, of the keys that
 * the box sees or, with `of_keys`, of the queries that see the box. */
int64_t gna_cpu_streamed(const gna_axis* axis, int32_t log2_box, int32_t of_keys);

#ifdef __cplusplus
}
#endif

#endif
