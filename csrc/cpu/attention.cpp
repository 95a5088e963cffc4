// The C interface: checks the problem, cuts it into tiles, and has them worked on.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "gna_cpu.h"
#include "isa.hpp"
#include "kernel.hpp"
#include "threads.hpp"
#include "tiles.hpp"

namespace gna {

namespace {

constexpr int32_t most_tokens = 1 << 30;

bool valid(const gna_axis& axis) {
  return axis.length >= 1 && axis.stride >= 1 && axis.stride <= axis.window && axis.dilation >= 1 &&
         int64_t{axis.window} * axis.dilation <= axis.length;
}

bool valid_box(const int32_t* log2_box, int32_t axis_count) {
  int32_t sum = 0;
  for (int32_t a = 0; a < axis_count; ++a) {
    if (log2_box[a] < 0 || log2_box[a] > 6) return false;
    sum += log2_box[a];
  }
  return sum >= 4 && sum <= 6;
}

bool valid(const gna_problem& problem) {
  if (problem.type < 0 || problem.type >= type_count) return false;
  if (problem.batch < 1 || problem.heads < 1 || problem.kv_heads < 1 || problem.threads < 1)
    return false;
  if (problem.heads % problem.kv_heads != 0) return false;
  if (problem.head_dim < 1 || problem.head_dim > 1024) return false;
  if (problem.axis_count < 1 || problem.axis_count > 3) return false;
  if (problem.prefix < 0 || problem.suffix < 0) return false;
  int64_t tokens = 1;
  for (int32_t a = 0; a < problem.axis_count; ++a) {
    if (!valid(problem.axes[a])) return false;
    tokens *= problem.axes[a].length;
    if (tokens > most_tokens) return false;
  }
  if (tokens + problem.prefix + problem.suffix > most_tokens) return false;
  return valid_box(problem.log2_query_box, problem.axis_count) &&
         valid_box(problem.log2_key_box, problem.axis_count);
}

int32_t tokens_of(const gna_problem& problem) {
  int32_t grid = 1;
  for (int32_t a = 0; a < problem.axis_count; ++a) grid *= problem.axes[a].length;
  return problem.prefix + grid + problem.suffix;
}

Rows rows_of(const gna_problem& problem, const gna_tensor& tensor, int32_t batch, int32_t head) {
  const int64_t size = problem.type == GNA_FP32 ? 4 : 2;
  const int64_t offset = batch * tensor.batch_stride + head * tensor.head_stride;
  return {static_cast<char*>(tensor.data) + size * offset, tensor.token_stride, tensor.dim_stride};
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) {
  const int64_t bytes = (count * int64_t{sizeof(float)} + 63) / 64 * 64;
  auto* const memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!memory) throw std::bad_alloc();
  return Floats(memory);
}

int64_t padded_dim(const gna_problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

std::vector<GlobalTokens> globals_of(const gna_problem& problem) {
  std::vector<GlobalTokens> result;
  for (int32_t batch = 0; batch < problem.batch; ++batch) result.emplace_back(problem, batch);
  return result;
}

// Calls visit(batch, head, lists) for every tile: first the long ones of global tokens, then head
// by head, so that a head's keys stay in the caches, longest first within a head.
// `lane_globals`: those of a batch element's global tokens that are to be in lanes.
template <class LaneGlobals, class MakeVisit>
int32_t for_tiles(const gna_problem& problem, const Tiling& tiling,
                  const std::vector<GlobalTokens>& globals, int32_t heads, double flops_per_pair,
                  const LaneGlobals& lane_globals, const MakeVisit& make_visit) {
  const int64_t global_tokens = problem.prefix + problem.suffix;
  const int64_t global_tiles = (global_tokens + most_lanes - 1) / most_lanes;
  const int64_t batch_heads = int64_t{problem.batch} * heads;
  const int64_t items = batch_heads * (global_tiles + tiling.count());
  const double pairs = double(tiling.pairs()) + 2.0 * double(global_tokens) * tiling.tokens();
  const double flops = pairs * flops_per_pair * double(batch_heads) * problem.head_dim;
  return for_items(items, flops, problem.threads, [&]() {
    return [&, visit = make_visit(), lists = Tiling::Lists{}](int64_t item) mutable {
      const bool global = item < batch_heads * global_tiles;
      const int64_t tiles = global ? global_tiles : tiling.count();
      if (!global) item -= batch_heads * global_tiles;
      const auto batch = static_cast<int32_t>(item / tiles / heads);
      const auto head = static_cast<int32_t>(item / tiles % heads);
      if (global) {
        const std::vector<int32_t>& in_lanes = lane_globals(globals[batch]);
        const int64_t begin = item % tiles * most_lanes;
        if (begin >= static_cast<int64_t>(in_lanes.size())) return;
        tiling.global_tile(in_lanes, begin, globals[batch], lists);
      } else {
        tiling.grid_tile(item % tiles, globals[batch], lists);
      }
      visit(batch, head, lists);
    };
  });
}

int32_t forward(const gna_problem& problem, const Kernel& kernel, const gna_tensor& query,
                const gna_tensor& key, const gna_tensor& value, const gna_tensor& output,
                float* logsumexp) {
  const Tiling tiling(problem, Role::queries);
  const std::vector<GlobalTokens> globals = globals_of(problem);
  const int32_t group = problem.heads / problem.kv_heads;
  const auto all_globals = [](const GlobalTokens& tokens) -> const std::vector<int32_t>& {
    return tokens.all;
  };
  return for_tiles(problem, tiling, globals, problem.heads, 4, all_globals, [&]() {
    return [&, scratch = floats(forward_scratch(padded_dim(problem)))](
               int32_t batch, int32_t head, const Tiling::Lists& lists) {
      ForwardTile tile;
      tile.tokens = &lists.tile;
      tile.head_dim = problem.head_dim;
      tile.scale = problem.scale;
      tile.query = rows_of(problem, query, batch, head);
      tile.key = rows_of(problem, key, batch, head / group);
      tile.value = rows_of(problem, value, batch, head / group);
      tile.output = rows_of(problem, output, batch, head);
      tile.logsumexp = logsumexp + (int64_t{batch} * problem.heads + head) * tiling.tokens();
      tile.scratch = scratch.get();
      kernel.forward[problem.type](tile);
    };
  });
}

struct BackwardTensors {
  const gna_tensor &grad_output, *grad_logsumexp, &query, &key, &value, &output;
  const float* logsumexp;
  const gna_tensor &grad_query, &grad_key, &grad_value;
};

int32_t query_gradient(const gna_problem& problem, const Kernel& kernel,
                       const BackwardTensors& tensors, float* delta) {
  const Tiling tiling(problem, Role::queries);
  const std::vector<GlobalTokens> globals = globals_of(problem);
  const int32_t group = problem.heads / problem.kv_heads;
  const auto all_globals = [](const GlobalTokens& tokens) -> const std::vector<int32_t>& {
    return tokens.all;
  };
  return for_tiles(problem, tiling, globals, problem.heads, 6, all_globals, [&]() {
    return [&, scratch = floats(backward_scratch(padded_dim(problem)))](
               int32_t batch, int32_t head, const Tiling::Lists& lists) {
      const int64_t row = (int64_t{batch} * problem.heads + head) * tiling.tokens();
      QueryGradientTile tile;
      tile.tokens = &lists.tile;
      tile.head_dim = problem.head_dim;
      tile.scale = problem.scale;
      tile.query = rows_of(problem, tensors.query, batch, head);
      tile.key = rows_of(problem, tensors.key, batch, head / group);
      tile.value = rows_of(problem, tensors.value, batch, head / group);
      tile.output = rows_of(problem, tensors.output, batch, head);
      tile.grad_output = rows_of(problem, tensors.grad_output, batch, head);
      tile.grad_query = rows_of(problem, tensors.grad_query, batch, head);
      tile.logsumexp = tensors.logsumexp + row;
      tile.grad_logsumexp = nullptr;
      tile.grad_logsumexp_step = 0;
      if (const gna_tensor* grad = tensors.grad_logsumexp) {
        tile.grad_logsumexp = static_cast<const float*>(grad->data) + batch * grad->batch_stride +
                              head * grad->head_stride;
        tile.grad_logsumexp_step = grad->token_stride;
      }
      tile.delta = delta + row;
      tile.scratch = scratch.get();
      kernel.query_gradient[problem.type](tile);
    };
  });
}

int32_t key_gradient(const gna_problem& problem, const Kernel& kernel,
                     const BackwardTensors& tensors, const float* delta) {
  const Tiling tiling(problem, Role::keys);
  const std::vector<GlobalTokens> globals = globals_of(problem);
  const int32_t group = problem.heads / problem.kv_heads;
  const auto visible_globals = [](const GlobalTokens& tokens) -> const std::vector<int32_t>& {
    return tokens.visible;
  };
  return for_tiles(problem, tiling, globals, problem.kv_heads, 8.0 * group, visible_globals, [&]() {
    return [&, scratch = floats(backward_scratch(padded_dim(problem)))](
               int32_t batch, int32_t head, const Tiling::Lists& lists) {
      const int64_t row = (int64_t{batch} * problem.heads + head * group) * tiling.tokens();
      KeyGradientTile tile;
      tile.tokens = &lists.tile;
      tile.head_dim = problem.head_dim;
      tile.scale = problem.scale;
      tile.heads = group;
      tile.query = rows_of(problem, tensors.query, batch, head * group);
      tile.query_head_step = tensors.query.head_stride;
      tile.grad_output = rows_of(problem, tensors.grad_output, batch, head * group);
      tile.grad_output_head_step = tensors.grad_output.head_stride;
      tile.logsumexp = tensors.logsumexp + row;
      tile.delta = delta + row;
      tile.tokens_per_head = tiling.tokens();
      tile.key = rows_of(problem, tensors.key, batch, head);
      tile.value = rows_of(problem, tensors.value, batch, head);
      tile.grad_key = rows_of(problem, tensors.grad_key, batch, head);
      tile.grad_value = rows_of(problem, tensors.grad_value, batch, head);
      tile.scratch = scratch.get();
      kernel.key_gradient[problem.type](tile);
    };
  });
}

// The gradients of hidden keys are 0, and no tile has them in a lane.
void zero_hidden(const gna_problem& problem, const BackwardTensors& tensors) {
  const int64_t size = problem.type == GNA_FP32 ? 4 : 2;
  for (int32_t batch = 0; batch < problem.batch; ++batch) {
    const GlobalTokens globals(problem, batch);
    for (int32_t head = 0; head < problem.kv_heads; ++head)
      for (const gna_tensor* tensor : {&tensors.grad_key, &tensors.grad_value}) {
        const Rows rows = rows_of(problem, *tensor, batch, head);
        for (const int32_t token : globals.hidden)
          for (int64_t d = 0; d < problem.head_dim; ++d)
            std::memset(static_cast<char*>(rows.data) +
                            size * (token * rows.token_step + d * rows.dim_step),
                        0, size);
      }
  }
}

}  // namespace

}  // namespace gna

