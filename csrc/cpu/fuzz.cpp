// Random problems through the C interface against brute force in double; meant for sanitizers.
//
//   gna_fuzz [seconds] [seed]
//
// Every tensor has its own allocation that ends where the tensor ends, in a random memory order, so
// that a sanitizer sees any access outside. Also checks exp2 and the conversions of every 16-bit float.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define GNA_ISA fuzz
#include "gna_cpu.h"
#include "simd.hpp"

namespace {

std::mt19937 generator;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

[[noreturn]] void fail(const char* what, double actual, double expected) {
  std::printf("FAILED: %s is %g, expected %g\n", what, actual, expected);
  std::exit(1);
}

float to_float(int32_t type, const char* at) {
  if (type == GNA_FP32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  uint16_t some[gna::fuzz::width] = {};
  std::memcpy(some, at, 2);
  return (type == GNA_BF16 ? gna::fuzz::Bf16::load(some) : gna::fuzz::Fp16::load(some))[0];
}

void from_float(int32_t type, float value, char* at) {
  if (type == GNA_FP32) {
    std::memcpy(at, &value, 4);
    return;
  }
  uint16_t some[gna::fuzz::width];
  if (type == GNA_BF16)
    gna::fuzz::Bf16::store(some, gna::fuzz::splat(value));
  else
    gna::fuzz::Fp16::store(some, gna::fuzz::splat(value));
  std::memcpy(at, some, 2);
}

// [batch, heads, tokens, dim] in a random memory order; the allocation is exactly as long.
struct Tensor {
  int32_t type;
  int sizes[4];
  int64_t strides[4];
  std::vector<char> bytes;
  std::vector<double> values;  // in plain order

  Tensor(int32_t type, int batch, int heads, int tokens, int dim)
      : type(type), sizes{batch, heads, tokens, dim} {
    int order[4] = {0, 1, 2, 3};
    if (draw(0, 1)) std::shuffle(order, order + 4, generator);
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      strides[order[i]] = stride;
      stride *= sizes[order[i]];
    }
    bytes.resize(stride * size());
    bytes.shrink_to_fit();
    values.resize(stride);
  }

  int64_t size() const { return type == GNA_FP32 ? 4 : 2; }
  char* at(int b, int h, int t, int d) {
    return bytes.data() +
           size() * (b * strides[0] + h * strides[1] + t * strides[2] + d * strides[3]);
  }
  double& value(int b, int h, int t, int d) {
    return values[((int64_t{b} * sizes[1] + h) * sizes[2] + t) * sizes[3] + d];
  }
  template <class Visit>
  void each(Visit visit) {
    for (int b = 0; b < sizes[0]; ++b)
      for (int h = 0; h < sizes[1]; ++h)
        for (int t = 0; t < sizes[2]; ++t)
          for (int d = 0; d < sizes[3]; ++d) visit(at(b, h, t, d), value(b, h, t, d));
  }
  void randomize() {
    std::normal_distribution<float> normal;
    each([&](char* at, double& value) {
      from_float(type, normal(generator), at);
      value = to_float(type, at);
    });
  }
  void poison() {
    each([&](char* at, double&) { from_float(type, NAN, at); });
  }
  void expect_values(const char* what, double tolerance) {
    double largest = 1;
    for (const double value : values) largest = std::max(largest, std::fabs(value));
    each([&](char* at, double& value) {
      const double actual = to_float(type, at);
      if (!(std::fabs(actual - value) <= tolerance * largest)) fail(what, actual, value);
    });
  }
  gna_tensor plain() { return {bytes.data(), strides[0], strides[1], strides[2], strides[3]}; }
};

// From the definition, member by member.
std::vector<char> axis_matrix(const gna_axis& axis) {
  std::vector<char> sees(axis.length * axis.length, 0);
  for (int group = 0; group < axis.dilation; ++group) {
    std::vector<int> members;
    for (int token = group; token < axis.length; token += axis.dilation) members.push_back(token);
    const int count = static_cast<int>(members.size());
    for (int query = 0; query < count; ++query) {
      const int start = query - query % axis.stride;
      int leader = std::min(start + (axis.causal ? axis.stride - 1 : axis.stride / 2), count - 1);
      int first = leader - (axis.causal ? axis.window - 1 : axis.window / 2);
      if (!axis.causal) first = std::max(0, std::min(first, count - axis.window));
      for (int key = std::max(first, 0); key < first + axis.window; ++key)
        if (!axis.causal || key <= query) sees[members[query] * axis.length + members[key]] = 1;
    }
  }
  return sees;
}

constexpr int most_tokens = 150;  // of a sequence

// A token: its segment and its place in the whole grid.
struct Token {
  int segment;
  int place[3];
};

std::vector<Token> tokens_of(const std::vector<gna_segment>& segments) {
  std::vector<Token> tokens;
  for (size_t n = 0; n < segments.size(); ++n) {
    const gna_segment& segment = segments[n];
    const int index = static_cast<int>(n);
    if (segment.axis_count == 0) tokens.insert(tokens.end(), segment.tokens, Token{index, {}});
    gna_axis axes[3] = {
        {1, 0, 1, 0, 1, 1, 1, 0}, {1, 0, 1, 0, 1, 1, 1, 0}, {1, 0, 1, 0, 1, 1, 1, 0}};
    std::copy_n(segment.axes, segment.axis_count, axes);
    if (segment.axis_count == 0) continue;
    for (int i = axes[0].begin; i < axes[0].end; ++i)
      for (int j = axes[1].begin; j < axes[1].end; ++j)
        for (int k = axes[2].begin; k < axes[2].end; ++k) tokens.push_back({index, {i, j, k}});
  }
  return tokens;
}

struct Case {
  gna_problem problem{};
  std::vector<gna_segment> query_segments, key_segments;
  std::vector<uint8_t> links;
  std::vector<Token> queries, keys;
  std::vector<uint8_t> key_mask;
  std::vector<char> visible;  // [batch, queries, keys]

