#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

const Kernels& kernels() {
  static constexpr Kernels table = {
      norm_act_fwd,       norm_act_bwd,       act_norm_fwd,   act_norm_bwd,   simnorm_fwd, simnorm_bwd,
      two_hot_decode_fwd, two_hot_decode_bwd, two_hot_ce_fwd, two_hot_ce_bwd, esnr,        axpby,
      checksum};
  return table;
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
