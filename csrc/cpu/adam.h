#pragma once

#include "view.h"

namespace pwm_fast {

// Clips the gradients by their norm and takes a step of Adam, or counts that it was skipped, where
// the norm or the loss is not finite. Tensors are in groups, which learn at a rate each: the first
// steps[0].cols of every list are those of the first group.
struct Adam {
  View options;  // both betas, epsilon and the largest norm
  Views params, grads, means, squares;
  Views steps;  // by group, steps taken by each of its tensors
  Views rates;  // by group
  View loss, norm, skipped, in_a_row;
  bool keep;  // clipped gradients are written back
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("options", options), f("params", params), f("grads", grads), f("means", means);
    f("squares", squares), f("steps", steps), f("rates", rates), f("loss", loss), f("norm", norm);
    f("skipped", skipped), f("in_a_row", in_a_row), f("keep", keep), f("threads", threads, optional);
  }
  int64_t check() const {
    check_vector(options, 4, fp64);
    check_list(params, params), check_list(grads, params);
    check_list(means, params), check_list(squares, params);
    int64_t tensors = 0, elements = 0;
    for (int64_t g = 0; g < steps.count; ++g) {
      const int64_t count = steps.items[g].rows * steps.items[g].cols;
      check_vector(steps.items[g], count);
      tensors += count;
    }
    check_count("the numbers of steps", tensors, params.count);
    check_count("the number of rates", rates.count, steps.count);
    for (int64_t g = 0; g < rates.count; ++g) check_number(rates.items[g]);
    check_number(loss), check_vector(norm, 1);
    check_vector(skipped, 1, integer64), check_vector(in_a_row, 1, integer64);
    for (int64_t t = 0; t < params.count; ++t) {
      elements += params.items[t].rows * params.items[t].cols;
    }
    return elements;
  }
};

}  // namespace pwm_fast
