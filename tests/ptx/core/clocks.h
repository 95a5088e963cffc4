// What a thread knows of what others did: vector clocks, after Mattern and Fidge.
//
// An access is visible to a thread if a chain of synchronization leads from it to that thread
// ("base causality order", PTX ISA 8.9.4, "Causality order"). Each warp counts its instructions; an
// entry of a clock is the count up to which the owner knows what the slot's thread did. Slots
// beyond the threads stand for asynchronous work: one for each mbarrier (its phases), one for the
// tensor core (its operations).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gna::ptx {

constexpr uint32_t most_barriers = 96;

struct Slots {
  uint32_t threads;
  uint32_t barrier(uint32_t index) const { return threads + index; }
  uint32_t tensor_core() const { return threads + most_barriers; }
  uint32_t count() const { return threads + most_barriers + 1; }
};

using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// `seen`: what happened before. `proxied`: of that, the generic writes that a proxy fence has shown
// to the asynchronous proxy (8.9.4.3, "Proxy-preserved base causality order"). `tensor`: of that,
// the accesses of tensor memory that tcgen05 fences have ordered.
struct Knowledge {
  Clock seen, proxied, tensor;

  explicit Knowledge(size_t slots = 0) : seen(slots), proxied(slots), tensor(slots) {}
  void learn(const Knowledge& other) {
    join(seen, other.seen);
    join(proxied, other.proxied);
    join(tensor, other.tensor);
  }
};

}  // namespace gna::ptx
