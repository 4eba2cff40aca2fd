// For .cu files: errors as exceptions, and the current device put back.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pwm_fast {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Throws what a kernel's launch left behind. Earlier errors of others are theirs to report: the
// caller clears them first, so that what is seen here is its own.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "current device");
    if (device != before_) check(cudaSetDevice(device), "device");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace pwm_fast
