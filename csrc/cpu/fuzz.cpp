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

struct Case {
  gna_problem problem{};
  int tokens = 0;
  std::vector<uint8_t> key_mask;
  std::vector<char> visible;  // [batch, tokens, tokens]

  Case() {
    problem.type = draw(0, 2);
    problem.batch = draw(1, 2);
    problem.kv_heads = draw(1, 2);
    problem.heads = problem.kv_heads * draw(1, 3);
    problem.head_dim = draw(0, 3) ? draw(1, 40) : draw(0, 1) ? 64 : 8;
    problem.axis_count = draw(1, 3);
    const int longest[] = {0, 90, 12, 6};
    int grid = 1;
    for (int a = 0; a < problem.axis_count; ++a) {
      gna_axis& axis = problem.axes[a];
      axis.length = draw(1, longest[problem.axis_count]);
      axis.dilation = draw(0, 2) ? 1 : draw(1, std::min(axis.length, 4));
      axis.window = draw(1, axis.length / axis.dilation);
      axis.stride = draw(0, 1) ? 1 : draw(1, axis.window);
      axis.causal = draw(0, 3) == 0;
      grid *= axis.length;
    }
    problem.prefix = draw(0, 1) ? 0 : draw(0, 70);
    problem.suffix = draw(0, 1) ? 0 : draw(0, 5);
    tokens = problem.prefix + grid + problem.suffix;
    problem.scale = std::uniform_real_distribution<float>(-1, 1)(generator);
    problem.threads = draw(1, 3);
    draw_box(problem.log2_query_box);
    draw_box(problem.log2_key_box);
    if (draw(0, 1)) {
      const int globals = problem.prefix + problem.suffix;
      for (int i = 0; i < problem.batch * globals; ++i) key_mask.push_back(draw(0, 2) != 0);
      key_mask.shrink_to_fit();
      if (!key_mask.empty()) problem.key_mask = key_mask.data();
      problem.key_mask_batch_stride = globals;
      problem.key_mask_token_stride = 1;
    }
    find_visible(grid);
  }

  void draw_box(int32_t* log2_box) {
    const int sum = draw(4, 6);
    int left = sum;
    for (int a = 0; a + 1 < problem.axis_count; ++a) left -= log2_box[a] = draw(0, left);
    log2_box[problem.axis_count - 1] = left;
  }

  void find_visible(int grid) {
    std::vector<char> inner(int64_t{grid} * grid, 1);
    int step = grid;
    for (int a = 0; a < problem.axis_count; ++a) {
      const int length = problem.axes[a].length;
      const std::vector<char> sees = axis_matrix(problem.axes[a]);
      step /= length;
      for (int i = 0; i < grid; ++i)
        for (int j = 0; j < grid; ++j)
          inner[int64_t{i} * grid + j] &= sees[i / step % length * length + j / step % length];
    }
    visible.assign(int64_t{problem.batch} * tokens * tokens, 1);
    for (int b = 0; b < problem.batch; ++b)
      for (int i = 0; i < tokens; ++i)
        for (int j = 0; j < tokens; ++j) {
          char& seen = visible[(int64_t{b} * tokens + i) * tokens + j];
          const int query = i - problem.prefix, key = j - problem.prefix;
          const bool global_key = key < 0 || key >= grid;
          if (global_key && problem.key_mask) {
            const int index = key < 0 ? j : j - grid;
            seen = key_mask[b * problem.key_mask_batch_stride + index] != 0;
          } else if (!global_key && query >= 0 && query < grid) {
            seen = inner[int64_t{query} * grid + key];
          }
        }
  }
};

void run(const char* isa) {
  Case test;
  gna_problem& problem = test.problem;
  problem.isa = isa;
  const int tokens = test.tokens, dim = problem.head_dim, group = problem.heads / problem.kv_heads;
  const auto of_queries = [&] {
    return Tensor(problem.type, problem.batch, problem.heads, tokens, dim);
  };
  const auto of_keys = [&] {
    return Tensor(problem.type, problem.batch, problem.kv_heads, tokens, dim);
  };
  Tensor query = of_queries(), key = of_keys(), value = of_keys(), output = of_queries(),
         grad_output = of_queries(), grad_query = of_queries(), grad_key = of_keys(),
         grad_value = of_keys();
  for (Tensor* tensor : {&query, &key, &value, &grad_output}) tensor->randomize();
  for (Tensor* tensor : {&output, &grad_query, &grad_key, &grad_value}) tensor->poison();
  const int64_t rows = int64_t{problem.batch} * problem.heads * tokens;
  std::vector<float> logsumexp(rows, NAN), grad_logsumexp(rows);
  std::normal_distribution<float> normal;
  for (float& grad : grad_logsumexp) grad = normal(generator);
  const bool with_logsumexp = draw(0, 1);

  const gna_tensor q = query.plain(), k = key.plain(), v = value.plain(), o = output.plain(),
                   go = grad_output.plain(), gq = grad_query.plain(), gk = grad_key.plain(),
                   gv = grad_value.plain();
  const gna_tensor gl = {grad_logsumexp.data(), int64_t{problem.heads} * tokens, tokens, 1, 1};
  int32_t code = gna_cpu_forward(&problem, &q, &k, &v, &o, logsumexp.data());
  if (code != GNA_OK) fail("forward's code", code, GNA_OK);
  code = gna_cpu_backward(&problem, &go, with_logsumexp ? &gl : nullptr, &q, &k, &v, &o,
                          logsumexp.data(), &gq, &gk, &gv);
  if (code != GNA_OK) fail("backward's code", code, GNA_OK);

  std::vector<double> weight(tokens);
  for (int b = 0; b < problem.batch; ++b)
    for (int h = 0; h < problem.heads; ++h)
      for (int i = 0; i < tokens; ++i) {
        const char* const sees = &test.visible[(int64_t{b} * tokens + i) * tokens];
        double total = 0;
        for (int j = 0; j < tokens; ++j) {
          double score = 0;
          for (int d = 0; d < dim; ++d)
            score += query.value(b, h, i, d) * key.value(b, h / group, j, d);
          weight[j] = sees[j] ? std::exp(score * problem.scale) : 0;
          total += weight[j];
        }
        const int64_t row = (int64_t{b} * problem.heads + h) * tokens + i;
        const double expected = std::log(total);
        if (total == 0 ? !(std::isinf(logsumexp[row]) && logsumexp[row] < 0)
                       : !(std::fabs(logsumexp[row] - expected) <= 1e-4 * (1 + std::fabs(expected))))
          fail("logsumexp", logsumexp[row], expected);
        double delta = with_logsumexp ? -grad_logsumexp[row] : 0;
        for (int j = 0; j < tokens; ++j) {
          weight[j] = total == 0 ? 0 : weight[j] / total;
          for (int d = 0; d < dim; ++d) {
            const double part = weight[j] * value.value(b, h / group, j, d);
            output.value(b, h, i, d) += part;
            delta += part * grad_output.value(b, h, i, d);
          }
        }
        for (int j = 0; j < tokens; ++j) {
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
  grad_query.expect_values("grad_query", allowed);
  grad_key.expect_values("grad_key", allowed);
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
