// GPUs as the rest of the extension sees them. No CUDA headers here; without CUDA, csrc/no_cuda.cpp.
#pragma once

#include <string>

namespace pwm_fast {

// Number of usable GPUs; `reason` says why there is none.
int cuda_devices(std::string& reason);

// Why the kernels cannot run on a device: no driver, no such device, no code for it. "" if they can.
std::string cuda_why_not(int device);

// The compiler and the architectures, for bug reports; without CUDA, why not.
std::string cuda_build();
bool cuda_is_built();

}  // namespace pwm_fast
