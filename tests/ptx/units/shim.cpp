// The units behind a C interface, for tests/ptx/test_units.py. Functions return 0, or 1 on a fault.
#include <cstring>
#include <exception>
#include <string>

#include "numbers.h"
#include "tcgen05.h"
#include "tensor_map.h"
#include "wgmma.h"

using namespace gna::ptx;

namespace {

thread_local std::string message;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// Writes up to `room` ranges as pairs.
void give(const ByteRanges& ranges, uint64_t* pairs, uint32_t room, uint32_t* count) {
  *count = static_cast<uint32_t>(ranges.size());
  for (uint32_t i = 0; i < *count && i < room; ++i) {
    pairs[2 * i] = ranges[i].begin;
    pairs[2 * i + 1] = ranges[i].end;
  }
}

void give(const std::vector<TensorRange>& ranges, uint32_t* quadruples, uint32_t* count) {
  *count = static_cast<uint32_t>(ranges.size());
  for (const TensorRange& range : ranges)
    for (const uint32_t x : {range.lane_begin, range.lane_end, range.column_begin, range.column_end})
      *quadruples++ = x;
}

const TensorMap& map_of(const void* map) { return *static_cast<const TensorMap*>(map); }

SmemMatrix matrix_of(int sm, uint64_t descriptor, int mn_major, uint32_t rows, uint32_t columns,
                     uint32_t element_bytes) {
  return {sm == 90 ? decode_sm90(descriptor) : decode_sm100(descriptor),
          mn_major ? Major::mn : Major::k,
          rows,
          columns,
          element_bytes,
          "the matrix"};
}

TensorAccess access_of(int shape, uint32_t repeat, int packed, uint32_t address, uint32_t warp) {
  return {static_cast<TensorShape>(shape), repeat, packed != 0, address, warp};
}

}  // namespace

extern "C" {

const char* unit_message() { return message.c_str(); }

// Numbers -----------------------------------------------------------------------------------------

void unit_to_float(int bf16, const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(bf16 ? Element::bf16 : Element::fp16, from[i]);
}
void unit_from_float(int bf16, const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = from_float(bf16 ? Element::bf16 : Element::fp16, from[i]);
}
uint32_t unit_pack(int bf16, float high, float low) {
  return pack(bf16 ? Element::bf16 : Element::fp16, high, low);
}
void unit_exp2(int flush, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = exp2_approximate(from[i], flush != 0);
}

// Tensor maps -------------------------------------------------------------------------------------

uint32_t unit_swizzled(uint32_t span, uint32_t address) {
  return swizzled(static_cast<Swizzle>(span), address);
}

int unit_encode(void* map, uint32_t type, uint32_t rank, uint64_t address, const uint64_t* extents,
                const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                uint32_t interleave, uint32_t swizzle, uint32_t promotion, uint32_t fill,
                const char** why) {
  return static_cast<int>(encode_tiled(static_cast<TensorMap*>(map), type, rank, address, extents,
                                       strides, box, steps, interleave, swizzle, promotion, fill, why));
}

int unit_load_box(const void* map, const int32_t* at, uint8_t* shared, uint32_t size, uint32_t to) {
  return guarded([&] { load_box(map_of(map), at, {shared, size}, to); });
}
int unit_store_box(const void* map, const int32_t* at, uint8_t* shared, uint32_t size,
                   uint32_t from) {
  return guarded([&] { store_box(map_of(map), at, {shared, size}, from); });
}
int unit_box_touched(const void* map, const int32_t* at, uint32_t address, uint32_t* transaction,
                     uint64_t* shared, uint32_t* shared_count, uint64_t* global,
                     uint32_t* global_count, uint32_t room) {
  return guarded([&] {
    const BoxCopy copy = touched(map_of(map), at, address);
    *transaction = copy.transaction_bytes;
    give(copy.shared, shared, room, shared_count);
    give(copy.global, global, room, global_count);
  });
}

// Matrices in shared memory -----------------------------------------------------------------------

// Addresses of all elements, row by row.
int unit_smem_addresses(int sm, uint64_t descriptor, int mn_major, uint32_t rows, uint32_t columns,
                        uint32_t element_bytes, uint32_t* addresses) {
  return guarded([&] {
    const SmemMatrix matrix = matrix_of(sm, descriptor, mn_major, rows, columns, element_bytes);
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t column = 0; column < columns; ++column)
        *addresses++ = matrix.address(row, column);
  });
}
int unit_smem_touched(int sm, uint64_t descriptor, int mn_major, uint32_t rows, uint32_t columns,
                      uint64_t* pairs, uint32_t* count, uint32_t room) {
  return guarded([&] {
    give(matrix_of(sm, descriptor, mn_major, rows, columns, 2).touched(), pairs, room, count);
  });
}

// wgmma -------------------------------------------------------------------------------------------

void unit_wgmma_d_place(uint32_t thread, uint32_t r, uint32_t* place) {
  const Place found = wgmma_d_place(thread, r);
  place[0] = found.row;
  place[1] = found.column;
}
void unit_wgmma_a_place(uint32_t thread, uint32_t r, uint32_t half, uint32_t* place) {
  const Place found = wgmma_a_place(thread, r, half);
  place[0] = found.row;
  place[1] = found.column;
}

