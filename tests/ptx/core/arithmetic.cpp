// Arithmetic, comparison, selection, logic, conversion (PTX ISA 9.7.1 to 9.7.8
// and 9.7.9.1, 9.7.9.21).
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../units/numbers.h"
#include "block.h"
#include "decode.h"

namespace gna::ptx {
namespace {

// Two fp32 numbers in 64 bits (PTX ISA 9.7.3, "f32x2").
struct Pair {
  float low, high;
};

template <typename T>
T from_bits(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return float_of(static_cast<uint32_t>(bits));
  else if constexpr (std::is_same_v<T, Pair>)
    return {float_of(static_cast<uint32_t>(bits)), float_of(static_cast<uint32_t>(bits >> 32))};
  else if constexpr (std::is_same_v<T, bool>)
    return bits != 0;
  else
    return static_cast<T>(bits);
}

template <typename T>
uint64_t to_bits(T x) {
  if constexpr (std::is_same_v<T, float>)
    return bits_of(x);
  else if constexpr (std::is_same_v<T, Pair>)
    return bits_of(x.low) | static_cast<uint64_t>(bits_of(x.high)) << 32;
  else if constexpr (std::is_same_v<T, bool>)
    return x;
  else
    return static_cast<std::make_unsigned_t<T>>(x);
}

template <typename T>
T value(Warp& warp, const Operand& operand, uint32_t lane) {
  const T x = from_bits<T>(warp.get(operand, lane));
  if constexpr (std::is_same_v<T, bool>) return x != operand.negated;
  return x;
}

// d = f(a, ...) with operands of T.
template <typename T, typename F>
Handler unary(Instruction& i, F f) {
  need_operands(i, 2, 2);
  first_is_written(i);
  return [f, d = i.operands[0], a = i.operands[1]](Warp& warp, uint32_t mask) {
    for_each_lane(mask,
                  [&](uint32_t lane) { warp.set(d, lane, to_bits(f(value<T>(warp, a, lane)))); });
    return true;
  };
}

template <typename T, typename F>
Handler binary(Instruction& i, F f) {
  need_operands(i, 3, 3);
  first_is_written(i);
  return [f, d = i.operands[0], a = i.operands[1], b = i.operands[2]](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      warp.set(d, lane, to_bits(f(value<T>(warp, a, lane), value<T>(warp, b, lane))));
    });
    return true;
  };
}

template <typename T, typename F>
Handler ternary(Instruction& i, F f) {
  need_operands(i, 4, 4);
  first_is_written(i);
  return [f, d = i.operands[0], a = i.operands[1], b = i.operands[2], c = i.operands[3]](
             Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      warp.set(
          d, lane,
          to_bits(f(value<T>(warp, a, lane), value<T>(warp, b, lane), value<T>(warp, c, lane))));
    });
    return true;
  };
}

[[noreturn]] void unknown_type(Type type) { fault("type .%c%u here", type.kind, type.bits); }

// visit(T{}) with the C++ type of an integer type; .b types count as unsigned.
template <typename Visit>
Handler of_integer(Type type, Visit visit) {
  const bool is_signed = type.kind == 's';
  if (type.kind == 'f' || type.kind == 'p') unknown_type(type);
  switch (type.bits) {
    case 8:
      return is_signed ? visit(int8_t{}) : visit(uint8_t{});
    case 16:
      return is_signed ? visit(int16_t{}) : visit(uint16_t{});
    case 32:
      return is_signed ? visit(int32_t{}) : visit(uint32_t{});
    default:
      return is_signed ? visit(int64_t{}) : visit(uint64_t{});
  }
}

// Sums, differences and products of integers wrap around; on unsigned numbers that is defined, and
// a 16-bit one must not become an int.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename F>
Handler wrapping(Instruction& i, Type type, F f) {
  return of_integer(type, [&](auto zero) {
    using T = decltype(zero);
    return binary<T>(i, [f](T a, T b) { return static_cast<T>(f(Wide<T>(a), Wide<T>(b))); });
  });
}

