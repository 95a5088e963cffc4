// The Blackwell kernel's descriptors, swizzles and tensor memory, beside CuTe's.
#include <functional>
#include <utility>
#include <vector>

#include "../../ptx/units/tcgen05.h"
#include "comparison.h"
#include "cute_host.h"
#include "device_on_host.h"

// Functions of inline PTX, which are replaced below.
#define pack pack_by_ptx
#define exp2_approximate exp2_by_ptx
#define mbarrier_arrive mbarrier_arrive_by_ptx
#define named_barrier_sync named_barrier_sync_by_ptx
#include "cuda/ptx.cuh"
#undef pack
#undef exp2_approximate
#undef mbarrier_arrive
#undef named_barrier_sync

namespace gna::cuda {

// Two whole numbers as they are; the tests number the elements.
template <typename Element>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(high) << 16 | static_cast<uint32_t>(low);
}

inline float exp2_approximate(float x) { return x; }

inline std::function<void(const uint64_t*)> on_arrival;
inline void mbarrier_arrive(uint64_t* barrier) {
  if (on_arrival) on_arrival(barrier);
}

inline std::function<void()> on_named_barrier;
template <int threads>
void named_barrier_sync(int) {
  if (on_named_barrier) on_named_barrier();
}

}  // namespace gna::cuda

#define mma_ss mma_ss_by_ptx
#define mma_ts mma_ts_by_ptx
#define tmem_load tmem_load_by_ptx
#define tmem_store tmem_store_by_ptx
#define fma2 fma2_by_ptx
#define add2 add2_by_ptx
#define max3 max3_by_ptx
#include "sm100/tcgen05.cuh"
#undef mma_ss
#undef mma_ts
#undef tmem_load
#undef tmem_store
#undef fma2
#undef add2
#undef max3

namespace gna::sm100 {

// One tcgen05.mma; `b`, and with `is_ss` also `a`, are descriptors as the PTX puts them together.
struct Mma {
  bool is_ss;
  uint32_t to;
  uint64_t a, b;
  uint32_t instruction;
};
inline std::vector<Mma> issued;

constexpr uint64_t high = static_cast<uint64_t>(descriptor_high) << 32;
inline void mma_ss(uint32_t to, uint32_t a, uint32_t b, uint32_t instruction, bool) {
  issued.push_back({true, to, high | a, high | b, instruction});
}
inline void mma_ts(uint32_t to, uint32_t a, uint32_t b, uint32_t instruction, bool) {
  issued.push_back({false, to, a, high | b, instruction});
}

namespace c = ::cute;

// Tensor memory, and which of its cells a thread's registers are by CuTe's traits of the instructions.
inline uint32_t cells[128][512];
inline std::vector<uint32_t> accessed;  // addresses, by the current thread

template <typename Op, typename Registers>
uint32_t& cell(uint32_t address, int i) {
  const int bit = Registers{}(static_cast<int>(threadIdx.x % 32), 32 * i);
  const int at = typename c::Copy_Traits<Op>::ValID{}(bit);
  constexpr int per_lane = c::TMEM::DP_b::value;
  return cells[(address >> 16) + at / per_lane][(address & 0xffff) + at % per_lane / 32];
}

inline void tmem_load(float* to, uint32_t address) {
  using Op = c::SM100_TMEM_LOAD_32dp32b32x;
  accessed.push_back(address);
  for (int i = 0; i < 32; ++i)
    to[i] = static_cast<float>(cell<Op, typename c::Copy_Traits<Op>::DstLayout>(address, i));
}

template <typename T, int n>
void tmem_store(uint32_t address, const T (&from)[n]) {
  using Op =
      std::conditional_t<n == 16, c::SM100_TMEM_STORE_32dp32b16x, c::SM100_TMEM_STORE_32dp32b32x>;
  accessed.push_back(address);
  for (int i = 0; i < n; ++i) {
    uint32_t& to = cell<Op, typename c::Copy_Traits<Op>::SrcLayout>(address, i);
    if constexpr (std::is_same_v<T, float>)
      to = std::isinf(from[i]) ? ~0u : static_cast<uint32_t>(from[i]);
    else
      to = from[i];
  }
}

inline Float2 fma2(Float2 a, Float2 b, Float2 x) {
  return {a.low * b.low + x.low, a.high * b.high + x.high};
}
inline Float2 add2(Float2 a, Float2 b) { return {a.low + b.low, a.high + b.high}; }
inline float max3(float a, float b, float x) { return std::fmax(a, std::fmax(b, x)); }

}  // namespace gna::sm100

