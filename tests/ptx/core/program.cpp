#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "decode.h"

namespace gna::ptx {
namespace {

struct Token {
  std::string text;
  int line;
};

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

std::vector<Token> tokenize(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (std::isspace(static_cast<unsigned char>(c))) {
      ++i;
    } else if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (c == '"') {
      const size_t end = text.find('"', i + 1);
      tokens.push_back({text.substr(i, end - i + 1), line});
      i = end + 1;
    } else if (is_word(c)) {
      size_t end = i;
      // "::" belongs to a modifier, ":" ends a label.
      while (end < text.size() &&
             (is_word(text[end]) ||
              (text[end] == ':' && (text[end + 1] == ':' || text[end - 1] == ':'))))
        ++end;
      tokens.push_back({text.substr(i, end - i), line});
      i = end;
    } else {
      tokens.push_back({std::string(1, c), line});
      ++i;
    }
  }
  tokens.push_back({"", line});
  return tokens;
}

uint32_t bytes_of_type(const std::string& type) {
  static const std::map<std::string, uint32_t> bytes = {
      {".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2}, {".u16", 2}, {".s16", 2}, {".b32", 4},
      {".u32", 4}, {".s32", 4}, {".f32", 4}, {".b64", 8}, {".u64", 8}, {".s64", 8}, {".f64", 8}};
  const auto found = bytes.find(type);
  if (found == bytes.end()) fault("unknown type %s", type.c_str());
  return found->second;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {}

  Program module() {
    try {
      while (!at("")) statement_of_module();
    } catch (const Fault& error) {
      fault("PTX line %d: %s", tokens_[std::min(next_, tokens_.size() - 1)].line, error.what());
    }
    return std::move(program_);
  }

 private:
  // Names inside a pair of braces.
  struct Scope {
    std::map<std::string, uint32_t> registers, labels;
    std::vector<std::pair<uint32_t, std::string>> jumps;  // instructions to labels of this scope
  };

  bool at(const char* text) const { return tokens_[next_].text == text; }
  const std::string& take() { return tokens_[next_++].text; }
  bool take_if(const char* text) {
    if (!at(text)) return false;
    ++next_;
    return true;
  }
  void expect(const char* text) {
    if (!take_if(text)) fault("expected %s, found %s", text, tokens_[next_].text.c_str());
  }
  uint32_t number() { return static_cast<uint32_t>(std::strtoull(take().c_str(), nullptr, 0)); }

  void statement_of_module() {
    const std::string word = take();
    if (word == ".version" || word == ".target" || word == ".address_size") {
      take();
      while (take_if(",")) take();
    } else if (word == ".visible" || word == ".weak") {
    } else if (word == ".extern") {
      expect(".shared");
      variable(Space::extern_shared);
    } else if (word == ".global" || word == ".const") {
      variable(Space::global);
    } else if (word == ".shared") {
      variable(Space::shared);
    } else if (word == ".entry") {
      entry();
    } else {
      fault("unknown directive %s", word.c_str());
    }
  }

  enum class Space { global, shared, extern_shared };

  static uint32_t aligned(uint32_t offset, uint32_t alignment) {
    return (offset + alignment - 1) / alignment * alignment;
  }

  // .align n .type name[count]
  Parameter declaration(uint32_t& alignment) {
    alignment = 0;
    if (take_if(".align")) alignment = number();
    const uint32_t element = bytes_of_type(take());
    alignment = std::max(alignment, element);
    Parameter made{take(), 0, element};
    if (take_if("[")) {
      if (!at("]"))
        made.bytes *= number();
      else
        made.bytes = 0;
      expect("]");
    }
    return made;
  }

  void variable(Space space) {
    uint32_t alignment;
    const Parameter made = declaration(alignment);
    if (!at(";")) fault("variable %s has an initializer, which is not modeled", made.name.c_str());
    expect(";");
    if (space == Space::global) {
      program_.globals.push_back(std::make_unique<std::vector<uint8_t>>(made.bytes + 256));
      const auto base = reinterpret_cast<uint64_t>(program_.globals.back()->data());
      program_.global_addresses[made.name] = (base + 255) / 256 * 256;
    } else if (space == Space::extern_shared) {
      extern_shared_.push_back(made.name);
      shared_alignment_ = std::max(shared_alignment_, alignment);
    } else {
      static_shared_ = aligned(static_shared_, alignment);
      shared_[made.name] = static_shared_;
      static_shared_ += made.bytes;
    }
  }

  void entry() {
    kernel_ = Kernel{};
    kernel_.name = take();
    if (take_if("(")) {
      while (!take_if(")")) {
        expect(".param");
        uint32_t alignment;
        Parameter parameter = declaration(alignment);
        parameter.offset = aligned(kernel_.parameter_bytes, alignment);
        kernel_.parameter_bytes = parameter.offset + parameter.bytes;
        kernel_.parameters.push_back(parameter);
        take_if(",");
      }
    }
    while (!at("{")) {
      const std::string word = take();
      if (word == ".maxntid" || word == ".reqntid") {
        kernel_.max_threads = number();
        while (take_if(",")) kernel_.max_threads *= number();
      } else if (word == ".minnctapersm") {
        take();
      } else {
        fault("unknown performance directive %s", word.c_str());
      }
    }
    expect("{");
    scopes_.assign(1, Scope{});
    used_bytes_ = ~0u;
    while (!scopes_.empty()) statement();
    // What falls off the end.
    if (kernel_.code.empty() || kernel_.code.back().flow != Instruction::Flow::exit)
      fault("kernel %s does not end with ret", kernel_.name.c_str());
    kernel_.static_shared = static_shared_;
    kernel_.shared_alignment = shared_alignment_;
    find_reconvergence(kernel_.code);
    program_.kernels[kernel_.name] = std::move(kernel_);
  }

  void statement() {
    if (take_if("{")) {
      scopes_.emplace_back();
    } else if (take_if("}")) {
      close_scope();
    } else if (take_if(".reg")) {
      registers();
    } else if (take_if(".shared")) {
      variable(Space::shared);
    } else if (take_if(".pragma")) {
      const std::string pragma = take();
      if (pragma.rfind("\"used_bytes_mask ", 0) == 0)
        used_bytes_ = static_cast<uint32_t>(std::strtoul(pragma.c_str() + 17, nullptr, 0));
      else if (pragma != "\"nounroll\"")
        fault("unknown pragma %s", pragma.c_str());
      expect(";");
    } else if (tokens_[next_ + 1].text == ":") {
      scopes_.back().labels[take()] = static_cast<uint32_t>(kernel_.code.size());
      expect(":");
    } else {
      instruction();
    }
  }

  void close_scope() {
    const Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    for (const auto& [at, label] : scope.jumps) {
      const auto found = scope.labels.find(label);
      if (found != scope.labels.end())
        kernel_.code[at].target = found->second;
      else if (scopes_.empty())
        fault("no label %s", label.c_str());
      else
        scopes_.back().jumps.emplace_back(at, label);
    }
  }

  void registers() {
    const std::string type = take();
    if (type != ".pred") bytes_of_type(type);
    do {
      const std::string name = take();
      if (take_if("<")) {
        const uint32_t count = number();
        for (uint32_t i = 0; i < count; ++i) add_register(name + std::to_string(i));
        expect(">");
      } else {
        add_register(name);
      }
    } while (take_if(","));
    expect(";");
  }

  void add_register(const std::string& name) {
    scopes_.back().registers[name] = kernel_.registers++;
    kernel_.register_names.push_back(name);
  }

  const uint32_t* find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return &found->second;
    }
    return nullptr;
  }

