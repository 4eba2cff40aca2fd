// SimNorm alone: softmax within groups of a row's elements.
#include "rows.h"
#include "softmax.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

void simnorm_fwd(const SimNormFwd& a) {
  const int64_t n = a.x.cols;
  const int64_t threads = useful_threads(a.threads, a.x.rows, a.x.rows * n);
  const Floats scratch(threads * padded(n));
  in_parallel(threads, a.x.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const held = scratch.at(thread * padded(n));
    for (int64_t r = begin; r < end; ++r) {
      const float* x = row<const float>(a.x, r);
      float* y = row<float>(a.y, r);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store(held + i, load_row(kind, x, i, n));
      });
      softmax_groups(held, n, a.group);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store_row(kind, y, i, n, load(held + i));
      });
    }
  });
}

void simnorm_bwd(const SimNormBwd& a) {
  const int64_t n = a.dy.cols;
  const int64_t threads = useful_threads(a.threads, a.dy.rows, a.dy.rows * n);
  const Floats scratch(2 * threads * padded(n));
  in_parallel(threads, a.dy.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const grad = scratch.at(2 * thread * padded(n));
    float* const value = grad + padded(n);
    for (int64_t r = begin; r < end; ++r) {
      const float *dy = row<const float>(a.dy, r), *y = row<const float>(a.y, r);
      float* dx = row<float>(a.dx, r);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store(grad + i, load_row(kind, dy, i, n));
        store(value + i, load_row(kind, y, i, n));
      });
      softmax_groups_bwd(grad, value, grad, n, a.group);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store_row(kind, dx, i, n, load(grad + i));
      });
    }
  });
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