#define max_of max_of_kernel
#include "sm100/softmax.cuh"
#undef max_of

namespace gna::sm100 {

inline std::vector<float> scores_loaded;  // by the current thread
inline float max_of(const float (&scores)[128]) {
  scores_loaded.assign(scores, scores + 128);
  return 0;
}

}  // namespace gna::sm100

#define tma_store tma_store_by_ptx
#include "cuda/tma.cuh"
#undef tma_store
#define store_logsumexp store_logsumexp_of_kernel
#include "cuda/logsumexp.cuh"
#undef store_logsumexp

namespace gna::cuda {

struct TmaStore {
  const uint8_t* from;
  int column;
};
inline std::vector<TmaStore> boxes_stored;
inline void tma_store(const CUtensorMap&, const void* from, int column, int, int, int, int) {
  boxes_stored.push_back({static_cast<const uint8_t*>(from), column});
}

struct LogsumexpStore {
  int row;
  float row_max;
};
inline std::vector<LogsumexpStore> logsumexps;
template <int log2_tile_m>
void store_logsumexp(const Params&, const WorkTileInfo<log2_tile_m>&, int row, float row_max,
                     float) {
  logsumexps.push_back({row, row_max});
}

}  // namespace gna::cuda

#include "sm100/epilogue.cuh"
#include "sm100/mainloop.cuh"

namespace gna::sm100 {
namespace {

using c::_;
using c::Int;
using c::Shape;
using Major = c::UMMA::Major;

constexpr uint32_t tmem = 0;

void for_each_thread(const std::function<void(int)>& body) {
  for (int thread = 0; thread < 128; ++thread) {
    device::thread.x = thread;
    accessed.clear();
    body(thread);
  }
}

// A number for each element of a tile of 128 rows, 32768 at most.
constexpr uint32_t number(int row, int column) { return static_cast<uint32_t>(128 * row + column); }

template <typename Element, int head_dim>
struct Checks {
  using T = CuteElementOf<Element>;
  using Storage = SharedStorage<head_dim>;
  using Qk = c::SM100_MMA_F16BF16_SS<T, T, float, half_rows, tile_n, Major::K, Major::K>;
  using Pv = c::SM100_MMA_F16BF16_TS<T, T, float, half_rows, head_dim, Major::K, Major::MN>;

  Params params{};
  Storage& shared = *reinterpret_cast<Storage*>(device::shared_memory);
  Mainloop<Element, head_dim, false> mainloop{params, shared};

  template <typename Op>
  static uint32_t instruction_of() {
    return static_cast<uint32_t>(typename c::MMA_Traits<Op>{}.idesc_);
  }

  // An accumulator, or the left operand P, in tensor memory by CuTe.
  template <int columns>
  static auto accumulator() {
    using Frg = typename c::MMA_Traits<Pv>::FrgTypeC;
    return Frg::make(Shape<Shape<Int<half_rows>, Int<columns>>, c::_1, c::_1>{});
  }
  static auto probabilities() {
    using Frg = typename c::MMA_Traits<Pv>::FrgTypeA;
    return Frg::make(Shape<Shape<Int<half_rows>, c::_16>, c::_1, Int<tile_n / 16>>{});
  }

