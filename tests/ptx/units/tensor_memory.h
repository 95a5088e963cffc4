// Tensor memory of one block: 128 lanes of 512 columns of 32 bits, and how warps get at it.
//
// PTX ISA 5.6 "Tensor memory", 9.7.16.1 "Tensor memory addressing and allocation", 9.7.16.7
// (tcgen05.alloc, dealloc, relinquish_alloc_permit), 9.7.16.8 (tcgen05.ld, st) and 9.7.16.2.3 "Data
// movement shape". An address is lane << 16 | column.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "fault.h"

namespace gna::ptx {

constexpr uint32_t tensor_lanes = 128;
constexpr uint32_t tensor_columns = 512;

constexpr uint32_t tensor_address(uint32_t lane, uint32_t column) { return lane << 16 | column; }
constexpr uint32_t lane_of(uint32_t address) { return address >> 16; }
constexpr uint32_t column_of(uint32_t address) { return address & 0xffff; }

// Cells of some lanes and columns, both half-open.
struct TensorRange {
  uint32_t lane_begin, lane_end, column_begin, column_end;

  bool overlaps(const TensorRange& other) const {
    return lane_begin < other.lane_end && other.lane_begin < lane_end &&
           column_begin < other.column_end && other.column_begin < column_end;
  }
};

// Keeps for each cell whether it is allocated and whether anything has been written to it since.
class TensorMemory {
 public:
  // tcgen05.alloc; nothing where there is no room now, and the warp has to wait.
  std::optional<uint32_t> allocate(uint32_t columns) {
    check_columns(columns, "tcgen05.alloc");
    if (relinquished_) fault("tcgen05.alloc after relinquish_alloc_permit");
    if (columns > last_allocated_)
      fault("tcgen05.alloc of %u columns after one of %u: allocations must not grow", columns,
            last_allocated_);
    for (uint32_t first = 0; first < tensor_columns; first += columns)
      if (std::none_of(owned_ + first, owned_ + first + columns, [](bool owned) { return owned; })) {
        last_allocated_ = columns;
        std::fill(owned_ + first, owned_ + first + columns, true);
        allocations_.push_back({first, columns});
        poison({0, tensor_lanes, first, first + columns});
        return tensor_address(0, first);
      }
    return std::nullopt;
  }

  // tcgen05.dealloc
  void deallocate(uint32_t address, uint32_t columns) {
    check_columns(columns, "tcgen05.dealloc");
    const auto found = std::find_if(
        allocations_.begin(), allocations_.end(), [&](const Allocation& allocation) {
          return tensor_address(0, allocation.first) == address && allocation.columns == columns;
        });
    if (found == allocations_.end())
      fault("tcgen05.dealloc of %u columns at %#x, which were not allocated so", columns, address);
    std::fill(owned_ + found->first, owned_ + found->first + columns, false);
    allocations_.erase(found);
  }

  // tcgen05.relinquish_alloc_permit
  void relinquish() { relinquished_ = true; }

  // At the end of the block.
  void check_all_freed() const {
    for (const Allocation& allocation : allocations_)
      fault("the block ends with %u columns of tensor memory allocated at %#x", allocation.columns,
            tensor_address(0, allocation.first));
  }

  void check_allocated(const TensorRange& range, const char* name) const {
    if (range.lane_end > tensor_lanes || range.column_end > tensor_columns)
      fault("%s: tensor memory has no lanes %u to %u of columns %u to %u", name, range.lane_begin,
            range.lane_end, range.column_begin, range.column_end);
    for (uint32_t column = range.column_begin; column < range.column_end; ++column)
      if (!owned_[column]) fault("%s: column %u of tensor memory is not allocated", name, column);
  }

  uint32_t read(uint32_t lane, uint32_t column, const char* name) const {
    if (!written_[lane][column])
      fault("%s: lane %u of column %u of tensor memory has not been written", name, lane, column);
    return cells_[lane][column];
  }
  void write(uint32_t lane, uint32_t column, uint32_t bits) {
    cells_[lane][column] = bits;
    written_[lane][column] = true;
  }

  // Makes reading these cells an error until they are written again.
  void poison(const TensorRange& range) {
    for (uint32_t lane = range.lane_begin; lane < range.lane_end; ++lane)
      std::fill(written_[lane] + range.column_begin, written_[lane] + range.column_end, false);
  }

 private:
  struct Allocation {
    uint32_t first, columns;
  };