template <typename T>
T lesser(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T greater(T a, T b) {
  return a < b ? b : a;
}
// NaN gives way to a number, and -0 is less than +0 (9.7.3.11, "max").
float least(float a, float b) {
  if (std::isnan(a)) return std::isnan(b) ? float_of(canonical_nan) : b;
  if (std::isnan(b)) return a;
  return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
}
float most(float a, float b) {
  if (std::isnan(a)) return std::isnan(b) ? float_of(canonical_nan) : b;
  if (std::isnan(b)) return a;
  return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
}

template <typename F>
auto flushing(bool flush, F f) {
  return [flush, f](auto... x) { return flush ? flushed(f(flushed(x)...)) : f(x...); };
}

bool is_f32x2(Modifiers& modifiers) {
  if (!modifiers.take("f32x2")) return false;
  modifiers.need("rn");
  modifiers.done();
  return true;
}

// add, sub, mul, min, max, fma of floats.
Handler decode_float(Instruction& i, const std::string& base) {
  Modifiers modifiers(i);
  const auto a_plus_b = [](float a, float b) { return a + b; };
  const auto a_times_b = [](float a, float b) { return a * b; };
  const auto multiply_add = [](float a, float b, float c) { return std::fma(a, b, c); };
  const auto both = [](auto f) {
    return [f](Pair a, Pair b) { return Pair{f(a.low, b.low), f(a.high, b.high)}; };
  };
  if (is_f32x2(modifiers)) {
    if (base == "add") return binary<Pair>(i, both(a_plus_b));
    if (base == "mul") return binary<Pair>(i, both(a_times_b));
    if (base == "fma")
      return ternary<Pair>(i, [](Pair a, Pair b, Pair c) {
        return Pair{std::fma(a.low, b.low, c.low), std::fma(a.high, b.high, c.high)};
      });
    fault("%s of two numbers", base.c_str());
  }
  modifiers.take("rn");  // the default
  const bool flush = modifiers.take("ftz");
  const bool keeps_nan = (base == "min" || base == "max") && modifiers.take("NaN");
  modifiers.need("f32");
  modifiers.done();
  if (base == "add") return binary<float>(i, flushing(flush, a_plus_b));
  if (base == "sub")
    return binary<float>(i, flushing(flush, [](float a, float b) { return a - b; }));
  if (base == "mul") return binary<float>(i, flushing(flush, a_times_b));
  if (base == "fma") return ternary<float>(i, flushing(flush, multiply_add));
  if (base == "neg") return unary<float>(i, flushing(flush, [](float a) { return -a; }));
  if (base == "abs") return unary<float>(i, flushing(flush, [](float a) { return std::fabs(a); }));
  if (base == "min" || base == "max") {
    const auto pick = [keeps_nan, of_numbers = base == "min" ? least : most](float a, float b) {
      return keeps_nan && (std::isnan(a) || std::isnan(b)) ? float_of(canonical_nan)
                                                           : of_numbers(a, b);
    };
    if (i.operands.size() == 4)
      return ternary<float>(
          i, flushing(flush, [pick](float a, float b, float c) { return pick(pick(a, b), c); }));
    return binary<float>(i, flushing(flush, pick));
  }
  fault("unknown instruction %s of floats", base.c_str());
}

Handler decode_approximate(Instruction& i, const std::string& base) {
  Modifiers modifiers(i);
  modifiers.need("approx");
  const bool flush = modifiers.take("ftz");
  modifiers.need("f32");
  modifiers.done();
  if (base == "ex2")
    return unary<float>(i, [flush](float x) { return exp2_approximate(x, flush); });
  if (base == "lg2")
    return unary<float>(i, flushing(flush, [](float x) {
                          return static_cast<float>(std::log2(static_cast<double>(x)));
                        }));
  if (base == "rcp") return unary<float>(i, flushing(flush, [](float x) { return 1.0f / x; }));
  // 9.7.3.8, "div": beyond 2^126 the divisor's reciprocal is lost.
  return binary<float>(i, flushing(flush, [](float a, float b) {
                         const float size = std::fabs(b);
                         if (size > 0x1p126f && std::isfinite(size))
                           return std::isinf(a) ? float_of(canonical_nan)
                                                : std::copysign(0.0f, a * b);
                         return a / b;
                       }));
}

// mul and mad: .lo, .hi or .wide.
Handler decode_product(Instruction& i, bool adds) {
  Modifiers modifiers(i);
  const std::string part = modifiers.take_first();
  const Type type = modifiers.take_type();
  modifiers.done();
  need_operands(i, adds ? 4 : 3, adds ? 4 : 3);
  first_is_written(i);
  if (part != "lo" && part != "hi" && part != "wide") fault("unknown modifier .%s", part.c_str());
  const uint32_t shift = part == "hi" ? type.bits : 0;
  const uint32_t bits = part == "wide" ? 2 * type.bits : type.bits;
  if (bits > 64 || type.bits < 16) unknown_type(type);
  return of_integer(type, [&](auto zero) -> Handler {
    using T = decltype(zero);
    return [=, d = i.operands[0], a = i.operands[1], b = i.operands[2],
            c = i.operands[adds ? 3 : 2]](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) {
        const __int128 product =
            static_cast<__int128>(value<T>(warp, a, lane)) * value<T>(warp, b, lane);
        auto result = static_cast<uint64_t>(product >> shift);
        if (adds) result += warp.get(c, lane);
        warp.set(d, lane, bits == 64 ? result : result & ((uint64_t{1} << bits) - 1));
      });
      return true;
    };
  });
}

