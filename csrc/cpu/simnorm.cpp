// SimNorm alone: softmax within groups of a row's elements.
#include "rows.h"
#include "softmax.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

void simnorm_fwd(const SimNormFwd& a) {
  const int64_t n = a.n;
  const int64_t threads = useful_threads(a.threads, a.rows, a.rows * n);
  const Floats scratch(threads * padded(n));
  in_parallel(threads, a.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const row = scratch.at(thread * padded(n));
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x + r * a.ld_x;
      float* y = a.y + r * a.ld_y;
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store(row + i, load_row(kind, x, i, n));
      });
      softmax_groups(row, n, a.group);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        store_row(kind, y, i, n, load(row + i));
      });
    }
  });
}

void simnorm_bwd(const SimNormBwd& a) {
  const int64_t n = a.n;
  const int64_t threads = useful_threads(a.threads, a.rows, a.rows * n);
  const Floats scratch(2 * threads * padded(n));
  in_parallel(threads, a.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const grad = scratch.at(2 * thread * padded(n));
    float* const value = grad + padded(n);
    for (int64_t r = begin; r < end; ++r) {
      const float *dy = a.dy + r * a.ld_dy, *y = a.y + r * a.ld_y;
      float* dx = a.dx + r * a.ld_dx;
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
