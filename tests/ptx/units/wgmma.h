// wgmma.mma_async.m64nNk16 of 16-bit types with fp32 accumulators.
//
// PTX ISA 9.7.15.5, "wgmma.mma_async". The core reads registers and predicates, and decides when an
// operation takes place; here is what it then does.
#pragma once

#include <cstdint>

#include "matrix_product.h"

namespace gna::ptx {

constexpr uint32_t wgmma_rows = 64;

struct Place {
  uint32_t row, column;
};

// Where register r of D (N / 2 of them) of a thread of the warpgroup (0 to 127) stands in the 64 x N
// matrix. Figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
constexpr Place wgmma_d_place(uint32_t thread, uint32_t r) {
  return {thread / 32 * 16 + r / 2 % 2 * 8 + thread % 32 / 4, r / 4 * 8 + thread % 4 * 2 + r % 2};
}

// Where half h (0 is the lower) of register r (0 to 3) of A stands in the 64 x 16 matrix. Figure "WGMMA
// .m64nNk16 register fragment layout for matrix A".
constexpr Place wgmma_a_place(uint32_t thread, uint32_t r, uint32_t h) {
  return {thread / 32 * 16 + r % 2 * 8 + thread % 32 / 4, r / 2 * 8 + thread % 4 * 2 + h};
}

struct Wgmma {
  uint32_t n;
  Element type;
  int32_t scale_a, scale_b;  // 1 or -1
  Major major_a, major_b;    // of matrices in shared memory; imm-trans 0 is K-major

  // The immediates as they stand in the instruction. With A in registers there is no imm-trans-a.
  Wgmma(uint32_t n, Element type, int32_t scale_a, int32_t scale_b, int32_t trans_a, int32_t trans_b)
      : n(n),
        type(type),
        scale_a(scale_a),
        scale_b(scale_b),
        major_a(trans_a ? Major::mn : Major::k),
        major_b(trans_b ? Major::mn : Major::k) {
    if (n % 8 != 0 || n < 8 || n > 256) fault("wgmma: N of %u", n);
    for (const int32_t scale : {scale_a, scale_b})
      if (scale != 1 && scale != -1) fault("wgmma: an imm-scale of %d", scale);
    for (const int32_t trans : {trans_a, trans_b})
      if (trans != 0 && trans != 1) fault("wgmma: an imm-trans of %d", trans);
  }

  SmemMatrix a(uint64_t descriptor) const {
    return {decode_sm90(descriptor), major_a, wgmma_rows, product_depth, 2, "A of wgmma"};
  }
  SmemMatrix b(uint64_t descriptor) const {
    return {decode_sm90(descriptor), major_b, n, product_depth, 2, "B of wgmma"};
  }

  // A from the registers of the warpgroup: registers[thread][r].
  Factor a_of_registers(const uint32_t (*registers)[4]) const {
    Factor factor(wgmma_rows);
    for (uint32_t thread = 0; thread < 128; ++thread)
      for (uint32_t r = 0; r < 4; ++r)
        for (uint32_t h = 0; h < 2; ++h) {
          const Place place = wgmma_a_place(thread, r, h);
          const auto bits = static_cast<uint16_t>(registers[thread][r] >> 16 * h);
          factor.at(place.row, place.column) = static_cast<float>(scale_a) * to_float(type, bits);
        }
    return factor;
  }
  Factor a_of_shared(const SharedMemory& shared, uint64_t descriptor) const {
    return read_factor(shared, a(descriptor), type, scale_a < 0);
  }
  Factor b_of_shared(const SharedMemory& shared, uint64_t descriptor) const {
    return read_factor(shared, b(descriptor), type, scale_b < 0);
  }

  // d is 64 x N, row by row; without scale_d its old contents do not count.
  void run(const Factor& a, const Factor& b, bool scale_d, float* d) const {
    multiply(a, b, scale_d, d);
  }
};

}  // namespace gna::ptx
