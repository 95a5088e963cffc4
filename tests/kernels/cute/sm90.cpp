// The Hopper kernel's descriptors, swizzles and fragments, beside CuTe's.
#include <array>
#include <functional>
#include <regex>
#include <vector>

#include "../../ptx/units/wgmma.h"
#include "comparison.h"
#include "cute_host.h"
#include "device_on_host.h"

// Functions of inline PTX, which are replaced below.
#define pack pack_by_ptx
#define exp2_approximate exp2_by_ptx
#define stmatrix stmatrix_by_ptx
#define named_barrier_any named_barrier_any_by_ptx
#include "cuda/ptx.cuh"
#undef pack
#undef exp2_approximate
#undef stmatrix
#undef named_barrier_any

namespace gna::cuda {

// Two whole numbers as they are; the tests number the elements.
template <typename Element>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(high) << 16 | static_cast<uint32_t>(low);
}

inline float exp2_approximate(float x) { return x; }

template <int threads>
bool named_barrier_any(int, bool) {
  return false;
}

struct Stmatrix {
  uint8_t* row;
  std::array<uint32_t, 4> registers;
};
inline std::vector<Stmatrix> stored;  // by the current thread

inline void stmatrix(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stored.push_back({static_cast<uint8_t*>(row), {a, b, c, d}});
}

}  // namespace gna::cuda

#define wgmma_ss wgmma_ss_by_ptx
#define wgmma_rs wgmma_rs_by_ptx
#define wgmma_rs_bf16 wgmma_rs_bf16_by_ptx
#include "sm90/wgmma.cuh"
#undef wgmma_ss
#undef wgmma_rs
#undef wgmma_rs_bf16

namespace gna::sm90 {

// One wgmma.mma_async as its PTX puts it together.
struct Wgmma {
  std::string text;
  uint32_t low_a, low_b;  // halves of descriptors
  const uint32_t* a_registers;

  uint64_t a() const { return high("a") | low_a; }
  uint64_t b() const { return high("b") | low_b; }

  // Such as m64n128k16.f32.bf16.bf16.
  std::string shape() const { return part("aligned\\.([^{]*)\\{"); }

  // Of A, unless that is in registers, and of B. They follow the two signs.
  std::string transposes() const { return part("b,[^;]*?,1,1((?:,[01])+);"); }

 private:
  std::string part(const std::string& pattern) const {
    const std::string dense = std::regex_replace(text, std::regex("[\" ]|\\\\n"), "");
    std::smatch found;
    return std::regex_search(dense, found, std::regex(pattern)) ? found[1] : std::string();
  }

  uint64_t high(const std::string& name) const {
    const std::string digits = part("mov\\.b64" + name + ",\\{%[0-9]+,(0x[0-9a-f]+)\\}");
    return digits.empty() ? 0 : std::stoull(digits, nullptr, 16) << 32;
  }
};
inline std::vector<Wgmma> issued;

inline void note_wgmma(uint32_t a, uint32_t b, const uint32_t* a_registers) {
  issued.push_back({device::last_asm, a, b, a_registers});
}

template <typename Element>
void wgmma_ss(float (&d)[64], uint32_t a, uint32_t b, int add) {
  wgmma_ss_by_ptx<Element>(d, a, b, add);
  note_wgmma(a, b, nullptr);
}

inline void wgmma_rs_bf16(float (&d)[64], const uint32_t* a, uint32_t b, int add) {
  wgmma_rs_bf16_by_ptx(d, a, b, add);
  note_wgmma(0, b, a);
}

template <typename Element, int n>
void wgmma_rs(float (&d)[n], const uint32_t* a, uint32_t b) {
  wgmma_rs_by_ptx<Element>(d, a, b);
  note_wgmma(0, b, a);
}

}  // namespace gna::sm90

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

inline std::vector<std::array<float, 2>> logsumexps;  // (row, row_max)
template <int log2_tile_m>
void store_logsumexp(const Params&, const WorkTileInfo<log2_tile_m>&, int row, float row_max,
                     float) {
  logsumexps.push_back({static_cast<float>(row), row_max});
}

}  // namespace gna::cuda

#define epilogue epilogue_of_kernel
#include "sm90/epilogue.cuh"
#undef epilogue