  void instruction() {
    Instruction made;
    made.line = tokens_[next_].line;
    const size_t first = next_;
    made.used_bytes = used_bytes_;
    used_bytes_ = ~0u;
    if (take_if("@")) {
      made.guarded = true;
      made.guard_negated = take_if("!");
      const uint32_t* const guard = find_register(take());
      if (guard == nullptr) fault("unknown guard");
      made.guard = *guard;
    }
    const std::string opcode = take();
    for (size_t begin = 0; begin <= opcode.size();) {
      const size_t end = std::min(opcode.find('.', begin), opcode.size());
      made.opcode.push_back(opcode.substr(begin, end - begin));
      begin = end + 1;
    }
    const std::string& base = made.opcode.front();
    if (base == "bra") {
      scopes_.back().jumps.emplace_back(static_cast<uint32_t>(kernel_.code.size()), take());
      made.flow = Instruction::Flow::branch;
    } else if (base == "ret" || base == "exit") {
      made.flow = Instruction::Flow::exit;
    } else if (!at(";")) {
      do made.operands.push_back(operand());
      while (take_if(","));
    }
    expect(";");
    for (size_t i = first; i < next_ && made.text.size() < 160; ++i)
      made.text += (i == first ? "" : " ") + tokens_[i].text;
    if (made.flow == Instruction::Flow::next) decode(made);
    kernel_.code.push_back(std::move(made));
  }

  Operand operand() {
    Operand made = simple_operand();
    if (take_if("|")) {
      Operand second = simple_operand();
      Operand pair;
      pair.kind = Operand::Kind::pair;
      pair.parts = {std::move(made), std::move(second)};
      return pair;
    }
    return made;
  }

  Operand simple_operand() {
    Operand made;
    if (take_if("{")) {
      made.kind = Operand::Kind::vector;
      do made.parts.push_back(operand());
      while (take_if(","));
      expect("}");
    } else if (take_if("[")) {
      made.kind = Operand::Kind::address;
      made.parts.push_back(operand());
      if (take_if("+")) {
        const bool minus = take_if("-");
        const uint64_t offset = std::strtoull(take().c_str(), nullptr, 0);
        made.value = minus ? 0 - offset : offset;
      }
      if (take_if(",")) made.parts.push_back(operand());
      expect("]");
    } else if (take_if("!")) {
      made = simple_operand();
      made.negated = true;
    } else if (take_if("-")) {
      made = simple_operand();
      if (made.kind != Operand::Kind::immediate) fault("minus before no number");
      made.value = 0 - made.value;
    } else {
      made = named_operand(take());
    }
    return made;
  }

