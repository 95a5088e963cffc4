#include "sides.hpp"

namespace gna {

namespace {

int32_t tokens_of(const gna_segment& segment) {
  if (segment.axis_count == 0) return segment.tokens;
  int32_t tokens = 1;
  for (int32_t a = 0; a < segment.axis_count; ++a)
    tokens *= segment.axes[a].end - segment.axes[a].begin;
  return tokens;
}

Sequence sequence(const gna_pattern& pattern, const gna_key_mask& key_mask, bool of_keys) {
  if (of_keys) return {pattern.keys, pattern.key_segments, key_mask};
  return {pattern.queries, pattern.query_segments, {}};
}

}  // namespace

Sequence::Sequence(const gna_segment* segments, int32_t count, const gna_key_mask& key_mask)
    : segments_(segments), key_mask_(key_mask) {
  int32_t begin = 0, column = 0;
  for (int32_t segment = 0; segment < count; ++segment) {
    const int32_t tokens = tokens_of(segments[segment]);
    ranges_.push_back({begin, begin + tokens});
    columns_.push_back(column);
    begin += tokens;
    if (segments[segment].axis_count == 0) column += tokens;
  }
}

void Sequence::append(int32_t segment, int32_t batch, bool shown,
                      std::vector<int32_t>& tokens) const {
  const Range range = ranges_[segment];
  const bool masked = key_mask_.data && segments_[segment].axis_count == 0;
  for (int32_t token = range.begin; token < range.end; ++token) {
    const int64_t column = columns_[segment] + token - range.begin;
    const bool is_shown =
        !masked || key_mask_.data[batch * key_mask_.batch_stride + column * key_mask_.token_stride];
    if (is_shown == shown) tokens.push_back(token);
  }
}

Sides::Sides(const gna_pattern& pattern, const gna_key_mask& key_mask, Role role)
    : pattern(pattern),
      role(role),
      lanes(sequence(pattern, key_mask, role == Role::keys)),
      streamed(sequence(pattern, key_mask, role == Role::queries)) {}

std::vector<int32_t> Sides::linked(int32_t segment, uint8_t link) const {
  std::vector<int32_t> result;
  for (int32_t other = 0; other < streamed.count(); ++other) {
    const int32_t query = role == Role::queries ? segment : other;
    const int32_t key = role == Role::queries ? other : segment;
    if (streamed.size(other) > 0 && pattern.links[query * pattern.key_segments + key] == link)
      result.push_back(other);
  }
  return result;
}

}  // namespace gna
