// The Python face of the CUDA kernels, and of their emulation: plain integers in, checked.
#include "bind_cuda.h"

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/esnr.h"
#include "esnr_emulation.h"

namespace py = pybind11;

namespace {

using namespace pwm_fast;
using Address = std::uintptr_t;
using Size = std::int64_t;
using esnr::Task;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const char* name, Size value, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " +
                              std::to_string(value));
}

void check_sizes(Address sizes, Size tensors) {
  if (tensors < 0) fail("tensors", tensors, "at least 0");
  for (Size t = 0; t < tensors; ++t) {
    if (at<const Size>(sizes)[t] < 0) fail("sizes", at<const Size>(sizes)[t], "at least 0");
  }
  constexpr Size most = std::numeric_limits<std::int32_t>::max();  // blocks of a launch
  if (tensors > most) fail("tensors", tensors, "at most " + std::to_string(most));
  const Size chunks = esnr_chunks(at<const Size>(sizes), tensors);
  if (chunks > most) fail("sizes", chunks, "at most " + std::to_string(most) + " chunks");
}

Size workspace_words(Address sizes, Size tensors, Size rows) {
  check_sizes(sizes, tensors);
  if (rows < 1) fail("rows", rows, "at least 1");
  return esnr_workspace_words(at<const Size>(sizes), tensors, rows);
}

EsnrCall checked(EsnrCall call, Size words) {
  check_sizes(reinterpret_cast<Address>(call.sizes), call.tensors);
  if (call.type < esnr_fp32 || call.type > esnr_fp16) {
    fail("type", call.type, "0 (fp32), 1 (bf16) or 2 (fp16)");
  }
  if (call.samples < 1) fail("m", call.samples, "at least 1");
  const Size needed = esnr_workspace_words(call.sizes, call.tensors, call.row_count());
  if (words < needed) fail("words", words, "at least " + std::to_string(needed));
  return call;
}

EsnrCall moments(Address rows, Address sizes, Size type, Address signal, Address noise, Size m,
                 Size tensors, Address workspace, Size words) {
  return checked({Task::moments, type, m, tensors, at<const Size>(rows), at<const Size>(sizes),
                  nullptr, at<double>(signal), at<double>(noise), at<Size>(workspace)},
                 words);
}

EsnrCall update(Address rows, Address sizes, Size type, Address squares, Size tensors,
                Address workspace, Size words) {
  return checked({Task::update, type, 1, tensors, at<const Size>(rows), at<const Size>(sizes),
                  at<double>(squares), nullptr, nullptr, at<Size>(workspace)},
                 words);
}

EsnrCall result(Address rows, Address sizes, Size type, Address squares, Address signal,
                Address noise, Size m, Size tensors, Address workspace, Size words) {
  return checked({Task::result, type, m, tensors, at<const Size>(rows), at<const Size>(sizes),
                  at<double>(squares), at<double>(signal), at<double>(noise), at<Size>(workspace)},
                 words);
}

void cuda_esnr(Address rows, Address sizes, Size type, Address signal, Address noise, Size m,
               Size tensors, Address workspace, Size words, int device, Address stream) {
  esnr_launch(moments(rows, sizes, type, signal, noise, m, tensors, workspace, words), device,
              stream);
}

void cuda_esnr_update(Address rows, Address sizes, Size type, Address squares, Size tensors,
                      Address workspace, Size words, int device, Address stream) {
  esnr_launch(update(rows, sizes, type, squares, tensors, workspace, words), device, stream);
}

void cuda_esnr_result(Address rows, Address sizes, Size type, Address squares, Address signal,
                      Address noise, Size m, Size tensors, Address workspace, Size words,
                      int device, Address stream) {
  esnr_launch(result(rows, sizes, type, squares, signal, noise, m, tensors, workspace, words),
              device, stream);
}

void emulated_esnr(Address rows, Address sizes, Size type, Address signal, Address noise, Size m,
                   Size tensors, Address workspace, Size words, std::uint64_t order) {
  esnr_emulate(moments(rows, sizes, type, signal, noise, m, tensors, workspace, words), order);
}

void emulated_esnr_update(Address rows, Address sizes, Size type, Address squares, Size tensors,
                          Address workspace, Size words, std::uint64_t order) {
  esnr_emulate(update(rows, sizes, type, squares, tensors, workspace, words), order);
}

void emulated_esnr_result(Address rows, Address sizes, Size type, Address squares, Address signal,
                          Address noise, Size m, Size tensors, Address workspace, Size words,
                          std::uint64_t order) {
  esnr_emulate(result(rows, sizes, type, squares, signal, noise, m, tensors, workspace, words),
               order);
}

py::tuple devices() {
  std::string reason;
  const int count = cuda_devices(reason);
  return py::make_tuple(count, reason);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using py::arg;
  m.def("cuda_devices", &devices, "Number of usable GPUs, and why there is none.");
  m.def("cuda_why_not", &cuda_why_not, arg("device"),
        "Why the CUDA kernels cannot run on a device; empty if they can.");
  m.def("esnr_workspace_words", &workspace_words, arg("sizes"), arg("tensors"), arg("rows"),
        "64-bit words of workspace for the ESNR kernels on a GPU.");
  m.def("cuda_esnr", &cuda_esnr, "Signal and noise of m samples of tensors on a GPU.",
        arg("rows"), arg("sizes"), arg("type"), arg("signal"), arg("noise"), arg("m"),
        arg("tensors"), arg("workspace"), arg("words"), arg("device"), arg("stream"));
  m.def("cuda_esnr_update", &cuda_esnr_update, "Takes one sample into a streamed estimate.",
        arg("rows"), arg("sizes"), arg("type"), arg("squares"), arg("tensors"), arg("workspace"),
        arg("words"), arg("device"), arg("stream"));
  m.def("cuda_esnr_result", &cuda_esnr_result, "Signal and noise of a streamed estimate.",
        arg("rows"), arg("sizes"), arg("type"), arg("squares"), arg("signal"), arg("noise"),
        arg("m"), arg("tensors"), arg("workspace"), arg("words"), arg("device"), arg("stream"));
  m.def("emulated_esnr", &emulated_esnr, "cuda_esnr on the CPU, its blocks in some order.",
        arg("rows"), arg("sizes"), arg("type"), arg("signal"), arg("noise"), arg("m"),
        arg("tensors"), arg("workspace"), arg("words"), arg("order"));
  m.def("emulated_esnr_update", &emulated_esnr_update, "cuda_esnr_update on the CPU.", arg("rows"),
        arg("sizes"), arg("type"), arg("squares"), arg("tensors"), arg("workspace"), arg("words"),
        arg("order"));
  m.def("emulated_esnr_result", &emulated_esnr_result, "cuda_esnr_result on the CPU.", arg("rows"),
        arg("sizes"), arg("type"), arg("squares"), arg("signal"), arg("noise"), arg("m"),
        arg("tensors"), arg("workspace"), arg("words"), arg("order"));
}
