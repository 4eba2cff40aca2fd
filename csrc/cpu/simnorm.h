#pragma once

#include "view.h"

namespace pwm_fast {

// Softmax in groups of `group` elements, fp32.
struct SimNormFwd {
  View x, y;
  int64_t group, threads;

  template <class F>
  void fields(F& f) {
    f("x", x), f("y", y), f("group", group), f("threads", threads, optional);
  }
  int64_t check() const {
    check_fp32(x), check_matrix(x, x), check_fp32(y), check_matrix(y, x);
    check_group(group, x.cols);
    return x.rows * x.cols;
  }
};

struct SimNormBwd {
  View dy, y, dx;
  int64_t group, threads;

  template <class F>
  void fields(F& f) {
    f("dy", dy), f("y", y), f("dx", dx), f("group", group), f("threads", threads, optional);
  }
  int64_t check() const {
    check_fp32(dy), check_matrix(dy, dy), check_fp32(y), check_matrix(y, dy);
    check_fp32(dx), check_matrix(dx, dy);
    check_group(group, dy.cols);
    return dy.rows * dy.cols;
  }
};

}  // namespace pwm_fast
