// Tensor maps and the copies of cp.async.bulk.tensor in its tiled mode.
//
// CUDA driver API, cuTensorMapEncodeTiled (the rules in its documentation, in cuda.h); PTX ISA 5.5,
// "Tensors" (bounding box, traversal stride, out-of-boundary access, swizzles), and
// "cp.async.bulk.tensor". Not modeled, and refused: im2col, interleaved layouts, packed types of
// less than a byte, swizzles of atoms larger than 16 bytes, NaN fill.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared_memory.h"

namespace gna::ptx {

// Codes of the driver's CUresult.
enum class EncodeResult : int32_t { success = 0, invalid_value = 1, not_supported = 801 };

// Bytes of an element by CUtensorMapDataType; 0 for packed ones.
constexpr int tensor_element_bytes(uint32_t type) {
  constexpr int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type < sizeof bytes / sizeof bytes[0] ? bytes[type] : 0;
}

constexpr int max_tensor_rank = 5;

// What stands in the 128 bytes of a CUtensorMap here; those of the driver are secret. Dimensions run
// from the innermost out.
struct alignas(64) TensorMap {
  uint64_t magic;
  uint64_t address;                     // of the first element, in global memory
  uint64_t strides[max_tensor_rank];    // bytes, the innermost one being an element
  uint32_t last[max_tensor_rank];       // extent - 1, since an extent may be 2^32
  uint16_t box[max_tensor_rank];        // elements that the box spans
  uint8_t step[max_tensor_rank];        // of them, each so manieth is copied
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t swizzle_span;

  static constexpr uint64_t is_map = 0x50614d726f736e54;

  Swizzle swizzle() const { return static_cast<Swizzle>(swizzle_span); }
  int64_t extent(int dimension) const { return static_cast<int64_t>(last[dimension]) + 1; }
  // Elements copied along a dimension.
  uint32_t count(int dimension) const {
    return (box[dimension] + step[dimension] - 1u) / step[dimension];
  }
  uint32_t row_bytes() const { return count(0) * element_bytes; }
  // Bytes in shared memory, which is what an mbarrier is told of a load. Elements out of bounds count.
  uint32_t box_bytes() const {
    uint32_t bytes = row_bytes();
    for (int d = 1; d < rank; ++d) bytes *= count(d);
    return bytes;
  }
};
static_assert(sizeof(TensorMap) == 128);

// cuTensorMapEncodeTiled, with its arguments. `why` says what an error is about.
inline EncodeResult encode_tiled(TensorMap* map, uint32_t type, uint32_t rank, uint64_t address,
                                 const uint64_t* extents, const uint64_t* strides,
                                 const uint32_t* box, const uint32_t* steps, uint32_t interleave,
                                 uint32_t swizzle, uint32_t l2_promotion, uint32_t fill,
                                 const char** why = nullptr) {
  const auto fail = [&](EncodeResult code, const char* text) {
    if (why != nullptr) *why = text;
    return code;
  };
  const auto invalid = [&](const char* text) { return fail(EncodeResult::invalid_value, text); };
  const auto unsupported = [&](const char* text) {
    return fail(EncodeResult::not_supported, text);
  };
  constexpr uint32_t types = 16, interleaves = 3, swizzles = 7, promotions = 4, fills = 2;
  if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0)
    return invalid("the map is not aligned to 64 bytes");
  if (type >= types) return invalid("the data type");
  if (rank < 1 || rank > max_tensor_rank) return invalid("the rank is not 1 to 5");
  if (extents == nullptr || box == nullptr || steps == nullptr || (rank > 1 && strides == nullptr))
    return invalid("a null pointer");
  if (interleave >= interleaves || swizzle >= swizzles || l2_promotion >= promotions || fill >= fills)
    return invalid("interleave, swizzle, L2 promotion or fill");
  if (interleave != 0) return unsupported("interleaved layouts");
  if (tensor_element_bytes(type) == 0) return unsupported("packed types");
  if (swizzle > 3) return unsupported("swizzles of atoms larger than 16 bytes");
  if (fill != 0) return unsupported("NaN fill");
  if (address % 16 != 0) return invalid("the address is not a multiple of 16");

  TensorMap made{};
  made.magic = TensorMap::is_map;
  made.address = address;
  made.rank = static_cast<uint8_t>(rank);
  made.element_bytes = static_cast<uint8_t>(tensor_element_bytes(type));
  made.swizzle_span = static_cast<uint8_t>(16u << swizzle);
  made.strides[0] = made.element_bytes;
  for (uint32_t d = 0; d < rank; ++d) {
    if (extents[d] < 1 || extents[d] > uint64_t{1} << 32) return invalid("an extent is not 1 to 2^32");
    if (box[d] < 1 || box[d] > 256) return invalid("a box extent is not 1 to 256");
    if (steps[d] < 1 || steps[d] > 8) return invalid("an element stride is not 1 to 8");
    made.last[d] = static_cast<uint32_t>(extents[d] - 1);
    made.box[d] = static_cast<uint16_t>(box[d]);
    // The innermost one is ignored.
    made.step[d] = static_cast<uint8_t>(d == 0 ? 1 : steps[d]);
    if (d == 0) continue;
    const uint64_t stride = strides[d - 1];
    if (stride % 16 != 0) return invalid("a stride is not a multiple of 16 bytes");
    if (stride >= uint64_t{1} << 40) return invalid("a stride is not below 2^40 bytes");
    made.strides[d] = stride;
  }
  const uint32_t inner_bytes = made.box[0] * made.element_bytes;
  if (inner_bytes % 16 != 0) return invalid("the box is not a multiple of 16 bytes wide");
  if (swizzle != 0 && inner_bytes > span_of(made.swizzle()))
    return invalid("the box is wider than the swizzle");
  *map = made;
  return EncodeResult::success;
}