const char* gna_cpu_isa(int32_t index) {
  const gna::Kernel* const kernel = gna::kernel_at(index);
  return kernel ? kernel->isa : nullptr;
}

int32_t gna_cpu_forward(const gna_problem* problem, const gna_tensor* query, const gna_tensor* key,
                        const gna_tensor* value, const gna_tensor* output, float* logsumexp) try {
  if (!gna::valid(*problem)) return GNA_BAD_ARGUMENT;
  const gna::Kernel* const kernel = gna::find_kernel(problem->isa);
  if (!kernel) return GNA_NO_SUCH_ISA;
  return gna::forward(*problem, *kernel, *query, *key, *value, *output, logsumexp);
} catch (const std::bad_alloc&) {
  return GNA_NO_MEMORY;
}

int32_t gna_cpu_backward(const gna_problem* problem, const gna_tensor* grad_output,
                         const gna_tensor* grad_logsumexp, const gna_tensor* query,
                         const gna_tensor* key, const gna_tensor* value, const gna_tensor* output,
                         const float* logsumexp, const gna_tensor* grad_query,
                         const gna_tensor* grad_key, const gna_tensor* grad_value) try {
  if (!gna::valid(*problem)) return GNA_BAD_ARGUMENT;
  const gna::Kernel* const kernel = gna::find_kernel(problem->isa);
  if (!kernel) return GNA_NO_SUCH_ISA;
  const gna::BackwardTensors tensors = {*grad_output, grad_logsumexp, *query,      *key,     *value,
                                        *output,      logsumexp,      *grad_query, *grad_key,
                                        *grad_value};
  const int64_t rows =
      int64_t{problem->batch} * problem->heads * gna::tokens_of(*problem);
  const gna::Floats delta = gna::floats(rows);
  gna::zero_hidden(*problem, tensors);
  const int32_t code = gna::query_gradient(*problem, *kernel, tensors, delta.get());
  return code != GNA_OK ? code : gna::key_gradient(*problem, *kernel, tensors, delta.get());
} catch (const std::bad_alloc&) {
  return GNA_NO_MEMORY;
}

int64_t gna_cpu_streamed(const gna_axis* axis, int32_t log2_box, int32_t of_keys) {
  const auto role = of_keys ? gna::Role::keys : gna::Role::queries;
  const gna::AxisTiles tiles(*axis, log2_box, role);
  int64_t sum = 0;
  for (int32_t index = 0; index < tiles.count(); ++index)
    sum += tiles[index].stream.end - tiles[index].stream.begin;
  return sum;
}
