// Names of element types, as torch has them.
#pragma once

#include "cpu/view.h"

namespace pwm_fast {

inline const char* type_name(Type type) {
  switch (type) {
    case fp32: return "float32";
    case bfloat16: return "bfloat16";
    case fp64: return "float64";
    case integer64: break;
  }
  return "int64";
}

}  // namespace pwm_fast