  // The MMA warp's work on more key tiles than there are stages: visit(mma, half, tile, k), where k counts
  // the steps of 16 that are summed over.
  template <typename Visit>
  void for_each_mma(Visit visit) {
    constexpr int tiles = Storage::stages / 2 + 2;
    std::memset(device::shared_memory, 0, device::shared_size);
    int arrivals = 0;
    on_arrival = [&](const uint64_t* barrier) {
      if (barrier < shared.key_tile_info.empty ||
          barrier >= shared.key_tile_info.empty + Storage::key_tile_stages)
        return;
      ++arrivals;
      for (KeyTileInfo& tile : shared.key_tiles)
        tile.flags = arrivals == tiles       ? no_more_tiles | skipped | skipped << half_bits
                     : arrivals == tiles - 1 ? last_tile
                                             : 0;
    };
    issued.clear();
    mainloop.mma(tmem);
    on_arrival = nullptr;
    int scores_done[2] = {}, outputs_done[2] = {};  // MMAs, by half
    for (const Mma& mma : issued) {
      const int half = mma.to % 256 / 128;
      const int done = (mma.is_ss ? scores_done : outputs_done)[half]++;
      const int steps = (mma.is_ss ? head_dim : tile_n) / 16;
      visit(mma, half, done / steps, done % steps);
    }
  }

  void smem_descriptors(Comparison& comparison) {
    auto qk = c::make_tiled_mma(Qk{}).get_slice(0);
    auto pv = c::make_tiled_mma(Pv{}).get_slice(0);
    for_each_mma([&](const Mma& mma, int half, int tile, int k) {
      uint8_t* const stage = shared.tiles[(2 * tile + (mma.is_ss ? 0 : 1)) % Storage::stages];
      if (mma.is_ss) {
        const auto queries = k_major_tile<Element, half_rows, head_dim>(shared.query[half]);
        const auto keys = k_major_tile<Element, tile_n, head_dim>(stage);
        const auto a = qk.make_fragment_A(qk.partition_A(queries));
        const auto b = qk.make_fragment_B(qk.partition_B(keys));
        comparison.equal(mma.a, a(c::_0{}, c::_0{}, k).desc_, "queries, half %d, step %d", half, k);
        comparison.equal(mma.b, b(c::_0{}, c::_0{}, k).desc_, "keys, tile %d, step %d", tile, k);
      } else {
        const auto values = mn_major_tile<Element, tile_n, head_dim>(stage);
        const auto b = pv.make_fragment_B(pv.partition_B(values));
        // A tile of 64 columns has no leading dimension: nothing lies 64 columns further.
        constexpr uint64_t used = head_dim == 64 ? ~(uint64_t{0x3fff} << 16) : ~uint64_t{0};
        comparison.equal(mma.b & used, b(c::_0{}, c::_0{}, k).desc_ & used,
                         "values, tile %d, step %d", tile, k);
      }
    });
    const int tiles = Storage::stages / 2 + 2;
    comparison.equal(issued.size(), 2 * tiles * (head_dim / 16 + tile_n / 16), "MMAs");
  }

  void instruction_descriptors(Comparison& comparison) {
    for_each_mma([&](const Mma& mma, int half, int, int k) {
      comparison.equal(mma.instruction, mma.is_ss ? instruction_of<Qk>() : instruction_of<Pv>(),
                       "%s of half %d, step %d", mma.is_ss ? "S" : "O", half, k);
    });
  }

  void tensor_memory_operands(Comparison& comparison) {
    const auto probs = probabilities();
    for_each_mma([&](const Mma& mma, int half, int, int k) {
      comparison.equal(mma.to, mma.is_ss ? scores_column(half) : output_column(half),
                       "%s of half %d", mma.is_ss ? "S" : "O", half);
      if (!mma.is_ss)
        comparison.equal(mma.a, scores_column(half) + c::raw_pointer_cast(probs(_, _, k).data()),
                         "P of half %d, step %d", half, k);
    });
  }

  // Which cell is an accumulator's element.
  template <int columns>
  static uint32_t& element_cell(uint32_t first_column, int row, int column) {
    const auto tile = accumulator<columns>();
    const uint32_t at = tile.layout()(c::make_coord(row, column), 0, 0);
    return cells[at >> 16][first_column + (at & 0xffff)];
  }

