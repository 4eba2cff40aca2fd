// ESNR on a GPU. No CUDA headers here: the Python face, which includes this, needs none.
#pragma once

#include <cstdint>

#include "../esnr_plan.h"

namespace pwm_fast {

// Runs a call on a stream of a device, without waiting for it. std::runtime_error with what CUDA
// says if it cannot be launched.
void esnr_launch(const EsnrCall& call, int device, std::uintptr_t stream);

}  // namespace pwm_fast
