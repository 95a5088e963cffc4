// The host's side of the kernels: checks a problem, describes its tensors to TMA, launches.
// Each library has it once.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "api.h"
#include "launch.cuh"

namespace gna::cuda {

namespace {

constexpr int64_t element_bytes = 2;
constexpr int64_t stride_unit = 16 / element_bytes;  // elements; what TMA asks for
constexpr int max_element_stride = 8;
constexpr int max_box = 256;

thread_local std::string message;

int32_t fail(int32_t code, std::string text) {
  message = std::move(text);
  return code;
}

int32_t fail(cudaError_t error, const char* doing) {
  return fail(error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ? GNA_CUDA_DRIVER
                                                                                 : GNA_CUDA_LAUNCH,
              std::string(doing) + ": " + cudaGetErrorString(error));
}

// Tensor maps -------------------------------------------------------------------------------------

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's function, looked up at run time so that nothing links with the driver; null without.
Encode encode_function() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  return found;
}

// Heads and batch entries share the last dimension of a map, whose step is the smaller of their
// strides; a stride of zero (an expanded tensor) needs no step.
struct PlaneLayout {
  int64_t step = 0, count = 1;
  Planes planes{0, 0};
};

const char* plane_layout(int64_t batch, int64_t heads, const gna_cuda_tensor& tensor,
                         PlaneLayout& layout) {
  const int64_t by_head = heads == 1 ? 0 : tensor.head_stride;
  const int64_t by_batch = batch == 1 ? 0 : tensor.batch_stride;
  if (by_head < 0 || by_batch < 0 || tensor.token_stride < 0) return "negative strides";
  layout.step = by_head == 0 ? by_batch : by_batch == 0 ? by_head : std::min(by_head, by_batch);
  if (layout.step == 0) return nullptr;
  if (by_head % layout.step != 0 || by_batch % layout.step != 0)
    return "neither the batch nor the head stride is a multiple of the other";
  const int64_t per_head = by_head / layout.step, per_batch = by_batch / layout.step;
  layout.count = per_head * (heads - 1) + per_batch * (batch - 1) + 1;
  if (layout.count > INT32_MAX) return "more than 2^31 planes";
  layout.planes = {static_cast<int32_t>(per_head), static_cast<int32_t>(per_batch)};
  return nullptr;
}

// Columns, three axes of tokens (last axis first), planes; strides in elements.
struct View {
  uint8_t* base;
  std::array<int64_t, 3> lengths, strides;
  std::array<int32_t, 3> extents, dilations;
};

struct MapMaker {
  CUtensorMapDataType type;
  int32_t head_dim;
  PlaneLayout layout;

