// pwm_fast._C: the Python face of the native code. setup.py defines PWM_FAST_FLAGS.
#include <pybind11/pybind11.h>

#include <string>

#include "bind_cpu.h"
#include "bind_cuda.h"
#include "cpu_features.h"
#include "cuda/device.h"

namespace py = pybind11;

namespace {

// What this extension was built with. No date and no path: the same sources give the same binary.
py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang";
  info["compiler_version"] = __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc";
  info["compiler_version"] = __VERSION__;
#else
  info["compiler"] = "unknown";
  info["compiler_version"] = "unknown";
#endif
  info["cxx_standard"] = "c++" + std::to_string(__cplusplus / 100 % 100);
  info["flags"] = PWM_FAST_FLAGS;
  info["cuda"] = pwm_fast::cuda_is_built();
  info["cuda_detail"] = pwm_fast::cuda_build();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of pwm_fast.";
  m.def(
      "cpu_isa", [] { return pwm_fast::isa_name(pwm_fast::cpu_isa()); },
      "The instruction set for CPU kernels: PWM_FAST_ISA if set, else the best this CPU has.");
  m.def("build_info", &build_info, "The compiler, its flags and the CUDA support of this build.");
  bind_cpu(m);
  bind_cuda(m);
}
