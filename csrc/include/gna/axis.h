// One axis of a token grid: which keys a query attends to, which queries attend to a key, in closed form.
//
// The same definitions as gna_compile/geometry/, which explains them, for one dilation group:
// all positions are positions within the group, and a dilated axis is several such axes
// (group_length). Everything is 32-bit and without branches or loops, for host and device alike;
// lengths up to 2^30.
#pragma once

#include <cstdint>

#include "gna/macros.h"

namespace gna {

// Half-open; empty if end <= begin.
struct Range {
  int32_t begin;
  int32_t end;
};

// 1 <= stride <= window <= length; the caller has checked it.
struct Axis {
  int32_t length;
  int32_t window;
  int32_t stride;
  bool causal;
};

GNA_HD constexpr int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
GNA_HD constexpr int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Tokens of dilation group `group` on an axis of `length` tokens.
GNA_HD constexpr int32_t group_length(int32_t length, int32_t dilation, int32_t group) {
  return length / dilation + (group < length % dilation ? 1 : 0);
}

// The query whose window `query`'s stride group shares.
GNA_HD constexpr int32_t leader(const Axis& axis, int32_t query) {
  const int32_t place = axis.causal ? axis.stride - 1 : axis.stride / 2;
  return smaller(query / axis.stride * axis.stride + place, axis.length - 1);
}

// The keys that `query` attends to.
GNA_HD constexpr Range keys_of(const Axis& axis, int32_t query) {
  const int32_t at = leader(axis, query);
  const int32_t behind = axis.causal ? axis.window - 1 : axis.window / 2;
  const int32_t last = axis.causal ? axis.length - 1 : axis.length - axis.window;
  const int32_t first = smaller(larger(at - behind, 0), last);
  return {first, axis.causal ? query + 1 : first + axis.window};
}

// The keys that any of the non-empty `queries` attends to.
GNA_HD constexpr Range union_of(const Axis& axis, Range queries) {
  return {keys_of(axis, queries.begin).begin, keys_of(axis, queries.end - 1).end};
}

// The keys that all of the non-empty `queries` attend to.
GNA_HD constexpr Range intersection_of(const Axis& axis, Range queries) {
  const int32_t first = keys_of(axis, queries.end - 1).begin;
  return {first, larger(first, keys_of(axis, queries.begin).end)};
}

// The first query whose window starts after `key` (length if there is none); 0 for a key before 0.
//
// Windows start at leader - behind, and leaders step by the stride, so this is the first stride
// group whose leader lies beyond key + behind.
GNA_HD constexpr int32_t first_query_past(const Axis& axis, int32_t key) {
  const int32_t behind = axis.causal ? axis.window - 1 : axis.window / 2;
  const int32_t place = axis.causal ? axis.stride - 1 : axis.stride / 2;
  // The last window's start; a causal last leader is the last token.
  const int32_t last = axis.length - axis.window;
  const int32_t group = (larger(key, 0) + behind - place + axis.stride) / axis.stride;
  const int32_t query = smaller(group * axis.stride, axis.length);
  return key < 0 ? 0 : (key >= last ? axis.length : query);
}

// The queries that attend to any of the non-empty `keys`; empty if none does.
GNA_HD constexpr Range seen_by(const Axis& axis, Range keys) {
  const int32_t first =
      axis.causal ? keys.begin : first_query_past(axis, keys.begin - axis.window);
  return {first, larger(first, first_query_past(axis, keys.end - 1))};
}

// The queries that attend to all of the non-empty `keys`; empty if none does.
GNA_HD constexpr Range all_seen_by(const Axis& axis, Range keys) {
  const int32_t first = axis.causal ? keys.end - 1
                                    : first_query_past(axis, keys.end - 1 - axis.window);
  return {first, larger(first, first_query_past(axis, keys.begin))};
}

}  // namespace gna
