// Small matrix products, as the tensor cores of both architectures make them.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"
#include "smem_descriptor.h"

namespace gna::ptx {

constexpr uint32_t product_depth = 16;  // K of 16-bit types

// A factor: `rows` (M or N) of 16 numbers each.
struct Factor {
  uint32_t rows;
  std::vector<float> numbers;

  explicit Factor(uint32_t rows) : rows(rows), numbers(rows * product_depth) {}
  float& at(uint32_t row, uint32_t k) { return numbers[row * product_depth + k]; }
  float at(uint32_t row, uint32_t k) const { return numbers[row * product_depth + k]; }
};

inline Factor read_factor(const SharedMemory& shared, const SmemMatrix& matrix, Element type,
                          bool negated) {
  Factor factor(matrix.rows);
  matrix.for_each_chunk([&](uint32_t row, uint32_t k, uint32_t address) {
    const uint8_t* const chunk = shared.at(address, chunk_bytes);
    for (uint32_t i = 0; i < chunk_bytes / 2; ++i) {
      const auto bits = static_cast<uint16_t>(chunk[2 * i] | chunk[2 * i + 1] << 8);
      const float x = to_float(type, bits);
      (matrix.major == Major::k ? factor.at(row, k + i) : factor.at(row + i, k)) = negated ? -x : x;
    }
  });
  return factor;
}

// d = a b^T + c, where c is d or 0; d is a.rows x b.rows, row by row.
//
// The order and precision of the hardware's sums are not specified (PTX ISA, "wgmma.mma_async" and
// "tcgen05.mma"). Here a product of 16-bit numbers is exact, the 17 terms of an element are added in
// double precision, and the sum is rounded to fp32 once, to nearest, ties to even.
inline void multiply(const Factor& a, const Factor& b, bool accumulate, float* d) {
  const uint32_t columns = b.rows;
  std::vector<double> transposed(product_depth * columns), sums(columns);
  for (uint32_t n = 0; n < columns; ++n)
    for (uint32_t k = 0; k < product_depth; ++k) transposed[k * columns + n] = b.at(n, k);
  for (uint32_t m = 0; m < a.rows; ++m, d += columns) {
    for (uint32_t n = 0; n < columns; ++n) sums[n] = 0;
    for (uint32_t k = 0; k < product_depth; ++k) {
      const double x = a.at(m, k);
      const double* const row = &transposed[k * columns];
      for (uint32_t n = 0; n < columns; ++n) sums[n] += x * row[n];
    }
    for (uint32_t n = 0; n < columns; ++n) {
      const auto sum = static_cast<float>(accumulate ? sums[n] + static_cast<double>(d[n]) : sums[n]);
      d[n] = std::isnan(sum) ? float_of(canonical_nan) : sum;
    }
  }
}

}  // namespace gna::ptx
