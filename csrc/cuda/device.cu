#include "device.h"

#include "guard.h"

namespace pwm_fast {
namespace {

// Asked for its attributes only: whether this extension holds code that a device can run.
__global__ void probe() {}

#define PWM_FAST_TEXT_(x) #x
#define PWM_FAST_TEXT(x) PWM_FAST_TEXT_(x)

}  // namespace

bool cuda_is_built() { return true; }

std::string cuda_build() {
  return "nvcc " PWM_FAST_TEXT(__CUDACC_VER_MAJOR__) "." PWM_FAST_TEXT(__CUDACC_VER_MINOR__)
         ", for " PWM_FAST_CUDA_ARCHS;
}

int cuda_devices(std::string& reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // an answer, not an error of the next call
  if (error == cudaSuccess && count > 0) return count;
  reason = error == cudaSuccess ? "no CUDA device is visible" : cudaGetErrorString(error);
  return 0;
}

std::string cuda_why_not(int device) {
  std::string reason;
  const int count = cuda_devices(reason);
  if (count == 0) return "CUDA finds no GPU (" + reason + ")";
  if (device < 0 || device >= count) {
    return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count);
  }
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();
  if (error == cudaSuccess) return "";
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "the native extension's CUDA code (" + cuda_build() + ") does not run on compute capability " +
         std::to_string(major) + "." + std::to_string(minor) + " (" + cudaGetErrorString(error) +
         ")";
}

}  // namespace pwm_fast
