// The rules of gna_cpu.h.
#pragma once

#include "gna_cpu.h"

namespace gna {

bool valid(const gna_pattern& pattern);
bool valid(const gna_problem& problem);

}  // namespace gna