  Case() {
    problem.type = draw(0, 2);
    problem.batch = draw(1, 2);
    problem.kv_heads = draw(1, 2);
    problem.heads = problem.kv_heads * draw(1, 3);
    problem.head_dim = draw(0, 3) ? draw(1, 40) : draw(0, 1) ? 64 : 8;
    do {
      draw_segments();
      queries = tokens_of(query_segments);
      keys = tokens_of(key_segments);
    } while (queries.size() > most_tokens || keys.size() > most_tokens);
    query_segments.shrink_to_fit();
    key_segments.shrink_to_fit();
    draw_links();
    problem.pattern = {static_cast<int32_t>(query_segments.size()),
                       static_cast<int32_t>(key_segments.size()), query_segments.data(),
                       key_segments.data(), links.data()};
    problem.scale = std::uniform_real_distribution<float>(-1, 1)(generator);
    problem.threads = draw(1, 3);
    const auto globals = std::count_if(keys.begin(), keys.end(), [&](const Token& key) {
      return key_segments[key.segment].axis_count == 0;
    });
    if (draw(0, 1)) {
      for (int i = 0; i < problem.batch * globals; ++i) key_mask.push_back(draw(0, 2) != 0);
      key_mask.shrink_to_fit();
      problem.key_mask = {key_mask.empty() ? nullptr : key_mask.data(), globals, 1};
    }
    find_visible(static_cast<int>(globals));
  }

  // Segments around one grid, so that windows can link them.
  void draw_segments() {
    const int axis_count = draw(1, 3);
    const int longest[] = {0, 90, 12, 6};
    int lengths[3];
    for (int a = 0; a < axis_count; ++a) lengths[a] = draw(1, longest[axis_count]);
    const auto draw_sequence = [&] {
      std::vector<gna_segment> segments(draw(1, 3));
      for (gna_segment& segment : segments) draw_segment(segment, axis_count, lengths);
      return segments;
    };
    key_segments = draw_sequence();
    query_segments = draw(0, 1) ? key_segments : draw_sequence();
  }

  void draw_segment(gna_segment& segment, int axis_count, const int* lengths) {
    if (draw(0, 3) == 0) {
      segment.tokens = draw(0, 1) ? draw(0, 5) : draw(0, 70);
      return;
    }
    const bool thin = draw(0, 2) == 0, part = draw(0, 2) == 0, other = draw(0, 5) == 0;
    segment.axis_count = other ? draw(1, 3) : axis_count;
    int left = draw(4, 6);
    for (int a = 0; a < segment.axis_count; ++a) {
      gna_axis& axis = segment.axes[a];
      axis.length = other ? draw(1, 6) : thin && draw(0, 1) ? 1 : lengths[a];
      axis.end = axis.length;
      if (part) {
        axis.begin = draw(0, axis.length - 1);
        axis.end = draw(axis.begin + 1, axis.length);
      }
      axis.log2_box = a + 1 == segment.axis_count ? left : draw(0, left);
      left -= axis.log2_box;
      axis.dilation = draw(0, 2) ? 1 : draw(1, std::min(axis.length, 4));
      axis.window = draw(1, axis.length / axis.dilation);
      axis.stride = draw(0, 1) ? 1 : draw(1, axis.window);
      axis.causal = draw(0, 3) == 0;
    }
  }