namespace gna::sm90 {

inline int row_of_epilogue;
template <typename Element, int head_dim>
void epilogue(const Params&, uint8_t*, float (&)[head_dim / 2], const Softmax&, const WorkTileInfo&,
              int, int row) {
  row_of_epilogue = row;
}

}  // namespace gna::sm90

#include "sm90/fallback.cuh"
#include "sm90/mainloop.cuh"

namespace gna::sm90 {
namespace {

namespace c = ::cute;
using c::Int;
using c::Shape;
using GMMA = c::SM90::GMMA::Major;

constexpr int warpgroup = 128;
uint8_t* const shared = device::shared_memory + 1024;

void for_each_thread(int count, const std::function<void(int)>& body) {
  for (int thread = 0; thread < count; ++thread) {
    device::thread.x = thread;
    body(thread);
  }
}

template <typename Element>
constexpr const char* element_name = std::is_same_v<Element, __half> ? "f16" : "bf16";

// CuTe's MMA of 64 rows, n columns and 16 to sum over.
template <typename Element, int n>
using QkMma =
    decltype(c::GMMA::ss_op_selector<CuteElementOf<Element>, CuteElementOf<Element>, float,
                                     Shape<c::_64, Int<n>, c::_16>, GMMA::K, GMMA::K>());
template <typename Element, int n, GMMA major>
using PvMma =
    decltype(c::GMMA::rs_op_selector<CuteElementOf<Element>, CuteElementOf<Element>, float,
                                     Shape<c::_64, Int<n>, c::_16>, GMMA::K, major>());

struct Place {
  int row, column;
};

// Row and column of a thread's register of the accumulator, or of its 16-bit element of A, by CuTe.
template <typename Mma>
Place accumulator_place(int thread, int i) {
  const int at = typename c::MMA_Traits<Mma>::CLayout{}(thread, i);
  return {at % 64, at / 64};
}
template <typename Mma>
Place operand_place(int thread, int i) {
  const int at = typename c::MMA_Traits<Mma>::ALayout{}(thread, i);
  return {at % 64, at / 64};
}

template <typename Element, int head_dim>
struct Checks {
  using Storage = SharedStorage<head_dim>;
  using Qk = QkMma<Element, tile_n>;
  using Pv = PvMma<Element, head_dim, GMMA::MN>;
  using Mask = PvMma<__nv_bfloat16, tile_n, GMMA::K>;

  Params params{};
  Mainloop<Element, head_dim> mainloop{params, shared};
  Fallback<Element, head_dim> fallback{params, shared};

  static void same_modifiers(Comparison& comparison, const Wgmma& wgmma, int n, const char* type,
                             GMMA major_b) {
    const std::string shape = "m64n" + std::to_string(n) + "k16.f32." + type + "." + type;
    comparison.equal(wgmma.shape() == shape, true, "%s is %s", wgmma.shape().c_str(),
                     shape.c_str());
    const std::string transposes =
        (wgmma.a_registers != nullptr ? "," : ",0,") + std::to_string(static_cast<int>(major_b));
    comparison.equal(wgmma.transposes() == transposes, true, "imm-trans %s is %s",
                     wgmma.transposes().c_str(), transposes.c_str());
  }

  void score_descriptors(Comparison& comparison) {
    float scores[64] = {};
    uint32_t mask[8] = {};
    auto mma = c::make_tiled_mma(Qk{}).get_slice(0);
    auto mask_mma = c::make_tiled_mma(Mask{}).get_slice(0);
    const auto queries = k_major_tile<Element, tile_m, head_dim>(shared + offsetof(Storage, query));
    const auto a = mma.make_fragment_A(mma.partition_A(queries));
    const auto coordinates =
        k_major_tile<__nv_bfloat16, tile_n, 64>(shared + offsetof(Storage, key_coordinates));
    const auto mask_b = mask_mma.make_fragment_B(mask_mma.partition_B(coordinates));
    for (int stage = 0; stage < Storage::stages; ++stage)
      for (int half = 0; half < 2; ++half)
        for (int steps = 0; steps <= 2; ++steps) {
          const auto keys = k_major_tile<Element, tile_n, head_dim>(
              shared + offsetof(Storage, keys) + stage * Storage::tile_bytes);
          const auto b = mma.make_fragment_B(mma.partition_B(keys));
          params.key_coordinates.steps = steps;
          issued.clear();
          mainloop.issue_qk(scores, half, stage, steps > 0, mask);
          comparison.equal(issued.size(), steps + head_dim / 16, "products");
          for (int k = 0; k < steps; ++k) {
            const Wgmma& wgmma = issued.at(k);
            same_modifiers(comparison, wgmma, tile_n, "bf16", GMMA::K);
            comparison.equal(wgmma.b(), mask_b(c::_0{}, c::_0{}, k).desc_, "coordinates, step %d",
                             k);
            comparison.equal(wgmma.a_registers - mask, 4 * k, "registers of the mask, step %d", k);
          }
          for (int k = 0; k < head_dim / 16; ++k) {
            const Wgmma& wgmma = issued.at(steps + k);
            same_modifiers(comparison, wgmma, tile_n, element_name<Element>, GMMA::K);
            comparison.equal(wgmma.a(), a(c::_0{}, half, k).desc_, "queries, half %d, step %d",
                             half, k);
            comparison.equal(wgmma.b(), b(c::_0{}, c::_0{}, k).desc_, "keys, stage %d, step %d",
                             stage, k);
          }
        }
  }

