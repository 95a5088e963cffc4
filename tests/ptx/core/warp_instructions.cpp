// What the lanes of a warp do together: shuffles, votes, elections, barriers, register counts.
//
// PTX ISA 9.7.9.6 "shfl.sync", 9.7.13.14 "vote.sync", 9.7.13.16 "elect.sync", 9.7.13.2
// "bar.warp.sync", 9.7.19.5 "setmaxnreg".
#include "block.h"
#include "decode.h"

namespace gna::ptx {
namespace {

// All lanes that the member mask names must be at this instruction.
void check_members(Warp& warp, const Operand& members, uint32_t mask) {
  for_each_lane(mask, [&](uint32_t lane) {
    const auto named = static_cast<uint32_t>(warp.get(members, lane)) & warp.live;
    if (named != mask)
      fault("lanes %08x execute this instruction, which names lanes %08x", mask, named);
  });
}

Handler decode_shfl(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("sync");
  const std::string mode = modifiers.take_first();
  if (mode != "idx" && mode != "bfly" && mode != "up" && mode != "down")
    fault("unknown modifier .%s", mode.c_str());
  modifiers.need("b32");
  modifiers.done();
  need_operands(i, 5, 5);
  first_is_written(i);
  Operand d = i.operands[0], p;
  if (d.kind == Operand::Kind::pair) {
    p = d.parts[1];
    d = Operand(i.operands[0].parts[0]);
  }
  return [=, o = i.operands](Warp& warp, uint32_t mask) {
    check_members(warp, o[4], mask);
    uint32_t values[warp_size];
    for_each_lane(
        mask, [&](uint32_t lane) { values[lane] = static_cast<uint32_t>(warp.get(o[1], lane)); });
    for_each_lane(mask, [&](uint32_t lane) {
      const auto b = static_cast<uint32_t>(warp.get(o[2], lane)) & 31;
      const auto c = static_cast<uint32_t>(warp.get(o[3], lane));
      const uint32_t segment = c >> 8 & 31, clamp = c & 31;
      const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
      uint32_t from = lane;
      bool inside = false;
      if (mode == "idx") {
        from = first | (b & ~segment);
        inside = from <= last;
      } else if (mode == "bfly") {
        from = lane ^ b;
        inside = from <= last;
      } else if (mode == "down") {
        from = lane + b;
        inside = from <= last;
      } else {
        inside = lane >= b && lane - b >= last;
        from = lane - b;
      }
      if (!inside) from = lane;
      if ((mask >> from & 1) == 0) fault("lane %u reads lane %u, which takes no part", lane, from);
      warp.set(d, lane, values[from]);
      warp.set(p, lane, inside);
    });
    return true;
  };
}

Handler decode_vote(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("sync");
  const std::string mode = modifiers.take_first();
  if (mode != "ballot" && mode != "any" && mode != "all")
    fault("unknown modifier .%s", mode.c_str());
  modifiers.need(mode == "ballot" ? "b32" : "pred");
  modifiers.done();
  need_operands(i, 3, 3);
  first_is_written(i);
  return [=, o = i.operands](Warp& warp, uint32_t mask) {
    check_members(warp, o[2], mask);
    uint32_t votes = 0;
    for_each_lane(mask, [&](uint32_t lane) {
      if (warp.predicate(o[1], lane)) votes |= 1u << lane;
    });
    const uint32_t result = mode == "ballot" ? votes : mode == "any" ? votes != 0 : votes == mask;
    for_each_lane(mask, [&](uint32_t lane) { warp.set(o[0], lane, result); });
    return true;
  };
}

// The same lane for the same members, but which is anybody's guess: it follows from the seed.
Handler decode_elect(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("sync");
  modifiers.done();
  need_operands(i, 2, 2);
  first_is_written(i);
  if (i.operands[0].kind != Operand::Kind::pair) fault("no predicate");
  return [o = i.operands](Warp& warp, uint32_t mask) {
    check_members(warp, o[1], mask);
    uint32_t leader = warp.block.leader_seed;
    while ((mask >> leader & 1) == 0) leader = (leader + 1) % warp_size;
    for_each_lane(mask, [&](uint32_t lane) {
      warp.set(o[0].parts[0], lane, leader);
      warp.set(o[0].parts[1], lane, lane == leader);
    });
    return true;
  };
}

Handler decode_warp_barrier(Instruction& i) {
  need_operands(i, 1, 1);
  all_are_read(i);
  return [members = i.operands[0]](Warp& warp, uint32_t mask) {
    check_members(warp, members, mask);
    Knowledge shared;
    for_each_lane(mask, [&](uint32_t lane) { warp.block.release(warp, lane, shared); });
    for_each_lane(mask, [&](uint32_t lane) { warp.block.acquire(warp, lane, shared); });
    return true;
  };
}

Handler decode_setmaxnreg(Instruction& i) {
  Modifiers modifiers(i);
  const bool gives = modifiers.take("dec");
  if (!gives) modifiers.need("inc");
  for (const char* part : {"sync", "aligned", "u32"}) modifiers.need(part);
  modifiers.done();
  need_operands(i, 1, 1);
  const auto count = static_cast<uint32_t>(i.operands[0].value);
  if (i.operands[0].kind != Operand::Kind::immediate || count < 24 || count > 256 || count % 8 != 0)
    fault("a register count that is not a multiple of 8 from 24 to 256");
  return [=](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    Block& block = warp.block;
    if (gives ? count > warp.register_limit : count < warp.register_limit)
      fault("a thread has %u registers", warp.register_limit);
    if (gives) {
      block.spare_registers += (warp.register_limit - count) * warp_size;
      ++block.events;
    } else {
      const uint32_t wanted = (count - warp.register_limit) * warp_size;
      if (wanted > block.spare_registers)
        return warp.wait(std::to_string(wanted) + " registers, of which " +
                         std::to_string(block.spare_registers) + " are spare");
      block.spare_registers -= wanted;
    }
    warp.register_limit = count;
    return true;
  };
}

}  // namespace

Handler decode_warp(Instruction& i) {
  const std::string& base = i.opcode.front();
  if (base == "shfl") return decode_shfl(i);
  if (base == "vote") return decode_vote(i);
  if (base == "elect") return decode_elect(i);
  if (base == "bar" && i.opcode[1] == "warp") return decode_warp_barrier(i);
  if (base == "setmaxnreg") return decode_setmaxnreg(i);
  return nullptr;
}

}  // namespace gna::ptx
