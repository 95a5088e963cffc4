// Barriers of a block, mbarriers and fences.
//
// PTX ISA 9.7.13.1 "bar{.cta}", 9.7.13.15 "mbarrier", 9.7.13.4 "membar / fence".
#include "block.h"
#include "decode.h"

namespace gna::ptx {
namespace {

// Named barriers ----------------------------------------------------------------------------------

struct NamedOperands {
  Operand id, count;
  bool has_count;
};

// Arrives; whether this completes the barrier.
void arrive(Warp& warp, NamedBarrier& barrier, uint32_t count, bool any) {
  if (count == 0 || count % warp_size != 0 || count > warp.block.shape.threads)
    fault("a named barrier of %u threads", count);
  if (barrier.arrived != 0 && barrier.expected != count)
    fault("a named barrier of %u threads, where others expect %u", count, barrier.expected);
  barrier.expected = count;
  barrier.arrived += warp_size;
  barrier.any |= any;
  for_each_lane(warp.live,
                [&](uint32_t lane) { warp.block.release(warp, lane, barrier.arriving); });
  if (barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  barrier.any_before = barrier.any;
  barrier.any = false;
  barrier.completed = barrier.arriving;
  ++warp.block.events;
}

// bar.sync and bar.red: whether the barrier is complete.
bool synchronize(Warp& warp, uint32_t mask, const NamedOperands& operands, bool any) {
  warp.must_be_whole(mask);
  const auto id = static_cast<uint32_t>(warp.uniform(operands.id));
  if (id >= 16) fault("there is no barrier %u", id);
  NamedBarrier& barrier = warp.block.named[id];
  if (!warp.at_named_barrier) {
    warp.at_named_barrier = {id, barrier.generation};
    arrive(warp, barrier,
           operands.has_count ? static_cast<uint32_t>(warp.uniform(operands.count))
                              : warp.block.shape.threads,
           any);
  }
  if (barrier.generation == warp.at_named_barrier->second)
    return warp.wait("barrier " + std::to_string(id));
  warp.at_named_barrier.reset();
  for_each_lane(mask, [&](uint32_t lane) { warp.block.acquire(warp, lane, barrier.completed); });
  return true;
}

Handler decode_bar(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.take("cta");
  const std::string what = modifiers.take_first();
  if (what == "sync") {
    modifiers.done();
    need_operands(i, 1, 2);
    all_are_read(i);
    const NamedOperands operands{i.operands[0], i.operands.back(), i.operands.size() == 2};
    return [=](Warp& warp, uint32_t mask) { return synchronize(warp, mask, operands, false); };
  }
  if (what == "arrive") {
    modifiers.done();
    need_operands(i, 2, 2);
    all_are_read(i);
    return [o = i.operands](Warp& warp, uint32_t mask) {
      warp.must_be_whole(mask);
      const auto id = static_cast<uint32_t>(warp.uniform(o[0]));
      if (id >= 16) fault("there is no barrier %u", id);
      arrive(warp, warp.block.named[id], static_cast<uint32_t>(warp.uniform(o[1])), false);
      return true;
    };
  }
  if (what != "red") fault("unknown modifier .%s", what.c_str());
  modifiers.need("or");
  modifiers.need("pred");
  modifiers.done();
  need_operands(i, 4, 4);
  first_is_written(i);
  return [o = i.operands](Warp& warp, uint32_t mask) {
    bool any = false;
    for_each_lane(mask, [&](uint32_t lane) { any |= warp.predicate(o[3], lane); });
    if (!synchronize(warp, mask, {o[1], o[2], true}, any)) return false;
    const auto id = static_cast<uint32_t>(warp.uniform(o[1]));
    for_each_lane(mask,
                  [&](uint32_t lane) { warp.set(o[0], lane, warp.block.named[id].any_before); });
    return true;
  };
}

// mbarriers ---------------------------------------------------------------------------------------

uint32_t address_of(Warp& warp, const Operand& operand, uint32_t lane) {
  return static_cast<uint32_t>(warp.address(operand, lane));
}

Mbarrier& known_barrier(Warp& warp, const Operand& operand, uint32_t lane) {
  const uint32_t address = address_of(warp, operand, lane);
  Mbarrier& barrier = warp.block.barrier(address);
  if (barrier.init_thread != warp.thread_index(lane) &&
      warp.thread(lane).knows.seen[barrier.init_thread] < barrier.init_clock)
    fault("the mbarrier has been initialized without a synchronization since");
  return barrier;
}

void init(Warp& warp, uint32_t address, uint32_t count, uint32_t lane) {
  Block& block = warp.block;
  if (address % 8 != 0) fault("the address %u of an mbarrier is not a multiple of 8", address);
  if (count < 1 || count >= 1u << 20) fault("an mbarrier of %u arrivals", count);
  if (block.barriers.count(address)) fault("there is an mbarrier already");
  if (block.barriers.size() >= most_barriers) fault("more than %u mbarriers", most_barriers);
  block.shared.write(warp.thread_index(lane), warp.clock, warp.thread(lane).knows, address, 8,
                     warp.instruction().line);
  block.shared.make_barrier(address);
  Mbarrier& barrier = block.barriers[address];
  barrier.slot = block.slots.barrier(static_cast<uint32_t>(block.barriers.size() - 1));
  barrier.expected = barrier.pending = count;
  barrier.init_thread = warp.thread_index(lane);
  barrier.init_clock = warp.clock;
  barrier.arriving = barrier.completed = Knowledge(block.slots.count());
}

Handler decode_mbarrier(Instruction& i) {
  Modifiers modifiers(i);
  const std::string what = modifiers.take_first();
  const bool expects = what == "arrive" && modifiers.take("expect_tx");
  const bool by_parity = modifiers.take("parity");
  if (!modifiers.take("shared")) modifiers.need("shared::cta");
  modifiers.need("b64");
  modifiers.done();
  if (what == "init") {
    need_operands(i, 2, 2);
    all_are_read(i);
    return [o = i.operands](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) {
        init(warp, address_of(warp, o[0], lane), static_cast<uint32_t>(warp.get(o[1], lane)), lane);
      });
      return true;
    };
  }
  if (what == "arrive") {
    need_operands(i, expects ? 3 : 2, 3);
    if (i.operands[0].kind != Operand::Kind::sink)
      fault("the state of an mbarrier is not modeled");
    all_are_read(i);
    return [expects, o = i.operands](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) {
        Mbarrier& barrier = known_barrier(warp, o[1], lane);
        const auto number = o.size() == 3 ? static_cast<uint32_t>(warp.get(o[2], lane)) : 1;
        warp.block.release(warp, lane, barrier.arriving);
        if (expects) barrier.expect(number);
        if (barrier.arrive(expects ? 1 : number)) ++warp.block.events;
      });
      return true;
    };
  }
  if (what == "try_wait" && by_parity) {
    need_operands(i, 3, 3);
    first_is_written(i);
    return [o = i.operands](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) {
        Mbarrier& barrier = known_barrier(warp, o[1], lane);
        const auto parity = static_cast<uint32_t>(warp.get(o[2], lane));
        if (parity > 1) fault("a parity of %u", parity);
        const bool over = (barrier.phase & 1) != parity;
        warp.set(o[0], lane, over);
        if (over)
          warp.block.acquire(warp, lane, barrier.completed);
        else
          warp.wait("parity " + std::to_string(parity) + " of the mbarrier at " +
                    std::to_string(address_of(warp, o[1], lane) - warp.block.shared_base));
      });
      return true;
    };
  }
  fault("this mbarrier instruction is not modeled");
}

