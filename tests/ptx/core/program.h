// A PTX module: the subset that nvcc emits for a kernel without calls, parsed from its text.
//
// PTX ISA, chapter 4 "Syntax", 5 "State Spaces, Types, and Variables", 10 "Special Registers".
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../units/fault.h"

namespace gna::ptx {

struct Warp;

struct Operand {
  enum class Kind {
    reg,        // `index`
    immediate,  // `value`, an address in its state space too
    shared,     // a variable in shared memory, `value` bytes from the first one
    special,    // a special register: `index` of `Special`
    sink,       // "_"
    vector,     // {parts}
    address,    // [parts[0] + value], and for a tensor also parts[1], a vector of coordinates
    pair,       // parts[0] | parts[1]
    label,      // `index` is an instruction
  };
  Kind kind = Kind::sink;
  uint32_t index = 0;
  uint64_t value = 0;
  bool negated = false;
  std::vector<Operand> parts;
};

enum class Special : uint32_t { tid, ntid, ctaid, nctaid, laneid, warpid };

// Executes an instruction for the lanes of `mask`; false if the warp has to wait and try again.
using Handler = std::function<bool(Warp&, uint32_t mask)>;

struct Instruction {
  int line;
  std::string text;
  std::vector<std::string> opcode;  // its parts between dots
  std::vector<Operand> operands;
  bool guarded = false, guard_negated = false;
  uint32_t guard = 0;
  uint32_t used_bytes = ~0u;  // of a load, as its pragma says

  enum class Flow { next, branch, exit } flow = Flow::next;
  uint32_t target = 0;
  uint32_t reconvergence = 0;  // of a branch: where both sides meet again

  std::vector<uint32_t> reads, writes;  // registers, for the checks that all instructions share
  Handler run;
};

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;
  uint32_t registers = 0;
  uint32_t static_shared = 0;
  uint32_t shared_alignment = 16;
  std::vector<Instruction> code;
  std::vector<std::string> register_names;
};

struct Program {
  std::vector<std::unique_ptr<std::vector<uint8_t>>> globals;  // variables of the module
  std::map<std::string, uint64_t> global_addresses;
  std::map<std::string, Kernel> kernels;
};

// Fails on whatever it does not know, with the line.
Program parse(const std::string& text);

}  // namespace gna::ptx
