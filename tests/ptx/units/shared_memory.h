// The shared memory of one block as the asynchronous units see it: bytes, swizzles, ranges touched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fault.h"

namespace gna::ptx {

// Shared memory from address 0 of the shared state space on.
struct SharedMemory {
  uint8_t* bytes;
  uint32_t size;

  // The bytes [address, address + count), which must exist.
  uint8_t* at(uint32_t address, uint32_t count) const {
    if (address > size || count > size - address)
      fault("shared memory has %u bytes: no bytes %u to %u", size, address, address + count);
    return bytes + address;
  }
};

// The granule that swizzles move, and that a matrix descriptor counts in.
constexpr uint32_t chunk_bytes = 16;

// The modes that tensor maps and matrix descriptors share; the value is the span in bytes.
enum class Swizzle : uint32_t { none = 16, b32 = 32, b64 = 64, b128 = 128 };

constexpr uint32_t span_of(Swizzle swizzle) { return static_cast<uint32_t>(swizzle); }

// Bytes after which the pattern repeats: eight rows of a span (PTX ISA 5.5.7, "Tensor swizzling
// modes"); 16 where nothing moves.
constexpr uint32_t pattern_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::none ? chunk_bytes : 8 * span_of(swizzle);
}

// Where the byte of an unswizzled layout lies. Address bits from 7 on are xored to those from 4 on,
// one, two or three of them. They are the bits of the address itself, not of an offset in a tile: so
// a tile must start where the pattern does.
constexpr uint32_t swizzled(Swizzle swizzle, uint32_t address) {
  const uint32_t mask = (span_of(swizzle) - 1) & ~(chunk_bytes - 1);
  return address ^ ((address >> 3) & mask);
}

// Half-open.
struct ByteRange {
  uint64_t begin, end;
  bool operator==(const ByteRange& other) const { return begin == other.begin && end == other.end; }
};

// Sorted, disjoint, not adjacent.
using ByteRanges = std::vector<ByteRange>;

inline void merge(ByteRanges& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const ByteRange& range : ranges) {
    if (range.begin == range.end) continue;
    if (kept > 0 && range.begin <= ranges[kept - 1].end)
      ranges[kept - 1].end = std::max(ranges[kept - 1].end, range.end);
    else
      ranges[kept++] = range;
  }
  ranges.resize(kept);
}

// Adds a range at the end; neighbors that continue each other become one at once.
inline void add(ByteRanges& ranges, uint64_t begin, uint64_t end) {
  if (!ranges.empty() && ranges.back().end == begin)
    ranges.back().end = end;
  else
    ranges.push_back({begin, end});
}

}  // namespace gna::ptx