// Fences ------------------------------------------------------------------------------------------

Handler decode_fence(Instruction& i) {
  need_operands(i, 0, 0);
  Modifiers modifiers(i);
  if (modifiers.take("mbarrier_init")) {
    modifiers.need("release");
    modifiers.need("cluster");
    modifiers.done();
    return [](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) {
        for (auto& [address, barrier] : warp.block.barriers)
          barrier.open_to_copies |= barrier.init_thread == warp.thread_index(lane);
      });
      return true;
    };
  }
  modifiers.need("proxy");
  modifiers.need("async");
  if (!modifiers.take("shared::cta")) modifiers.take("global");
  modifiers.done();
  return [](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      Knowledge& knows = warp.thread(lane).knows;
      knows.seen[warp.thread_index(lane)] = warp.clock;
      join(knows.proxied, knows.seen);
      for (auto& [address, barrier] : warp.block.barriers)
        barrier.open_to_copies |= knows.seen[barrier.init_thread] >= barrier.init_clock;
    });
    return true;
  };
}

}  // namespace

Handler decode_barrier(Instruction& i) {
  const std::string& base = i.opcode.front();
  if (base == "bar") return decode_bar(i);
  if (base == "mbarrier") return decode_mbarrier(i);
  if (base == "fence") return decode_fence(i);
  return nullptr;
}

}  // namespace gna::ptx
