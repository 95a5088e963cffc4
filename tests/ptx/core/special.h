// What the families of special instructions share.
#pragma once

#include "block.h"

namespace gna::ptx {

std::shared_ptr<Block::TensorState> make_tensor_state();

// Bytes of a copy, or an arrival, come to an mbarrier from an asynchronous unit.
void completed_phase(Block& block);

}  // namespace gna::ptx
