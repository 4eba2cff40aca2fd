// What the C exchange interface of DLPack 1.x lays down (https://dmlc.github.io/dlpack), as far as it
// is used here: where a tensor's numbers are, without torch's headers and without calls of its methods.
#pragma once

#include <cstdint>

namespace pwm_fast::dlpack {

constexpr std::uint32_t major_version = 1;
constexpr std::int32_t cpu = 1;  // a device's type
enum Code : std::uint8_t { code_int = 0, code_float = 2, code_bfloat = 4 };

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;  // the tensor's own
  std::uint64_t byte_offset;
};

struct Exchange {
  std::uint32_t major, minor;
  const void* older;
  void (*allocate)();
  void (*from_object)();
  void (*to_object)();
  int (*view_of_object)(void* object, Tensor* view);  // -1 with a Python exception; or null
  void (*stream)();
};
constexpr const char* attribute = "__dlpack_c_exchange_api__";  // of a tensor's type: a capsule
constexpr const char* capsule = "dlpack_exchange_api";

}  // namespace pwm_fast::dlpack
