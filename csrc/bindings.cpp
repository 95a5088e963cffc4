// The Python module gna_compile._native: the C interface of csrc/cpu, and the shared header for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "bits.h"
#include "gna/axis.h"
#include "gna_cpu.h"

namespace py = pybind11;

namespace {

// Address and strides in elements: of [batch, heads, tokens, head_dim], of [batch, heads, tokens], or
// of [batch, global tokens].
using TensorArgument = std::tuple<uintptr_t, std::vector<int64_t>>;
// Length, begin and end, log2 of the box; window, stride, dilation, causal.
using AxisArgument = std::array<int32_t, 8>;
// Global tokens, or the axes of a grid.
using SegmentArgument = std::variant<int32_t, std::vector<AxisArgument>>;

gna_tensor tensor_of(const TensorArgument& tensor) {
  const auto& [address, strides] = tensor;
  if (strides.size() != 3 && strides.size() != 4)
    throw std::invalid_argument("a tensor has 3 or 4 strides");
  return {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2],
          strides.size() == 4 ? strides[3] : 1};
}

gna_segment segment_of(const SegmentArgument& argument) {
  gna_segment segment{};
  if (const auto* tokens = std::get_if<int32_t>(&argument)) {
    segment.tokens = *tokens;
    return segment;
  }
  const auto& axes = std::get<std::vector<AxisArgument>>(argument);
  if (axes.empty() || axes.size() > 3) throw std::invalid_argument("a grid has 1 to 3 axes");
  segment.axis_count = static_cast<int32_t>(axes.size());
  for (size_t a = 0; a < axes.size(); ++a) {
    const auto [length, begin, end, log2_box, window, stride, dilation, causal] = axes[a];
    segment.axes[a] = {length, begin, end, log2_box, window, stride, dilation, causal};
  }
  return segment;
}

std::vector<gna_segment> segments_of(const std::vector<SegmentArgument>& arguments) {
  std::vector<gna_segment> segments;
  for (const SegmentArgument& argument : arguments) segments.push_back(segment_of(argument));
  return segments;
}

struct Pattern {
  std::vector<gna_segment> queries, keys;
  std::vector<uint8_t> links;

  Pattern(const std::vector<SegmentArgument>& queries, const std::vector<SegmentArgument>& keys,
          std::vector<uint8_t> links)
      : queries(segments_of(queries)), keys(segments_of(keys)), links(std::move(links)) {
    if (this->links.size() != queries.size() * keys.size())
      throw std::invalid_argument("there is one link for each query segment and key segment");
  }

  gna_pattern get() const {
    return {static_cast<int32_t>(queries.size()), static_cast<int32_t>(keys.size()), queries.data(),
            keys.data(), links.data()};
  }
};

struct Problem {
  gna_problem plain{};
  std::shared_ptr<Pattern> pattern;
  std::string isa;

  Problem(int32_t type, std::array<int32_t, 4> sizes, std::shared_ptr<Pattern> pattern, float scale,
          const std::optional<TensorArgument>& key_mask, int32_t threads, std::string isa)
      : pattern(std::move(pattern)), isa(std::move(isa)) {
    plain.type = type;
    plain.batch = sizes[0];
    plain.heads = sizes[1];
    plain.kv_heads = sizes[2];
    plain.head_dim = sizes[3];
    plain.pattern = this->pattern->get();
    plain.scale = scale;
    plain.threads = threads;
    if (key_mask) {
      const auto& [address, strides] = *key_mask;
      if (strides.size() != 2) throw std::invalid_argument("a key mask has 2 strides");
      plain.key_mask = {reinterpret_cast<const uint8_t*>(address), strides[0], strides[1]};
    }
  }

  gna_problem get() const {
    gna_problem result = plain;
    result.isa = isa.empty() ? nullptr : isa.c_str();
    return result;
  }
};

void check(int32_t code, const Problem& problem) {
  switch (code) {
    case GNA_OK:
      return;
    case GNA_NO_MEMORY:
      throw std::bad_alloc();
    case GNA_NO_SUCH_ISA:
      throw std::invalid_argument("this processor or build has no instruction set '" +
                                  problem.isa + "'");
    default:
      throw std::invalid_argument("the CPU kernel does not take this problem");
  }
}

void forward(const Problem& problem, const TensorArgument& query, const TensorArgument& key,
             const TensorArgument& value, const TensorArgument& output, uintptr_t logsumexp) {
  const gna_problem plain = problem.get();
  const gna_tensor q = tensor_of(query), k = tensor_of(key), v = tensor_of(value),
                   o = tensor_of(output);
  int32_t code = GNA_OK;
  {
    py::gil_scoped_release release;
    code = gna_cpu_forward(&plain, &q, &k, &v, &o, reinterpret_cast<float*>(logsumexp));
  }
  check(code, problem);
}