  static void check_columns(uint32_t columns, const char* name) {
    if (columns < 32 || columns > tensor_columns || (columns & (columns - 1)) != 0)
      fault("%s of %u columns, not a power of two from 32 to 512", name, columns);
  }

  uint32_t cells_[tensor_lanes][tensor_columns] = {};
  bool written_[tensor_lanes][tensor_columns] = {};
  bool owned_[tensor_columns] = {};
  std::vector<Allocation> allocations_;
  uint32_t last_allocated_ = tensor_columns;
  bool relinquished_ = false;
};

// Shapes of tcgen05.ld and st, lanes by bits of a lane. Not modeled: 16x32bx2.
enum class TensorShape { s32x32b, s16x64b, s16x128b, s16x256b };

// One tcgen05.ld or st of a warp. With `packed` (.pack::16b of ld, .unpack::16b of st) a register holds
// the lower halves of two neighboring columns.
class TensorAccess {
 public:
  TensorAccess(TensorShape shape, uint32_t repeat, bool packed, uint32_t address, uint32_t warp)
      : shape_(shape), packed_(packed), address_(address), registers_(repeat * per_repeat()) {
    if (repeat < 1 || (repeat & (repeat - 1)) != 0 || registers_ > 128)
      fault("tcgen05.ld/st: a repeat count of %u", repeat);
    const uint32_t first = warp % 4 * 32, lane = lane_of(address);
    if (lane != first && !(lanes() == 16 && lane == first + 16))
      fault("tcgen05.ld/st: warp %u may not access lane %u, only those from %u to %u", warp, lane,
            first, first + 31);
  }

  uint32_t registers() const { return registers_; }

  // The cells, all of which must be allocated.
  TensorRange range() const {
    const uint32_t lane = lane_of(address_), column = column_of(address_);
    const uint32_t columns = registers_ * 32 / lanes() * (packed_ ? 2 : 1);
    return {lane, lane + lanes(), column, column + columns};
  }

  // What the 32 threads of the warp get: set(thread, register, bits).
  template <typename Set>
  void load(const TensorMemory& memory, Set set) const {
    memory.check_allocated(range(), "tcgen05.ld");
    for (uint32_t thread = 0; thread < 32; ++thread)
      for (uint32_t r = 0; r < registers_; ++r) {
        const auto [lane, column] = place(thread, r);
        if (packed_)
          set(thread, r,
              (memory.read(lane, column, "tcgen05.ld") & 0xffff) |
                  memory.read(lane, column + 1, "tcgen05.ld") << 16);
        else
          set(thread, r, memory.read(lane, column, "tcgen05.ld"));
      }
  }

  // Stores get(thread, register). The upper half of a column that is given half a register becomes 0.
  template <typename Get>
  void store(TensorMemory& memory, Get get) const {
    memory.check_allocated(range(), "tcgen05.st");
    for (uint32_t thread = 0; thread < 32; ++thread)
      for (uint32_t r = 0; r < registers_; ++r) {
        const auto [lane, column] = place(thread, r);
        const uint32_t bits = get(thread, r);
        memory.write(lane, column, packed_ ? bits & 0xffff : bits);
        if (packed_) memory.write(lane, column + 1, bits >> 16);
      }
  }

 private:
  struct Cell {
    uint32_t lane, column;
  };

  uint32_t lanes() const { return shape_ == TensorShape::s32x32b ? 32 : 16; }
  uint32_t per_repeat() const {
    return shape_ == TensorShape::s16x256b ? 4 : shape_ == TensorShape::s16x128b ? 2 : 1;
  }

  // Figures "Matrix fragment for shape .32x32b" and so on: the first cell of a register.
  Cell place(uint32_t thread, uint32_t r) const {
    uint32_t lane = 0, column = 0;
    switch (shape_) {
      case TensorShape::s32x32b:
        lane = thread;
        column = r;
        break;
      case TensorShape::s16x64b:
        lane = thread / 4 + thread % 2 * 8;
        column = thread / 2 % 2 + 2 * r;
        break;
      case TensorShape::s16x128b:
        lane = thread / 4 + r % 2 * 8;
        column = thread % 4 + r / 2 * 4;
        break;
      case TensorShape::s16x256b:
        lane = thread / 4 + r / 2 % 2 * 8;
        column = thread % 4 * 2 + r % 2 + r / 4 * 8;
        break;
    }
    return {lane_of(address_) + lane, column_of(address_) + column * (packed_ ? 2 : 1)};
  }

  TensorShape shape_;
  bool packed_;
  uint32_t address_;
  uint32_t registers_;
};

}  // namespace gna::ptx
