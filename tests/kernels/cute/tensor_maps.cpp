// The tensor maps that the host asks the driver for, beside those that CuTe asks it for. A stand-in for
// the driver keeps what it is asked.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

// CuTe calls the driver's functions by their names.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#include "comparison.h"
#include "cute_host.h"

namespace gna {

// cuTensorMapEncodeTiled's arguments.
struct Asked {
  int type, rank;
  const void* address;
  std::array<uint64_t, 5> sizes, strides;  // of strides, the last one is not used
  std::array<uint32_t, 5> box, steps;
  int interleave, swizzle, fill;
};
inline std::vector<Asked> asked;

}  // namespace gna

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type,
                                           cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps,
                                           CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  gna::Asked found{static_cast<int>(type),
                   static_cast<int>(rank),
                   address,
                   {},
                   {},
                   {},
                   {},
                   static_cast<int>(interleave),
                   static_cast<int>(swizzle),
                   static_cast<int>(fill)};
  for (cuuint32_t i = 0; i < rank; ++i) {
    found.sizes[i] = sizes[i];
    found.box[i] = box[i];
    found.steps[i] = steps[i];
    if (i + 1 < rank) found.strides[i] = strides[i];
  }
  // The map says which call made it.
  std::memset(map, 0, sizeof *map);
  map->opaque[0] = gna::asked.size();
  gna::asked.push_back(found);
  return CUDA_SUCCESS;
}

// Called by nothing here, but CuTe has a wrapper of it.
extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                            const cuuint64_t*, const cuuint64_t*, const int*,
                                            const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                            CUtensorMapInterleave, CUtensorMapSwizzle,
                                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

#include "device_on_host.h"

// Which kernel the host code prepares tensors for; it names four, by type and head_dim.
#include "cuda/launch.cuh"
#include "sm90/kernel.cuh"
#undef GNA_NAMES_32
#include "sm100/kernel.cuh"