void backward(const Problem& problem, const TensorArgument& grad_output,
              const std::optional<TensorArgument>& grad_logsumexp, const TensorArgument& query,
              const TensorArgument& key, const TensorArgument& value,
              const TensorArgument& output, uintptr_t logsumexp, const TensorArgument& grad_query,
              const TensorArgument& grad_key, const TensorArgument& grad_value) {
  const gna_problem plain = problem.get();
  const gna_tensor go = tensor_of(grad_output), q = tensor_of(query), k = tensor_of(key),
                   v = tensor_of(value), o = tensor_of(output), gq = tensor_of(grad_query),
                   gk = tensor_of(grad_key), gv = tensor_of(grad_value);
  const gna_tensor gl = grad_logsumexp ? tensor_of(*grad_logsumexp) : gna_tensor{};
  int32_t code = GNA_OK;
  {
    py::gil_scoped_release release;
    code = gna_cpu_backward(&plain, &go, grad_logsumexp ? &gl : nullptr, &q, &k, &v, &o,
                            reinterpret_cast<const float*>(logsumexp), &gq, &gk, &gv);
  }
  check(code, problem);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int32_t index = 0; const char* const name = gna_cpu_isa(index); ++index)
    names.emplace_back(name);
  return names;
}

// The boxes of an axis, and what each grid at the other end of a window streams past them.
std::pair<int64_t, std::vector<int64_t>> streamed(const Pattern& pattern, bool of_keys,
                                                  int32_t segment, int32_t axis, int32_t log2_box) {
  const gna_pattern plain = pattern.get();
  std::vector<int64_t> sums(of_keys ? pattern.queries.size() : pattern.keys.size());
  const int64_t boxes = gna_cpu_streamed(&plain, of_keys, segment, axis, log2_box, sums.data());
  if (boxes < 0) throw std::invalid_argument("the CPU kernel does not take this pattern");
  return {boxes, sums};
}

using Pair = std::tuple<int32_t, int32_t>;
using GroupArgument = std::tuple<int32_t, int32_t, int32_t, bool>;

gna::Axis group_of(const GroupArgument& axis) {
  const auto [length, window, stride, causal] = axis;
  return {length, window, stride, causal};
}

Pair pair_of(gna::Range range) { return {range.begin, range.end}; }

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native code of gna_compile; use it through gna_compile.providers.";

  py::class_<Pattern, std::shared_ptr<Pattern>>(module, "Pattern")
      .def(py::init<const std::vector<SegmentArgument>&, const std::vector<SegmentArgument>&,
                    std::vector<uint8_t>>(),
           py::kw_only(), py::arg("queries"), py::arg("keys"), py::arg("links"))
      .def("streamed", &streamed);
  py::class_<Problem>(module, "Problem")
      .def(py::init<int32_t, std::array<int32_t, 4>, std::shared_ptr<Pattern>, float,
                    const std::optional<TensorArgument>&, int32_t, std::string>(),
           py::kw_only(), py::arg("type"), py::arg("sizes"), py::arg("pattern"), py::arg("scale"),
           py::arg("key_mask"), py::arg("threads"), py::arg("isa"));
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("isas", &isas);

  // The shared header, for tests: an axis is (length, window, stride, causal), a range (begin, end).
  module.def("group_length", &gna::group_length);
  module.def("keys_of", [](const GroupArgument& axis, int32_t query) {
    return pair_of(gna::keys_of(group_of(axis), query));
  });
  module.def("union_of", [](const GroupArgument& axis, int32_t begin, int32_t end) {
    return pair_of(gna::union_of(group_of(axis), {begin, end}));
  });
  module.def("intersection_of", [](const GroupArgument& axis, int32_t begin, int32_t end) {
    return pair_of(gna::intersection_of(group_of(axis), {begin, end}));
  });
  module.def("seen_by", [](const GroupArgument& axis, int32_t begin, int32_t end) {
    return pair_of(gna::seen_by(group_of(axis), {begin, end}));
  });
  module.def("all_seen_by", [](const GroupArgument& axis, int32_t begin, int32_t end) {
    return pair_of(gna::all_seen_by(group_of(axis), {begin, end}));
  });
  module.def("axis_bits", [](int32_t begin, int32_t end, int32_t log2_inner, int32_t log2_extent,
                             int32_t word) {
    return gna::axis_bits({begin, end}, log2_inner, log2_extent, word);
  });
}
