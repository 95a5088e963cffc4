// From an instruction's text to what executes it.
#pragma once

#include <algorithm>
#include <string>

#include "program.h"

namespace gna::ptx {

// Fills in `run`, `reads` and `writes`; fails on an opcode, modifier or type it does not know.
void decode(Instruction& instruction);

struct Type {
  char kind;  // 'u', 's', 'b', 'f', or 'p' for a predicate
  uint32_t bits;
};

// The parts of an opcode, taken one by one; what is left over at the end is an error.
class Modifiers {
 public:
  explicit Modifiers(const Instruction& instruction)
      : parts_(instruction.opcode.begin() + 1, instruction.opcode.end()) {}

  bool take(const std::string& part) {
    const auto found = std::find(parts_.begin(), parts_.end(), part);
    if (found == parts_.end()) return false;
    parts_.erase(found);
    return true;
  }
  void need(const std::string& part) {
    if (!take(part)) fault("modifier .%s is missing: no other form is modeled", part.c_str());
  }
  std::string take_first() {
    if (parts_.empty()) fault("a modifier is missing");
    std::string first = parts_.front();
    parts_.erase(parts_.begin());
    return first;
  }
  Type take_type() {
    const std::string name = take_first();
    if (name == "pred") return {'p', 1};
    const std::string bits = name.substr(1);
    if (std::string("usbf").find(name[0]) == std::string::npos ||
        (bits != "8" && bits != "16" && bits != "32" && bits != "64"))
      fault("unknown type .%s", name.c_str());
    return {name[0], static_cast<uint32_t>(std::stoul(bits))};
  }
  void done() const {
    if (!parts_.empty()) fault("unknown modifier .%s", parts_.front().c_str());
  }

 private:
  std::vector<std::string> parts_;
};

// Registers among these operands, for `reads` and `writes`.
inline void collect(const Operand& operand, std::vector<uint32_t>& registers) {
  if (operand.kind == Operand::Kind::reg) registers.push_back(operand.index);
  for (const Operand& part : operand.parts) collect(part, registers);
}

inline void need_operands(const Instruction& instruction, size_t least, size_t most) {
  const size_t count = instruction.operands.size();
  if (count < least || count > most) fault("%zu operands", count);
}

// The first operand is written and the rest is read.
inline void first_is_written(Instruction& instruction) {
  for (size_t i = 0; i < instruction.operands.size(); ++i)
    collect(instruction.operands[i], i == 0 ? instruction.writes : instruction.reads);
}
inline void all_are_read(Instruction& instruction) {
  for (const Operand& operand : instruction.operands) collect(operand, instruction.reads);
}

// By family; null if the opcode is of another one.
Handler decode_arithmetic(Instruction& instruction);
Handler decode_memory(Instruction& instruction);
Handler decode_warp(Instruction& instruction);
Handler decode_barrier(Instruction& instruction);
Handler decode_copy(Instruction& instruction);
Handler decode_wgmma(Instruction& instruction);
Handler decode_tcgen05(Instruction& instruction);

}  // namespace gna::ptx
