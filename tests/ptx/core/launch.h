// Running a kernel: all blocks of a launch, one after another in an order that follows from the
// seed.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "block.h"

namespace gna::ptx {

class HostMemory : public GlobalMemory {
 public:
  // `shared`: blocks may write it more than once. What the host hands out, a launch must not.
  void add(uint64_t begin, uint64_t bytes, bool writable, bool shared = false) {
    regions_.push_back(
        {begin, begin + bytes, writable, std::vector<bool>(shared || !writable ? 0 : bytes)});
  }
  void clear() { regions_.clear(); }

  void check(uint64_t address, uint64_t bytes, bool writes) const override {
    for (Region& region : regions_) {
      if (address < region.begin || address >= region.end || bytes > region.end - address) continue;
      if (!writes) return;
      if (!region.writable) fault("writes global memory that is only to be read");
      if (region.written.empty()) return;
      for (uint64_t b = address - region.begin; b < address - region.begin + bytes; ++b) {
        if (region.written[b])
          fault("writes byte %#llx of global memory a second time",
                static_cast<unsigned long long>(region.begin + b));
        region.written[b] = true;
      }
      return;
    }
    fault("%llu bytes at %#llx are not in any global memory handed out",
          static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address));
  }

 private:
  struct Region {
    uint64_t begin, end;
    bool writable;
    std::vector<bool> written;
  };
  mutable std::vector<Region> regions_;
};

inline void add_globals(HostMemory& memory, const Program& program) {
  for (const auto& variable : program.globals)
    memory.add(reinterpret_cast<uint64_t>(variable->data()), variable->size(), true, true);
}

inline void run(const Kernel& kernel, const LaunchShape& shape, const GlobalMemory& global,
                std::vector<uint8_t> parameters, uint64_t seed, uint64_t most_instructions,
                Statistics& statistics) {
  if (parameters.size() != kernel.parameter_bytes)
    fault("%zu bytes of parameters, not %u", parameters.size(), kernel.parameter_bytes);
  Schedule schedule(seed);
  std::vector<uint32_t> order(shape.blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), schedule.random);
  for (const uint32_t index : order)
    Block(kernel, shape, index, global, parameters, schedule, statistics).run(most_instructions);
}

}  // namespace gna::ptx
