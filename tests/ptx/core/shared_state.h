// Shared memory and who touched each byte of it, so that a race is an error whatever the schedule.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "../units/shared_memory.h"
#include "clocks.h"

namespace gna::ptx {

class SharedState {
 public:
  static constexpr uint8_t poison = 0xff;  // NaN in each type

  SharedState(uint32_t size, Slots slots, uint32_t warps)
      : slots_(slots), bytes_(size, poison), writes_(size), reads_(warps, Clock(size)) {}

  SharedMemory memory() { return {bytes_.data(), static_cast<uint32_t>(bytes_.size())}; }
  uint8_t* at(uint32_t address, uint32_t count) { return memory().at(address, count); }

  // Accesses of a thread by ordinary instructions -------------------------------------------------

  void read(uint32_t thread, uint32_t clock, const Knowledge& knows, uint32_t begin,
            uint32_t count) {
    at(begin, count);
    for (uint32_t b = begin; b < begin + count; ++b) {
      const Write& last = writes_[b];
      check_plain(b, "reads");
      if (last.line == 0) fault("reads byte %u of shared memory, which nothing has written", b);
      if (last.slot != thread && knows.seen[last.slot] < last.clock)
        fault(
            "reads byte %u of shared memory, which %s has written without a synchronization since",
            b, author(last).c_str());
      reads_[thread / 32][b] = clock;
    }
  }

  void write(uint32_t thread, uint32_t clock, const Knowledge& knows, uint32_t begin,
             uint32_t count, int line) {
    at(begin, count);
    for (uint32_t b = begin; b < begin + count; ++b) {
      Write& last = writes_[b];
      check_plain(b, "writes");
      check_idle(b, "writes");
      if (last.slot != thread && knows.seen[last.slot] < last.clock)
        fault(
            "writes byte %u of shared memory, which %s has written without a synchronization since",
            b, author(last).c_str());
      check_read(b, knows, thread / 32, "writes");
      last = {thread, clock, line, last.reading, false, false};
    }
  }

  // Accesses of the asynchronous proxy, when they are issued by a thread
  // ---------------------------

  void read_async(uint32_t thread, const Knowledge& knows, const ByteRanges& ranges) {
    each(ranges, [&](uint32_t b) {
      const Write& last = writes_[b];
      check_plain(b, "has an asynchronous unit read");
      if (last.line == 0)
        fault("has an asynchronous unit read byte %u of shared memory, which nothing has written",
              b);
      check_known(b, thread, knows, "read");
    });
  }

  void begin_write_async(uint32_t thread, const Knowledge& knows, const ByteRanges& ranges,
                         int line) {
    each(ranges, [&](uint32_t b) {
      Write& last = writes_[b];
      check_plain(b, "has an asynchronous unit write");
      check_idle(b, "has an asynchronous unit write");
      if (last.line != 0) check_known(b, thread, knows, "write");
      check_read(b, knows, ~0u, "has an asynchronous unit write");
      last.writing = true;
      last.line = line;
      bytes_[b] = poison;
    });
  }

  // A copy has landed; `slot` and `clock` say what makes it visible.
  void end_write_async(const ByteRanges& ranges, uint32_t slot, uint32_t clock, int line) {
    each(ranges, [&](uint32_t b) {
      Write& last = writes_[b];
      last = {slot, clock, line, last.reading, false, false};
    });
  }

  // Between the two nothing may write these bytes.
  void begin_reading(const ByteRanges& ranges) {
    each(ranges, [&](uint32_t b) { ++writes_[b].reading; });
  }
  void end_reading(const ByteRanges& ranges) {
    each(ranges, [&](uint32_t b) { --writes_[b].reading; });
  }
  // A thread of the warp knows by now that reads have ended.
  void note_read(uint32_t warp, uint32_t clock, const ByteRanges& ranges) {
    for (const ByteRange& range : ranges)
      std::fill(&reads_[warp][range.begin], &reads_[warp][range.begin] + (range.end - range.begin),
                clock);
  }
  // The tensor core reads these bytes in its operation number `clock`.
  void note_tensor_read(uint32_t clock, const ByteRanges& ranges) {
    if (tensor_reads_.empty()) tensor_reads_.resize(bytes_.size());
    for (const ByteRange& range : ranges)
      std::fill(&tensor_reads_[range.begin],
                &tensor_reads_[range.begin] + (range.end - range.begin), clock);
  }

  // Eight bytes become an mbarrier: opaque to ordinary accesses.
  void make_barrier(uint32_t address) {
    for (uint32_t b = address; b < address + 8; ++b) writes_[b].barrier = true;
  }

 private:
  struct Write {
    uint32_t slot = 0, clock = 0;
    int line = 0;  // 0: never written
    uint16_t reading = 0;
    bool writing = false, barrier = false;
  };

  template <typename Visit>
  void each(const ByteRanges& ranges, Visit visit) {
    for (const ByteRange& range : ranges) {
      at(static_cast<uint32_t>(range.begin), static_cast<uint32_t>(range.end - range.begin));
      for (auto b = static_cast<uint32_t>(range.begin); b < range.end; ++b) visit(b);
    }
  }

  std::string author(const Write& write) const {
    const std::string line = " (line " + std::to_string(write.line) + ")";
    if (write.slot < slots_.threads)
      return "thread " + std::to_string(write.slot) + " of warp " +
             std::to_string(write.slot / 32) + line;
    return "a copy" + line;
  }

  void check_plain(uint32_t b, const char* doing) const {
    if (writes_[b].barrier)
      fault("%s byte %u of shared memory, which is part of an mbarrier", doing, b);
    if (writes_[b].writing)
      fault("%s byte %u of shared memory, which the copy of line %d is still going to write", doing,
            b, writes_[b].line);
  }
  void check_idle(uint32_t b, const char* doing) const {
    if (writes_[b].reading != 0)
      fault("%s byte %u of shared memory, which an asynchronous unit may still be reading", doing,
            b);
  }

  // The last write is visible to the asynchronous proxy by what the issuing thread knows.
  void check_known(uint32_t b, uint32_t thread, const Knowledge& knows, const char* doing) const {
    const Write& last = writes_[b];
    if (last.slot != thread && knows.seen[last.slot] < last.clock)
      fault(
          "has an asynchronous unit %s byte %u of shared memory, which %s has written without a "
          "synchronization since",
          doing, b, author(last).c_str());
    if (last.slot < slots_.threads && knows.proxied[last.slot] < last.clock)
      fault(
          "has an asynchronous unit %s byte %u of shared memory, which %s has written without a "
          "fence.proxy.async since",
          doing, b, author(last).c_str());
  }

  // Earlier reads have happened before, by what the thread knows of any lane of the reading warps.
  void check_read(uint32_t b, const Knowledge& knows, uint32_t own_warp, const char* doing) const {
    for (uint32_t warp = 0; warp < reads_.size(); ++warp) {
      const uint32_t clock = reads_[warp][b];
      if (clock == 0 || warp == own_warp) continue;
      const auto first = knows.seen.begin() + 32 * warp;
      if (*std::max_element(first, first + 32) < clock)
        fault("%s byte %u of shared memory, which warp %u has read without a synchronization since",
              doing, b, warp);
    }
    if (!tensor_reads_.empty() && knows.seen[slots_.tensor_core()] < tensor_reads_[b])
      fault("%s byte %u of shared memory, which the tensor core may still be reading", doing, b);
  }

  Slots slots_;
  std::vector<uint8_t> bytes_;
  std::vector<Write> writes_;
  std::vector<Clock> reads_;  // by warp
  Clock tensor_reads_;
};

}  // namespace gna::ptx