  // S from tensor memory, row_stats and P back to tensor memory.
  void softmax_rows(Comparison& comparison) {
    std::memset(device::shared_memory, 0, device::shared_size);
    shared.work_tiles[1].is_end = true;
    shared.key_tiles[0].flags = last_tile;
    params.scale_log2 = 1;
    params.minor = 3;  // no exponential is emulated
    const auto tile = accumulator<tile_n>();
    const auto tensor = c::make_tensor(tile.data(), c::layout<0>(tile.layout()));
    const auto copy = c::make_tmem_copy(c::SM100_TMEM_LOAD_32dp32b32x{}, tensor);
    const auto places = c::make_identity_tensor(Shape<Int<half_rows>, Int<tile_n>>{});
    for (int half = 0; half < 2; ++half) {
      std::memset(cells, 0, sizeof cells);
      for (int row = 0; row < half_rows; ++row)
        for (int column = 0; column < tile_n; ++column)
          element_cell<tile_n>(scores_column(half), row, column) = number(row, column);
      for_each_thread([&](int thread) {
        mainloop.softmax(half, tmem);
        const auto slice = copy.get_slice(thread);
        const auto of_thread = slice.partition_D(places);
        const auto source = slice.partition_S(tensor);
        comparison.equal(scores_loaded.size(), c::size(of_thread), "scores of thread %d", thread);
        for (int i = 0; i < tile_n; ++i)
          comparison.equal(scores_loaded[i],
                           number(c::get<0>(of_thread(i)), c::get<1>(of_thread(i))),
                           "half %d, thread %d: score %d", half, thread, i);
        for (int column = 0; column < tile_n; ++column) {
          float scores[tile_n] = {};
          Bitmask bitmask{};
          bitmask.word[column / 32] = 1u << column % 32;
          apply_bitmask(scores, bitmask);
          for (int i = 0; i < tile_n; ++i)
            comparison.equal(scores[i] == 0, c::get<1>(of_thread(i)) == column,
                             "thread %d, register %d, column %d: is visible", thread, i, column);
        }
        for (int part = 0; part < tile_n / 32; ++part)
          comparison.equal(
              accessed.at(part),
              scores_column(half) + c::raw_pointer_cast(source(_, c::_0{}, part).data()),
              "half %d, thread %d: address of load %d", half, thread, part);
      });
      const auto a = probabilities();
      for (int row = 0; row < half_rows; ++row)
        for (int key = 0; key < tile_n; ++key) {
          // Of 16-bit elements an address has the half of the cell in its uppermost bits.
          const uint32_t at =
              (a.data() + a.layout()(c::make_coord(row, key % 16), 0, key / 16)).get();
          const uint32_t pair = cells[at >> 16 & 0x7f][scores_column(half) + (at & 0xffff)];
          comparison.equal(at >> 24 == 0 ? pair & 0xffff : pair >> 16, number(row, key),
                           "half %d, row %d: P of key %d", half, row, key);
        }
    }
  }

