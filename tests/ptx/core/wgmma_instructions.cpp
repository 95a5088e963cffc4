// Hopper's tensor core: products of a warpgroup, which run beside its warps.
//
// PTX ISA 9.7.15, "Asynchronous warpgroup level matrix instructions": 9.7.15.7.1 "wgmma.fence", .2
// "wgmma.commit_group", .3 "wgmma.wait_group", 9.7.15.5.2 "wgmma.mma_async".
#include "../units/wgmma.h"
#include "block.h"
#include "decode.h"

namespace gna::ptx {

// One wgmma.mma_async, once all four warps have issued it.
struct WarpgroupProduct {
  const Instruction* instruction;
  uint64_t a = 0, b = 0;  // descriptors
  bool scale_d = true;
  uint32_t warps = 0, awaited = 0;
  bool done = false;
  ByteRanges reads;
};

namespace {

constexpr uint32_t warps_of_group = 4;

struct Form {
  Wgmma unit;
  bool a_in_registers;
};

using Product = WarpgroupProduct;

void run(Block& block, uint32_t group, const Form& form, Product& product) {
  const std::vector<Operand>& o = product.instruction->operands;
  const auto warp_of = [&](uint32_t thread) -> Warp& {
    return block.warps[group * warps_of_group + thread / warp_size];
  };
  const uint32_t n = form.unit.n, registers = n / 2;
  std::vector<float> d(wgmma_rows * n);
  const auto each = [&](auto visit) {
    for (uint32_t thread = 0; thread < 128; ++thread)
      for (uint32_t r = 0; r < registers; ++r) {
        const Place place = wgmma_d_place(thread, r);
        visit(warp_of(thread).lanes_of(o[0].parts[r].index)[thread % warp_size],
              d[place.row * n + place.column]);
      }
  };
  if (product.scale_d)
    each([](uint64_t& bits, float& x) { x = float_of(static_cast<uint32_t>(bits)); });
  const SharedMemory memory = block.shared.memory();
  Factor a(0);
  if (form.a_in_registers) {
    uint32_t bits[128][4];
    for (uint32_t thread = 0; thread < 128; ++thread)
      for (uint32_t r = 0; r < 4; ++r)
        bits[thread][r] =
            static_cast<uint32_t>(warp_of(thread).get(o[1].parts[r], thread % warp_size));
    a = form.unit.a_of_registers(bits);
  } else {
    a = form.unit.a_of_shared(memory, product.a);
  }
  form.unit.run(a, form.unit.b_of_shared(memory, product.b), product.scale_d, d.data());
  each([](uint64_t& bits, float& x) { bits = bits_of(x); });
  product.done = true;
}

// Until wgmma.fence a matrix instruction may see registers as they were before the last writes.
void check_fenced(const Warp& warp, const Operand& registers) {
  for (const Operand& reg : registers.parts)
    if (warp.changed[reg.index] > warp.matrix_fence)
      fault("%s has been written without a wgmma.fence since",
            warp.block.kernel.register_names[reg.index].c_str());
}

void issue(Warp& warp, uint32_t mask, const Form& form) {
  warp.must_be_whole(mask);
  Block& block = warp.block;
  const Instruction& i = warp.instruction();
  const std::vector<Operand>& o = i.operands;
  if (warp.matrix_fence == 0) fault("no wgmma.fence before");
  Product own;
  own.instruction = &i;
  if (!form.a_in_registers) own.a = warp.uniform(o[1]);
  own.b = warp.uniform(o[2]);
  for_each_lane(mask, [&](uint32_t lane) {
    if (lane == 0) own.scale_d = warp.predicate(o[3], 0);
    if (warp.predicate(o[3], lane) != own.scale_d) fault("scale-d differs among the lanes");
  });

  check_fenced(warp, o[0]);
  for (const Operand& reg : o[0].parts)
    if (warp.locks[reg.index] == Warp::read_only)
      warp.check_writable(reg.index);
    else if (own.scale_d && warp.written[reg.index] != all_lanes)
      warp.check_readable(reg.index, mask);
  if (form.a_in_registers) {
    check_fenced(warp, o[1]);
    for (const Operand& reg : o[1].parts) warp.check_readable(reg.index, mask);
    for (const Operand& reg : o[1].parts) warp.locks[reg.index] = Warp::read_only;
  }
  for (const Operand& reg : o[0].parts) {
    warp.locks[reg.index] = Warp::closed;
    warp.written[reg.index] = all_lanes;
  }

  const uint32_t group = warp.index / warps_of_group;
  const std::pair key{group, warp.products_issued++};
  auto& product = block.partial_products[key];
  if (!product) {
    product = std::make_shared<Product>(own);
    const SmemMatrix b = form.unit.b(own.b);
    product->reads = b.touched();
    if (!form.a_in_registers)
      for (const ByteRange& range : form.unit.a(own.a).touched()) product->reads.push_back(range);
    merge(product->reads);
    block.shared.begin_reading(product->reads);
  }
  if (product->instruction != &i || product->a != own.a || product->b != own.b ||
      product->scale_d != own.scale_d)
    fault("the warps of a warpgroup do not issue the same product");
  block.shared.read_async(warp.thread_index(0), warp.thread(0).knows, product->reads);
  warp.open_products.push_back(product);
  if (++product->warps < warps_of_group) return;
  ++block.statistics.products;
  block.start(group, warp,
              [&block, group, form, product = product] { run(block, group, form, *product); });
  block.partial_products.erase(key);
}

Handler decode_product(Instruction& i, Modifiers& modifiers) {
  modifiers.need("sync");
  modifiers.need("aligned");
  const std::string shape = modifiers.take_first();
  modifiers.need("f32");
  const bool is_bf16 = modifiers.take("bf16");
  modifiers.need(is_bf16 ? "bf16" : "f16");
  if (!is_bf16) modifiers.need("f16");
  modifiers.done();
  unsigned n = 0;
  if (std::sscanf(shape.c_str(), "m64n%uk16", &n) != 1 ||
      shape != "m64n" + std::to_string(n) + "k16")
    fault("unknown shape .%s", shape.c_str());
  need_operands(i, 7, 8);
  const std::vector<Operand>& o = i.operands;
  const bool in_registers = o[1].kind == Operand::Kind::vector;
  if (o.size() != (in_registers ? 7 : 8) || o[0].parts.size() != n / 2 ||
      (in_registers && o[1].parts.size() != 4))
    fault("the operands");
  const auto number = [&](size_t index) {
    if (o[index].kind != Operand::Kind::immediate) fault("operand %zu is not an immediate", index);
    return static_cast<int32_t>(o[index].value);
  };
  const Form form{Wgmma(n, is_bf16 ? Element::bf16 : Element::fp16, number(4), number(5),
                        in_registers ? 0 : number(6), number(o.size() - 1)),
                  in_registers};
  // The accumulators and A have checks of their own.
  if (!in_registers) collect(o[1], i.reads);
  collect(o[2], i.reads);
  collect(o[3], i.reads);
  return [form](Warp& warp, uint32_t mask) {
    issue(warp, mask, form);
    return true;
  };
}

void set_locks(Warp& warp, const Product& product, Warp::Lock d, Warp::Lock a) {
  const std::vector<Operand>& o = product.instruction->operands;
  if (o[1].kind == Operand::Kind::vector)
    for (const Operand& reg : o[1].parts) warp.locks[reg.index] = a;
  for (const Operand& reg : o[0].parts) warp.locks[reg.index] = d;
}

bool await(Warp& warp, uint32_t mask, uint32_t pending) {
  warp.must_be_whole(mask);
  const size_t count = warp.products.size() - std::min<size_t>(pending, warp.products.size());
  for (size_t group = 0; group < count; ++group)
    for (const auto& product : warp.products[group])
      if (!product->done) return warp.wait("its wgmma");
  for (size_t group = 0; group < count; ++group) {
    for (const auto& product : warp.products.front()) {
      set_locks(warp, *product, Warp::open, Warp::open);
      warp.block.shared.note_read(warp.index, warp.clock, product->reads);
      if (++product->awaited == warps_of_group) warp.block.shared.end_reading(product->reads);
    }
    warp.products.pop_front();
  }
  for (const WarpgroupProducts& group : warp.products)
    for (const auto& product : group) set_locks(warp, *product, Warp::closed, Warp::read_only);
  for (const auto& product : warp.open_products)
    set_locks(warp, *product, Warp::closed, Warp::read_only);
  return true;
}

}  // namespace

Handler decode_wgmma(Instruction& i) {
  if (i.opcode.front() != "wgmma") return nullptr;
  Modifiers modifiers(i);
  const std::string what = modifiers.take_first();
  if (what == "mma_async") return decode_product(i, modifiers);
  modifiers.need("sync");
  modifiers.need("aligned");
  modifiers.done();
  if (what == "fence")
    return [](Warp& warp, uint32_t mask) {
      warp.must_be_whole(mask);
      warp.matrix_fence = warp.clock;
      return true;
    };
  if (what == "commit_group")
    return [](Warp& warp, uint32_t mask) {
      warp.must_be_whole(mask);
      warp.products.push_back(std::move(warp.open_products));
      warp.open_products.clear();
      return true;
    };
  if (what != "wait_group") fault("unknown modifier .%s", what.c_str());
  need_operands(i, 1, 1);
  if (i.operands[0].kind != Operand::Kind::immediate) fault("the count is not an immediate");
  return [pending = static_cast<uint32_t>(i.operands[0].value)](Warp& warp, uint32_t mask) {
    return await(warp, mask, pending);
  };
}

}  // namespace gna::ptx
