// A stand-in for the CUDA runtime: the entry points that the host code of a launch uses, and what
// nvcc emits for <<<>>>. A launch ends in the interpreter with its real parameters. Beside them,
// the C interface that the tests use.
//
// A "device pointer" is an address of this process that the tests have registered.
#include <cstring>
#include <list>
#include <map>
#include <string>

#include "../units/tensor_map.h"
#include "launch.h"

namespace {

using namespace gna::ptx;

enum Error : int { success = 0, invalid_value = 1, not_found = 500, launch_failure = 719 };

constexpr int most_multiprocessors = 16;  // less than this many

struct Dim3 {
  unsigned x, y, z;
};

// The PTX of one source file, as nvcc has put it into its object.
struct Module {
  std::string text;
  std::unique_ptr<Program> program;
};

struct Function {
  std::string name;
  Module* module = nullptr;
  uint32_t most_dynamic_shared = 48 * 1024;
};

struct Runtime {
  std::list<Module> modules;
  std::map<const void*, Function> functions;  // by the host's stub
  HostMemory memory;
  Statistics statistics;
  std::string message;  // of the last fault
  int multiprocessors = 1;
  int capability[2] = {9, 0};
  uint64_t seed = 0, most_instructions = uint64_t{1} << 32;
  int error = success;
  struct {
    Dim3 grid, block;
    size_t shared;
  } configuration;
};

Runtime& runtime() {
  static Runtime it;
  return it;
}

int fail(int code, const std::string& message) {
  runtime().message = message;
  return runtime().error = code;
}

// The first PTX entry of a fat binary: header {magic u32, version u16, bytes of it u16, size u64},
// then entries {kind u16, version u16, bytes of the header u32, size u64, ...}.
std::string ptx_of(const uint8_t* fat_binary) {
  const auto number = [](const uint8_t* at, size_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, at, bytes);
    return value;
  };
  constexpr uint64_t magic = 0xba55ed50, is_ptx = 1;
  if (number(fat_binary, 4) != magic) return "";
  const uint8_t* entry = fat_binary + number(fat_binary + 6, 2);
  const uint8_t* const end = entry + number(fat_binary + 8, 8);
  while (entry < end) {
    const uint64_t header = number(entry + 4, 4), size = number(entry + 8, 8);
    if (number(entry, 2) == is_ptx) {
      const auto* const text = reinterpret_cast<const char*>(entry + header);
      return std::string(text, strnlen(text, size));
    }
    entry += header + size;
  }
  return "";
}

int launch(Function& function, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  Runtime& it = runtime();
  if (it.error != success) return it.error;
  try {
    if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
      fault("a grid of more than one axis");
    if (shared > function.most_dynamic_shared)
      fault("%zu bytes of dynamic shared memory where %u are allowed", shared,
            function.most_dynamic_shared);
    Module& module = *function.module;
    if (!module.program) module.program = std::make_unique<Program>(parse(module.text));
    const auto found = module.program->kernels.find(function.name);
    if (found == module.program->kernels.end()) fault("no kernel %s", function.name.c_str());
    const Kernel& kernel = found->second;
    std::vector<uint8_t> parameters(kernel.parameter_bytes);
    for (size_t p = 0; p < kernel.parameters.size(); ++p)
      std::memcpy(parameters.data() + kernel.parameters[p].offset, arguments[p],
                  kernel.parameters[p].bytes);
    HostMemory memory = it.memory;
    add_globals(memory, *module.program);
    run(kernel, {grid.x, block.x, static_cast<uint32_t>(shared)}, memory, parameters, it.seed,
        it.most_instructions, it.statistics);
    return success;
  } catch (const Fault& error) {
    return fail(launch_failure, error.what());
  }
}

int encode(TensorMap* map, uint32_t type, uint32_t rank, void* address, const uint64_t* extents,
           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, uint32_t interleave,
           uint32_t swizzle, uint32_t l2_promotion, uint32_t fill) {
  const char* why = nullptr;
  const EncodeResult result =
      encode_tiled(map, type, rank, reinterpret_cast<uint64_t>(address), extents, strides, box,
                   steps, interleave, swizzle, l2_promotion, fill, &why);
  if (why != nullptr) runtime().message = std::string("cuTensorMapEncodeTiled: ") + why;
  return static_cast<int>(result);
}

Module* find_module(const char* kernel, uint32_t first) {
  uint32_t index = 0;
  for (Module& module : runtime().modules)
    if (index++ >= first)
      for (const auto& [stub, function] : runtime().functions)
        if (function.module == &module && function.name.find(kernel) != std::string::npos)
          return &module;
  return nullptr;
}

}  // namespace

