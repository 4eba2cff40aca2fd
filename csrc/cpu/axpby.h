#pragma once

#include "view.h"

namespace pwm_fast {

// out = z + c1 k1 + c2 k2, in fp32 without gaps; k2 may be absent.
struct Axpby {
  View z, k1, k2, out;
  float c1, c2;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("z", z), f("k1", k1), f("k2", k2, nullable), f("out", out);
    f("c1", c1), f("c2", c2), f("threads", threads, optional);
  }
  int64_t check() const {
    const int64_t count = z.rows * z.cols;
    check_vector(z, count), check_vector(k1, count), check_vector(k2, count);
    check_vector(out, count);
    return count;
  }
};

}  // namespace pwm_fast