// 16 bytes of a box. Those from `begin` to before `end` are in bounds, at global + begin on.
struct BoxChunk {
  uint32_t shared;
  uint64_t global;
  uint32_t begin, end;
};

// All chunks of the box at these coordinates (innermost first), in the order of the unswizzled box in
// shared memory, where the innermost dimension lies densest and nothing lies between elements.
template <typename Visit>
void for_each_chunk(const TensorMap& map, const int32_t* coordinates, uint32_t shared_address,
                    Visit visit) {
  if (map.magic != TensorMap::is_map) fault("this is not a tensor map");
  if (shared_address % 128 != 0)
    fault("shared address %u of a tensor copy is not a multiple of 128", shared_address);
  if (map.swizzle() != Swizzle::none && map.row_bytes() != map.swizzle_span)
    fault("a swizzle of %u bytes with rows of %u is not modeled", map.swizzle_span, map.row_bytes());
  const int64_t inner_begin = int64_t{coordinates[0]} * map.element_bytes;
  const int64_t inner_end = map.extent(0) * map.element_bytes;
  uint32_t index[max_tensor_rank] = {};
  uint32_t unswizzled = shared_address;
  while (true) {
    bool inside = true;
    uint64_t row = map.address;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t at = int64_t{coordinates[d]} + int64_t{index[d]} * map.step[d];
      inside &= at >= 0 && at < map.extent(d);
      row += static_cast<uint64_t>(at) * map.strides[d];
    }
    for (uint32_t byte = 0; byte < map.row_bytes(); byte += chunk_bytes, unswizzled += chunk_bytes) {
      const int64_t at = inner_begin + byte;
      const auto clipped = [&](int64_t x) {
        return static_cast<uint32_t>(
            std::min<int64_t>(std::max<int64_t>(x - at, 0), inside ? chunk_bytes : 0));
      };
      visit(BoxChunk{swizzled(map.swizzle(), unswizzled), row + static_cast<uint64_t>(at), clipped(0),
                     clipped(inner_end)});
    }
    int d = 1;
    while (d < map.rank && ++index[d] == map.count(d)) index[d++] = 0;
    if (d >= map.rank) return;
  }
}

// What a copy has touched. `transaction_bytes` is for the mbarrier of a load.
struct BoxCopy {
  uint32_t transaction_bytes = 0;
  ByteRanges shared, global;  // of global memory, what is in bounds
};

// Says what a copy of this box would touch, and copies nothing.
inline BoxCopy touched(const TensorMap& map, const int32_t* coordinates, uint32_t shared_address) {
  BoxCopy copy;
  copy.transaction_bytes = map.box_bytes();
  for_each_chunk(map, coordinates, shared_address, [&](const BoxChunk& chunk) {
    if (chunk.begin < chunk.end) add(copy.global, chunk.global + chunk.begin, chunk.global + chunk.end);
  });
  copy.shared = {{shared_address, uint64_t{shared_address} + copy.transaction_bytes}};
  merge(copy.global);
  return copy;
}

// Global to shared memory; elements out of bounds arrive as zeros. A map's addresses are addresses of
// this process.
inline void load_box(const TensorMap& map, const int32_t* coordinates, const SharedMemory& shared,
                     uint32_t shared_address) {
  for_each_chunk(map, coordinates, shared_address, [&](const BoxChunk& chunk) {
    uint8_t* const to = shared.at(chunk.shared, chunk_bytes);
    std::memset(to, 0, chunk_bytes);
    if (chunk.begin < chunk.end)
      std::memcpy(to + chunk.begin, reinterpret_cast<const uint8_t*>(chunk.global + chunk.begin),
                  chunk.end - chunk.begin);
  });
}

// Shared to global memory; elements out of bounds are left out.
inline void store_box(const TensorMap& map, const int32_t* coordinates, const SharedMemory& shared,
                      uint32_t shared_address) {
  for_each_chunk(map, coordinates, shared_address, [&](const BoxChunk& chunk) {
    const uint8_t* const from = shared.at(chunk.shared, chunk_bytes);
    if (chunk.begin < chunk.end)
      std::memcpy(reinterpret_cast<uint8_t*>(chunk.global + chunk.begin), from + chunk.begin,
                  chunk.end - chunk.begin);
  });
}

}  // namespace gna::ptx
