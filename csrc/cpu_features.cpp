#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pwm_fast {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::generic;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::generic: break;
  }
  return "generic";
}

Isa cpu_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("PWM_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;

  const std::string setting = std::string("PWM_FAST_ISA=") + wanted;
  for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (isa_name(isa) != std::string(wanted)) continue;
    if (isa <= best) return isa;
    throw std::invalid_argument(setting + ": this CPU does not have it; its best is " +
                                isa_name(best));
  }
  throw std::invalid_argument(setting + " is unknown: use generic, avx2 or avx512");
}

}  // namespace pwm_fast
