// Barriers: mbarrier objects in shared memory, and the sixteen named barriers.
//
// PTX ISA 9.7.13.15, "mbarrier" (phases, pending and expected arrivals, tx-count), 9.7.13.1,
// "bar{.cta}".
#pragma once

#include <cstdint>
#include <map>

#include "../units/fault.h"
#include "clocks.h"

namespace gna::ptx {

struct Mbarrier {
  uint32_t slot;
  uint32_t expected, pending;
  int64_t bytes = 0;   // tx-count
  uint32_t phase = 0;  // the current, incomplete one
  uint32_t init_thread, init_clock;
  bool open_to_copies = false;  // by a fence since the initialization
  Knowledge arriving, completed;

  // The range of the tx-count, 9.7.13.15.3.
  static constexpr int64_t most_bytes = (1 << 20) - 1;

  void expect(uint32_t more) {
    bytes += more;
    check_bytes();
  }

  // Whether this completes the phase.
  bool arrive(uint32_t count = 1) {
    if (count > pending)
      fault("arrives at an mbarrier of %u arrivals of which %u are pending in phase %u", expected,
            pending, phase);
    pending -= count;
    return complete();
  }
  bool complete_bytes(uint32_t count) {
    bytes -= count;
    check_bytes();
    return complete();
  }

 private:
  void check_bytes() const {
    if (bytes > most_bytes || bytes < -most_bytes)
      fault("the tx-count of an mbarrier is out of range");
  }
  bool complete() {
    if (pending != 0 || bytes != 0) return false;
    ++phase;
    pending = expected;
    completed.learn(arriving);
    completed.seen[slot] = phase;
    return true;
  }
};

struct NamedBarrier {
  uint32_t expected = 0;  // threads; 0 while nobody has arrived
  uint32_t arrived = 0;
  uint32_t generation = 0;
  bool any = false, any_before = false;  // of the predicates, now and in the generation before
  Knowledge arriving, completed;
};

}  // namespace gna::ptx