template <typename T>
T shifted_right(T a, uint32_t by) {
  constexpr uint32_t bits = 8 * sizeof(T);
  if (by >= bits) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  return static_cast<T>(a >> by);
}

Handler decode_shift(Instruction& i, bool left) {
  Modifiers modifiers(i);
  const Type type = modifiers.take_type();
  modifiers.done();
  need_operands(i, 3, 3);
  first_is_written(i);
  return of_integer(type, [&](auto zero) -> Handler {
    using T = decltype(zero);
    return
        [left, d = i.operands[0], a = i.operands[1], b = i.operands[2]](Warp& warp, uint32_t mask) {
          for_each_lane(mask, [&](uint32_t lane) {
            const T x = value<T>(warp, a, lane);
            const auto by = value<uint32_t>(warp, b, lane);
            const T moved = !left                 ? shifted_right(x, by)
                            : by >= 8 * sizeof(T) ? T(0)
                                                  : static_cast<T>(Wide<T>(x) << by);
            warp.set(d, lane, to_bits(moved));
          });
          return true;
        };
  });
}

// What is undefined by zero is some number that nobody expects.
template <typename T>
T quotient(T a, T b) {
  if (b == 0 || (std::is_signed_v<T> && b == T(-1) && a == std::numeric_limits<T>::min()))
    return static_cast<T>(0xdeadbeef);
  return static_cast<T>(a / b);
}

Handler decode_logic(Instruction& i, const std::string& base) {
  Modifiers modifiers(i);
  const Type type = modifiers.take_type();
  modifiers.done();
  if (type.kind == 'p') {
    if (base == "and") return binary<bool>(i, [](bool a, bool b) { return a && b; });
    if (base == "or") return binary<bool>(i, [](bool a, bool b) { return a || b; });
    if (base == "xor") return binary<bool>(i, [](bool a, bool b) { return a != b; });
    return unary<bool>(i, [](bool a) { return !a; });
  }
  if (type.kind != 'b') unknown_type(type);
  if (base == "and") return wrapping(i, type, [](auto a, auto b) { return a & b; });
  if (base == "or") return wrapping(i, type, [](auto a, auto b) { return a | b; });
  if (base == "xor") return wrapping(i, type, [](auto a, auto b) { return a ^ b; });
  return of_integer(type, [&](auto zero) {
    using T = decltype(zero);
    return unary<T>(i, [](T a) { return static_cast<T>(~a); });
  });
}

