// TMA: boxes of tensors between global and shared memory.
//
// PTX ISA 9.7.9.25 "cp.async.bulk" (completion mechanisms, bulk async-groups), 9.7.9.27
// "cp.async.bulk.tensor".
#include <cstring>

#include "../units/tensor_map.h"
#include "block.h"
#include "decode.h"

namespace gna::ptx {
namespace {

struct Box {
  TensorMap map;
  int32_t coordinates[max_tensor_rank] = {};
};

// [map, {coordinates}]
Box box_of(Warp& warp, const Operand& operand, uint32_t rank, uint32_t lane) {
  Block& block = warp.block;
  const uint64_t address = warp.address(operand, lane);
  const uint8_t* bytes = nullptr;
  if (address >= param_window) {
    const uint64_t offset = address - param_window;
    if (offset % 64 != 0 || offset + sizeof(TensorMap) > block.parameters.size())
      fault("there is no tensor map at byte %llu of the parameters",
            static_cast<unsigned long long>(offset));
    bytes = block.parameters.data() + offset;
  } else {
    if (address % 64 != 0) fault("the address of a tensor map is not a multiple of 64");
    block.global.check(address, sizeof(TensorMap), false);
    bytes = reinterpret_cast<const uint8_t*>(address);
  }
  Box box;
  std::memcpy(&box.map, bytes, sizeof box.map);
  if (box.map.magic != TensorMap::is_map) fault("this is not a tensor map");
  if (box.map.rank != rank) fault("a tensor map of rank %u", box.map.rank);
  for (uint32_t d = 0; d < rank; ++d)
    box.coordinates[d] = static_cast<int32_t>(warp.get(operand.parts[1].parts[d], lane));
  return box;
}

uint32_t shared_address(Warp& warp, const Operand& operand, uint32_t lane) {
  return static_cast<uint32_t>(warp.address(operand, lane));
}

void check_global(Block& block, const BoxCopy& copy, bool writes) {
  for (const ByteRange& range : copy.global)
    block.global.check(range.begin, range.end - range.begin, writes);
}

void start_load(Warp& warp, const Instruction& i, uint32_t rank, uint32_t lane) {
  Block& block = warp.block;
  const Box box = box_of(warp, i.operands[1], rank, lane);
  const uint32_t to = shared_address(warp, i.operands[0], lane);
  const uint32_t barrier_address = shared_address(warp, i.operands[2], lane);
  if (!block.barrier(barrier_address).open_to_copies)
    fault("the mbarrier at %u has been initialized without a fence for TMA since",
          barrier_address);
  const BoxCopy copy = touched(box.map, box.coordinates, to);
  check_global(block, copy, false);
  block.shared.begin_write_async(warp.thread_index(lane), warp.thread(lane).knows, copy.shared,
                                 i.line);
  ++block.statistics.loads;
  block.start(block.next_queue++, warp, [&block, box, copy, to, barrier_address, line = i.line] {
    load_box(box.map, box.coordinates, block.shared.memory(), to);
    Mbarrier& barrier = block.barrier(barrier_address);
    block.shared.end_write_async(copy.shared, barrier.slot, barrier.phase + 1, line);
    barrier.complete_bytes(copy.transaction_bytes);
  });
}

// First reads shared memory, later writes global memory.
void start_store(Warp& warp, const Instruction& i, uint32_t rank, uint32_t lane) {
  Block& block = warp.block;
  const Box box = box_of(warp, i.operands[0], rank, lane);
  const uint32_t from = shared_address(warp, i.operands[1], lane);
  const BoxCopy copy = touched(box.map, box.coordinates, from);
  check_global(block, copy, true);
  block.shared.read_async(warp.thread_index(lane), warp.thread(lane).knows, copy.shared);
  block.shared.begin_reading(copy.shared);
  const auto store = std::make_shared<BulkStore>();
  store->shared = copy.shared;
  warp.thread(lane).open_stores.push_back(store);
  ++block.statistics.stores;
  const uint64_t queue = block.next_queue++;
  const auto end = static_cast<uint32_t>(copy.shared.back().end);
  AsyncWork write{queue, i.line, i.text, nullptr};
  block.start(queue, warp, [&block, box, store, from, end, write]() mutable {
    const auto bytes = std::make_shared<std::vector<uint8_t>>(end);
    std::memcpy(bytes->data() + from, block.shared.at(from, end - from), end - from);
    store->has_read = true;
    write.run = [box, store, from, bytes] {
      store_box(box.map, box.coordinates, {bytes->data(), static_cast<uint32_t>(bytes->size())},
                from);
      store->has_written = true;
    };
    block.async.push_back(std::move(write));
  });
}

Handler decode_tensor_copy(Instruction& i) {
  Modifiers modifiers(i);
  for (const char* part : {"async", "bulk", "tensor"}) modifiers.need(part);
  const std::string dimensions = modifiers.take_first();
  const auto rank = static_cast<uint32_t>(dimensions[0] - '0');
  if (dimensions.size() != 2 || dimensions[1] != 'd' || rank < 1 || rank > max_tensor_rank)
    fault("unknown modifier .%s", dimensions.c_str());
  modifiers.take("tile");
  modifiers.need("global");
  const bool loads = modifiers.take("mbarrier::complete_tx::bytes");
  if (loads) {
    if (!modifiers.take("shared::cluster")) modifiers.need("shared::cta");
  } else {
    modifiers.need("shared::cta");
    modifiers.need("bulk_group");
    if (i.opcode[5] != "global") fault("the order of the state spaces");
  }
  modifiers.done();
  need_operands(i, loads ? 3 : 2, loads ? 3 : 2);
  const Operand& tensor = i.operands[loads ? 1 : 0];
  if (tensor.parts.size() != 2 || tensor.parts[1].parts.size() != rank)
    fault("not %u coordinates", rank);
  all_are_read(i);
  return [loads, rank](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      (loads ? start_load : start_store)(warp, warp.instruction(), rank, lane);
    });
    return true;
  };
}

