// The Python module gna_compile._native: the C interface of csrc/cpu, and the shared header for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "gna/axis.h"
#include "bits.h"
#include "gna_cpu.h"

namespace py = pybind11;

namespace {

// Address and strides in elements: of [batch, heads, tokens, head_dim], of [batch, heads, tokens], or
// of [batch, global tokens].
using TensorArgument = std::tuple<uintptr_t, std::vector<int64_t>>;
using AxisArgument = std::tuple<int32_t, int32_t, int32_t, int32_t, bool>;

gna_axis axis_of(const AxisArgument& axis) {
  const auto [length, window, stride, dilation, causal] = axis;
  return {length, window, stride, dilation, causal};
}

gna_tensor tensor_of(const TensorArgument& tensor) {
  const auto& [address, strides] = tensor;
  if (strides.size() != 3 && strides.size() != 4)
    throw std::invalid_argument("a tensor has 3 or 4 strides");
  return {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2],
          strides.size() == 4 ? strides[3] : 1};
}

struct Problem {
  gna_problem plain{};
  std::string isa;

  Problem(int32_t type, std::array<int32_t, 4> sizes, const std::vector<AxisArgument>& axes,
          int32_t prefix, int32_t suffix, const std::vector<int32_t>& log2_query_box,
          const std::vector<int32_t>& log2_key_box, float scale,
          const std::optional<TensorArgument>& key_mask, int32_t threads, std::string isa)
      : isa(std::move(isa)) {
    if (axes.empty() || axes.size() > 3 || log2_query_box.size() != axes.size() ||
        log2_key_box.size() != axes.size())
      throw std::invalid_argument("a grid has 1 to 3 axes, and each box as many extents");
    plain.type = type;
    plain.batch = sizes[0];
    plain.heads = sizes[1];
    plain.kv_heads = sizes[2];
    plain.head_dim = sizes[3];
    plain.axis_count = static_cast<int32_t>(axes.size());
    for (size_t a = 0; a < axes.size(); ++a) {
      plain.axes[a] = axis_of(axes[a]);
      plain.log2_query_box[a] = log2_query_box[a];
      plain.log2_key_box[a] = log2_key_box[a];
    }
    plain.prefix = prefix;
    plain.suffix = suffix;
    plain.scale = scale;
    plain.threads = threads;
    if (key_mask) {
      const auto& [address, strides] = *key_mask;
      if (strides.size() != 2) throw std::invalid_argument("a key mask has 2 strides");
      plain.key_mask = reinterpret_cast<const uint8_t*>(address);
      plain.key_mask_batch_stride = strides[0];
      plain.key_mask_token_stride = strides[1];
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

int64_t streamed(const AxisArgument& axis, int32_t log2_box, bool of_keys) {
  const gna_axis plain = axis_of(axis);
  py::gil_scoped_release release;
  return gna_cpu_streamed(&plain, log2_box, of_keys);
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

  py::class_<Problem>(module, "Problem")
      .def(py::init<int32_t, std::array<int32_t, 4>, const std::vector<AxisArgument>&, int32_t,
                    int32_t, const std::vector<int32_t>&, const std::vector<int32_t>&, float,
                    const std::optional<TensorArgument>&, int32_t, std::string>(),
           py::kw_only(), py::arg("type"), py::arg("sizes"), py::arg("axes"), py::arg("prefix"),
           py::arg("suffix"), py::arg("log2_query_box"), py::arg("log2_key_box"),
           py::arg("scale"), py::arg("key_mask"), py::arg("threads"), py::arg("isa"));
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("isas", &isas);
  module.def("streamed", &streamed);

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
