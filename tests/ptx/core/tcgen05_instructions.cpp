// Blackwell's tensor core and its tensor memory.
//
// PTX ISA 9.7.16, "TensorCore 5th generation family instructions": 9.7.16.6 (memory consistency:
// which instructions wait for, fence or pipeline others), .7 (allocation), .8 (ld, st, wait), .10
// (mma), .11 (fences), .12 (commit).
#include "../units/tcgen05.h"
#include "block.h"
#include "decode.h"

namespace gna::ptx {

// tcgen05.ld or st of a warp, which runs until tcgen05.wait.
struct TensorTransfer {
  TensorRange cells;
  uint32_t clock;  // of the issue
  const Instruction* instruction;
  std::vector<uint32_t> values;  // of a store: by lane, then register
  bool done = false;
};

// Who touched which cell of tensor memory.
struct Block::TensorState {
  // Of a load that its warp has not awaited.
  static constexpr uint32_t unfinished = ~0u;

  struct Cell {
    uint32_t slot = 0, clock = 0;  // of the last write
    int line = 0;
    uint32_t product = 0;    // number of the last one that reads it
    uint32_t reads[8] = {};  // clocks of the warps that can, by rank of their warpgroup
  };
  std::vector<Cell> cells = std::vector<Cell>(tensor_lanes * tensor_columns);
  uint32_t products = 0;
  std::optional<uint32_t> issuer;  // the thread that has asked for them

  template <typename Visit>
  void each(const TensorRange& range, Visit visit) {
    for (uint32_t lane = range.lane_begin; lane < range.lane_end; ++lane)
      for (uint32_t column = range.column_begin; column < range.column_end; ++column)
        visit(cells[lane * tensor_columns + column], lane, column);
  }
};

std::shared_ptr<Block::TensorState> make_tensor_state() {
  return std::make_shared<Block::TensorState>();
}

namespace {

using Cell = Block::TensorState::Cell;

// What an access by a thread must know of earlier ones.
struct Accessor {
  Block& block;
  Warp& warp;
  uint32_t lane;
  bool multiplies = false;  // its own products are ordered among themselves

  const Knowledge& knows() const { return warp.thread(lane).knows; }

  void check_written(const Cell& cell, uint32_t row, uint32_t column, const char* doing) const {
    if (cell.line == 0) return;  // never: the unit says so where it matters
    const uint32_t core = block.slots.tensor_core();
    bool known;
    if (cell.slot == core)
      known = multiplies || knows().tensor[core] >= cell.clock;
    else if (cell.slot / warp_size == warp.index)
      known = warp.thread(cell.slot % warp_size).tensor_waited >= cell.clock;
    else
      known = knows().tensor[cell.slot] >= cell.clock;
    if (!known)
      fault(
          "%s lane %u of column %u of tensor memory, which line %d has written without what orders "
          "the two (a wait, fences, a barrier) since",
          doing, row, column, cell.line);
  }