Handler decode_commit(Instruction& i) {
  need_operands(i, 0, 0);
  return [](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      Thread& thread = warp.thread(lane);
      thread.stores.push_back(std::move(thread.open_stores));
      thread.open_stores.clear();
    });
    return true;
  };
}

// All but the last `pending` groups must have read their source or, without `read`, be complete.
bool await_stores(Warp& warp, uint32_t lane, uint32_t pending, bool read) {
  Thread& thread = warp.thread(lane);
  const size_t awaited = thread.stores.size() - std::min<size_t>(pending, thread.stores.size());
  for (size_t group = 0; group < awaited; ++group)
    for (const auto& store : thread.stores[group])
      if (!(read ? store->has_read : store->has_written)) return warp.wait("its bulk stores");
  for (size_t group = 0; group < awaited; ++group)
    for (const auto& store : thread.stores[group]) {
      if (store->read_awaited) continue;
      store->read_awaited = true;
      warp.block.shared.end_reading(store->shared);
      warp.block.shared.note_read(warp.index, warp.clock, store->shared);
    }
  if (!read)
    thread.stores.erase(thread.stores.begin(),
                        thread.stores.begin() + static_cast<std::ptrdiff_t>(awaited));
  return true;
}

Handler decode_wait(Instruction& i) {
  Modifiers modifiers(i);
  for (const char* part : {"async", "bulk", "wait_group"}) modifiers.need(part);
  const bool read = modifiers.take("read");
  modifiers.done();
  need_operands(i, 1, 1);
  if (i.operands[0].kind != Operand::Kind::immediate) fault("the count is not an immediate");
  return [read, pending = static_cast<uint32_t>(i.operands[0].value)](Warp& warp, uint32_t mask) {
    bool ready = true;
    for_each_lane(mask,
                  [&](uint32_t lane) { ready = ready && await_stores(warp, lane, pending, read); });
    return ready;
  };
}

}  // namespace

Handler decode_copy(Instruction& i) {
  const std::string& base = i.opcode.front();
  if (base == "prefetch" && i.opcode[1] == "tensormap") {
    all_are_read(i);
    return [](Warp&, uint32_t) { return true; };
  }
  if (base != "cp") return nullptr;
  if (i.opcode.size() > 3 && i.opcode[3] == "tensor") return decode_tensor_copy(i);
  if (i.opcode.size() == 4 && i.opcode[3] == "commit_group") return decode_commit(i);
  if (i.opcode.size() > 3 && i.opcode[3] == "wait_group") return decode_wait(i);
  fault("this copy is not modeled");
}

}  // namespace gna::ptx