  void draw_links() {
    for (const gna_segment& query : query_segments)
      for (const gna_segment& key : key_segments) {
        bool aligned = query.axis_count > 0 && query.axis_count == key.axis_count;
        for (int a = 0; aligned && a < query.axis_count; ++a) {
          const int one = query.axes[a].length, other = key.axes[a].length;
          aligned = one == other || one == 1 || other == 1;
        }
        links.push_back(aligned && draw(0, 4) ? GNA_WINDOW : draw(0, 3) ? GNA_FULL : GNA_NONE);
      }
    links.shrink_to_fit();
  }

  void find_visible(int globals) {
    std::vector<std::vector<char>> sees[3];  // of each query segment's axis
    for (int a = 0; a < 3; ++a)
      for (const gna_segment& segment : query_segments)
        sees[a].push_back(a < segment.axis_count ? axis_matrix(segment.axes[a])
                                                 : std::vector<char>{});
    for (int b = 0; b < problem.batch; ++b)
      for (const Token& query : queries) {
        int column = b * globals;
        for (const Token& key : keys) {
          const gna_segment& own = query_segments[query.segment];
          const gna_segment& other = key_segments[key.segment];
          const int link = links[query.segment * key_segments.size() + key.segment];
          bool seen = link != GNA_NONE;
          for (int a = 0; link == GNA_WINDOW && a < own.axis_count; ++a) {
            const int length = own.axes[a].length;
            if (other.axes[a].length == length)
              seen = seen && sees[a][query.segment][query.place[a] * length + key.place[a]];
          }
          if (other.axis_count == 0 && problem.key_mask.data) seen = seen && key_mask[column];
          column += other.axis_count == 0;
          visible.push_back(seen);
        }
      }
  }
};

void run(const char* isa) {
  Case test;
  gna_problem& problem = test.problem;
  problem.isa = isa;
  const int queries = static_cast<int>(test.queries.size());
  const int keys = static_cast<int>(test.keys.size());
  const int dim = problem.head_dim, group = problem.heads / problem.kv_heads;
  const auto of_queries = [&] {
    return Tensor(problem.type, problem.batch, problem.heads, queries, dim);
  };
  const auto of_keys = [&] {
    return Tensor(problem.type, problem.batch, problem.kv_heads, keys, dim);
  };
  Tensor query = of_queries(), key = of_keys(), value = of_keys(), output = of_queries(),
         grad_output = of_queries(), grad_query = of_queries(), grad_key = of_keys(),
         grad_value = of_keys();
  for (Tensor* tensor : {&query, &key, &value, &grad_output}) tensor->randomize();
  for (Tensor* tensor : {&output, &grad_query, &grad_key, &grad_value}) tensor->poison();
  const int64_t rows = int64_t{problem.batch} * problem.heads * queries;
  std::vector<float> logsumexp(rows, NAN), grad_logsumexp(rows);
  std::normal_distribution<float> normal;
  for (float& grad : grad_logsumexp) grad = normal(generator);
  const bool with_logsumexp = draw(0, 1);

  const gna_tensor q = query.plain(), k = key.plain(), v = value.plain(), o = output.plain(),
                   go = grad_output.plain(), gq = grad_query.plain(), gk = grad_key.plain(),
                   gv = grad_value.plain();
  const gna_tensor gl = {grad_logsumexp.data(), int64_t{problem.heads} * queries, queries, 1, 1};
  int32_t code = gna_cpu_forward(&problem, &q, &k, &v, &o, logsumexp.data());
  if (code != GNA_OK) fail("forward's code", code, GNA_OK);
  code = gna_cpu_backward(&problem, &go, with_logsumexp ? &gl : nullptr, &q, &k, &v, &o,
                          logsumexp.data(), &gq, &gk, &gv);
  if (code != GNA_OK) fail("backward's code", code, GNA_OK);

  std::vector<double> weight(keys);
  for (int b = 0; b < problem.batch; ++b)
    for (int h = 0; h < problem.heads; ++h)
      for (int i = 0; i < queries; ++i) {
        const char* const sees = test.visible.data() + (int64_t{b} * queries + i) * keys;
        double total = 0;
        for (int j = 0; j < keys; ++j) {
          double score = 0;
          for (int d = 0; d < dim; ++d)
            score += query.value(b, h, i, d) * key.value(b, h / group, j, d);
          weight[j] = sees[j] ? std::exp(score * problem.scale) : 0;
          total += weight[j];
        }
        const int64_t row = (int64_t{b} * problem.heads + h) * queries + i;
        const double expected = std::log(total);
        if (total == 0 ? !(std::isinf(logsumexp[row]) && logsumexp[row] < 0)
                       : !(std::fabs(logsumexp[row] - expected) <= 1e-4 * (1 + std::fabs(expected))))
          fail("logsumexp", logsumexp[row], expected);
        double delta = with_logsumexp ? -grad_logsumexp[row] : 0;
        for (int j = 0; j < keys; ++j) {
          weight[j] = total == 0 ? 0 : weight[j] / total;
          for (int d = 0; d < dim; ++d) {
            const double part = weight[j] * value.value(b, h / group, j, d);
            output.value(b, h, i, d) += part;
            delta += part * grad_output.value(b, h, i, d);
          }
        }
        for (int j = 0; j < keys; ++j) {
          double grad = -delta;
          for (int d = 0; d < dim; ++d)
            grad += grad_output.value(b, h, i, d) * value.value(b, h / group, j, d);
          grad *= weight[j] * problem.scale;
          for (int d = 0; d < dim; ++d) {
            grad_query.value(b, h, i, d) += grad * key.value(b, h / group, j, d);
            grad_key.value(b, h / group, j, d) += grad * query.value(b, h, i, d);
            grad_value.value(b, h / group, j, d) += weight[j] * grad_output.value(b, h, i, d);
          }
        }
      }
  const double tolerance[] = {3e-5, 4e-2, 6e-3};
  const double allowed = tolerance[problem.type];
  output.expect_values("output", allowed);
  // The backward starts from the rounded output, whose error counts for each element of a head.
  grad_query.expect_values("grad_query", 4 * allowed);
  grad_key.expect_values("grad_key", 4 * allowed);
  grad_value.expect_values("grad_value", allowed);
}

void check_exp2() {
  for (int step = -130 * 4096; step <= 10 * 4096; ++step) {
    const float x = static_cast<float>(step) / 4096;
    const double actual = gna::fuzz::exp2(gna::fuzz::splat(x))[0], expected = std::exp2(double{x});
    const double allowed = x < -126 ? 0x1p-126 : 2e-7 * expected;
    if (!(std::fabs(actual - expected) <= allowed)) fail("exp2", actual, expected);
  }
  if (gna::fuzz::exp2(gna::fuzz::splat(-INFINITY))[0] != 0) fail("exp2(-inf)", 1, 0);
  if (!std::isinf(gna::fuzz::exp2(gna::fuzz::splat(INFINITY))[0])) fail("exp2(inf)", 0, INFINITY);
  if (!std::isnan(gna::fuzz::exp2(gna::fuzz::splat(NAN))[0])) fail("exp2(NaN)", 0, NAN);
}

void check_conversions() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    const double expected = exponent == 31  ? (fraction ? NAN : sign * INFINITY)
                            : exponent == 0 ? sign * std::ldexp(fraction, -24)
                                            : sign * std::ldexp(1024 + fraction, exponent - 25);
    const auto half = static_cast<uint16_t>(bits);
    char at[4];
    std::memcpy(at, &half, 2);
    const float actual = to_float(GNA_FP16, at);
    if (std::isnan(expected) ? !std::isnan(actual) : actual != expected)
      fail("an fp16", actual, expected);
    // Halfway to the next value up goes to the even one of the two, a hair more to the next.
    for (const int32_t type : {GNA_FP16, GNA_BF16}) {
      const float value = to_float(type, at);
      const auto up = static_cast<uint16_t>(bits + 1);
      char up_at[4], result[4];
      std::memcpy(up_at, &up, 2);
      const float next = to_float(type, up_at);
      if (!std::isfinite(value) || !std::isfinite(next) || (bits & 0x7fff) == 0x7fff) continue;
      const float middle = value / 2 + next / 2;
      const char* const even = bits & 1 ? up_at : at;
      from_float(type, value, result);
      if (std::memcmp(result, at, 2) != 0) fail("a converted float", to_float(type, result), value);
      if (middle == value || middle == next || std::fabs(middle) < 0x1p-125f) continue;
      from_float(type, middle, result);
      if (std::memcmp(result, even, 2) != 0)
        fail("a rounded middle", to_float(type, result), to_float(type, even));
      from_float(type, std::nextafter(middle, next), result);
      if (std::memcmp(result, up_at, 2) != 0)
        fail("a rounded float", to_float(type, result), next);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  check_exp2();
  check_conversions();
  int count = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  while (elapsed() < seconds)
    for (int32_t index = 0; const char* const isa = gna_cpu_isa(index); ++index, ++count) run(isa);
  std::printf("%d random problems agree\n", count);
  return 0;
}
