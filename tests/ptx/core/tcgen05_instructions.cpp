// Blackwell's matrix unit and its tensor memory.
#include "block.h"
#include "decode.h"
#include "special.h"

namespace gna::ptx {

struct Block::TensorState {};
std::shared_ptr<Block::TensorState> make_tensor_state() { return nullptr; }

Handler decode_tcgen05(Instruction&) { return nullptr; }

}  // namespace gna::ptx
