// What the sources that are compiled once per instruction set declare to each other.
#pragma once

#include "kernels.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

void norm_act_fwd(const NormActFwd&);
void norm_act_bwd(const NormActBwd&);
void act_norm_fwd(const ActNormFwd&);
void act_norm_bwd(const ActNormBwd&);
void simnorm_fwd(const SimNormFwd&);
void simnorm_bwd(const SimNormBwd&);
void two_hot_decode_fwd(const TwoHotDecodeFwd&);
void two_hot_decode_bwd(const TwoHotDecodeBwd&);
void two_hot_ce_fwd(const TwoHotCeFwd&);
void two_hot_ce_bwd(const TwoHotCeBwd&);
void esnr(const Esnr&);
void axpby(const Axpby&);
void checksum(const Checksum&);

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
