// The ESNR kernels of csrc/cuda run on the CPU, block after block, for tests without a GPU.
#pragma once

#include "esnr_plan.h"

namespace pwm_fast {

// The same results to the bit as on a GPU, from memory of the CPU. The blocks run in an order that
// `order` picks: 0 is first to last, any other number another permutation.
void esnr_emulate(const EsnrCall& call, std::uint64_t order);

}  // namespace pwm_fast