// Comparisons, 9.3.1 and 9.3.2. With NaN those of floats are false, but for those whose names end
// in u and for nan.
struct Comparison {
  bool less = false, equal = false, greater = false, unordered = false;

  template <typename T>
  bool operator()(T a, T b) const {
    return a < b ? less : a == b ? equal : a > b ? greater : unordered;
  }
};

Comparison comparison_of(std::string how, bool of_floats) {
  if (of_floats && how == "num") return {true, true, true, false};
  if (of_floats && how == "nan") return {false, false, false, true};
  const bool unordered = of_floats && how.size() == 3 && how[2] == 'u';
  if (unordered) how.pop_back();
  if (how == "eq") return {false, true, false, unordered};
  if (how == "ne") return {true, false, true, unordered};
  if (how == "lt" || how == "lo") return {true, false, false, unordered};
  if (how == "le" || how == "ls") return {true, true, false, unordered};
  if (how == "gt" || how == "hi") return {false, false, true, unordered};
  if (how == "ge" || how == "hs") return {false, true, true, unordered};
  fault("unknown comparison .%s", how.c_str());
}

template <typename T>
Handler comparison(Instruction& i, const std::string& how) {
  return [compare = comparison_of(how, std::is_same_v<T, float>), d = i.operands[0],
          a = i.operands[1], b = i.operands[2]](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      warp.set(d, lane, compare(value<T>(warp, a, lane), value<T>(warp, b, lane)));
    });
    return true;
  };
}

Handler decode_setp(Instruction& i) {
  Modifiers modifiers(i);
  const std::string how = modifiers.take_first();
  const Type type = modifiers.take_type();
  modifiers.done();
  need_operands(i, 3, 3);
  first_is_written(i);
  if (i.operands[0].kind != Operand::Kind::reg) fault("two results");
  if (type.kind == 'f') {
    if (type.bits != 32) unknown_type(type);
    return comparison<float>(i, how);
  }
  return of_integer(type, [&](auto zero) { return comparison<decltype(zero)>(i, how); });
}

// Copies what `from` says for each lane. nvcc moves and selects what it never wrote where nothing
// comes of it; so a copy of it is no error, but reading the copy is.
template <typename From>
void move(Warp& warp, uint32_t mask, const Operand& to, From from) {
  warp.check_writable(to.index);
  uint32_t written = mask;
  for_each_lane(mask, [&](uint32_t lane) {
    const Operand& source = from(lane);
    if (source.kind == Operand::Kind::reg) {
      const bool known = warp.written[source.index] >> lane & 1;
      warp.check_readable(source.index, known ? 1u << lane : 0);
      if (!known) written &= ~(1u << lane);
    }
    warp.set(to, lane, warp.get(source, lane));
  });
  warp.wrote(to.index, mask);
  warp.written[to.index] &= ~(mask & ~written);
}

Handler decode_mov(Instruction& i) {
  Modifiers modifiers(i);
  const Type type = modifiers.take_type();
  modifiers.done();
  need_operands(i, 2, 2);
  first_is_written(i);
  const Operand &d = i.operands[0], &a = i.operands[1];
  using Kind = Operand::Kind;
  if (type.kind == 'p') return unary<bool>(i, [](bool x) { return x; });
  const bool packs = a.kind == Kind::vector, unpacks = d.kind == Kind::vector;
  if (!packs && !unpacks) {
    if (d.kind == Kind::reg && a.kind == Kind::reg) {
      i.reads.clear();
      i.writes.clear();
      return [d, a](Warp& warp, uint32_t mask) {
        move(warp, mask, d, [&](uint32_t) -> const Operand& { return a; });
        return true;
      };
    }
    const uint64_t bits = type.bits == 64 ? ~uint64_t{0} : (uint64_t{1} << type.bits) - 1;
    return [bits, d, a](Warp& warp, uint32_t mask) {
      for_each_lane(mask, [&](uint32_t lane) { warp.set(d, lane, warp.get(a, lane) & bits); });
      return true;
    };
  }
  // Elements from the lowest bits up (9.7.9.2, "mov").
  const auto parts = static_cast<uint32_t>(packs ? a.parts.size() : d.parts.size());
  if (packs == unpacks || type.kind != 'b' || type.bits % parts != 0) fault("this mov of vectors");
  const uint32_t width = type.bits / parts;
  const uint64_t bits = (uint64_t{1} << width) - 1;
  return [=](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      uint64_t whole = 0;
      if (packs) {
        for (uint32_t p = 0; p < parts; ++p)
          whole |= (warp.get(a.parts[p], lane) & bits) << p * width;
        warp.set(d, lane, whole);
      } else {
        whole = warp.get(a, lane);
        for (uint32_t p = 0; p < parts; ++p) warp.set(d.parts[p], lane, whole >> p * width & bits);
      }
    });
    return true;
  };
}

