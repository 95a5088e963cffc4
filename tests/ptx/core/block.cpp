#include "block.h"

#include <cstdio>

namespace gna::ptx {

// A warp ------------------------------------------------------------------------------------------

Warp::Warp(Block& block, uint32_t index) : block(block), index(index) {
  const uint32_t count = block.kernel.registers;
  const uint32_t lanes = block.shape.threads - index * warp_size;
  live = lanes >= warp_size ? all_lanes : (1u << lanes) - 1;
  const auto end = static_cast<uint32_t>(block.kernel.code.size());
  paths.push_back({live, 0, end});
  registers.assign(count * warp_size, 0xffffffffffffffff);
  written.assign(count, 0);
  locks.assign(count, open);
  changed.assign(count, 0);
}

const Instruction& Warp::instruction() const { return block.kernel.code[paths.back().at]; }

uint64_t Warp::uniform(const Operand& operand) {
  const uint64_t first = get(operand, 0);
  for (uint32_t lane = 1; lane < warp_size; ++lane)
    if (get(operand, lane) != first) fault("an operand differs among the lanes");
  return first;
}

void Warp::must_be_whole(uint32_t mask) const {
  if (mask != live)
    fault("only lanes %08x of the warp's %08x execute this instruction, which is for all", mask,
          live);
}

bool Warp::wait(std::string why) {
  waits_since = block.events;
  waits_for = std::move(why);
  return false;
}

void Warp::check_readable(uint32_t reg, uint32_t mask) const {
  if (locks[reg] == closed)
    fault("reads %s, which an asynchronous instruction has not finished with",
          block.kernel.register_names[reg].c_str());
  if ((written[reg] & mask) != mask)
    fault("reads %s, which lanes %08x have not written", block.kernel.register_names[reg].c_str(),
          mask & ~written[reg]);
}

void Warp::check_writable(uint32_t reg) const {
  if (locks[reg] != open)
    fault("writes %s, which an asynchronous instruction has not finished with",
          block.kernel.register_names[reg].c_str());
}

void Warp::wrote(uint32_t reg, uint32_t mask) {
  written[reg] |= mask;
  changed[reg] = clock;
}

void Warp::step() {
  const Instruction& now = instruction();
  const uint32_t active = paths.back().mask;
  waits_since.reset();
  ++clock;
  ++block.statistics.instructions;
  uint32_t mask = active;
  if (now.guarded) {
    check_readable(now.guard, active);
    const uint64_t* const lanes = lanes_of(now.guard);
    for_each_lane(active, [&](uint32_t lane) {
      if ((lanes[lane] != 0) == now.guard_negated) mask &= ~(1u << lane);
    });
  }
  switch (now.flow) {
    case Instruction::Flow::branch:
      branch(now, active, mask);
      break;
    case Instruction::Flow::exit:
      leave(mask);
      ++paths.back().at;
      break;
    case Instruction::Flow::next:
      if (mask != 0) {
        for (const uint32_t reg : now.reads) check_readable(reg, mask);
        for (const uint32_t reg : now.writes) check_writable(reg);
        if (!now.run(*this, mask)) return;
        for (const uint32_t reg : now.writes) wrote(reg, mask);
      }
      ++paths.back().at;
      break;
  }
  settle();
}

// Lanes part at a branch and meet again at its immediate post-dominator; which side runs first is a
// matter of the schedule.
void Warp::branch(const Instruction& now, uint32_t active, uint32_t taken) {
  Path& path = paths.back();
  const uint32_t next = path.at + 1, left = active & ~taken;
  if (left == 0) {
    path.at = now.target;
  } else if (taken == 0) {
    path.at = next;
  } else {
    path.at = now.reconvergence;
    Path sides[] = {{taken, now.target, now.reconvergence}, {left, next, now.reconvergence}};
    if (block.schedule.chance(0.5)) std::swap(sides[0], sides[1]);
    paths.insert(paths.end(), sides, sides + 2);
  }
}

void Warp::leave(uint32_t lanes) {
  live &= ~lanes;
  for_each_lane(lanes, [&](uint32_t lane) {
    for (const BulkGroup& group : thread(lane).stores)
      for (const auto& store : group)
        if (!store->read_awaited)
          fault("thread %u exits while its bulk store may still read shared memory",
                thread_index(lane));
    if (!thread(lane).open_stores.empty())
      fault("thread %u exits with bulk stores in no group", thread_index(lane));
  });
  for (Path& path : paths) path.mask &= ~lanes;
}

void Warp::settle() {
  while (!paths.empty() &&
         (paths.back().mask == 0 || paths.back().at == paths.back().reconvergence))
    paths.pop_back();
}

// Schedules ---------------------------------------------------------------------------------------

Schedule::Schedule(uint64_t seed) : random(seed) {
  by_priority = seed % 3 == 2;
  constexpr uint32_t bursts[] = {1, 8, 64, 400};
  longest_burst = bursts[seed / 3 % 4];
  constexpr double rates[] = {0.3, 0.0, 1.0, 0.02};
  async_rate = rates[seed % 4];
}

// A block -----------------------------------------------------------------------------------------

namespace {

// Registers of a thread at the launch: as many as fit, in steps of eight (PTX ISA 9.7.19.5,
// "setmaxnreg", and the occupancy rules of compute capability 9.0 and 10.0).
uint32_t registers_at_launch(uint32_t threads) { return std::min(255u, 65536 / threads / 8 * 8); }

}  // namespace

Block::Block(const Kernel& kernel, const LaunchShape& shape, uint32_t index,
             const GlobalMemory& global, std::vector<uint8_t>& parameters, Schedule& schedule,
             Statistics& statistics)
    : kernel(kernel),
      shape(shape),
      block_index(index),
      global(global),
      parameters(parameters),
      schedule(schedule),
      statistics(statistics),
      slots{shape.threads},
      // The first kilobyte belongs to the system; variables are aligned as they ask for, not more.
      shared_base(1024 + kernel.shared_alignment *
                             schedule.below(std::max(1024 / kernel.shared_alignment, 2u))),
      shared(shared_base + kernel.static_shared + shape.dynamic_shared, slots,
             (shape.threads + warp_size - 1) / warp_size),
      threads(shape.threads),
      named(16),
      leader_seed(schedule.below(warp_size)),
      tensor(make_tensor_state()) {
  if (shape.threads == 0 || shape.threads % warp_size != 0 || shape.threads > 1024)
    fault("a block of %u threads", shape.threads);
  if (kernel.max_threads != 0 && shape.threads > kernel.max_threads)
    fault("a block of %u threads of a kernel compiled for %u", shape.threads, kernel.max_threads);
  if (kernel.static_shared + shape.dynamic_shared > 227 * 1024)
    fault("%u bytes of shared memory", kernel.static_shared + shape.dynamic_shared);
  for (Thread& thread : threads) {
    thread.knows = Knowledge(slots.count());
    thread.acquired_tensor.assign(slots.count(), 0);
  }
  warps.reserve(shape.threads / warp_size);
  for (uint32_t i = 0; i < shape.threads / warp_size; ++i) {
    warps.emplace_back(*this, i);
    warps.back().register_limit = registers_at_launch(shape.threads);
  }
}

void Block::run(uint64_t most_instructions) {
  std::vector<uint32_t> priorities(warps.size());
  for (uint32_t& priority : priorities) priority = schedule.below(1u << 30);
  std::vector<uint32_t> ready;
  Warp* current = nullptr;
  try {
    while (true) {
      ready.clear();
      bool any_live = false;
      for (const Warp& warp : warps) {
        if (warp.paths.empty()) continue;
        any_live = true;
        if (!warp.waits_since || *warp.waits_since != events) ready.push_back(warp.index);
      }
      if (!any_live) break;
      current = nullptr;
      if (!async.empty() && (ready.empty() || schedule.chance(schedule.async_rate))) {
        finish_async();
        continue;
      }
      if (ready.empty()) fault("deadlock: every warp waits");
      uint32_t chosen = ready[schedule.below(static_cast<uint32_t>(ready.size()))];
      if (schedule.by_priority) {
        for (const uint32_t warp : ready)
          if (priorities[warp] > priorities[chosen]) chosen = warp;
        // Now and then the most urgent one becomes the least.
        if (schedule.chance(0.05)) priorities[chosen] = schedule.below(1u << 30);
      }
      current = &warps[chosen];
      const uint32_t burst = 1 + schedule.below(schedule.longest_burst);
      for (uint32_t i = 0; i < burst && !current->paths.empty(); ++i) {
        current->step();
        if (current->waits_since) break;
      }
      if (statistics.instructions > most_instructions) fault("more than the allowed instructions");
    }
    current = nullptr;
    check_end();
  } catch (const Fault& error) {
    std::string text = error.what();
    if (current != nullptr && !current->paths.empty())
      text = "warp " + std::to_string(current->index) + ", line " +
             std::to_string(current->instruction().line) + ", " + current->instruction().text +
             ": " + text;
    throw Fault(text + "\n" + state());
  }
}

void Block::check_end() {
  for (const Warp& warp : warps) {
    if (!warp.products.empty() || !warp.open_products.empty())
      fault("warp %u has ended without waiting for its wgmma", warp.index);
    if (warp.register_limit != warps[warp.index / 4 * 4].register_limit)
      fault("warp %u has not changed its registers with its warpgroup", warp.index);
  }
  for (const auto& [address, barrier] : barriers)
    if (barrier.bytes != 0)
      fault("the mbarrier at %u still waits for %lld bytes at the end", address - shared_base,
            static_cast<long long>(barrier.bytes));
  while (!async.empty()) finish_async();
  tensor_memory.check_all_freed();
}

void Block::start(uint64_t queue, const Warp& warp, std::function<void()> work) {
  const Instruction& instruction = warp.instruction();
  async.push_back({queue, instruction.line, instruction.text, std::move(work)});
}

void Block::finish_async() {
  size_t chosen = schedule.below(static_cast<uint32_t>(async.size()));
  for (size_t i = 0; i < chosen; ++i)
    if (async[i].queue == async[chosen].queue) {
      chosen = i;
      break;
    }
  const AsyncWork work = std::move(async[chosen]);
  async.erase(async.begin() + static_cast<std::ptrdiff_t>(chosen));
  ++events;
  try {
    work.run();
  } catch (const Fault& error) {
    fault("what line %d, %s, has started: %s", work.line, work.text.c_str(), error.what());
  }
}

Mbarrier& Block::barrier(uint32_t address) {
  if (address % 8 != 0) fault("the address %u of an mbarrier is not a multiple of 8", address);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fault("there is no mbarrier at %u", address - shared_base);
  return found->second;
}

void Block::release(Warp& warp, uint32_t lane, Knowledge& to) {
  Thread& thread = warp.thread(lane);
  const uint32_t own = warp.thread_index(lane);
  thread.knows.seen[own] = warp.clock;
  thread.knows.tensor[own] = thread.tensor_released;
  if (to.seen.empty()) to = Knowledge(slots.count());
  to.learn(thread.knows);
  // What others have published goes through; only the last one needs a fence to make use of it.
  join(to.tensor, thread.acquired_tensor);
}

void Block::acquire(Warp& warp, uint32_t lane, const Knowledge& from) {
  if (from.seen.empty()) return;
  Thread& thread = warp.thread(lane);
  join(thread.knows.seen, from.seen);
  join(thread.knows.proxied, from.proxied);
  join(thread.acquired_tensor, from.tensor);
}

std::string Block::state() const {
  std::string text = "block " + std::to_string(block_index) + ":\n";
  char line[400];
  for (const Warp& warp : warps) {
    if (warp.paths.empty()) {
      std::snprintf(line, sizeof line, "  warp %2u has ended\n", warp.index);
    } else {
      const Instruction& now = warp.instruction();
      std::snprintf(line, sizeof line, "  warp %2u, lanes %08x, line %d, %.90s%s%s\n", warp.index,
                    warp.paths.back().mask, now.line, now.text.c_str(),
                    warp.waits_since ? ": waits for " : "",
                    warp.waits_since ? warp.waits_for.c_str() : "");
    }
    text += line;
  }
  for (const auto& [address, barrier] : barriers) {
    std::snprintf(line, sizeof line,
                  "  mbarrier at %u: phase %u, %u of %u arrivals and %lld bytes pending\n",
                  address - shared_base, barrier.phase, barrier.pending, barrier.expected,
                  static_cast<long long>(barrier.bytes));
    text += line;
  }
  for (size_t id = 0; id < named.size(); ++id)
    if (named[id].arrived != 0) {
      std::snprintf(line, sizeof line, "  named barrier %zu: %u of %u threads\n", id,
                    named[id].arrived, named[id].expected);
      text += line;
    }
  for (const AsyncWork& work : async) {
    std::snprintf(line, sizeof line, "  in flight: line %d, %.90s\n", work.line, work.text.c_str());
    text += line;
  }
  return text;
}

}  // namespace gna::ptx