  Operand named_operand(const std::string& name) {
    using Kind = Operand::Kind;
    Operand made;
    if (name == "_") return made;
    made.kind = Kind::immediate;
    if (std::isdigit(static_cast<unsigned char>(name[0]))) {
      if (name[1] == 'f' || name[1] == 'F')
        made.value = std::strtoul(name.c_str() + 2, nullptr, 16);
      else
        made.value = std::strtoull(name.c_str(), nullptr, 0);
      return made;
    }
    if (const uint32_t* const found = find_register(name)) {
      made.kind = Kind::reg;
      made.index = *found;
      return made;
    }
    static const std::map<std::string, Special> specials = {
        {"%tid.x", Special::tid},       {"%ntid.x", Special::ntid},   {"%ctaid.x", Special::ctaid},
        {"%nctaid.x", Special::nctaid}, {"%laneid", Special::laneid}, {"%warpid", Special::warpid}};
    if (const auto found = specials.find(name); found != specials.end()) {
      made.kind = Kind::special;
      made.index = static_cast<uint32_t>(found->second);
      return made;
    }
    for (const Parameter& parameter : kernel_.parameters)
      if (parameter.name == name) {
        made.value = parameter.offset;
        return made;
      }
    if (const auto found = program_.global_addresses.find(name);
        found != program_.global_addresses.end()) {
      made.value = found->second;
      return made;
    }
    made.kind = Kind::shared;
    if (const auto found = shared_.find(name); found != shared_.end()) {
      made.value = found->second;
      return made;
    }
    if (std::find(extern_shared_.begin(), extern_shared_.end(), name) != extern_shared_.end()) {
      made.value = static_shared_ = aligned(static_shared_, shared_alignment_);
      return made;
    }
    fault("unknown name %s", name.c_str());
  }

  // The immediate post-dominators of branches, by the method of Cooper, Harvey and Kennedy ("A
  // simple, fast dominance algorithm") on the reversed graph of instructions.
  static void find_reconvergence(std::vector<Instruction>& code) {
    const auto count = static_cast<uint32_t>(code.size());
    const uint32_t exit = count, unknown = count + 1;
    std::vector<std::vector<uint32_t>> before(count + 1);
    const auto successors = [&](uint32_t at) -> std::vector<uint32_t> {
      const Instruction& instruction = code[at];
      std::vector<uint32_t> to;
      if (instruction.flow == Instruction::Flow::branch) to.push_back(instruction.target);
      if (instruction.flow == Instruction::Flow::exit) to.push_back(exit);
      if (instruction.flow == Instruction::Flow::next || instruction.guarded) to.push_back(at + 1);
      return to;
    };
    for (uint32_t at = 0; at < count; ++at)
      for (const uint32_t to : successors(at)) before[to].push_back(at);
    // Postorder of the reversed graph from the exit.
    std::vector<uint32_t> order(count + 1, 0), sequence;
    std::vector<bool> visited(count + 1, false);
    std::vector<std::pair<uint32_t, size_t>> path{{exit, 0}};
    visited[exit] = true;
    while (!path.empty()) {
      auto& [node, child] = path.back();
      if (child < before[node].size()) {
        const uint32_t to = before[node][child++];
        if (!visited[to]) {
          visited[to] = true;
          path.emplace_back(to, 0);
        }
      } else {
        order[node] = static_cast<uint32_t>(sequence.size());
        sequence.push_back(node);
        path.pop_back();
      }
    }
    std::vector<uint32_t> dominator(count + 1, unknown);
    dominator[exit] = exit;
    for (bool changed = true; changed;) {
      changed = false;
      for (auto node = sequence.rbegin(); node != sequence.rend(); ++node) {
        if (*node == exit) continue;
        uint32_t found = unknown;
        for (uint32_t to : successors(*node)) {
          if (dominator[to] == unknown) continue;
          if (found == unknown) {
            found = to;
            continue;
          }
          while (found != to)
            if (order[found] < order[to])
              found = dominator[found];
            else
              to = dominator[to];
        }
        if (found != dominator[*node]) {
          dominator[*node] = found;
          changed = true;
        }
      }
    }
    for (uint32_t at = 0; at < count; ++at)
      if (code[at].flow == Instruction::Flow::branch)
        code[at].reconvergence = dominator[at] == unknown ? exit : dominator[at];
  }

  std::vector<Token> tokens_;
  size_t next_ = 0;
  Program program_;
  Kernel kernel_;
  std::vector<Scope> scopes_;
  std::map<std::string, uint32_t> shared_;
  std::vector<std::string> extern_shared_;
  uint32_t static_shared_ = 0;
  uint32_t shared_alignment_ = 16;
  uint32_t used_bytes_ = ~0u;
};

}  // namespace

Program parse(const std::string& text) { return Parser(text).module(); }

}  // namespace gna::ptx
