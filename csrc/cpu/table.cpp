#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

const Kernels& kernels() {
  static constexpr Kernels table = {
#define PWM_FAST_KERNEL(name, Arguments, doc) name,
#include "ops.def"
  };
  return table;
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
