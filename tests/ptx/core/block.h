// One thread block: its warps, its memories, its barriers and what its asynchronous units still
// have to do; and the scheduler that decides, from a seed, who goes next.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../units/tensor_memory.h"
#include "barriers.h"
#include "program.h"
#include "shared_state.h"

namespace gna::ptx {

constexpr uint32_t warp_size = 32;
constexpr uint32_t all_lanes = ~0u;

// Generic addresses of what is not in global memory (PTX ISA 5.1, "State spaces").
constexpr uint64_t shared_window = uint64_t{1} << 60, param_window = uint64_t{1} << 61;

// Memory that the host has handed out, and bounds for every access to it.
struct GlobalMemory {
  virtual ~GlobalMemory() = default;
  virtual void check(uint64_t address, uint64_t bytes, bool writes) const = 0;
};

struct LaunchShape {
  uint32_t blocks, threads, dynamic_shared;
};

// Bulk copies of one thread to global memory (PTX ISA 9.7.9.25, "bulk async-groups").
struct BulkStore {
  ByteRanges shared;
  bool has_read = false, has_written = false;
  bool read_awaited = false;  // by its thread, which knows from then on
};
using BulkGroup = std::vector<std::shared_ptr<BulkStore>>;

struct Thread {
  Knowledge knows;
  Clock acquired_tensor;         // of tensor memory: what is to be known after the next fence
  uint32_t tensor_waited = 0;    // clock of the last tcgen05.wait
  uint32_t tensor_released = 0;  // and of the last one before a tcgen05.fence::before_thread_sync
  BulkGroup open_stores;
  std::deque<BulkGroup> stores;
};

// wgmma.mma_async of a warpgroup; each of its four warps issues and awaits it.
struct WarpgroupProduct;
using WarpgroupProducts = std::vector<std::shared_ptr<WarpgroupProduct>>;

struct TensorTransfer;

struct Block;

struct Warp {
  Block& block;
  uint32_t index;
  uint32_t clock = 0;
  uint32_t live;

  struct Path {
    uint32_t mask, at, reconvergence;
  };
  std::vector<Path> paths;  // the last one runs

  // Registers by number; 32 lanes each.
  enum Lock : uint8_t { open, read_only, closed };
  std::vector<uint64_t> registers;
  std::vector<uint32_t> written;  // lanes
  std::vector<uint8_t> locks;     // by asynchronous units
  std::vector<uint32_t> changed;  // clock of the last ordinary write

  // Where a warp waits: the block's event counter when it last tried.
  std::optional<uint64_t> waits_since;
  std::string waits_for;
  std::optional<std::pair<uint32_t, uint32_t>> at_named_barrier;  // and its generation
  uint32_t register_limit;

  uint32_t matrix_fence = 0;  // clock of the last wgmma.fence
  uint64_t products_issued = 0;
  WarpgroupProducts open_products;
  std::deque<WarpgroupProducts> products;
  std::vector<std::shared_ptr<TensorTransfer>> tensor_loads, tensor_stores;

  Warp(Block& block, uint32_t index);

  const Instruction& instruction() const;
  uint64_t* lanes_of(uint32_t reg) { return &registers[reg * warp_size]; }
  uint64_t get(const Operand& operand, uint32_t lane);
  void set(const Operand& operand, uint32_t lane, uint64_t value);
  bool predicate(const Operand& operand, uint32_t lane) {
    return (get(operand, lane) != 0) != operand.negated;
  }
  // An operand that must be the same in all lanes.
  uint64_t uniform(const Operand& operand);
  // [base + offset]
  uint64_t address(const Operand& operand, uint32_t lane) {
    return get(operand.parts[0], lane) + operand.value;
  }
  Thread& thread(uint32_t lane);
  uint32_t thread_index(uint32_t lane) const { return index * warp_size + lane; }
  // For instructions marked .aligned, which all lanes must execute together.
  void must_be_whole(uint32_t mask) const;
  bool wait(std::string why);