  void output_descriptors(Comparison& comparison) {
    float output[head_dim / 2] = {};
    uint32_t probs[32] = {};
    auto mma = c::make_tiled_mma(Pv{}).get_slice(0);
    for (int stage = 0; stage < Storage::stages; ++stage) {
      const auto values = mn_major_tile<Element, tile_n, head_dim>(
          shared + offsetof(Storage, values) + stage * Storage::tile_bytes);
      const auto b = mma.make_fragment_B(mma.partition_B(values));
      issued.clear();
      mainloop.issue_pv(output, probs, stage);
      comparison.equal(issued.size(), tile_n / 16, "products");
      for (int k = 0; k < tile_n / 16; ++k) {
        const Wgmma& wgmma = issued.at(k);
        same_modifiers(comparison, wgmma, head_dim, element_name<Element>, GMMA::MN);
        // A tile of 64 columns has no leading dimension: nothing lies 64 columns further.
        constexpr uint64_t used = head_dim == 64 ? ~(uint64_t{0x3fff} << 16) : ~uint64_t{0};
        comparison.equal(wgmma.b() & used, b(c::_0{}, c::_0{}, k).desc_ & used,
                         "values, stage %d, step %d", stage, k);
        comparison.equal(wgmma.a_registers - probs, 4 * k, "registers of P, step %d", k);
      }
    }
  }

  // P comes from the accumulator of S, and is the left operand of O.
  void probability_operand(Comparison& comparison) {
    for_each_thread(warpgroup, [&](int thread) {
      float scores[64], sum[2];
      uint32_t probs[32];
      for (int i = 0; i < 64; ++i) scores[i] = static_cast<float>(i);
      exp2_scores<Element>(scores, probs, sum);
      float expected[2] = {};
      for (int i = 0; i < 64; ++i)
        expected[accumulator_place<Qk>(thread, i).row / 8 % 2] += static_cast<float>(i);
      for (int r = 0; r < 2; ++r) comparison.equal(sum[r], expected[r], "sum of row %d", r);
      for (int k = 0; k < tile_n / 16; ++k)
        for (int i = 0; i < 8; ++i) {
          const uint32_t score = probs[4 * k + i / 2] >> 16 * (i % 2) & 0xffff;
          const Place from = accumulator_place<Qk>(thread, static_cast<int>(score));
          const Place to = operand_place<Pv>(thread, i);
          comparison.equal(from.row, to.row, "thread %d, step %d, element %d: row", thread, k, i);
          comparison.equal(from.column, 16 * k + to.column,
                           "thread %d, step %d, element %d: column", thread, k, i);
        }
    });
  }

  // One visible column in one row.
  void bitmask_fragment(Comparison& comparison) {
    for_each_thread(warpgroup, [&](int thread) {
      for (int r = 0; r < 2; ++r)
        for (int column = 0; column < tile_n; ++column) {
          Bitmask bitmask{};
          bitmask.row[r][column / 32] = 1u << column % 32;
          float scores[64] = {};
          apply_bitmask(scores, bitmask);
          for (int i = 0; i < 64; ++i) {
            const Place place = accumulator_place<Qk>(thread, i);
            comparison.equal(scores[i] == 0, place.row / 8 % 2 == r && place.column == column,
                             "thread %d, register %d, column %d: is visible", thread, i, column);
          }
        }
    });
  }