Handler decode_selp(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.take_type();
  modifiers.done();
  need_operands(i, 4, 4);
  collect(i.operands[3], i.reads);
  return [d = i.operands[0], a = i.operands[1], b = i.operands[2], p = i.operands[3]](
             Warp& warp, uint32_t mask) {
    move(warp, mask, d,
         [&](uint32_t lane) -> const Operand& { return warp.predicate(p, lane) ? a : b; });
    return true;
  };
}

Handler decode_cvt(Instruction& i) {
  Modifiers modifiers(i);
  const bool rounds = modifiers.take("rn");
  for (const auto& [name, element] : {std::pair{"bf16x2", Element::bf16}, {"f16x2", Element::fp16}})
    if (modifiers.take(name)) {
      modifiers.need("f32");
      modifiers.done();
      if (!rounds) fault("no rounding");
      need_operands(i, 3, 3);
      first_is_written(i);
      return [element = element, d = i.operands[0], a = i.operands[1], b = i.operands[2]](
                 Warp& warp, uint32_t mask) {
        for_each_lane(mask, [&](uint32_t lane) {
          warp.set(d, lane,
                   pack(element, value<float>(warp, a, lane), value<float>(warp, b, lane)));
        });
        return true;
      };
    }
  const Type to = modifiers.take_type(), from = modifiers.take_type();
  modifiers.done();
  need_operands(i, 2, 2);
  first_is_written(i);
  if (to.kind == 'f') {
    if (to.bits != 32 || !rounds) unknown_type(to);
    return of_integer(from, [&](auto zero) -> Handler {
      using T = decltype(zero);
      return [d = i.operands[0], a = i.operands[1]](Warp& warp, uint32_t mask) {
        for_each_lane(mask, [&](uint32_t lane) {
          warp.set(d, lane, to_bits(static_cast<float>(value<T>(warp, a, lane))));
        });
        return true;
      };
    });
  }
  if (rounds) fault("unknown modifier .rn");
  return of_integer(from, [&](auto source) {
    using From = decltype(source);
    return of_integer(to, [&](auto target) -> Handler {
      using To = decltype(target);
      return [d = i.operands[0], a = i.operands[1]](Warp& warp, uint32_t mask) {
        for_each_lane(mask, [&](uint32_t lane) {
          warp.set(d, lane, to_bits(static_cast<To>(value<From>(warp, a, lane))));
        });
        return true;
      };
    });
  });
}

// Between an address of a state space and the generic one (9.7.9.20, "cvta").
Handler decode_cvta(Instruction& i) {
  Modifiers modifiers(i);
  const bool to_space = modifiers.take("to");
  uint64_t window = 0;
  if (modifiers.take("shared") || modifiers.take("shared::cta"))
    window = shared_window;
  else if (modifiers.take("param"))
    window = param_window;
  else
    modifiers.need("global");
  modifiers.need("u64");
  modifiers.done();
  return unary<uint64_t>(i, [=](uint64_t x) { return to_space ? x - window : x + window; });
}