// What the host code calls ------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const uint8_t* fat_binary = nullptr;
  std::memcpy(&fat_binary, static_cast<uint8_t*>(wrapper) + 8, sizeof fat_binary);
  runtime().modules.push_back({ptx_of(fat_binary), nullptr});
  return reinterpret_cast<void**>(&runtime().modules.back());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  runtime().functions[stub] = {name, reinterpret_cast<Module*>(module), 48 * 1024};
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void*) {
  runtime().configuration = {grid, block, shared};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = runtime().configuration.grid;
  *block = runtime().configuration.block;
  *shared = runtime().configuration.shared;
  *static_cast<void**>(stream) = nullptr;
  return success;
}
int __cudaGetKernel(void** kernel, const void* stub) {
  const auto found = runtime().functions.find(stub);
  if (found == runtime().functions.end()) return invalid_value;
  *kernel = &found->second;
  return success;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                       void*) {
  return launch(*static_cast<Function*>(kernel), grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                     void*) {
  void* kernel = nullptr;
  if (__cudaGetKernel(&kernel, stub) != success) return fail(invalid_value, "an unknown kernel");
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared, nullptr);
}

// Each configuration is a device of its own, since host code may remember what it knows of one.
int cudaGetDevice(int* device) {
  *device = runtime().multiprocessors + most_multiprocessors * runtime().capability[1];
  return success;
}
int cudaGetDeviceCount(int* count) {
  *count = 64;
  return success;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int multiprocessors = 16, major = 75, minor = 76;
  if (attribute == multiprocessors)
    *value = runtime().multiprocessors;
  else if (attribute == major || attribute == minor)
    *value = runtime().capability[attribute - major];
  else
    return fail(invalid_value,
                "device attribute " + std::to_string(attribute) + " is not modeled");
  return success;
}
int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  constexpr int most_dynamic_shared = 8, limit = 227 * 1024;
  const auto found = runtime().functions.find(stub);
  if (found == runtime().functions.end() || attribute != most_dynamic_shared || value > limit)
    return fail(invalid_value, "cudaFuncSetAttribute");
  found->second.most_dynamic_shared = static_cast<uint32_t>(value);
  return success;
}
int cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                     unsigned long long, int* status) {
  constexpr int found = 0, missing = 1;
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  if (status != nullptr) *status = known ? found : missing;
  return known ? success : not_found;
}
int cudaGetLastError() {
  const int error = runtime().error;
  runtime().error = success;
  return error;
}
const char* cudaGetErrorString(int) { return runtime().message.c_str(); }

// What the tests call -----------------------------------------------------------------------------

void ptx_configure(uint64_t seed, uint64_t most_instructions, int multiprocessors, int major,
                   int minor) {
  Runtime& it = runtime();
  it.seed = seed;
  it.most_instructions = most_instructions;
  it.multiprocessors = std::min(multiprocessors, most_multiprocessors - 1);
  it.capability[0] = major;
  it.capability[1] = minor;
  it.error = success;
  it.message.clear();
  it.statistics = {};
  it.memory.clear();
}

void ptx_register_memory(uint64_t address, uint64_t bytes, int writable) {
  runtime().memory.add(address, bytes, writable != 0);
}

const char* ptx_message() { return runtime().message.c_str(); }

// Instructions, products of a tensor core, loads and stores of boxes since the configuration.
void ptx_statistics(uint64_t* counts) {
  const Statistics& statistics = runtime().statistics;
  const uint64_t all[] = {statistics.instructions, statistics.products, statistics.loads,
                          statistics.stores};
  std::copy(std::begin(all), std::end(all), counts);
}

// How many source files' modules have been loaded.
uint32_t ptx_modules() { return static_cast<uint32_t>(runtime().modules.size()); }

// The text of that one of the modules from `first` on that has this kernel, its name being part of
// the mangled one; null if none.
const char* ptx_module_text(const char* kernel, uint32_t first) {
  Module* const module = find_module(kernel, first);
  return module == nullptr ? nullptr : module->text.c_str();
}

// Has launches of that module run another text.
int ptx_replace_module_text(const char* kernel, uint32_t first, const char* text) {
  Module* const module = find_module(kernel, first);
  if (module == nullptr) return fail(invalid_value, "no such kernel");
  module->text = text;
  module->program.reset();
  return success;
}

// Runs a kernel from its text; `parameters` are laid out as the kernel declares them.
int ptx_run(const char* text, const char* kernel, unsigned blocks, unsigned threads,
            unsigned dynamic_shared, const void* parameters, uint64_t parameter_bytes) {
  Runtime& it = runtime();
  try {
    const Program program = parse(text);
    const auto found = program.kernels.find(kernel);
    if (found == program.kernels.end()) fault("no kernel %s", kernel);
    const auto* const bytes = static_cast<const uint8_t*>(parameters);
    HostMemory memory = it.memory;
    add_globals(memory, program);
    run(found->second, {blocks, threads, dynamic_shared}, memory,
        std::vector<uint8_t>(bytes, bytes + parameter_bytes), it.seed, it.most_instructions,
        it.statistics);
    return success;
  } catch (const Fault& error) {
    it.message = error.what();
    return launch_failure;
  }
}

int ptx_encode_tensor_map(void* map, uint32_t type, uint32_t rank, uint64_t address,
                          const uint64_t* extents, const uint64_t* strides, const uint32_t* box,
                          const uint32_t* steps, uint32_t swizzle) {
  return encode(static_cast<TensorMap*>(map), type, rank, reinterpret_cast<void*>(address), extents,
                strides, box, steps, 0, swizzle, 0, 0);
}

}  // extern "C"