// A from `registers`, [128][4], or where that is null from a descriptor.
int unit_wgmma(uint32_t n, int bf16, int scale_a, int scale_b, int trans_a, int trans_b,
               const uint32_t* registers, uint64_t a, uint64_t b, uint8_t* shared, uint32_t size,
               int scale_d, float* d) {
  return guarded([&] {
    const Wgmma wgmma(n, bf16 ? Element::bf16 : Element::fp16, scale_a, scale_b, trans_a, trans_b);
    const SharedMemory memory{shared, size};
    wgmma.run(registers != nullptr
                  ? wgmma.a_of_registers(reinterpret_cast<const uint32_t(*)[4]>(registers))
                  : wgmma.a_of_shared(memory, a),
              wgmma.b_of_shared(memory, b), scale_d != 0, d);
  });
}

// Tensor memory -----------------------------------------------------------------------------------

TensorMemory* unit_tensor_memory() { return new TensorMemory; }
void unit_tensor_memory_end(TensorMemory* memory) { delete memory; }

// The address, or -1 where there is no room.
int unit_allocate(TensorMemory* memory, uint32_t columns, int64_t* address) {
  return guarded([&] {
    const auto found = memory->allocate(columns);
    *address = found ? static_cast<int64_t>(*found) : -1;
  });
}
int unit_deallocate(TensorMemory* memory, uint32_t address, uint32_t columns) {
  return guarded([&] { memory->deallocate(address, columns); });
}
void unit_relinquish(TensorMemory* memory) { memory->relinquish(); }
int unit_check_all_freed(const TensorMemory* memory) {
  return guarded([&] { memory->check_all_freed(); });
}
void unit_poison(TensorMemory* memory, uint32_t lane_begin, uint32_t lane_end, uint32_t column_begin,
                 uint32_t column_end) {
  memory->poison({lane_begin, lane_end, column_begin, column_end});
}

// registers is [32][count], the count being returned through `count`.
int unit_tensor_load(const TensorMemory* memory, int shape, uint32_t repeat, int packed,
                     uint32_t address, uint32_t warp, uint32_t* registers) {
  return guarded([&] {
    const TensorAccess access = access_of(shape, repeat, packed, address, warp);
    access.load(*memory, [&](uint32_t thread, uint32_t r, uint32_t bits) {
      registers[thread * access.registers() + r] = bits;
    });
  });
}
int unit_tensor_store(TensorMemory* memory, int shape, uint32_t repeat, int packed, uint32_t address,
                      uint32_t warp, const uint32_t* registers) {
  return guarded([&] {
    const TensorAccess access = access_of(shape, repeat, packed, address, warp);
    access.store(*memory, [&](uint32_t thread, uint32_t r) {
      return registers[thread * access.registers() + r];
    });
  });
}
int unit_tensor_access(int shape, uint32_t repeat, int packed, uint32_t address, uint32_t warp,
                       uint32_t* registers, uint32_t* range) {
  return guarded([&] {
    const TensorAccess access = access_of(shape, repeat, packed, address, warp);
    uint32_t count;
    *registers = access.registers();
    give({access.range()}, range, &count);
  });
}

// Neighboring columns of a lane, whoever may access them.
void unit_tensor_write(TensorMemory* memory, uint32_t lane, uint32_t column, uint32_t count,
                       const uint32_t* bits) {
  for (uint32_t i = 0; i < count; ++i) memory->write(lane, column + i, bits[i]);
}
int unit_tensor_read(const TensorMemory* memory, uint32_t lane, uint32_t column, uint32_t count,
                     uint32_t* bits) {
  return guarded([&] {
    for (uint32_t i = 0; i < count; ++i) bits[i] = memory->read(lane, column + i, "a test");
  });
}

// tcgen05.mma -------------------------------------------------------------------------------------

int unit_decode_instruction(uint32_t bits, uint32_t* fields) {
  return guarded([&] {
    const InstructionDescriptor found = decode_instruction(bits);
    for (const uint32_t x :
         {found.m, found.n, static_cast<uint32_t>(found.type == Element::bf16),
          static_cast<uint32_t>(found.negate_a), static_cast<uint32_t>(found.negate_b),
          static_cast<uint32_t>(found.major_a == Major::mn),
          static_cast<uint32_t>(found.major_b == Major::mn)})
      *fields++ = x;
  });
}
int unit_mma(TensorMemory* memory, uint8_t* shared, uint32_t size, uint32_t instruction, uint32_t d,
             int tensor_a, uint64_t a, uint64_t b, int accumulate) {
  return guarded([&] {
    const Tcgen05Mma mma(instruction, d);
    if (tensor_a)
      mma.run_tensor_a(*memory, {shared, size}, static_cast<uint32_t>(a), b, accumulate != 0);
    else
      mma.run(*memory, {shared, size}, a, b, accumulate != 0);
  });
}
int unit_mma_touched(uint32_t instruction, uint32_t d, uint32_t a, uint32_t* of_d, uint32_t* of_a,
                     uint32_t* count) {
  return guarded([&] {
    const Tcgen05Mma mma(instruction, d);
    give(mma.touched_d(), of_d, count);
    give(mma.touched_a(a), of_a, count);
  });
}

}  // extern "C"
