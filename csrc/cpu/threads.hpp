// Work items spread over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "gna_cpu.h"

namespace gna {

#if defined(GNA_EAGER_THREADS)
constexpr double flops_worth_a_thread = 1;  // so that sanitizers see threads in small problems
#else
constexpr double flops_worth_a_thread = 5e6;  // fifty microseconds, about
#endif

// Calls work(data) in up to `threads` threads at once, the calling one among them; returns when all
// have. See threads.cpp for where they come from.
void run_in_threads(int threads, void (*work)(void*), void* data);

// Calls make_worker() once in each thread and the result with every item in 0 .. items - 1, in order,
// each in whichever thread is free. All `threads` or only this one, if the work is not worth more.
// Returns a GNA_ code.
template <class MakeWorker>
int32_t for_items(int64_t items, double flops, int threads, const MakeWorker& make_worker) {
  struct Shared {
    const MakeWorker& make_worker;
    const int64_t items;
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> code{GNA_OK};

    void work() noexcept {
      try {
        auto worker = make_worker();
        for (int64_t item = next++; item < items && code == GNA_OK; item = next++) worker(item);
      } catch (const std::bad_alloc&) {
        code = GNA_NO_MEMORY;
      }
    }
  };
  Shared shared{make_worker, items};
  if (threads == 1 || items == 1 || flops < 2 * flops_worth_a_thread)
    shared.work();
  else
    run_in_threads(threads, [](void* data) { static_cast<Shared*>(data)->work(); }, &shared);
  return shared.code;
}

}  // namespace gna