  // O from tensor memory to shared memory, as TMA stores it.
  void output_tile(Comparison& comparison) {
    std::memset(device::shared_memory, 0, device::shared_size);
    WorkTileInfo work{};
    work.has_rows[0] = work.has_rows[1] = true;
    const Epilogue<Element, head_dim, false> epilogue(mainloop);
    for (int half = 0; half < 2; ++half) {
      std::memset(cells, 0, sizeof cells);
      for (int row = 0; row < half_rows; ++row) {
        shared.row_stats[half][row] = {static_cast<float>(half * half_rows + row), 1.0f};
        for (int column = 0; column < head_dim; ++column)
          element_cell<head_dim>(output_column(half), row, column) = number(row, column);
      }
      // One stage serves several boxes: what a thread has written of each is taken from it at the barrier
      // before the store. No number has only ones.
      boxes_stored.clear();
      logsumexps.clear();
      constexpr int elements = half_rows * box_columns;
      std::vector<std::vector<uint16_t>> boxes(Storage::boxes,
                                               std::vector<uint16_t>(elements, 0xffff));
      std::memset(shared.output, 0xff, sizeof shared.output);
      for_each_thread([&](int thread) {
        int barriers = 0;
        on_named_barrier = [&] {
          if (++barriers % 2 != 0) return;
          const int box = barriers / 2 - 1;
          auto* const stage =
              reinterpret_cast<uint16_t*>(shared.output[box % Storage::output_stages]);
          for (int i = 0; i < elements; ++i)
            if (stage[i] != 0xffff) boxes[box][i] = std::exchange(stage[i], 0xffff);
        };
        typename Epilogue<Element, head_dim, false>::OutputState state;
        epilogue.store_half(work, half, tmem + (thread / 32 * 32 << 16), 0, state);
        on_named_barrier = nullptr;
      });
      comparison.equal(boxes_stored.size(), Storage::boxes, "boxes stored");
      for (int box = 0; box < Storage::boxes; ++box) {
        uint8_t* const stage = shared.output[box % Storage::output_stages];
        const auto tile = k_major_tile<Element, half_rows, box_columns>(stage);
        comparison.equal(boxes_stored.at(box).from - device::shared_memory,
                         stage - device::shared_memory, "box %d", box);
        comparison.equal(boxes_stored.at(box).column, box * box_columns, "column of box %d", box);
        for (int row = 0; row < half_rows; ++row)
          for (int column = 0; column < box_columns; ++column)
            comparison.equal(boxes[box][(address_of(tile, row, column) - stage) / 2],
                             number(row, box * box_columns + column), "row %d, column %d of box %d",
                             row, column, box);
      }
      for (const LogsumexpStore& stored : logsumexps)
        comparison.equal(stored.row, stored.row_max, "row of a logsumexp");
      comparison.equal(logsumexps.size(), half_rows, "logsumexps");
    }
  }