  void check_read(const Cell& cell, uint32_t row, uint32_t column, const char* doing) const {
    if (!multiplies && knows().tensor[block.slots.tensor_core()] < cell.product)
      fault("%s lane %u of column %u of tensor memory, which a product may still be reading", doing,
            row, column);
    for (uint32_t group = 0; group < 8; ++group) {
      const uint32_t clock = cell.reads[group];
      if (clock == 0) continue;
      const uint32_t reader = group * 4 + row / warp_size;
      const auto first = knows().tensor.begin() + reader * warp_size;
      const bool known = reader == warp.index
                             ? clock != Block::TensorState::unfinished
                             : *std::max_element(first, first + warp_size) >= clock;
      if (!known)
        fault(
            "%s lane %u of column %u of tensor memory, which warp %u has read without what orders "
            "the "
            "two (a wait, fences, a barrier) since",
            doing, row, column, reader);
    }
  }
};

uint32_t uniform_address(Warp& warp, const Operand& operand) {
  return static_cast<uint32_t>(warp.uniform(operand.parts[0]) + operand.value);
}

// Allocation --------------------------------------------------------------------------------------

void need_one_block_form(Modifiers& modifiers) { modifiers.need("cta_group::1"); }

Handler decode_alloc(Instruction& i, Modifiers& modifiers) {
  need_one_block_form(modifiers);
  for (const char* part : {"sync", "aligned", "shared::cta", "b32"}) modifiers.need(part);
  modifiers.done();
  need_operands(i, 2, 2);
  all_are_read(i);
  return [o = i.operands](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    Block& block = warp.block;
    const auto found = block.tensor_memory.allocate(static_cast<uint32_t>(warp.uniform(o[1])));
    if (!found) return warp.wait("tensor memory");
    const uint32_t to = uniform_address(warp, o[0]);
    if (to % 4 != 0) fault("address %u is not a multiple of 4", to);
    block.shared.write(warp.thread_index(0), warp.clock, warp.thread(0).knows, to, 4,
                       warp.instruction().line);
    std::memcpy(block.shared.at(to, 4), &*found, 4);
    return true;
  };
}

Handler decode_dealloc(Instruction& i, Modifiers& modifiers) {
  need_one_block_form(modifiers);
  for (const char* part : {"sync", "aligned", "b32"}) modifiers.need(part);
  modifiers.done();
  need_operands(i, 2, 2);
  all_are_read(i);
  return [o = i.operands](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    Block& block = warp.block;
    const auto address = static_cast<uint32_t>(warp.uniform(o[0]));
    const auto columns = static_cast<uint32_t>(warp.uniform(o[1]));
    block.tensor_memory.deallocate(address, columns);
    // All accesses must be over; no fence is needed for that.
    const Clock& seen = warp.thread(0).knows.seen;
    block.tensor->each(
        {0, tensor_lanes, column_of(address), column_of(address) + columns},
        [&](Cell& cell, uint32_t row, uint32_t column) {
          bool over = seen[block.slots.tensor_core()] >= cell.product;
          if (cell.line != 0 && cell.slot / warp_size != warp.index)
            over = over && seen[cell.slot] >= cell.clock;
          for (uint32_t group = 0; group < 8; ++group) {
            const uint32_t clock = cell.reads[group], reader = group * 4 + row / warp_size;
            if (clock == 0 || reader == warp.index) continue;
            const auto first = seen.begin() + reader * warp_size;
            over = over && *std::max_element(first, first + warp_size) >= clock;
          }
          if (!over) fault("frees column %u of tensor memory, which may still be in use", column);
          cell = Cell{};
        });
    ++block.events;
    return true;
  };
}

// Loads and stores --------------------------------------------------------------------------------

struct Transfer {
  TensorShape shape;
  uint32_t repeat;
  bool packed;

