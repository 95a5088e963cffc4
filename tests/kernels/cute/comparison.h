// Counts what was compared, and keeps the first difference.
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

namespace gna {

struct Comparison {
  const char* name;
  int64_t compared = 0, different = 0;
  std::string first;

  explicit Comparison(const char* name) : name(name) {}
  Comparison(const Comparison&) = delete;

  // For test_cute.py: name, counts and the first difference, between tabs.
  ~Comparison() {
    std::printf("%s\t%" PRId64 "\t%" PRId64 "\t%s\n", name, compared, different, first.c_str());
  }

  // The rest of the arguments says where, as for printf.
  template <typename Ours, typename Cute>
  __attribute__((format(printf, 4, 5))) void equal(Ours ours, Cute cute, const char* where, ...) {
    ++compared;
    const auto a = static_cast<uint64_t>(ours), b = static_cast<uint64_t>(cute);
    if (a == b || different++ > 0) return;
    char place[128], text[256];
    va_list arguments;
    va_start(arguments, where);
    std::vsnprintf(place, sizeof place, where, arguments);
    va_end(arguments);
    std::snprintf(text, sizeof text, "%s: ours %#" PRIx64 ", CuTe's %#" PRIx64, place, a, b);
    first = text;
  }
};

}  // namespace gna
