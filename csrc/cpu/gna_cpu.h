/* The CPU kernel's C interface: attention of any pattern, forward and backward.
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

/* What the queries of a segment see of the keys of another. */
enum { GNA_NONE = 0, GNA_FULL = 1, GNA_WINDOW = 2 };

/* One axis of a grid, of which begin .. end - 1 is at hand. */
typedef struct {
  int32_t length, begin, end; /* 0 <= begin < end <= length */
  /* Where the segment is linked by a window: log2 of the extent of the box of tokens in one tile's
   * lanes. Those of a segment's axes add up to 4, 5 or 6. */
  int32_t log2_box;
  /* Of queries that are linked by a window; in the whole grid's coordinates.
   * 1 <= stride <= window, 1 <= dilation, window * dilation <= length */
  int32_t window, stride, dilation, causal;
} gna_axis;

/* Global tokens, or those of a grid that are at hand, in raster order, last axis fastest. */
typedef struct {
  int32_t axis_count; /* 0 for global tokens; 1 .. 3 for a grid */
  int32_t tokens;     /* of global tokens */
  gna_axis axes[3];   /* of a grid */
} gna_segment;

/* Two sequences of segments, and links between them. GNA_WINDOW is for two grids whose axes have
 * equal lengths, or length 1 on one side, where all that is at hand is seen. */
typedef struct {
  int32_t query_segments, key_segments; /* at least 1 */
  const gna_segment *queries, *keys;
  const uint8_t* links; /* [query_segments, key_segments] */
} gna_pattern;

/* [batch, global keys], in the order of the keys; 0 hides a key. data may be null. */
typedef struct {
  const uint8_t* data;
  int64_t batch_stride, token_stride;
} gna_key_mask;

typedef struct {
  int32_t type;                   /* GNA_FP32, ... of all tensors but logsumexp */
  int32_t batch, heads, kv_heads; /* kv_heads divides heads */
  int32_t head_dim;               /* 1 .. 1024 */
  gna_pattern pattern;            /* the same for all heads */
  gna_key_mask key_mask;
  float scale;
  int32_t threads; /* at most this many, at least 1 */
  const char* isa; /* one of gna_cpu_isa, or null for the best */
} gna_problem;

/* The names of the instruction sets that run here, best first; null from `index` = their number on. */
const char* gna_cpu_isa(int32_t index);

/* output: like query. logsumexp: contiguous [batch, heads, query tokens], natural, scale included;
 * -inf, with an output of 0, where a row sees no key, or only logits of -inf. */
int32_t gna_cpu_forward(const gna_problem* problem, const gna_tensor* query, const gna_tensor* key,
                        const gna_tensor* value, const gna_tensor* output, float* logsumexp);

/* output and logsumexp: the forward's. grad_logsumexp: fp32 [batch, heads, query tokens],
 * dim_stride unused, or null. Writes the last three. */
int32_t gna_cpu_backward(const gna_problem* problem, const gna_tensor* grad_output,
                         const gna_tensor* grad_logsumexp, const gna_tensor* query,
                         const gna_tensor* key, const gna_tensor* value, const gna_tensor* output,
                         const float* logsumexp, const gna_tensor* grad_query,
                         const gna_tensor* grad_key, const gna_tensor* grad_value);

/* One axis of a segment that is linked by a window, cut into boxes of 2^log2_box tokens.
 *
 * of_keys: the segment is one of the keys. streamed: for each segment of the other sequence, the sum
 * over the boxes of the tokens that a box sees or that see it, 0 where there is no window between them.
 * Returns the number of boxes, or -1 for an argument that breaks a rule. */
int64_t gna_cpu_streamed(const gna_pattern* pattern, int32_t of_keys, int32_t segment, int32_t axis,
                         int32_t log2_box, int64_t* streamed);

#ifdef __cplusplus
}
#endif

#endif
