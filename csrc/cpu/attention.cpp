// The C interface: checks the problem, cuts it into tiles, and has them worked on.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "gna_cpu.h"
#include "isa.hpp"
#include "kernel.hpp"
#include "problem.hpp"
#include "threads.hpp"
#include "tiles.hpp"

namespace gna {

namespace {

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
  const int64_t bytes = (count * int64_t{sizeof(float)} + 64) / 64 * 64;
  auto* const memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!memory) throw std::bad_alloc();
  return Floats(memory);
}

int64_t padded_dim(const gna_problem& problem) { return (problem.head_dim + 15) / 16 * 16; }

// Calls visit(batch, head, lists) for every tile: first those that no window limits, as a rule the
// longest, then head by head, so that a head's keys stay in the caches, longest first within a head.
template <class MakeVisit>
int32_t for_tiles(const gna_problem& problem, const Tiling& tiling, int32_t heads,
                  double flops_per_pair, const MakeVisit& make_visit) {
  const int64_t batch_heads = int64_t{problem.batch} * heads;
  const int64_t linked = batch_heads * tiling.linked_count();
  const int64_t items = linked + batch_heads * tiling.grid_count();
  const double flops = tiling.pairs() * flops_per_pair * heads * problem.head_dim;
  return for_items(items, flops, problem.threads, [&]() {
    return [&, visit = make_visit(), lists = Lists{}](int64_t item) mutable {
      const bool of_grid = item >= linked;
      if (of_grid) item -= linked;
      const int64_t tiles = of_grid ? tiling.grid_count() : tiling.linked_count();
      const auto batch = static_cast<int32_t>(item / tiles / heads);
      const auto head = static_cast<int32_t>(item / tiles % heads);
      if (of_grid)
        tiling.make_grid(batch, item % tiles, lists);
      else if (!tiling.make_linked(batch, item % tiles, lists))
        return;
      visit(batch, head, lists);
    };
  });
}

int32_t forward(const gna_problem& problem, const Kernel& kernel, const gna_tensor& query,
                const gna_tensor& key, const gna_tensor& value, const gna_tensor& output,
                float* logsumexp) {
  const Tiling tiling(problem, Role::queries);
  const int32_t group = problem.heads / problem.kv_heads;
  return for_tiles(problem, tiling, problem.heads, 4, [&]() {
    return [&, scratch = floats(forward_scratch(padded_dim(problem)))](int32_t batch, int32_t head,
                                                                       const Lists& lists) {
      ForwardTile tile;
      tile.tokens = &lists.tile;
      tile.head_dim = problem.head_dim;
      tile.scale = problem.scale;
      tile.query = rows_of(problem, query, batch, head);
      tile.key = rows_of(problem, key, batch, head / group);
      tile.value = rows_of(problem, value, batch, head / group);
      tile.output = rows_of(problem, output, batch, head);
      tile.logsumexp = logsumexp + (int64_t{batch} * problem.heads + head) * tiling.lane_tokens();
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

int32_t query_gradient(const gna_problem& problem, const Kernel& kernel, const Tiling& tiling,
                       const BackwardTensors& tensors, float* delta) {
  const int32_t group = problem.heads / problem.kv_heads;
  return for_tiles(problem, tiling, problem.heads, 6, [&]() {
    return [&, scratch = floats(backward_scratch(padded_dim(problem)))](int32_t batch, int32_t head,
                                                                        const Lists& lists) {
      const int64_t row = (int64_t{batch} * problem.heads + head) * tiling.lane_tokens();
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

int32_t key_gradient(const gna_problem& problem, const Kernel& kernel, const Tiling& tiling,
                     const BackwardTensors& tensors, const float* delta) {
  const int32_t group = problem.heads / problem.kv_heads;
  return for_tiles(problem, tiling, problem.kv_heads, 8.0 * group, [&]() {
    return [&, scratch = floats(backward_scratch(padded_dim(problem)))](int32_t batch, int32_t head,
                                                                        const Lists& lists) {
      const int64_t queries = tiling.streamed_tokens();
      const int64_t row = (int64_t{batch} * problem.heads + head * group) * queries;
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
      tile.queries_per_head = queries;
      tile.key = rows_of(problem, tensors.key, batch, head);
      tile.value = rows_of(problem, tensors.value, batch, head);
      tile.grad_key = rows_of(problem, tensors.grad_key, batch, head);
      tile.grad_value = rows_of(problem, tensors.grad_value, batch, head);
      tile.scratch = scratch.get();
      kernel.key_gradient[problem.type](tile);
    };
  });
}

int32_t backward(const gna_problem& problem, const Kernel& kernel, const BackwardTensors& tensors) {
  const Tiling queries(problem, Role::queries), keys(problem, Role::keys);
  const Floats delta = floats(int64_t{problem.batch} * problem.heads * queries.lane_tokens());
  const int32_t code = query_gradient(problem, kernel, queries, tensors, delta.get());
  return code != GNA_OK ? code : key_gradient(problem, kernel, keys, tensors, delta.get());
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
  return gna::backward(*problem, *kernel, tensors);
} catch (const std::bad_alloc&) {
  return GNA_NO_MEMORY;
}

int64_t gna_cpu_streamed(const gna_pattern* pattern, int32_t of_keys, int32_t segment, int32_t axis,
                         int32_t log2_box, int64_t* streamed) {
  if (!gna::valid(*pattern) || log2_box < 0 || log2_box > 6) return -1;
  const gna::Sides sides(*pattern, {}, of_keys ? gna::Role::keys : gna::Role::queries);
  if (segment < 0 || segment >= sides.lanes.count()) return -1;
  const gna_segment& cut = sides.lanes[segment];
  if (axis < 0 || axis >= cut.axis_count) return -1;
  const gna::Range at_hand = {cut.axes[axis].begin, cut.axes[axis].end};
  const auto sights = gna::sights_along(sides, segment, axis + gna::most_axes - cut.axis_count);
  const gna::AxisTiles tiles(at_hand, gna::lane_step(sights, at_hand), log2_box);
  const std::vector<int32_t> linked = sides.linked(segment, GNA_WINDOW);
  std::fill_n(streamed, sides.streamed.count(), int64_t{0});
  for (std::size_t n = 0; n < linked.size(); ++n)
    for (int32_t index = 0; index < tiles.count(); ++index)
      streamed[linked[n]] += gna::size(sights[n].stream(tiles, tiles[index]).all);
  return tiles.count();
}