  TensorAccess access(uint32_t address, uint32_t warp) const {
    return {shape, repeat, packed, address, warp};
  }
};

Transfer take_transfer(Modifiers& modifiers, const char* packing) {
  modifiers.need("sync");
  modifiers.need("aligned");
  const std::string shape = modifiers.take_first(), repeat = modifiers.take_first();
  Transfer transfer{};
  if (shape == "32x32b")
    transfer.shape = TensorShape::s32x32b;
  else if (shape == "16x64b")
    transfer.shape = TensorShape::s16x64b;
  else if (shape == "16x128b")
    transfer.shape = TensorShape::s16x128b;
  else if (shape == "16x256b")
    transfer.shape = TensorShape::s16x256b;
  else
    fault("unknown shape .%s", shape.c_str());
  if (repeat[0] != 'x') fault("unknown modifier .%s", repeat.c_str());
  transfer.repeat = static_cast<uint32_t>(std::stoul(repeat.substr(1)));
  transfer.packed = modifiers.take(packing);
  modifiers.need("b32");
  modifiers.done();
  return transfer;
}

const Operand& register_of(const Operand& operand, uint32_t r) {
  return operand.kind == Operand::Kind::vector ? operand.parts[r] : operand;
}

uint32_t count_of(const Operand& operand) {
  return operand.kind == Operand::Kind::vector ? static_cast<uint32_t>(operand.parts.size()) : 1;
}

// One warp's transfers happen in order; those of loads and of stores may pass each other, which the
// checks make an error where it matters.
uint64_t queue_of(const Warp& warp, bool loads) { return 1000 + 2 * warp.index + loads; }

Handler decode_load(Instruction& i, Modifiers& modifiers) {
  const Transfer transfer = take_transfer(modifiers, "pack::16b");
  need_operands(i, 2, 2);
  collect(i.operands[1], i.reads);
  return [transfer, o = i.operands](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    Block& block = warp.block;
    const TensorAccess access = transfer.access(uniform_address(warp, o[1]), warp.index);
    if (access.registers() != count_of(o[0])) fault("not %u registers", access.registers());
    const auto started = std::make_shared<TensorTransfer>();
    started->cells = access.range();
    started->clock = warp.clock;
    started->instruction = &warp.instruction();
    block.tensor_memory.check_allocated(started->cells, "tcgen05.ld");
    block.tensor->each(started->cells, [&](Cell& cell, uint32_t row, uint32_t column) {
      Accessor{block, warp, row % warp_size}.check_written(cell, row, column, "reads");
      cell.reads[warp.index / 4] = Block::TensorState::unfinished;
    });
    for (uint32_t r = 0; r < access.registers(); ++r) {
      const uint32_t reg = register_of(o[0], r).index;
      warp.check_writable(reg);
      warp.locks[reg] = Warp::closed;
    }
    warp.tensor_loads.push_back(started);
    block.start(queue_of(warp, true), warp, [&block, &warp, access, started] {
      const Operand& to = started->instruction->operands[0];
      access.load(block.tensor_memory, [&](uint32_t lane, uint32_t r, uint32_t bits) {
        warp.lanes_of(register_of(to, r).index)[lane] = bits;
      });
      started->done = true;
    });
    return true;
  };
}

Handler decode_store(Instruction& i, Modifiers& modifiers) {
  const Transfer transfer = take_transfer(modifiers, "unpack::16b");
  need_operands(i, 2, 2);
  all_are_read(i);
  return [transfer, o = i.operands](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    Block& block = warp.block;
    const TensorAccess access = transfer.access(uniform_address(warp, o[0]), warp.index);
    const uint32_t count = access.registers();
    if (count != count_of(o[1])) fault("not %u registers", count);
    const auto started = std::make_shared<TensorTransfer>();
    started->cells = access.range();
    started->clock = warp.clock;
    started->instruction = &warp.instruction();
    for (uint32_t lane = 0; lane < warp_size; ++lane)
      for (uint32_t r = 0; r < count; ++r)
        started->values.push_back(static_cast<uint32_t>(warp.get(register_of(o[1], r), lane)));
    block.tensor_memory.check_allocated(started->cells, "tcgen05.st");
    block.tensor->each(started->cells, [&](Cell& cell, uint32_t row, uint32_t column) {
      const Accessor by{block, warp, row % warp_size};
      by.check_written(cell, row, column, "writes");
      by.check_read(cell, row, column, "writes");
      cell.slot = warp.thread_index(row % warp_size);
      cell.clock = warp.clock;
      cell.line = warp.instruction().line;
    });
    block.tensor_memory.poison(started->cells);
    warp.tensor_stores.push_back(started);
    block.start(queue_of(warp, false), warp, [&block, access, started, count] {
      access.store(block.tensor_memory,
                   [&](uint32_t lane, uint32_t r) { return started->values[lane * count + r]; });
      started->done = true;
    });
    return true;
  };
}

bool await(Warp& warp, uint32_t mask, bool loads) {
  warp.must_be_whole(mask);
  auto& transfers = loads ? warp.tensor_loads : warp.tensor_stores;
  for (const auto& transfer : transfers)
    if (!transfer->done) return warp.wait(loads ? "its tcgen05.ld" : "its tcgen05.st");
  if (loads) {
    for (const auto& transfer : transfers) {
      warp.block.tensor->each(transfer->cells, [&](Cell& cell, uint32_t, uint32_t) {
        cell.reads[warp.index / 4] = warp.clock;
      });
      const Operand& to = transfer->instruction->operands[0];
      for (uint32_t r = 0; r < count_of(to); ++r) {
        const uint32_t reg = register_of(to, r).index;
        warp.locks[reg] = Warp::open;
        warp.wrote(reg, mask);
      }
    }
  } else {
    for_each_lane(mask, [&](uint32_t lane) { warp.thread(lane).tensor_waited = warp.clock; });
  }
  transfers.clear();
  return true;
}

// Fences ------------------------------------------------------------------------------------------

void fence_before(Warp& warp, uint32_t mask) {
  // A store that has not been awaited is ordered before nothing.
  const uint32_t upto =
      warp.tensor_stores.empty() ? warp.clock : warp.tensor_stores.front()->clock - 1;
  for_each_lane(mask, [&](uint32_t lane) { warp.thread(lane).tensor_released = upto; });
}

void fence_after(Warp& warp, uint32_t mask) {
  for_each_lane(mask, [&](uint32_t lane) {
    Thread& thread = warp.thread(lane);
    join(thread.knows.tensor, thread.acquired_tensor);
  });
}

// Products ----------------------------------------------------------------------------------------

uint64_t product_queue(uint32_t thread) { return 2000 + thread; }

uint32_t only_lane(uint32_t mask) {
  if (mask == 0 || (mask & (mask - 1)) != 0)
    fault("lanes %08x execute what is for one thread", mask);
  return static_cast<uint32_t>(__builtin_ctz(mask));
}

void multiply(Warp& warp, uint32_t lane, const Instruction& i) {
  Block& block = warp.block;
  Block::TensorState& state = *block.tensor;
  const std::vector<Operand>& o = i.operands;
  const Knowledge& knows = warp.thread(lane).knows;
  const auto address = [&](const Operand& operand) {
    return static_cast<uint32_t>(warp.address(operand, lane));
  };
  const bool tensor_a = o[1].kind == Operand::Kind::address;
  const bool accumulates = warp.predicate(o[4], lane);
  const Tcgen05Mma unit(static_cast<uint32_t>(warp.get(o[3], lane)), address(o[0]));
  const uint64_t a = tensor_a ? address(o[1]) : warp.get(o[1], lane), b = warp.get(o[2], lane);

  const uint32_t thread = warp.thread_index(lane);
  if (state.issuer && *state.issuer != thread &&
      knows.tensor[block.slots.tensor_core()] < state.products)
    fault("thread %u multiplies while products of thread %u may be in flight", thread,
          *state.issuer);
  state.issuer = thread;
  const uint32_t number = ++state.products;

  ByteRanges ranges = unit.b(b).touched();
  if (!tensor_a)
    for (const ByteRange& range : unit.a(a).touched()) ranges.push_back(range);
  merge(ranges);
  block.shared.read_async(thread, knows, ranges);
  block.shared.note_tensor_read(number, ranges);

  const Accessor by{block, warp, lane, true};
  if (tensor_a)
    for (const TensorRange& range : unit.touched_a(static_cast<uint32_t>(a)))
      state.each(range, [&](Cell& cell, uint32_t row, uint32_t column) {
        by.check_written(cell, row, column, "has a product read");
        cell.product = number;
      });
  for (const TensorRange& range : unit.touched_d()) {
    block.tensor_memory.check_allocated(range, "D of tcgen05.mma");
    state.each(range, [&](Cell& cell, uint32_t row, uint32_t column) {
      by.check_written(cell, row, column, "has a product write");
      by.check_read(cell, row, column, "has a product write");
      cell.slot = block.slots.tensor_core();
      cell.clock = number;
      cell.line = i.line;
    });
  }
  ++block.statistics.products;
  block.start(product_queue(thread), warp, [&block, unit, a, b, accumulates, tensor_a] {
    const SharedMemory memory = block.shared.memory();
    if (tensor_a)
      unit.run_tensor_a(block.tensor_memory, memory, static_cast<uint32_t>(a), b, accumulates);
    else
      unit.run(block.tensor_memory, memory, a, b, accumulates);
  });
}

Handler decode_product(Instruction& i, Modifiers& modifiers) {
  need_one_block_form(modifiers);
  modifiers.need("kind::f16");
  modifiers.done();
  need_operands(i, 5, 5);
  all_are_read(i);
  return [](Warp& warp, uint32_t mask) {
    multiply(warp, only_lane(mask), warp.instruction());
    return true;
  };
}

// An arrival when all products before it are done; as if a fence stood before (9.7.16.12). Whoever
// sees it knows what the products had to wait for, too: what their thread had learned of others.
Handler decode_commit(Instruction& i, Modifiers& modifiers) {
  need_one_block_form(modifiers);
  modifiers.need("mbarrier::arrive::one");
  if (!modifiers.take("shared::cluster")) modifiers.need("shared::cta");
  modifiers.need("b64");
  modifiers.done();
  need_operands(i, 1, 1);
  all_are_read(i);
  return [o = i.operands](Warp& warp, uint32_t mask) {
    Block& block = warp.block;
    const uint32_t lane = only_lane(mask), core = block.slots.tensor_core();
    const auto address = static_cast<uint32_t>(warp.address(o[0], lane));
    if (!block.barrier(address).open_to_copies)
      fault("the mbarrier at %u has been initialized without a fence for asynchronous units since",
            address);
    Knowledge known = warp.thread(lane).knows;
    known.seen[core] = known.tensor[core] = block.tensor->products;
    block.start(product_queue(warp.thread_index(lane)), warp, [&block, address, known] {
      Mbarrier& barrier = block.barrier(address);
      barrier.arriving.learn(known);
      barrier.arrive();
    });
    return true;
  };
}

}  // namespace

Handler decode_tcgen05(Instruction& i) {
  if (i.opcode.front() != "tcgen05") return nullptr;
  Modifiers modifiers(i);
  const std::string what = modifiers.take_first();
  if (what == "alloc") return decode_alloc(i, modifiers);
  if (what == "dealloc") return decode_dealloc(i, modifiers);
  if (what == "ld") return decode_load(i, modifiers);
  if (what == "st") return decode_store(i, modifiers);
  if (what == "mma") return decode_product(i, modifiers);
  if (what == "commit") return decode_commit(i, modifiers);
  if (what == "fence::before_thread_sync" || what == "fence::after_thread_sync") {
    modifiers.done();
    const auto fence = what == "fence::before_thread_sync" ? fence_before : fence_after;
    return [fence](Warp& warp, uint32_t mask) {
      fence(warp, mask);
      return true;
    };
  }
  if (what == "relinquish_alloc_permit") need_one_block_form(modifiers);
  modifiers.need("sync");
  modifiers.need("aligned");
  modifiers.done();
  if (what == "relinquish_alloc_permit")
    return [](Warp& warp, uint32_t mask) {
      warp.must_be_whole(mask);
      warp.block.tensor_memory.relinquish();
      return true;
    };
  if (what != "wait::ld" && what != "wait::st") fault("unknown modifier .%s", what.c_str());
  return
      [loads = what == "wait::ld"](Warp& warp, uint32_t mask) { return await(warp, mask, loads); };
}

}  // namespace gna::ptx