  // Which rows a thread takes its registers for.
  void rows_of_threads(Comparison& comparison) {
    auto& work = *reinterpret_cast<WorkTileInfo(*)[Storage::work_stages]>(
        shared + offsetof(Storage, work_tiles));
    auto& key_tiles =
        *reinterpret_cast<KeyTileInfo(*)[Storage::stages]>(shared + offsetof(Storage, key_tiles));
    std::memset(device::shared_memory, 0, device::shared_size);
    work[0].has_rows[0] = work[0].has_rows[1] = true;
    work[1].is_end = true;
    for (KeyTileInfo& tile : key_tiles) tile.flags = last_tile;
    for (int half = 0; half < 2; ++half)
      for_each_thread(warpgroup, [&](int thread) {
        const int expected = half * half_rows + accumulator_place<Qk>(thread, 0).row;
        issued.clear();
        row_of_epilogue = -1;
        mainloop.consume(half);
        comparison.equal(row_of_epilogue, expected, "thread %d of half %d", thread, half);
        row_of_epilogue = -1;
        fallback.consume(half);
        comparison.equal(row_of_epilogue, expected, "thread %d of half %d, fallback", thread, half);
        float scores[64], output[head_dim / 2];
        const float by[2] = {1, 2};
        Softmax softmax;
        for (int r = 0; r < 2; ++r) softmax.row_max[r] = -by[r];
        std::fill(std::begin(scores), std::end(scores), 0.0f);
        std::fill(std::begin(output), std::end(output), 1.0f);
        scale_subtract_row_max(scores, softmax, 1.0f);
        rescale_rows(output, by);
        for (int i = 0; i < 64; ++i)
          comparison.equal(scores[i], by[(accumulator_place<Qk>(thread, i).row - expected) / 8 & 1],
                           "thread %d, register %d: row of a score", thread, i);
        for (int i = 0; i < head_dim / 2; ++i)
          comparison.equal(output[i], by[(accumulator_place<Pv>(thread, i).row - expected) / 8 & 1],
                           "thread %d, register %d: row of an output", thread, i);
      });
  }

  // The product of both operands, as CuTe finds them, for each coordinate that a row does not attend to.
  void mask_by_mma(Comparison& comparison) {
    for (const auto& log2_extent :
         {std::array<int32_t, 3>{2, 2, 3}, std::array<int32_t, 3>{1, 2, 4}}) {
      const CoordinateBits bits = coordinate_bits({log2_extent[0], log2_extent[1], log2_extent[2]});
      uint8_t* const to = shared + offsetof(Storage, key_coordinates);
      std::memset(to, 0xff, box_bytes);
      for_each_thread(128, [&](int) { write_key_coordinates(bits, to); });
      const auto keys = k_major_tile<__nv_bfloat16, tile_n, 64>(to);
      const auto has = [&](int key, int column) {
        uint16_t element;
        std::memcpy(&element, address_of(keys, key, column), 2);
        return element;
      };
      for (int coordinate = 0; coordinate < 32; ++coordinate) {
        // One step has bits 0 to 7 and 16 to 23.
        if (bits.steps == 1 && coordinate % 16 >= 8) continue;
        size_t found = 0;
        for_each_thread(warpgroup, [&](int thread) {
          const uint32_t masked[2] = {1u << coordinate, 0};
          uint32_t operand[8];
          make_mask_operand(masked, operand);
          for (int k = 0; k < bits.steps; ++k)
            for (int i = 0; i < 8; ++i) {
              const uint32_t element = operand[4 * k + i / 2] >> 16 * (i % 2) & 0xffff;
              if (element == 0) continue;
              const Place place = operand_place<Mask>(thread, i);
              const int column = 16 * k + place.column;
              comparison.equal(element, masked_element, "coordinate %d: element", coordinate);
              comparison.equal(place.row / 8 % 2, 0, "coordinate %d: of the other row", coordinate);
              for (int key = 0; key < tile_n; ++key)
                comparison.equal(has(key, column),
                                 coordinates_of(bits, key) & 1u << coordinate ? has_element : 0,
                                 "key %d, coordinate %d, column %d", key, coordinate, column);
              ++found;
            }
        });
        // One of the four lanes of a row has it.
        comparison.equal(found, warpgroup / 4, "coordinate %d: rows with a column", coordinate);
      }
    }
  }

