#include "problem.hpp"

#include "kernel.hpp"

namespace gna {

namespace {

constexpr int64_t most_tokens = 1 << 30;

// Tokens of a sequence, or -1 if a segment breaks a rule or they are too many.
int64_t tokens_of(const gna_segment* segments, int32_t count) {
  int64_t sum = 0;
  for (int32_t n = 0; n < count; ++n) {
    const gna_segment& segment = segments[n];
    if (segment.axis_count < 0 || segment.axis_count > 3) return -1;
    if (segment.axis_count == 0 && segment.tokens < 0) return -1;
    int64_t tokens = segment.axis_count ? 1 : segment.tokens;
    int64_t grid = 1;
    for (int32_t a = 0; a < segment.axis_count; ++a) {
      const gna_axis& axis = segment.axes[a];
      if (axis.begin < 0 || axis.begin >= axis.end || axis.end > axis.length) return -1;
      tokens *= axis.end - axis.begin;
      grid *= axis.length;
      if (grid > most_tokens) return -1;
    }
    sum += tokens;
    if (sum > most_tokens) return -1;
  }
  return sum;
}

bool valid_box(const gna_segment& segment) {
  int32_t sum = 0;
  for (int32_t a = 0; a < segment.axis_count; ++a) {
    const int32_t log2_box = segment.axes[a].log2_box;
    if (log2_box < 0 || log2_box > 6) return false;
    sum += log2_box;
  }
  return sum >= 4 && sum <= 6;
}

bool valid_window(const gna_segment& query, const gna_segment& key) {
  if (query.axis_count == 0 || query.axis_count != key.axis_count) return false;
  for (int32_t a = 0; a < query.axis_count; ++a) {
    const gna_axis& axis = query.axes[a];
    const int32_t other = key.axes[a].length;
    if (axis.length != other && axis.length != 1 && other != 1) return false;
    if (axis.stride < 1 || axis.stride > axis.window || axis.dilation < 1 ||
        int64_t{axis.window} * axis.dilation > axis.length)
      return false;
  }
  return valid_box(query) && valid_box(key);
}

}  // namespace

bool valid(const gna_pattern& pattern) {
  if (pattern.query_segments < 1 || pattern.key_segments < 1) return false;
  if (tokens_of(pattern.queries, pattern.query_segments) < 0) return false;
  if (tokens_of(pattern.keys, pattern.key_segments) < 0) return false;
  for (int32_t query = 0; query < pattern.query_segments; ++query)
    for (int32_t key = 0; key < pattern.key_segments; ++key) {
      const uint8_t link = pattern.links[query * pattern.key_segments + key];
      if (link > GNA_WINDOW) return false;
      if (link == GNA_WINDOW && !valid_window(pattern.queries[query], pattern.keys[key]))
        return false;
    }
  return true;
}

bool valid(const gna_problem& problem) {
  if (problem.type < 0 || problem.type >= type_count) return false;
  if (problem.batch < 1 || problem.heads < 1 || problem.kv_heads < 1 || problem.threads < 1)
    return false;
  if (problem.heads % problem.kv_heads != 0) return false;
  if (problem.head_dim < 1 || problem.head_dim > 1024) return false;
  return valid(problem.pattern);
}

}  // namespace gna