  void check_readable(uint32_t reg, uint32_t mask) const;
  void check_writable(uint32_t reg) const;
  void wrote(uint32_t reg, uint32_t mask);

  void step();

 private:
  void branch(const Instruction& instruction, uint32_t active, uint32_t taken);
  void leave(uint32_t lanes);
  void settle();
};

template <typename Visit>
void for_each_lane(uint32_t mask, Visit visit) {
  for (uint32_t lane = 0; lane < warp_size; ++lane)
    if (mask >> lane & 1) visit(lane);
}

// Work that an asynchronous unit does at a time of its own choice. Of one queue, in order.
struct AsyncWork {
  uint64_t queue;
  int line;
  std::string text;
  std::function<void()> run;
};

// How adversarial a schedule is; all of it follows from the seed.
struct Schedule {
  std::mt19937_64 random;
  bool by_priority;        // else warps take turns at random
  uint32_t longest_burst;  // instructions of a warp in a row
  double
      async_rate;  // chance, before each burst, that a unit finishes something; 0: only when stuck

  explicit Schedule(uint64_t seed);
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(random() % bound); }
  bool chance(double probability) { return (random() >> 11) * 0x1p-53 < probability; }
};

struct Statistics {
  uint64_t instructions = 0, products = 0, loads = 0, stores = 0;
};

struct Block {
  const Kernel& kernel;
  const LaunchShape& shape;
  uint32_t block_index;
  const GlobalMemory& global;
  std::vector<uint8_t>& parameters;
  Schedule& schedule;
  Statistics& statistics;

  Slots slots;
  uint32_t shared_base;  // address of the first variable in shared memory
  SharedState shared;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<uint32_t, Mbarrier> barriers;  // by address
  std::vector<NamedBarrier> named;
  uint32_t spare_registers = 0;
  // Issued by some of a warpgroup's warps, by warpgroup and number.
  std::map<std::pair<uint32_t, uint64_t>, std::shared_ptr<WarpgroupProduct>> partial_products;
  std::vector<AsyncWork> async;
  uint64_t next_queue = uint64_t{1} << 32;
  uint64_t events = 0;  // anything that a waiting warp may wait for
  uint32_t leader_seed;

  TensorMemory tensor_memory;
  struct TensorState;  // who touched which cell
  std::shared_ptr<TensorState> tensor;

  Block(const Kernel& kernel, const LaunchShape& shape, uint32_t index, const GlobalMemory& global,
        std::vector<uint8_t>& parameters, Schedule& schedule, Statistics& statistics);

  void run(uint64_t most_instructions);

  Mbarrier& barrier(uint32_t address);
  void release(Warp& warp, uint32_t lane, Knowledge& to);
  void acquire(Warp& warp, uint32_t lane, const Knowledge& from);
  void start(uint64_t queue, const Warp& warp, std::function<void()> work);
  void finish_async();
  std::string state() const;

 private:
  void check_end();
};

std::shared_ptr<Block::TensorState> make_tensor_state();

inline Thread& Warp::thread(uint32_t lane) { return block.threads[thread_index(lane)]; }

inline uint64_t Warp::get(const Operand& operand, uint32_t lane) {
  switch (operand.kind) {
    case Operand::Kind::reg:
      return registers[operand.index * warp_size + lane];
    case Operand::Kind::immediate:
      return operand.value;
    case Operand::Kind::shared:
      return block.shared_base + operand.value;
    case Operand::Kind::special:
      switch (static_cast<Special>(operand.index)) {
        case Special::tid:
          return thread_index(lane);
        case Special::ntid:
          return block.shape.threads;
        case Special::ctaid:
          return block.block_index;
        case Special::nctaid:
          return block.shape.blocks;
        case Special::laneid:
          return lane;
        case Special::warpid:
          return index;
      }
      [[fallthrough]];
    default:
      fault("this operand has no value");
  }
}

inline void Warp::set(const Operand& operand, uint32_t lane, uint64_t value) {
  if (operand.kind == Operand::Kind::sink) return;
  registers[operand.index * warp_size + lane] = value;
}

}  // namespace gna::ptx
