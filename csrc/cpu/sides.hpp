// A pattern from one side: the sequence whose tokens are in lanes, and the one that is streamed.
#pragma once

#include <cstdint>
#include <vector>

#include "gna/axis.h"
#include "gna_cpu.h"

namespace gna {

// What a tile has in its lanes; the other side is streamed.
enum class Role { queries, keys };

// The segments of one sequence, and what a key mask hides of it.
class Sequence {
 public:
  Sequence(const gna_segment* segments, int32_t count, const gna_key_mask& key_mask);

  int32_t count() const { return static_cast<int32_t>(ranges_.size()); }
  const gna_segment& operator[](int32_t segment) const { return segments_[segment]; }
  // The tokens of a segment.
  Range range(int32_t segment) const { return ranges_[segment]; }
  int32_t size(int32_t segment) const { return ranges_[segment].end - ranges_[segment].begin; }
  int32_t tokens() const { return ranges_.empty() ? 0 : ranges_.back().end; }

  // Appends the tokens of a segment that the key mask shows to a batch element, or those it hides.
  void append(int32_t segment, int32_t batch, bool shown, std::vector<int32_t>& tokens) const;
  bool has_key_mask() const { return key_mask_.data != nullptr; }

 private:
  const gna_segment* segments_;
  gna_key_mask key_mask_;
  std::vector<Range> ranges_;
  std::vector<int32_t> columns_;  // of the key mask: a global segment's first
};

struct Sides {
  Sides(const gna_pattern& pattern, const gna_key_mask& key_mask, Role role);

  // What is streamed past a segment because of one kind of link; without empty segments.
  std::vector<int32_t> linked(int32_t segment, uint8_t link) const;

  const gna_pattern& pattern;
  Role role;
  Sequence lanes, streamed;
};

}  // namespace gna
