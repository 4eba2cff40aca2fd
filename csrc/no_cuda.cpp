// In the place of csrc/cuda/*.cu where the extension is built without CUDA.
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/esnr.h"

namespace pwm_fast {

bool cuda_is_built() { return false; }

std::string cuda_build() { return PWM_FAST_NO_CUDA; }

std::string cuda_why_not(int) {
  return std::string("the native extension is built without CUDA (") + PWM_FAST_NO_CUDA + ")";
}

int cuda_devices(std::string& reason) {
  reason = cuda_why_not(0);
  return 0;
}

void esnr_launch(const EsnrCall&, int, std::uintptr_t) {
  throw std::runtime_error(cuda_why_not(0));
}

}  // namespace pwm_fast
