// Work items spread over threads that live for one call.
//
// No pool: nothing is left behind that a fork could break or two callers could fight over, and an
// OpenMP runtime beside PyTorch's own copy would spin against it. A thread costs some ten
// microseconds, so `workers_for` starts none for work that is not worth it.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "gna_cpu.h"

namespace gna {

#if defined(GNA_EAGER_THREADS)
constexpr double flops_worth_a_thread = 1;  // so that sanitizers see threads in small problems
#else
constexpr double flops_worth_a_thread = 3e7;  // a third of a millisecond, about
#endif

inline int workers_for(double flops, int64_t items, int threads) {
  const double worth = flops / flops_worth_a_thread;
  int64_t workers = threads < items ? threads : items;
  if (worth < static_cast<double>(workers)) workers = static_cast<int64_t>(worth);
  return workers < 1 ? 1 : static_cast<int>(workers);
}

// Calls make_worker() once in each of `workers` threads (this one is the first) and the result with
// every item in 0 .. items - 1, in order, each in whichever thread is free. Returns a GNA_ code.
template <class MakeWorker>
int32_t for_items(int64_t items, int workers, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> code{GNA_OK};
  const auto work = [&]() noexcept {
    try {
      auto worker = make_worker();
      for (int64_t item = next++; item < items && code == GNA_OK; item = next++) worker(item);
    } catch (const std::bad_alloc&) {
      code = GNA_NO_MEMORY;
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(workers - 1);
    while (static_cast<int>(others.size()) < workers - 1) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
  return code;
}

}  // namespace gna