  CUresult operator()(CUtensorMap& map, const View& view) const {
    cuuint64_t sizes[5] = {static_cast<cuuint64_t>(head_dim)};
    cuuint64_t strides[4];
    cuuint32_t box[5] = {box_columns};
    cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    for (int a = 0; a < 3; ++a) {
      sizes[a + 1] = view.lengths[a];
      strides[a] = view.strides[a] * element_bytes;
      // A box of one token needs no step between tokens.
      steps[a + 1] = view.extents[a] == 1 ? 1 : view.dilations[a];
      box[a + 1] = view.extents[a] * steps[a + 1];
    }
    sizes[4] = layout.count;
    // A dimension of one plane still wants a legal stride.
    strides[3] = layout.step == 0 ? strides[2] : layout.step * element_bytes;
    box[4] = 1;
    return encode_function()(&map, type, 5, view.base, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
};

// log2 of the tokens of a box along each axis.
using BoxShape = std::array<int32_t, 3>;

// The maps of one tensor, for boxes of this shape and runs of `rows` global tokens.
int32_t make_maps(const gna_cuda_problem& plain, const Problem& problem,
                  const gna_cuda_tensor& tensor, int32_t heads, const BoxShape& shape, int32_t rows,
                  Maps& maps) {
  MapMaker make{plain.type == GNA_CUDA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                plain.head_dim,
                {}};
  if (const char* reason = plane_layout(plain.batch, heads, tensor, make.layout))
    return fail(GNA_CUDA_BAD_ARGUMENT, reason);
  maps.planes = make.layout.planes;
  auto* const base = static_cast<uint8_t*>(tensor.data);
  const int64_t token = tensor.token_stride;
  const auto at = [&](int64_t first) { return base + first * token * element_bytes; };

  View grid{at(problem.prefix), {}, {}, {}, {}};
  int64_t inner = 1;
  for (int a = 0; a < 3; ++a) {
    const GridAxis& axis = problem.axes[2 - a];
    grid.lengths[a] = axis.length;
    // An axis of one token has no stride; the innermost one's is always legal.
    grid.strides[a] = axis.length == 1 ? token : inner * token;
    grid.extents[a] = 1 << shape[2 - a];
    grid.dilations[a] = axis.dilation;
    inner *= axis.length;
  }
  CUresult result = make(maps.of_part[grid_part], grid);
  View plain_grid = grid;
  plain_grid.dilations = {1, 1, 1};
  if (grid.dilations == plain_grid.dilations)
    maps.undilated = maps.of_part[grid_part];
  else if (problem.prefix + problem.suffix > 0 && result == CUDA_SUCCESS)
    result = make(maps.undilated, plain_grid);
  for (const int32_t part : {prefix_part, suffix_part}) {
    const int32_t tokens = part_tokens(problem, part);
    if (tokens == 0 || result != CUDA_SUCCESS) continue;
    const int64_t first = part == prefix_part ? 0 : problem.prefix + inner;
    result = make(maps.of_part[part],
                  {at(first), {tokens, 1, 1}, {token, token, token}, {rows, 1, 1}, {1, 1, 1}});
  }
  if (result != CUDA_SUCCESS)
    return fail(GNA_CUDA_BAD_ARGUMENT, "the driver declines to describe a tensor (CUresult " +
                                           std::to_string(static_cast<int>(result)) + ")");
  return GNA_CUDA_OK;
}

// Checks ------------------------------------------------------------------------------------------

// log2 of the tokens along each axis of a part of a box: the outer axes are cut first.
BoxShape part_of_box(const BoxShape& box, int32_t log2_rows) {
  BoxShape part{};
  for (int a = max_axes - 1; a >= 0; --a) {
    part[a] = std::min(log2_rows, box[a]);
    log2_rows -= part[a];
  }
  return part;
}

// Whether TMA can skip the tokens between those of a box of a dilated axis.
bool is_readable(const gna_cuda_axis& axis, int32_t log2_box) {
  return log2_box == 0 || axis.dilation == 1 ||
         (axis.dilation <= max_element_stride && axis.dilation << log2_box <= max_box);
}

// Each of these returns what is wrong, with its value and the rule, or an empty string.
std::string broken_rule(const gna_cuda_problem& plain) {
  const auto is = [](const char* name, int64_t value) {
    return std::string(name) + " is " + std::to_string(value) + ", ";
  };
  if (plain.type != GNA_CUDA_BF16 && plain.type != GNA_CUDA_FP16)
    return is("type", plain.type) + "not 1 (bf16) or 2 (fp16)";
  if (plain.head_dim < 8 || plain.head_dim > 128 || plain.head_dim % 8 != 0)
    return is("head_dim", plain.head_dim) + "not a multiple of 8 up to 128";
  if (plain.batch < 1) return is("batch", plain.batch) + "not positive";
  if (plain.heads < 1) return is("heads", plain.heads) + "not positive";
  if (plain.kv_heads < 1 || plain.heads % plain.kv_heads != 0)
    return is("kv_heads", plain.kv_heads) + "not a divisor of the " + std::to_string(plain.heads) +
           " heads";
  if (plain.axis_count < 1 || plain.axis_count > 3)
    return is("axis_count", plain.axis_count) + "not 1 to 3";
  if (plain.prefix < 0) return is("prefix", plain.prefix) + "negative";
  if (plain.suffix < 0) return is("suffix", plain.suffix) + "negative";
  const int64_t global_tokens = static_cast<int64_t>(plain.prefix) + plain.suffix;
  if (plain.global_end < 0 || plain.global_end > global_tokens)
    return is("global_end", plain.global_end) + "not 0 to " + std::to_string(global_tokens);
  if (plain.global_begin < 0 || plain.global_begin > plain.global_end)
    return is("global_begin", plain.global_begin) + "not 0 to global_end, which is " +
           std::to_string(plain.global_end);
  if (!(plain.scale > 0)) return "scale is " + std::to_string(plain.scale) + ", not positive";
  return "";
}

const CompiledKernel& kernel_of(const gna_cuda_problem& plain) {
  if (plain.type == GNA_CUDA_BF16) return plain.head_dim > 64 ? bf16_128 : bf16_64;
  return plain.head_dim > 64 ? fp16_128 : fp16_64;
}

std::string broken_axis_rule(const gna_cuda_problem& plain, const CompiledKernel& kernel) {
  int32_t query = 0, key = 0;
  int64_t tokens = 1;
  BoxShape query_box{};
  const auto on_axis = [](int32_t a, const std::string& text) {
    return "axis " + std::to_string(a) + ": " + text;
  };
  const auto broken_box = [&](int32_t a, const char* name, int32_t log2_box, int32_t most) {
    return log2_box >= 0 && log2_box <= most
               ? ""
               : on_axis(a, std::string(name) + " is " + std::to_string(log2_box) + ", not 0 to " +
                                std::to_string(most));
  };
  for (int32_t a = 0; a < plain.axis_count; ++a) {
    const gna_cuda_axis& axis = plain.axes[a];
    if (axis.length < 1 || axis.stride < 1 || axis.window < axis.stride || axis.dilation < 1 ||
        static_cast<int64_t>(axis.window) * axis.dilation > axis.length)
      return on_axis(a, "length " + std::to_string(axis.length) + ", window " +
                            std::to_string(axis.window) + ", stride " +
                            std::to_string(axis.stride) + ", dilation " +
                            std::to_string(axis.dilation) +
                            " break 1 <= stride <= window, window * dilation <= length");
    std::string broken =
        broken_box(a, "log2_query_box", axis.log2_query_box, kernel.log2_query_tile);
    if (broken.empty()) broken = broken_box(a, "log2_key_box", axis.log2_key_box, log2_tile_n);
    if (!broken.empty()) return broken;
    query_box[max_axes - plain.axis_count + a] = axis.log2_query_box;
    query += axis.log2_query_box;
    key += axis.log2_key_box;
    tokens *= axis.length;
    if (tokens > INT32_MAX)
      return "the grid has " + std::to_string(tokens) + " tokens, more than 2^31 - 1";
  }
  const auto broken_sum = [](const char* name, int32_t sum, int32_t tile) {
    return sum == tile ? ""
                       : std::string(name) + " boxes hold 2^" + std::to_string(sum) +
                             " tokens, not 2^" + std::to_string(tile) + " as the kernel's tiles do";
  };
  std::string broken = broken_sum("query", query, kernel.log2_query_tile);
  if (broken.empty()) broken = broken_sum("key", key, log2_tile_n);
  if (!broken.empty()) return broken;
  const BoxShape loaded = part_of_box(query_box, kernel.log2_query_box);
  for (int32_t a = 0; a < plain.axis_count; ++a) {
    const gna_cuda_axis& axis = plain.axes[a];
    for (const int32_t log2_box : {axis.log2_key_box, loaded[max_axes - plain.axis_count + a]})
      if (!is_readable(axis, log2_box))
        return on_axis(
            a, "a box of " + std::to_string(1 << log2_box) + " tokens with dilation " +
                   std::to_string(axis.dilation) +
                   " is too long for TMA: dilation at most 8, dilation * tokens at most 256");
  }
  return "";
}

Problem problem_of(const gna_cuda_problem& plain, const CompiledKernel& kernel) {
  Problem problem{};
  for (int32_t a = 0; a < max_axes; ++a) {
    GridAxis& axis = problem.axes[a];
    const int32_t from = a - (max_axes - plain.axis_count);
    if (from < 0) {
      axis = {1, 1, 1, 1, 0, 0, 0, 1, 1};
      continue;
    }
    const gna_cuda_axis& given = plain.axes[from];
    axis = {given.length,
            given.window,
            given.stride,
            given.dilation,
            given.causal,
            given.log2_query_box,
            given.log2_key_box,
            0,
            1};
    axis.query_tiles = query_tiles_of(axis);
  }
  problem.prefix = plain.prefix;
  problem.suffix = plain.suffix;
  problem.log2_query_tile = kernel.log2_query_tile;
  problem.log2_key_tile = log2_tile_n;
  return problem;
}

// Devices -----------------------------------------------------------------------------------------

struct Device {
  int sm_count, minor;  // minor: of the compute capability
};

constexpr int max_devices = 64;
Device devices[max_devices];
std::atomic<bool> is_set_up[max_devices];
std::mutex setting_up;

// The current device, the kernels being set up on it.
int32_t set_up(Device& device) {
  int number = 0;
  if (const cudaError_t error = cudaGetDevice(&number)) return fail(error, "cudaGetDevice");
  if (number >= max_devices)
    return fail(GNA_CUDA_DRIVER, "device " + std::to_string(number) + ": only 0 to " +
                                     std::to_string(max_devices - 1) + " are supported");
  if (!is_set_up[number].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(setting_up);
    if (encode_function() == nullptr)
      return fail(GNA_CUDA_DRIVER,
                  "the driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    for (const CompiledKernel* kernel : {&bf16_64, &bf16_128, &fp16_64, &fp16_128})
      if (const cudaError_t error = kernel->prepare()) return fail(error, "setting up the kernel");
    const struct {
      cudaDeviceAttr attribute;
      int& value;
    } asked[] = {{cudaDevAttrMultiProcessorCount, devices[number].sm_count},
                 {cudaDevAttrComputeCapabilityMinor, devices[number].minor}};
    for (const auto& one : asked)
      if (const cudaError_t error = cudaDeviceGetAttribute(&one.value, one.attribute, number))
        return fail(error, "cudaDeviceGetAttribute");
    is_set_up[number].store(true, std::memory_order_release);
  }
  device = devices[number];
  return GNA_CUDA_OK;
}

// Why TMA cannot read a tensor with these strides, or null if it can.
const char* declines(int32_t batch, int32_t heads, int32_t tokens, const gna_cuda_tensor& tensor) {
  constexpr int64_t too_far = int64_t{1} << 40;  // bytes
  const int64_t strides[] = {batch == 1 ? 0 : tensor.batch_stride,
                             heads == 1 ? 0 : tensor.head_stride, tensor.token_stride};
  for (const int64_t stride : strides) {
    if (stride % stride_unit != 0) return "strides must be multiples of 16 bytes";
    if (stride >= too_far / element_bytes) return "strides must be below 2^40 bytes";
  }
  if (tensor.token_stride == 0) return "all tokens are the same memory";
  if (tensor.token_stride * tokens >= too_far / element_bytes)
    return "an axis of tokens has a stride of 2^40 bytes or more";
  PlaneLayout layout;
  return plane_layout(batch, heads, tensor, layout);
}

int32_t run(const gna_cuda_problem& plain, const gna_cuda_tensor& query, const gna_cuda_tensor& key,
            const gna_cuda_tensor& value, const gna_cuda_tensor& output, float* logsumexp,
            cudaStream_t stream) {
  std::string rule = broken_rule(plain);
  if (!rule.empty()) return fail(GNA_CUDA_BAD_ARGUMENT, rule);
  const CompiledKernel& kernel = kernel_of(plain);
  rule = broken_axis_rule(plain, kernel);
  if (!rule.empty()) return fail(GNA_CUDA_BAD_ARGUMENT, rule);
  Problem problem = problem_of(plain, kernel);
  int64_t tokens = 1;
  for (const GridAxis& axis : problem.axes) tokens *= axis.length;
  tokens += static_cast<int64_t>(plain.prefix) + plain.suffix;
  if (tokens > INT32_MAX)
    return fail(GNA_CUDA_BAD_ARGUMENT, std::to_string(tokens) + " tokens are more than 2^31 - 1");
  for (const gna_cuda_tensor* tensor : {&query, &key, &value, &output}) {
    const int32_t heads = tensor == &key || tensor == &value ? plain.kv_heads : plain.heads;
    const char* const name = tensor == &query   ? "query"
                             : tensor == &key   ? "key"
                             : tensor == &value ? "value"
                                                : "output";
    if (reinterpret_cast<uintptr_t>(tensor->data) % 16 != 0)
      return fail(GNA_CUDA_BAD_ARGUMENT,
                  std::string(name) + ": its address is not a multiple of 16 bytes");
    if (const char* reason = declines(plain.batch, heads, static_cast<int32_t>(tokens), *tensor))
      return fail(GNA_CUDA_BAD_ARGUMENT, std::string(name) + ": " + reason);
  }
  const Range global_tiles = global_query_tiles(problem, {plain.global_begin, plain.global_end});
  const int64_t tiles =
      static_cast<int64_t>(grid_query_tiles(problem)) + global_tiles.end - global_tiles.begin;
  const int64_t work = tiles * plain.batch * plain.heads;
  if (work > INT32_MAX / 2)
    return fail(GNA_CUDA_BAD_ARGUMENT,
                std::to_string(work) + " query tiles of all heads are more than 2^30");

  Device device{};
  if (const int32_t code = set_up(device)) return code;
  set_rasterization(problem, device.sm_count);
  BoxShape query_box{}, key_box{};
  for (int a = 0; a < max_axes; ++a) {
    query_box[a] = problem.axes[a].log2_query;
    key_box[a] = problem.axes[a].log2_key;
  }
  Params parameters{};
  const struct {
    const gna_cuda_tensor& tensor;
    int32_t heads;
    BoxShape box;
    int32_t rows;
    Maps& maps;
  } described[] = {{query, plain.heads, part_of_box(query_box, kernel.log2_query_box),
                    1 << kernel.log2_query_box, parameters.query},
                   {key, plain.kv_heads, key_box, tile_n, parameters.key},
                   {value, plain.kv_heads, key_box, tile_n, parameters.value},
                   {output, plain.heads, part_of_box(query_box, kernel.log2_output_box),
                    1 << kernel.log2_output_box, parameters.output}};
  for (const auto& one : described)
    if (const int32_t code =
            make_maps(plain, problem, one.tensor, one.heads, one.box, one.rows, one.maps))
      return code;
  parameters.problem = problem;
  for (int a = max_axes - 1, log2_inner = 0; a >= 0; --a) {
    parameters.key_words[a] = axis_words(log2_inner, problem.axes[a].log2_key);
    log2_inner += problem.axes[a].log2_key;
  }
  parameters.key_coordinates = coordinate_bits({key_box[0], key_box[1], key_box[2]});
  parameters.batch = plain.batch;
  parameters.heads = plain.heads;
  parameters.heads_per_kv_head = plain.heads / plain.kv_heads;
  parameters.scale_log2 = plain.scale * 1.4426950408889634f;
  parameters.logsumexp = logsumexp;
  parameters.key_mask = plain.key_mask;
  parameters.key_mask_batch_stride = plain.key_mask_batch_stride;
  parameters.key_mask_token_stride = plain.key_mask_token_stride;
  parameters.minor = device.minor;
  parameters.global_tiles = global_tiles;
  static std::atomic<uint32_t> launches;
  while ((parameters.launch = ++launches) == 0) {
  }
  const int blocks = static_cast<int>(std::min<int64_t>(device.sm_count, work));
  if (const cudaError_t error = kernel.launch(parameters, blocks, stream))
    return fail(error, "launching the kernel");
  return GNA_CUDA_OK;
}

}  // namespace
}  // namespace gna::cuda

void gna_layout(int32_t layout[4]) {
  layout[0] = GNA_CUDA_API_VERSION;
  layout[1] = sizeof(gna_cuda_tensor);
  layout[2] = sizeof(gna_cuda_axis);
  layout[3] = sizeof(gna_cuda_problem);
}

const char* gna_declines(int32_t batch, int32_t heads, int32_t tokens,
                         const gna_cuda_tensor* tensor) {
  return gna::cuda::declines(batch, heads, tokens, *tensor);
}

int32_t gna_forward(const gna_cuda_problem* problem, const gna_cuda_tensor* query,
                    const gna_cuda_tensor* key, const gna_cuda_tensor* value,
                    const gna_cuda_tensor* output, float* logsumexp, void* stream) {
  return gna::cuda::run(*problem, *query, *key, *value, *output, logsumexp,
                        static_cast<cudaStream_t>(stream));
}

const char* gna_message(void) { return gna::cuda::message.c_str(); }
