// Descriptors of matrices in shared memory, and where they put each element.
//
// PTX ISA 9.7.15.5.1.2, "Shared memory matrix layout" and "Matrix descriptor format" (wgmma), and
// 9.7.16.3 and 9.7.16.4.1, "Shared memory descriptor" (tcgen05): the same canonical layouts, other
// bits. A matrix is M x K (or N x K): its rows run along M or N. K-major means that the elements of a
// row lie together, MN-major that those of a column do. In chunks of 16 bytes, T elements each, and for
// a swizzle whose span is W chunks, the unswizzled layouts are
//
//               row                                    column (k)
//   K-major     8 rows W chunks apart, then SBO        chunk by chunk (no swizzle: chunks LBO apart)
//   MN-major    T in a chunk, W chunks, then LBO       8 columns W chunks apart, then SBO
//   MN-major,   T in a chunk, then SBO                 8 columns a chunk apart, then LBO
//    no swizzle
//
// and the swizzle moves the bytes by their addresses.
#pragma once

#include <cstdint>

#include "shared_memory.h"

namespace gna::ptx {

enum class Major { k, mn };

// Byte offsets; `leading` and `stride` are LBO and SBO.
struct SmemDescriptor {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};

namespace descriptor_bits {

constexpr uint32_t field(uint64_t bits, int first, int count) {
  return static_cast<uint32_t>(bits >> first & ((uint64_t{1} << count) - 1));
}

inline void must_be(uint64_t bits, int first, int count, uint32_t value, const char* unit) {
  const uint32_t found = field(bits, first, count);
  if (found != value)
    fault("%s descriptor %#018" PRIx64 ": bits %d to %d are %u, not %u", unit, bits, first,
          first + count - 1, found, value);
}

inline SmemDescriptor offsets(uint64_t bits, Swizzle swizzle, const char* unit) {
  must_be(bits, 14, 2, 0, unit);
  must_be(bits, 30, 2, 0, unit);
  if (const uint32_t base_offset = field(bits, 49, 3))
    fault("%s descriptor %#018" PRIx64 ": base offset %u; only patterns that start at a multiple of "
          "%u are modeled",
          unit, bits, base_offset, pattern_bytes(swizzle));
  return {field(bits, 0, 14) << 4, field(bits, 16, 14) << 4, field(bits, 32, 14) << 4, swizzle};
}

}  // namespace descriptor_bits

// For wgmma.
inline SmemDescriptor decode_sm90(uint64_t bits) {
  using namespace descriptor_bits;
  constexpr Swizzle swizzles[] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
  must_be(bits, 46, 3, 0, "wgmma");
  must_be(bits, 52, 10, 0, "wgmma");
  return offsets(bits, swizzles[field(bits, 62, 2)], "wgmma");
}

// For tcgen05.
inline SmemDescriptor decode_sm100(uint64_t bits) {
  using namespace descriptor_bits;
  must_be(bits, 46, 3, 1, "tcgen05");
  if (field(bits, 52, 1) != 0)
    fault("tcgen05 descriptor %#018" PRIx64 ": an absolute leading dimension is for sm_103a", bits);
  must_be(bits, 53, 8, 0, "tcgen05");
  const auto swizzle = [&] {
    switch (const uint32_t mode = field(bits, 61, 3)) {
      case 0:
        return Swizzle::none;
      case 2:
        return Swizzle::b128;
      case 4:
        return Swizzle::b64;
      case 6:
        return Swizzle::b32;
      case 1:
        fault("tcgen05 descriptor %#018" PRIx64 ": swizzle of 32-byte atoms is not modeled", bits);
      default:
        fault("tcgen05 descriptor %#018" PRIx64 ": there is no swizzle mode %u", bits, mode);
    }
  };
  return offsets(bits, swizzle(), "tcgen05");
}

// The matrix that an instruction finds at a descriptor: `rows` along M or N, `columns` along K.
struct SmemMatrix {
  SmemDescriptor descriptor;
  Major major;
  uint32_t rows, columns;
  uint32_t element_bytes;
  const char* name;  // for messages

  SmemMatrix(const SmemDescriptor& descriptor, Major major, uint32_t rows, uint32_t columns,
             uint32_t element_bytes, const char* name)
      : descriptor(descriptor),
        major(major),
        rows(rows),
        columns(columns),
        element_bytes(element_bytes),
        name(name) {
    check();
  }

  uint32_t address(uint32_t row, uint32_t column) const {
    return swizzled(descriptor.swizzle, descriptor.start + offset(row, column));
  }

  // Chunks of the matrix: visit(row, column, address) with their first elements. A chunk holds
  // elements of one row (K-major) or of one column (MN-major).
  template <typename Visit>
  void for_each_chunk(Visit visit) const {
    const uint32_t elements = chunk_bytes / element_bytes;
    if (major == Major::k) {
      for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t column = 0; column < columns; column += elements)
          visit(row, column, address(row, column));
    } else {
      for (uint32_t column = 0; column < columns; ++column)
        for (uint32_t row = 0; row < rows; row += elements) visit(row, column, address(row, column));
    }
  }

  // The bytes that the instruction reads.
  ByteRanges touched() const {
    ByteRanges ranges;
    for_each_chunk([&](uint32_t, uint32_t, uint32_t at) { add(ranges, at, at + chunk_bytes); });
    merge(ranges);
    return ranges;
  }

 private:
  uint32_t offset(uint32_t row, uint32_t column) const {
    const auto& [start, leading, stride, swizzle] = descriptor;
    const uint32_t span = span_of(swizzle);
    if (major == Major::k) {
      const uint32_t byte = column * element_bytes;
      const uint32_t along = swizzle == Swizzle::none
                                 ? byte / chunk_bytes * leading + byte % chunk_bytes
                                 : byte;
      return row % 8 * span + row / 8 * stride + along;
    }
    const uint32_t byte = row * element_bytes;
    const bool plain = swizzle == Swizzle::none;
    return byte % span + byte / span * (plain ? stride : leading) + column % 8 * span +
           column / 8 * (plain ? leading : stride);
  }

  void check() const {
    const auto& [start, leading, stride, swizzle] = descriptor;
    if (major == Major::mn && element_bytes != 2) fault("%s: MN-major needs elements of two bytes", name);
    if (rows % 8 != 0 || columns * element_bytes % chunk_bytes != 0)
      fault("%s: a matrix of %u x %u", name, rows, columns);
    if (swizzle == Swizzle::none) return;
    const uint32_t span = span_of(swizzle), pattern = pattern_bytes(swizzle);
    // Where a step along the row of a pattern has been added, only bits below the span change.
    if (start % pattern >= span)
      fault("%s starts at %u, in row %u of a swizzle of %u bytes: its base offset must not be 0", name,
            start, start % pattern / span, span);
    if (stride % pattern != 0)
      fault("%s: a stride of %u bytes breaks the swizzle, which repeats every %u", name, stride,
            pattern);
    const uint32_t width = (major == Major::k ? columns : rows) * element_bytes;
    if (start % span + std::min(width, span) > span)
      fault("%s starts at byte %u of a row of %u and is %u wide: it runs out of the swizzle", name,
            start % span, span, std::min(width, span));
    if (major == Major::mn && width > span && (start % span != 0 || leading % pattern != 0))
      fault("%s: a leading dimension of %u bytes from byte %u of a row breaks the swizzle", name,
            leading, start % span);
  }
};

}  // namespace gna::ptx