  // One value that is not finite in each column: where it is found, and which outputs it comes back to.
  void non_finite_values(Comparison& comparison) {
    const auto values = mn_major_tile<Element, tile_n, head_dim>(shared.tiles[1]);
    const uint16_t nan = 0x7fff;
    for (int round = 0; round < tile_n; ++round) {
      std::memset(shared.tiles[1], 0, Storage::tile_bytes);
      const auto key_of = [&](int column) { return (round + 5 * column) % tile_n; };
      for (int column = 0; column < head_dim; ++column)
        std::memcpy(address_of(values, column, key_of(column)), &nan, 2);
      for_each_thread([&](int thread) {
        take_out_non_finite<Element, head_dim, epilogue_threads>(shared.tiles[1], thread,
                                                                 shared.non_finite);
      });
      for (int column = 0; column < head_dim; ++column)
        for (int word = 0; word < tile_n / 32; ++word) {
          const int key = key_of(column);
          comparison.equal(shared.non_finite.nan[word][column],
                           word == key / 32 ? 1u << key % 32 : 0, "key %d, column %d: is noted",
                           key, column);
        }
    }
    for (int column = 0; column < head_dim; ++column) {
      std::memset(&shared.non_finite, 0, sizeof shared.non_finite);
      shared.non_finite.plus[0][column] = 1;
      for (int row = 0; row < half_rows; row += 31) {
        std::memset(cells, 0, sizeof cells);
        for_each_thread([&](int thread) {
          Bitmask bitmask{};
          bitmask.word[0] = thread == row;
          put_back_non_finite<head_dim>(tmem + (thread / 32 * 32 << 16) + output_column(0), true,
                                        shared.non_finite, bitmask);
        });
        for (int other = 0; other < head_dim; ++other)
          comparison.equal(element_cell<head_dim>(output_column(0), row, other) != 0,
                           other == column, "row %d, column %d: is put back", row, other);
      }
    }
  }
};

// The kernels of one type and head_dim, or of all; GNA_ONE_KERNEL compiles faster.
template <typename Element, int head_dim, typename Visit>
void for_kernel(Comparison& comparison, Visit visit) {
  Checks<Element, head_dim> checks;
  visit(checks, comparison);
}

template <typename Visit>
void for_each_kernel(const char* name, Visit visit) {
  Comparison comparison(name);
  for_kernel<__nv_bfloat16, 128>(comparison, visit);
#ifndef GNA_ONE_KERNEL
  for_kernel<__nv_bfloat16, 64>(comparison, visit);
  for_kernel<__half, 64>(comparison, visit);
  for_kernel<__half, 128>(comparison, visit);
#endif
}

// The interpreter's tcgen05: instruction descriptors, tensor memory, and where it looks for what CuTe
// describes.
void interpreter() {
  Comparison comparison("interpreter");
  using T = c::half_t;
  using Qk = c::SM100_MMA_F16BF16_SS<T, T, float, 128, 128, Major::K, Major::K>;
  using Pv = c::SM100_MMA_F16BF16_TS<T, T, float, 128, 128, Major::K, Major::MN>;
  const ptx::InstructionDescriptor decoded =
      ptx::decode_instruction(static_cast<uint32_t>(c::MMA_Traits<Pv>{}.idesc_));
  comparison.equal(decoded.m, 128, "rows");
  comparison.equal(decoded.n, 128, "columns");
  comparison.equal(decoded.type == ptx::Element::fp16, true, "type");
  comparison.equal(decoded.major_a == ptx::Major::k, true, "A is K-major");
  comparison.equal(decoded.major_b == ptx::Major::mn, true, "B is MN-major");

  uint8_t* const shared = device::shared_memory;
  const auto same_addresses = [&](const auto& tile, const auto& fragment, ptx::Major major) {
    for (int k = 0; k < c::size<2>(fragment); ++k) {
      const ptx::SmemMatrix matrix(ptx::decode_sm100(fragment(c::_0{}, c::_0{}, k).desc_), major,
                                   128, 16, 2, "a tile");
      for (int row = 0; row < 128; ++row)
        for (int column = 0; column < 16; ++column)
          comparison.equal(matrix.address(row, column),
                           address_of(tile, row, 16 * k + column) - shared, "row %d, column %d",
                           row, 16 * k + column);
    }
  };
  auto qk = c::make_tiled_mma(Qk{}).get_slice(0);
  const auto keys = k_major_tile<__half, 128, 128>(shared);
  same_addresses(keys, qk.make_fragment_B(qk.partition_B(keys)), ptx::Major::k);
  auto pv = c::make_tiled_mma(Pv{}).get_slice(0);
  const auto values = mn_major_tile<__half, 128, 128>(shared);
  same_addresses(values, pv.make_fragment_B(pv.partition_B(values)), ptx::Major::mn);

  ptx::TensorMemory memory;
  comparison.equal(memory.allocate(512).value_or(1), 0, "address of all columns");
  for (uint32_t lane = 0; lane < 128; ++lane)
    for (uint32_t column = 0; column < 512; ++column)
      memory.write(lane, column, cells[lane][column] = 512 * lane + column);
  for (uint32_t warp = 0; warp < 4; ++warp) {
    const uint32_t address = (32 * warp << 16) + 96;
    const ptx::TensorAccess access(ptx::TensorShape::s32x32b, 32, false, address, warp);
    access.load(memory, [&](uint32_t thread, uint32_t i, uint32_t bits) {
      device::thread.x = thread;
      using Op = c::SM100_TMEM_LOAD_32dp32b32x;
      comparison.equal(bits, (cell<Op, typename c::Copy_Traits<Op>::DstLayout>(address, i)),
                       "warp %u, thread %u, register %u", warp, thread, i);
    });
  }
}

}  // namespace
}  // namespace gna::sm100

int main() {
  using gna::Comparison;
  using gna::sm100::for_each_kernel;
  for_each_kernel("smem descriptors", [](auto& of, Comparison& to) { of.smem_descriptors(to); });
  for_each_kernel("instruction descriptors",
                  [](auto& of, Comparison& to) { of.instruction_descriptors(to); });
  for_each_kernel("tensor memory operands",
                  [](auto& of, Comparison& to) { of.tensor_memory_operands(to); });
  for_each_kernel("softmax rows", [](auto& of, Comparison& to) { of.softmax_rows(to); });
  for_each_kernel("output tile", [](auto& of, Comparison& to) { of.output_tile(to); });
  for_each_kernel("non-finite values", [](auto& of, Comparison& to) { of.non_finite_values(to); });
  gna::sm100::interpreter();
}
