#pragma once

#include "view.h"

namespace pwm_fast {

// Of samples of a list of tensors: by tensor, the sum of mu^2 and of mean((g - mu)^2).
struct Esnr {
  View grads;  // [samples, tensors] addresses of fp32, which are believed
  View sizes;  // [tensors] elements
  View signal, noise;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("grads", grads), f("sizes", sizes), f("signal", signal), f("noise", noise);
    f("threads", threads, optional);
  }
  int64_t check() const {
    const int64_t tensors = sizes.rows * sizes.cols;
    check_vector(sizes, tensors, integer64);
    check_least("the rows of grads", grads.rows, 1);
    check_table(grads, grads.rows, tensors, integer64);
    check_vector(signal, tensors, fp64), check_vector(noise, tensors, fp64);
    int64_t elements = 0;
    for (int64_t t = 0; t < tensors; ++t) {
      const int64_t size = static_cast<const int64_t*>(sizes.data)[t];
      check_least("sizes", size, 0);
      elements += size;
    }
    return elements * grads.rows;
  }
};

}  // namespace pwm_fast