  void output_tile(Comparison& comparison) {
    WorkTileInfo work{};
    for (int half = 0; half < 2; ++half) {
      uint8_t* const tile = shared + offsetof(Storage, output);
      const auto own =
          k_major_tile<Element, half_rows, head_dim>(tile + half * sizeof(Storage::output) / 2);
      std::vector<std::vector<Stmatrix>> of_thread(warpgroup);
      boxes_stored.clear();
      logsumexps.clear();
      for_each_thread(warpgroup, [&](int thread) {
        float output[head_dim / 2];
        for (int i = 0; i < head_dim / 2; ++i)
          output[i] = static_cast<float>(thread * (head_dim / 2) + i);
        Softmax softmax;
        const int row = half * half_rows + accumulator_place<Pv>(thread, 0).row;
        // The sum over four lanes, each of which here is this one, is 1.
        for (int r = 0; r < 2; ++r) softmax.row_sum[r] = 0.25f;
        for (int i = 0; i < 4; ++i)
          softmax.row_max[i / 2] =
              static_cast<float>(half * half_rows + accumulator_place<Pv>(thread, i).row);
        stored.clear();
        epilogue_of_kernel<Element, head_dim>(params, tile, output, softmax, work, half, row);
        of_thread[thread] = stored;
      });
      for (const auto& [row, row_max] : logsumexps)
        comparison.equal(row, row_max, "row of a logsumexp");
      comparison.equal(logsumexps.size(), half_rows, "logsumexps");

      // stmatrix by CuTe: from (lane, bit of its registers) to (lane, bit of the row at its address).
      using Stsm = c::Copy_Traits<c::SM90_U32x4_STSM_N>;
      for (int thread = 0; thread < warpgroup; ++thread)
        for (size_t n = 0; n < of_thread[thread].size(); ++n)
          for (int i = 0; i < 8; ++i) {
            const int at = typename Stsm::SrcLayout{}(thread % 32, 16 * i);
            const auto to = c::right_inverse(typename Stsm::DstLayout{})(at);
            const int lane = to % 32, byte = to / 32 / 8;
            const uint32_t pair = of_thread[thread][n].registers[i / 2];
            const uint16_t element = static_cast<uint16_t>(pair >> 16 * (i % 2));
            std::memcpy(of_thread[thread / 32 * 32 + lane][n].row + byte, &element, 2);
          }
      for (int thread = 0; thread < warpgroup; ++thread)
        for (int i = 0; i < head_dim / 2; ++i) {
          const Place place = accumulator_place<Pv>(thread, i);
          uint16_t element;
          std::memcpy(&element, address_of(own, place.row, place.column), 2);
          comparison.equal(element, thread * (head_dim / 2) + i, "half %d, row %d, column %d", half,
                           place.row, place.column);
        }
      comparison.equal(boxes_stored.size(), Storage::boxes, "boxes stored");
      for (const TmaStore& box : boxes_stored)
        comparison.equal(box.from - shared, address_of(own, 0, box.column) - shared,
                         "box of column %d", box.column);
    }
  }