namespace gna::cuda {

inline Params launched;

template <typename Kernel>
CompiledKernel host_side_of() {
  return {Kernel::log2_query_tile, Kernel::log2_query_box, Kernel::log2_output_box,
          [] { return cudaSuccess; },
          [](const Params& params, int, cudaStream_t) {
            launched = params;
            return cudaSuccess;
          }};
}
inline CompiledKernel tested_kernel;
inline int query_rows, output_rows;  // of its tiles in shared memory

// The runtime, for a machine without a device.
inline cudaError_t entry_point(const char*, void** function, unsigned, unsigned long long,
                               cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t current_device(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t attribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

}  // namespace gna::cuda

#define bf16_64 tested_kernel
#define bf16_128 tested_kernel
#define fp16_64 tested_kernel
#define fp16_128 tested_kernel
#define cudaGetDriverEntryPointByVersion entry_point
#define cudaGetDevice current_device
#define cudaDeviceGetAttribute attribute
#include "cuda/host.cu"

namespace gna {
namespace {

namespace c = ::cute;
using c::Int;

// A tensor [batch, heads, tokens, head_dim] of 16-bit elements in one of the two usual orders.
struct Tensor {
  int64_t batch, heads, tokens, head_dim;
  bool heads_before_tokens;  // BHSD, else BSHD

  int64_t token_stride() const { return heads_before_tokens ? head_dim : heads * head_dim; }
  int64_t head_stride() const { return heads_before_tokens ? tokens * head_dim : head_dim; }
  int64_t batch_stride() const { return tokens * heads * head_dim; }
};

struct Extents {
  int w, h, t;
};

// What CuTe asks for to load boxes of 64 columns and w x h x t tokens into the tiles that GMMA reads.
template <typename T, int w, int h, int t>
Asked asked_by_cute(const void* first, const Tensor& tensor, const Extents& grid) {
  const int64_t token = tensor.token_stride();
  const int64_t step = tensor.heads == 1   ? tensor.batch_stride()
                       : tensor.batch == 1 ? tensor.head_stride()
                                           : std::min(tensor.head_stride(), tensor.batch_stride());
  const int64_t last =
      (tensor.heads - 1) * tensor.head_stride() + (tensor.batch - 1) * tensor.batch_stride();
  const auto global =
      c::make_tensor(c::make_gmem_ptr(static_cast<const T*>(first)),
                     c::make_shape(static_cast<int>(tensor.head_dim), grid.w, grid.h, grid.t,
                                   static_cast<int>(last / step + 1)),
                     c::make_stride(c::_1{}, token, token * grid.w, token * grid.w * grid.h, step));
  using Atom = c::GMMA::Layout_K_SW128_Atom<T>;
  const auto shared = c::composition(Atom{}.layout_a(), Atom{}.offset(),
                                     c::Layout<c::Shape<c::_64, Int<w>, Int<h>, Int<t>, c::_1>>{});
  c::make_tma_copy(c::SM90_TMA_LOAD{}, global, shared, c::shape(shared), c::_1{});
  return asked.back();
}

// The same box, whatever the type and the extents; boxes that are not listed are not compared.
template <int w, int h, int t>
struct Box {};
template <typename... Boxes>
struct BoxList {};
using Compared = BoxList<Box<128, 1, 1>, Box<8, 16, 1>, Box<8, 8, 2>, Box<4, 4, 8>, Box<1, 2, 64>,
                         Box<64, 1, 1>, Box<8, 8, 1>, Box<8, 4, 2>, Box<4, 4, 4>, Box<1, 2, 32>>;

template <int... w, int... h, int... t>
bool find(BoxList<Box<w, h, t>...>, int type, const void* first, const Tensor& tensor,
          const Extents& grid, const Extents& box, Asked& found) {
  const auto try_one = [&](auto of_w, auto of_h, auto of_t) {
    constexpr int W = decltype(of_w)::value, H = decltype(of_h)::value, T = decltype(of_t)::value;
    if (W != box.w || H != box.h || T != box.t) return false;
    found = type == GNA_CUDA_BF16 ? asked_by_cute<c::bfloat16_t, W, H, T>(first, tensor, grid)
                                  : asked_by_cute<c::half_t, W, H, T>(first, tensor, grid);
    return true;
  };
  return (try_one(Int<w>{}, Int<h>{}, Int<t>{}) || ...);
}

// Dimensions from the second on. Those of one token say nothing, and may stand anywhere.
struct Dimension {
  uint64_t size, stride;
  uint32_t box, step;
};
std::vector<Dimension> dimensions_of(const Asked& map) {
  std::vector<Dimension> dimensions;
  for (int i = 1; i < map.rank; ++i)
    if (map.sizes[i] > 1)
      dimensions.push_back({map.sizes[i], map.strides[i - 1], map.box[i], map.steps[i]});
  return dimensions;
}

// What a map says of elements, of its tensor in global memory, and of its box in shared memory.
struct Comparisons {
  Comparison elements{"map elements and swizzles"}, tensors{"map tensors"}, boxes{"map boxes"};
};

void same_maps(Comparisons& comparisons, const char* name, const Asked& ours, const Asked& cutes) {
  auto& [elements, tensors, boxes] = comparisons;
  elements.equal(ours.type, cutes.type, "%s: type", name);
  tensors.equal(ours.rank, cutes.rank, "%s: rank", name);
  tensors.equal(reinterpret_cast<uintptr_t>(ours.address),
                reinterpret_cast<uintptr_t>(cutes.address), "%s: address", name);
  elements.equal(ours.interleave, cutes.interleave, "%s: interleave", name);
  elements.equal(ours.swizzle, cutes.swizzle, "%s: swizzle", name);
  elements.equal(ours.fill, cutes.fill, "%s: fill", name);
  tensors.equal(ours.sizes[0], cutes.sizes[0], "%s: columns", name);
  boxes.equal(ours.box[0], cutes.box[0], "%s: columns of a box", name);
  auto a = dimensions_of(ours), b = dimensions_of(cutes);
  tensors.equal(a.size(), b.size(), "%s: dimensions", name);
  if (a.size() != b.size()) return;
  // Dimensions of boxes of one token may be in any order, the others not: it is that of the tile's rows.
  const auto tokens = [](const std::vector<Dimension>& dimensions) {
    std::vector<uint64_t> strides;
    for (const Dimension& dimension : dimensions)
      if (dimension.box > 1) strides.push_back(dimension.stride);
    return strides;
  };
  boxes.equal(tokens(a) == tokens(b), true, "%s: order of dimensions", name);
  for (auto* dimensions : {&a, &b})
    std::sort(dimensions->begin(), dimensions->end(),
              [](const Dimension& x, const Dimension& y) { return x.stride < y.stride; });
  for (size_t i = 0; i < a.size(); ++i) {
    tensors.equal(a[i].size, b[i].size, "%s: size %zu", name, i);
    tensors.equal(a[i].stride, b[i].stride, "%s: stride %zu", name, i);
    boxes.equal(a[i].box, b[i].box, "%s: box %zu", name, i);
    boxes.equal(a[i].step, b[i].step, "%s: element stride %zu", name, i);
  }
}

struct Case {
  int rank;
  std::array<int, 3> lengths;  // t, h, w; axes in front that the rank leaves out have one token
  std::array<int, 3> log2_query, log2_key;
  int prefix, suffix;
};

alignas(1024) uint8_t memory[16];

void compare(Comparisons& comparisons, const Case& one, int type, int head_dim,
             bool heads_before_tokens, int batch, int kv_heads) {
  const cuda::CompiledKernel& kernel = cuda::tested_kernel;
  gna_cuda_problem problem{};
  problem.type = type;
  problem.batch = batch;
  problem.heads = 4;
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.axis_count = one.rank;
  problem.prefix = one.prefix;
  problem.suffix = one.suffix;
  problem.scale = 1;
  int grid_tokens = 1;
  std::array<int, 3> query_box = one.log2_query;
  // A query tile of 256 rows: twice as long along its first axis.
  query_box[3 - one.rank] += kernel.log2_query_tile - 7;
  for (int a = 3 - one.rank; a < 3; ++a) {
    grid_tokens *= one.lengths[a];
    problem.axes[a - 3 + one.rank] = {one.lengths[a], 4, 1, 1, 0, query_box[a], one.log2_key[a]};
  }
  const int64_t tokens = one.prefix + grid_tokens + one.suffix;
  const Tensor queries{batch, 4, tokens, head_dim, heads_before_tokens};
  const Tensor keys{batch, kv_heads, tokens, head_dim, heads_before_tokens};
  const auto plain = [](const Tensor& tensor, int place) {
    return gna_cuda_tensor{memory + (static_cast<size_t>(place) << 32), tensor.batch_stride(),
                           tensor.head_stride(), tensor.token_stride()};
  };
  const gna_cuda_tensor tensors[4] = {plain(queries, 0), plain(keys, 1), plain(keys, 2),
                                      plain(queries, 3)};
  asked.clear();
  if (gna_forward(&problem, &tensors[0], &tensors[1], &tensors[2], &tensors[3], nullptr, nullptr) !=
      GNA_CUDA_OK) {
    comparisons.tensors.equal(1, 0, "%s", gna_message());
    return;
  }
  const std::vector<Asked> by_host = asked;

  // What fits into a tile of so many rows: the inner axes first.
  const auto part = [](const std::array<int, 3>& log2_box, int rows) {
    Extents extents{1, 1, 1};
    int* const to[3] = {&extents.t, &extents.h, &extents.w};
    for (int a = 2; a >= 0; --a) {
      *to[a] = std::min(rows, 1 << log2_box[a]);
      rows /= *to[a];
    }
    return extents;
  };
  const struct {
    const char* name;
    const cuda::Maps& maps;
    const Tensor& tensor;
    Extents box;
    int rows;
  } described[] = {
      {"query", cuda::launched.query, queries, part(query_box, cuda::query_rows), cuda::query_rows},
      {"key", cuda::launched.key, keys, part(one.log2_key, cuda::tile_n), cuda::tile_n},
      {"value", cuda::launched.value, keys, part(one.log2_key, cuda::tile_n), cuda::tile_n},
      {"output", cuda::launched.output, queries, part(query_box, cuda::output_rows),
       cuda::output_rows}};
  const Extents grid{one.lengths[2], one.lengths[1], one.lengths[0]};
  for (int i = 0; i < 4; ++i) {
    const auto& [name, maps, tensor, box, rows] = described[i];
    const auto* const base = static_cast<const uint8_t*>(tensors[i].data);
    const auto same = [&](const CUtensorMap& map, int first, const Extents& of_part,
                          const Extents& of_box) {
      Asked cutes;
      const void* const at = base + 2 * first * tensor.token_stride();
      if (!find(Compared{}, type, at, tensor, of_part, of_box, cutes)) {
        comparisons.boxes.equal(0, 1, "%s: no box of %d x %d x %d to compare with", name, of_box.w,
                                of_box.h, of_box.t);
        return;
      }
      same_maps(comparisons, name, by_host.at(map.opaque[0]), cutes);
    };
    same(maps.of_part[grid_part], one.prefix, grid, box);
    const Extents run{rows, 1, 1};
    if (one.prefix > 0) same(maps.of_part[prefix_part], 0, {one.prefix, 1, 1}, run);
    if (one.suffix > 0)
      same(maps.of_part[suffix_part], one.prefix + grid_tokens, {one.suffix, 1, 1}, run);
  }
}

// Of the kernel whose host side is tested_kernel.
void compare_all(Comparisons& comparisons) {
  const Case cases[] = {{1, {1, 1, 1000}, {0, 0, 7}, {0, 0, 7}, 0, 0},
                        {2, {1, 50, 70}, {0, 4, 3}, {0, 4, 3}, 7, 0},
                        {3, {9, 20, 30}, {1, 3, 3}, {3, 2, 2}, 0, 300},
                        {3, {70, 5, 6}, {3, 2, 2}, {6, 1, 0}, 3, 5}};
  for (const Case& one : cases)
    for (const int type : {GNA_CUDA_BF16, GNA_CUDA_FP16})
      for (const int head_dim : {40, 64, 72, 128})
        for (const bool heads_before_tokens : {false, true})
          for (const int batch : {1, 2})
            for (const int kv_heads : {1, 4})
              compare(comparisons, one, type, head_dim, heads_before_tokens, batch, kv_heads);
}

void compare_architectures() {
  Comparisons comparisons;
  using Hopper = sm90::SharedStorage<64>;
  cuda::tested_kernel = cuda::host_side_of<sm90::Kernel<__half, 64, false>>();
  cuda::query_rows = sizeof(Hopper::query) / cuda::row_bytes;
  cuda::output_rows = sizeof(Hopper::output) / 2 / cuda::row_bytes;
  compare_all(comparisons);
  using Blackwell = sm100::SharedStorage<64>;
  cuda::tested_kernel = cuda::host_side_of<sm100::Kernel<__half, 64, false>>();
  cuda::query_rows = sizeof(Blackwell::query) / 2 / cuda::row_bytes;
  cuda::output_rows = sizeof(Blackwell::output) / Blackwell::output_stages / cuda::row_bytes;
  compare_all(comparisons);
}

}  // namespace
}  // namespace gna

int main() { gna::compare_architectures(); }
