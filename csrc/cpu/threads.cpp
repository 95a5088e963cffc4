// Threads come from the OpenMP runtime that is in the process already, which is PyTorch's; without
// one, or in a forked child, they live for one call.
//
// PyTorch's workers spin for milliseconds after each of its operators: threads beside them would
// share their cores, and a second runtime would spin back. Inside a parallel region the runtime gives
// one thread, so nothing is oversubscribed there. It is looked up, not linked: GOMP_parallel is what
// compilers call for `#pragma omp parallel`, part of libgomp's stable interface, and LLVM's runtime
// has it too. Its pool does not survive a fork, which is why a child does without.
#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

namespace gna {

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
const int not_watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel find_parallel() {
  if (not_watched || forked) return nullptr;
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

void run_in_own_threads(int threads, void (*work)(void*), void* data) {
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(work, data);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work(data);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_in_threads(int threads, void (*work)(void*), void* data) {
  if (const Parallel parallel = find_parallel())
    parallel(work, data, static_cast<unsigned>(threads), 0);
  else
    run_in_own_threads(threads, work, data);
}

}  // namespace gna
