// out = z + c1 k1 + c2 k2: the steps of the ODE solvers.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {

void axpby(const Axpby& a) {
  constexpr int64_t chunk = 1024;  // whole vectors, so that no thread count changes a result
  const int64_t n = a.z.rows * a.z.cols;
  const int64_t chunks = (n + chunk - 1) / chunk;
  const int64_t threads = useful_threads(a.threads, chunks, n);
  in_parallel(threads, chunks, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t first = begin * chunk, count = smaller(n, end * chunk) - first;
    const float *z = numbers(a.z) + first, *k1 = numbers(a.k1) + first;
    float* out = numbers(a.out) + first;
    if (a.k2.data == nullptr) {
      each_vector<2>(count, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        const vf step = load_row(kind, k1, i, count) * a.c1;
        store_row(kind, out, i, count, load_row(kind, z, i, count) + step);
      });
    } else {
      const float* k2 = numbers(a.k2) + first;
      each_vector<2>(count, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        const vf step = load_row(kind, k1, i, count) * a.c1;
        const vf both = step + load_row(kind, k2, i, count) * a.c2;
        store_row(kind, out, i, count, load_row(kind, z, i, count) + both);
      });
    }
  });
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