// 9.7.1.20, "bfi": the lowest bits of a into b.
Handler decode_bfi(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("b32");
  modifiers.done();
  need_operands(i, 5, 5);
  first_is_written(i);
  return [o = i.operands](Warp& warp, uint32_t mask) {
    for_each_lane(mask, [&](uint32_t lane) {
      const uint32_t position = warp.get(o[3], lane) & 0xff, length = warp.get(o[4], lane) & 0xff;
      const uint64_t bits = ((uint64_t{1} << std::min(length, 32u)) - 1) << std::min(position, 32u);
      const uint64_t moved = (warp.get(o[1], lane) & 0xffffffff) << std::min(position, 32u);
      warp.set(o[0], lane, ((warp.get(o[2], lane) & ~bits) | (moved & bits)) & 0xffffffff);
    });
    return true;
  };
}

// 9.7.9.7, "prmt", in its default mode.
Handler decode_prmt(Instruction& i) {
  Modifiers modifiers(i);
  modifiers.need("b32");
  modifiers.done();
  return ternary<uint32_t>(i, [](uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (uint32_t byte = 0; byte < 4; ++byte) {
      const uint32_t select = selector >> 4 * byte & 15;
      uint32_t picked = bytes >> 8 * (select & 7) & 0xff;
      if (select & 8) picked = picked & 0x80 ? 0xff : 0;
      result |= picked << 8 * byte;
    }
    return result;
  });
}

}  // namespace

Handler decode_arithmetic(Instruction& i) {
  const std::string& base = i.opcode.front();
  const std::string& last = i.opcode.back();
  const auto plain = [&] {
    Modifiers modifiers(i);
    const Type type = modifiers.take_type();
    modifiers.done();
    return type;
  };
  if (base == "mov") return decode_mov(i);
  if (base == "setp") return decode_setp(i);
  if (base == "selp") return decode_selp(i);
  if (base == "cvt") return decode_cvt(i);
  if (base == "cvta") return decode_cvta(i);
  if (base == "bfi") return decode_bfi(i);
  if (base == "prmt") return decode_prmt(i);
  if (base == "and" || base == "or" || base == "xor" || base == "not") return decode_logic(i, base);
  if (base == "shl" || base == "shr") return decode_shift(i, base == "shl");
  if (base == "ex2" || base == "lg2" || base == "rcp") return decode_approximate(i, base);
  if (base == "div" && last == "f32") return decode_approximate(i, base);
  const bool computes = base == "add" || base == "sub" || base == "mul" || base == "fma" ||
                        base == "min" || base == "max" || base == "neg" || base == "abs";
  if (computes && (last == "f32" || last == "f32x2")) return decode_float(i, base);
  if (base == "mul" || base == "mad") return decode_product(i, base == "mad");
  if (base == "add") return wrapping(i, plain(), [](auto a, auto b) { return a + b; });
  if (base == "sub") return wrapping(i, plain(), [](auto a, auto b) { return a - b; });
  if (base == "popc") {
    Modifiers modifiers(i);
    modifiers.need("b32");
    modifiers.done();
    return unary<uint32_t>(i,
                           [](uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); });
  }
  if (base == "min" || base == "max" || base == "div" || base == "rem" || base == "neg")
    return of_integer(plain(), [&](auto zero) -> Handler {
      using T = decltype(zero);
      if (base == "min") return binary<T>(i, lesser<T>);
      if (base == "max") return binary<T>(i, greater<T>);
      if (base == "div") return binary<T>(i, quotient<T>);
      if (base == "neg") return unary<T>(i, [](T a) { return static_cast<T>(0 - Wide<T>(a)); });
      return binary<T>(i, [](T a, T b) {
        return static_cast<T>(Wide<T>(a) - Wide<T>(quotient<T>(a, b)) * Wide<T>(b));
      });
    });
  return nullptr;
}

void decode(Instruction& instruction) {
  Handler (*const families[])(Instruction&) = {decode_arithmetic, decode_memory, decode_warp,
                                               decode_barrier,    decode_copy,   decode_wgmma,
                                               decode_tcgen05};
  try {
    for (const auto family : families)
      if ((instruction.run = family(instruction))) return;
    fault("unknown instruction");
  } catch (const Fault& error) {
    fault("%s: %s", instruction.text.c_str(), error.what());
  }
}

}  // namespace gna::ptx
