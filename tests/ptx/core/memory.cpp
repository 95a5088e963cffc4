// Loads and stores (PTX ISA 9.7.9.8 "ld", 9.7.9.11 "st", 9.7.13.12 "atom", 9.7.14.5.16 "stmatrix").
#include <cstring>

#include "block.h"
#include "decode.h"

namespace gna::ptx {
namespace {

enum class Space { generic, shared, global, param };

Space take_space(Modifiers& modifiers) {
  if (modifiers.take("shared") || modifiers.take("shared::cta")) return Space::shared;
  if (modifiers.take("global")) return Space::global;
  if (modifiers.take("param")) return Space::param;
  return Space::generic;
}

// The space of an address, and the address in it.
Space resolve(Space space, uint64_t& address) {
  if (space != Space::generic) return space;
  if (address >= param_window) {
    address -= param_window;
    return Space::param;
  }
  if (address >= shared_window) {
    address -= shared_window;
    return Space::shared;
  }
  return Space::global;
}

struct Access {
  Space space = Space::generic;
  uint32_t count = 1, bytes = 0;  // elements, and of one
  bool is_signed = false;
  uint32_t used_bytes = ~0u;
};

Access take_access(Modifiers& modifiers) {
  Access access;
  modifiers.take("volatile");  // every access is done as it stands
  modifiers.take("nc");
  access.space = take_space(modifiers);
  if (modifiers.take("v2")) access.count = 2;
  if (modifiers.take("v4")) access.count = 4;
  const Type type = modifiers.take_type();
  modifiers.done();
  access.bytes = type.bits / 8;
  access.is_signed = type.kind == 's';
  return access;
}

const Operand& part(const Operand& operand, uint32_t index) {
  return operand.kind == Operand::Kind::vector ? operand.parts[index] : operand;
}

void check_vector(const Access& access, const Operand& operand) {
  const size_t parts = operand.kind == Operand::Kind::vector ? operand.parts.size() : 1;
  if (parts != access.count) fault("%zu registers for %u elements", parts, access.count);
}

void check_alignment(uint64_t address, uint32_t bytes) {
  if (address % bytes != 0)
    fault("address %#llx is not a multiple of %u", static_cast<unsigned long long>(address), bytes);
}

void load(Warp& warp, const Access& access, const Operand& to, const Operand& from, uint32_t lane) {
  Block& block = warp.block;
  uint64_t address = warp.address(from, lane);
  const Space space = resolve(access.space, address);
  if (space == Space::shared) address &= 0xffffffff;
  check_alignment(address, access.bytes * access.count);
  for (uint32_t e = 0; e < access.count; ++e, address += access.bytes) {
    if (part(to, e).kind == Operand::Kind::sink) continue;
    const uint32_t own = (1u << access.bytes) - 1;
    if ((access.used_bytes >> e * access.bytes & own) == 0) continue;
    const uint8_t* bytes = nullptr;
    if (space == Space::shared) {
      const auto at = static_cast<uint32_t>(address);
      block.shared.read(warp.thread_index(lane), warp.clock, warp.thread(lane).knows, at,
                        access.bytes);
      bytes = block.shared.at(at, access.bytes);
    } else if (space == Space::param) {
      if (address + access.bytes > block.parameters.size())
        fault("the parameters have %zu bytes, not %llu", block.parameters.size(),
              static_cast<unsigned long long>(address + access.bytes));
      bytes = block.parameters.data() + address;
    } else {
      block.global.check(address, access.bytes, false);
      bytes = reinterpret_cast<const uint8_t*>(address);
    }
    uint64_t value = 0;
    std::memcpy(&value, bytes, access.bytes);
    if (access.is_signed && access.bytes < 8) {
      const uint32_t unused = 64 - 8 * access.bytes;
      value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
    }
    warp.set(part(to, e), lane, value);
  }
}

void store(Warp& warp, Space given, uint64_t address, const void* bytes, uint32_t count,
           uint32_t lane) {
  Block& block = warp.block;
  const Space space = resolve(given, address);
  if (space == Space::shared) {
    const auto at = static_cast<uint32_t>(address);
    block.shared.write(warp.thread_index(lane), warp.clock, warp.thread(lane).knows, at, count,
                       warp.instruction().line);
    std::memcpy(block.shared.at(at, count), bytes, count);
  } else if (space == Space::global) {
    block.global.check(address, count, true);
    std::memcpy(reinterpret_cast<void*>(address), bytes, count);
  } else {
    fault("parameters cannot be written");
  }
}

Handler decode_ld(Instruction& i) {
  Modifiers modifiers(i);
  Access access = take_access(modifiers);
  access.used_bytes = i.used_bytes;
  need_operands(i, 2, 2);
  check_vector(access, i.operands[0]);
  first_is_written(i);
  return [access, to = i.operands[0], from = i.operands[1]](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) { load(warp, access, to, from, lane); });
    return true;
  };
}

Handler decode_st(Instruction& i) {
  Modifiers modifiers(i);
  const Access access = take_access(modifiers);
  need_operands(i, 2, 2);
  check_vector(access, i.operands[1]);
  all_are_read(i);
  return [access, to = i.operands[0], from = i.operands[1]](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      const uint64_t address = warp.address(to, lane);
      check_alignment(address, access.bytes * access.count);
      for (uint32_t e = 0; e < access.count; ++e) {
        const uint64_t value = warp.get(part(from, e), lane);
        store(warp, access.space, address + e * access.bytes, &value, access.bytes, lane);
      }
    });
    return true;
  };
}

Handler decode_atom(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("global");
  modifiers.need("add");
  modifiers.need("u32");
  modifiers.done();
  need_operands(i, 3, 3);
  first_is_written(i);
  return [d = i.operands[0], a = i.operands[1], b = i.operands[2]](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      const uint64_t address = warp.address(a, lane);
      check_alignment(address, 4);
      warp.block.global.check(address, 4, true);
      auto& number = *reinterpret_cast<uint32_t*>(address);
      warp.set(d, lane, number);
      number += static_cast<uint32_t>(warp.get(b, lane));
    });
    return true;
  };
}

// Each lane stores two elements of a row of each matrix: lane l the columns 2 (l % 4) and one more
// of row l / 4. Lanes 8 m to 8 m + 7 give the addresses of the rows of matrix m.
Handler decode_stmatrix(Instruction& i) {
  Modifiers modifiers(i);
  for (const char* part : {"sync", "aligned", "m8n8", "x4", "b16"}) modifiers.need(part);
  const Space space = take_space(modifiers);
  modifiers.done();
  need_operands(i, 2, 2);
  all_are_read(i);
  if (i.operands[1].parts.size() != 4) fault("not four matrices");
  return [space, to = i.operands[0], from = i.operands[1]](Warp& warp, uint32_t mask) {
    warp.must_be_whole(mask);
    for (uint32_t matrix = 0; matrix < 4; ++matrix)
      for (uint32_t lane = 0; lane < warp_size; ++lane) {
        const uint64_t row = warp.address(to, 8 * matrix + lane / 4);
        check_alignment(row, 16);
        const auto bits = static_cast<uint32_t>(warp.get(from.parts[matrix], lane));
        store(warp, space, row + lane % 4 * 4, &bits, 4, lane);
      }
    return true;
  };
}

}  // namespace

Handler decode_memory(Instruction& i) {
  const std::string& base = i.opcode.front();
  if (base == "ld") return decode_ld(i);
  if (base == "st") return decode_st(i);
  if (base == "atom") return decode_atom(i);
  if (base == "stmatrix") return decode_stmatrix(i);
  return nullptr;
}

}  // namespace gna::ptx
