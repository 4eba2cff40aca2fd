// SimNorm: softmax within groups of a row's elements. Private like simd.h.
#pragma once

#include "simd.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

// One group of any size, in place.
inline void softmax_group(float* x, int64_t group) {
  vf largest[1] = {splat(x[0])};
  each_vector<1>(group, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    // The row's other elements lie behind a group: a part must not see them.
    const vf v = load_row(kind, x, i, group);
    const vf known = decltype(kind)::part ? select(first_lanes(int(group - i)), v, splat(x[0])) : v;
    largest[0] = larger(known, largest[0]);
  });
  const float top = max(largest[0]);
  vf total[1] = {};
  each_vector<1>(group, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    const vf e = only_row(kind, exp_below_88(load_row(kind, x, i, group) - top), i, group);
    store_row(kind, x, i, group, e);
    total[0] += e;
  });
  const float inverse = 1.0f / sum(total[0]);
  each_vector<1>(group, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    store_row(kind, x, i, group, load_row(kind, x, i, group) * inverse);
  });
}

// All groups of a row of n elements in padded scratch memory, in place.
template <int G>
PWM_FAST_INLINE void softmax_small_groups(float* x, int64_t n) {  // G lanes divide a vector
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(x + i);
    const vf e = exp_below_88(v - group_max<G>(v));
    store(x + i, e / group_sum<G>(e));
  }
}
inline void softmax_groups(float* x, int64_t n, int64_t group) {
  if (group == 4) return softmax_small_groups<4>(x, n);
  if constexpr (W >= 8) {
    if (group == 8) return softmax_small_groups<8>(x, n);
  }
  if constexpr (W >= 16) {
    if (group == 16) return softmax_small_groups<16>(x, n);
  }
  for (int64_t i = 0; i < n; i += group) softmax_group(x + i, group);
}

// dx = y (dy - sum over the group of dy y), in padded scratch memory; dx may be dy.
template <int G>
PWM_FAST_INLINE void softmax_small_groups_bwd(const float* dy, const float* y, float* dx,
                                              int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const vf g = load(dy + i), p = load(y + i);
    store(dx + i, p * (g - group_sum<G>(g * p)));
  }
}
inline void softmax_groups_bwd(const float* dy, const float* y, float* dx, int64_t n,
                               int64_t group) {
  if (group == 4) return softmax_small_groups_bwd<4>(dy, y, dx, n);
  if constexpr (W >= 8) {
    if (group == 8) return softmax_small_groups_bwd<8>(dy, y, dx, n);
  }
  if constexpr (W >= 16) {
    if (group == 16) return softmax_small_groups_bwd<16>(dy, y, dx, n);
  }
  for (int64_t start = 0; start < n; start += group) {
    const float *g = dy + start, *p = y + start;
    vf total[1] = {};
    each_vector<1>(group, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      total[0] += load_row(kind, g, i, group) * load_row(kind, p, i, group);
    });
    const float dot = sum(total[0]);
    each_vector<1>(group, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      const vf d = load_row(kind, p, i, group) * (load_row(kind, g, i, group) - dot);
      store_row(kind, dx + start, i, group, d);
    });
  }
}

}  // namespace
}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