  // One value that is not finite in each column: where it is found, and which outputs it comes back to.
  void non_finite_values(Comparison& comparison) {
    uint8_t* const tile = shared + offsetof(Storage, values);
    const auto values = mn_major_tile<Element, tile_n, head_dim>(tile);
    auto& non_finite =
        *reinterpret_cast<NonFinite<head_dim>*>(shared + offsetof(Storage, non_finite));
    const uint16_t nan = 0x7fff;
    for (int round = 0; round < tile_n; ++round) {
      std::memset(tile, 0, Storage::tile_bytes);
      const auto key_of = [&](int column) { return (round + 5 * column) % tile_n; };
      for (int column = 0; column < head_dim; ++column)
        std::memcpy(address_of(values, column, key_of(column)), &nan, 2);
      for (int thread = 0; thread < 2 * consumer_threads; ++thread) {
        device::thread.x = producer_threads + thread;
        fallback.take_out_non_finite(0);
      }
      for (int column = 0; column < head_dim; ++column)
        for (int word = 0; word < tile_n / 32; ++word) {
          const int key = key_of(column);
          comparison.equal(non_finite.nan[word][column], word == key / 32 ? 1u << key % 32 : 0,
                           "key %d, column %d: is noted", key, column);
        }
    }
    for (int column = 0; column < head_dim; ++column) {
      std::memset(&non_finite, 0, sizeof non_finite);
      non_finite.nan[3][column] = 1;
      for_each_thread(warpgroup, [&](int thread) {
        for (int r = 0; r < 2; ++r) {
          float output[head_dim / 2] = {};
          Bitmask bitmask{};
          bitmask.row[r][3] = all_bits;
          fallback.put_back_non_finite(output, bitmask);
          for (int i = 0; i < head_dim / 2; ++i) {
            const Place place = accumulator_place<Pv>(thread, i);
            comparison.equal(std::isnan(output[i]),
                             place.row / 8 % 2 == r && place.column == column,
                             "thread %d, register %d, column %d: is put back", thread, i, column);
          }
        }
      });
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

// What the kernels share.
template <typename Visit>
void for_one_kernel(const char* name, Visit visit) {
  Comparison comparison(name);
  for_kernel<__nv_bfloat16, 128>(comparison, visit);
}

// The interpreter's wgmma: fragments, and where it looks for what CuTe describes.
void interpreter() {
  Comparison comparison("interpreter");
  using Wide = QkMma<__nv_bfloat16, 256>;
  using Registers = PvMma<__nv_bfloat16, 128, GMMA::MN>;
  for (uint32_t thread = 0; thread < warpgroup; ++thread) {
    for (uint32_t i = 0; i < 128; ++i) {
      const ptx::Place ours = ptx::wgmma_d_place(thread, i);
      const Place cutes = accumulator_place<Wide>(thread, i);
      comparison.equal(ours.row, cutes.row, "accumulator, thread %u, register %u: row", thread, i);
      comparison.equal(ours.column, cutes.column, "accumulator, thread %u, register %u: column",
                       thread, i);
    }
    for (uint32_t i = 0; i < 8; ++i) {
      const ptx::Place ours = ptx::wgmma_a_place(thread, i / 2, i % 2);
      const Place cutes = operand_place<Registers>(thread, i);
      comparison.equal(ours.row, cutes.row, "operand, thread %u, element %u: row", thread, i);
      comparison.equal(ours.column, cutes.column, "operand, thread %u, element %u: column", thread,
                       i);
    }
  }
  const auto same_addresses = [&](const auto& tile, const auto& fragment, ptx::Major major,
                                  int rows) {
    for (int k = 0; k < c::size<2>(fragment); ++k) {
      const ptx::SmemMatrix matrix(ptx::decode_sm90(fragment(c::_0{}, c::_0{}, k).desc_), major,
                                   rows, 16, 2, "a tile");
      for (int row = 0; row < rows; ++row)
        for (int column = 0; column < 16; ++column)
          comparison.equal(matrix.address(row, column),
                           address_of(tile, row, 16 * k + column) - device::shared_memory,
                           "row %d, column %d", row, 16 * k + column);
    }
  };
  auto qk = c::make_tiled_mma(QkMma<__half, 128>{}).get_slice(0);
  const auto keys = k_major_tile<__half, 128, 128>(shared);
  same_addresses(keys, qk.make_fragment_B(qk.partition_B(keys)), ptx::Major::k, 128);
  auto pv = c::make_tiled_mma(PvMma<__half, 128, GMMA::MN>{}).get_slice(0);
  const auto values = mn_major_tile<__half, 128, 128>(shared);
  same_addresses(values, pv.make_fragment_B(pv.partition_B(values)), ptx::Major::mn, 128);
}

}  // namespace
}  // namespace gna::sm90

int main() {
  using gna::Comparison;
  using gna::sm90::for_each_kernel, gna::sm90::for_one_kernel;
  for_each_kernel("score descriptors", [](auto& of, Comparison& to) { of.score_descriptors(to); });
  for_each_kernel("output descriptors",
                  [](auto& of, Comparison& to) { of.output_descriptors(to); });
  for_each_kernel("probability operand",
                  [](auto& of, Comparison& to) { of.probability_operand(to); });
  for_one_kernel("bitmask fragment", [](auto& of, Comparison& to) { of.bitmask_fragment(to); });
  for_each_kernel("rows of threads", [](auto& of, Comparison& to) { of.rows_of_threads(to); });
  for_one_kernel("mask by MMA", [](auto& of, Comparison& to) { of.mask_by_mma(to); });
  for_each_kernel("output tile", [](auto& of, Comparison& to) { of.output_tile(to); });
  for_each_kernel("non-finite values", [](auto& of, Comparison& to) { of.non_finite_values(to); });
  gna::sm90::interpreter();
}
