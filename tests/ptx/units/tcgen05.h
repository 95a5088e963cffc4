// tcgen05.mma of kind::f16 in one block (cta_group::1), dense, with fp32 accumulators.
//
// PTX ISA 9.7.16.4.2, "Instruction descriptor", and 9.7.16.10, "TensorCore 5th generation matrix
// multiply and accumulate operations". The core decides when an operation takes place. Not modeled,
// and refused: fp16 accumulators, sparsity, factors of two types, .ws, disabled lanes, scaled input.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix_product.h"
#include "tensor_memory.h"

namespace gna::ptx {

struct InstructionDescriptor {
  uint32_t m, n;
  Element type;
  bool negate_a, negate_b;
  Major major_a, major_b;
};

inline InstructionDescriptor decode_instruction(uint32_t bits) {
  const auto field = [&](int first, int count) { return bits >> first & ((1u << count) - 1); };
  const auto refuse = [&](const char* text) {
    fault("instruction descriptor %#010x of tcgen05.mma: %s", bits, text);
  };
  if (field(2, 1) != 0) refuse("sparsity is not modeled");
  if (field(0, 2) != 0) refuse("a sparsity selector without sparsity");
  if (field(3, 1) != 0) refuse("saturation is for integers");
  if (field(4, 2) == 0) refuse("fp16 accumulators are not modeled");
  if (field(4, 2) != 1) refuse("the type of D");
  if (field(6, 1) != 0 || field(23, 1) != 0 || field(29, 1) != 0) refuse("reserved bits");
  if (field(30, 2) != 0) refuse("a maximum shift is for .ws");
  if (field(7, 3) > 1 || field(10, 3) > 1) refuse("the type of A or B");
  if (field(7, 3) != field(10, 3)) refuse("factors of two types are not modeled");
  const uint32_t n = field(17, 6) * 8, m = field(24, 5) * 16;
  if (m != 64 && m != 128) refuse("M is neither 64 nor 128");
  if (n < 8 || n > 256 || n % (m == 128 ? 16 : 8) != 0)
    refuse("N is not a multiple of 16 (of 8 for M of 64) up to 256");
  return {m,
          n,
          field(7, 3) == 1 ? Element::bf16 : Element::fp16,
          field(13, 1) != 0,
          field(14, 1) != 0,
          field(15, 1) != 0 ? Major::mn : Major::k,
          field(16, 1) != 0 ? Major::mn : Major::k};
}

struct Tcgen05Mma {
  InstructionDescriptor instruction;
  uint32_t d;  // tensor memory address

  Tcgen05Mma(uint32_t descriptor, uint32_t d) : instruction(decode_instruction(descriptor)), d(d) {
    check_lane(d, "D");
  }

  SmemMatrix a(uint64_t descriptor) const {
    return {decode_sm100(descriptor), instruction.major_a, instruction.m, product_depth, 2,
            "A of tcgen05.mma"};
  }
  SmemMatrix b(uint64_t descriptor) const {
    return {decode_sm100(descriptor), instruction.major_b, instruction.n, product_depth, 2,
            "B of tcgen05.mma"};
  }

  // A row of D or of A lies in one lane. "Data path layout organization": layout D has 128 rows in 128
  // lanes, layout F has 64 in the lower or upper half of each quarter of the lanes.
  uint32_t lane(uint32_t address, uint32_t row) const {
    return lane_of(address) + (instruction.m == 128 ? row : row / 16 * 32 + row % 16);
  }

  // Written, and with enable-input-d read.
  std::vector<TensorRange> touched_d() const { return touched(d, instruction.n); }
  // Read, where A is in tensor memory: two elements a column.
  std::vector<TensorRange> touched_a(uint32_t a) const { return touched(a, product_depth / 2); }

  // Both factors in shared memory.
  void run(TensorMemory& memory, const SharedMemory& shared, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate) const {
    finish(memory, read_factor(shared, a(a_descriptor), instruction.type, instruction.negate_a),
           shared, b_descriptor, accumulate);
  }

  // A in tensor memory, always K-major.
  void run_tensor_a(TensorMemory& memory, const SharedMemory& shared, uint32_t a_address,
                    uint64_t b_descriptor, bool accumulate) const {
    if (instruction.major_a != Major::k) fault("A of tcgen05.mma in tensor memory is transposed");
    check_lane(a_address, "A");
    if (lane_of(a_address) != lane_of(d))
      fault("A of tcgen05.mma starts at lane %u, D at lane %u", lane_of(a_address), lane_of(d));
    for (const TensorRange& range : touched_a(a_address))
      memory.check_allocated(range, "A of tcgen05.mma");
    Factor factor(instruction.m);
    for (uint32_t row = 0; row < instruction.m; ++row)
      for (uint32_t k = 0; k < product_depth; ++k) {
        const uint32_t cell =
            memory.read(lane(a_address, row), column_of(a_address) + k / 2, "A of tcgen05.mma");
        const float x = to_float(instruction.type, static_cast<uint16_t>(cell >> k % 2 * 16));
        factor.at(row, k) = instruction.negate_a ? -x : x;
      }
    finish(memory, factor, shared, b_descriptor, accumulate);
  }

 private:
  void check_lane(uint32_t address, const char* name) const {
    const uint32_t lane = lane_of(address);
    if (lane != 0 && !(instruction.m == 64 && lane == 16))
      fault("%s of tcgen05.mma with M of %u starts at lane %u", name, instruction.m, lane);
  }

  std::vector<TensorRange> touched(uint32_t address, uint32_t columns) const {
    const uint32_t lane = lane_of(address), column = column_of(address);
    if (instruction.m == 128) return {{lane, lane + 128, column, column + columns}};
    std::vector<TensorRange> ranges;
    for (uint32_t quarter = 0; quarter < 4; ++quarter)
      ranges.push_back(
          {lane + 32 * quarter, lane + 32 * quarter + 16, column, column + columns});
    return ranges;
  }

  void finish(TensorMemory& memory, const Factor& a, const SharedMemory& shared,
              uint64_t b_descriptor, bool accumulate) const {
    for (const TensorRange& range : touched_d()) memory.check_allocated(range, "D of tcgen05.mma");
    const Factor right =
        read_factor(shared, b(b_descriptor), instruction.type, instruction.negate_b);
    std::vector<float> result(instruction.m * instruction.n);
    const auto each = [&](auto visit) {
      for (uint32_t row = 0, i = 0; row < instruction.m; ++row)
        for (uint32_t column = 0; column < instruction.n; ++column, ++i)
          visit(lane(d, row), column_of(d) + column, result[i]);
    };
    if (accumulate)
      each([&](uint32_t lane, uint32_t column, float& x) {
        x = float_of(memory.read(lane, column, "D of tcgen05.mma"));
      });
    multiply(a, right, accumulate, result.data());
    each([&](uint32_t lane, uint32_t column, float& x) { memory.write(lane, column, bits_of(x)); });
  }
};

}  // namespace gna::ptx
