// What the sources that are compiled once per instruction set declare to each other.
#pragma once

#include "kernels.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

#define PWM_FAST_KERNEL(name, Arguments, doc) void name(const Arguments&);
#include "ops.def"

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
