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
    vf v = load_row(kind, x, i, group);
    if constexpr (decltype(kind)::part) v = first_lanes(int(group - i)) ? v : splat(x[0]);
    largest[0] = larger(v, largest[0]);
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

// Groups of 4, 8, 16 or 32: some lanes of a vector, or a few vectors.
template <int G>
struct Group {
  static constexpr int lanes = G < W ? G : W;
  static constexpr int vectors = G < W ? 1 : G / W;
};
template <class F>
PWM_FAST_INLINE bool with_small_group(int64_t group, F f) {
  if (group == 4) return f(Group<4>{}), true;
  if (group == 8) return f(Group<8>{}), true;
  if (group == 16) return f(Group<16>{}), true;
  if (group == 32) return f(Group<32>{}), true;
  return false;
}

// All groups of a row of n elements in padded scratch memory, in place.
inline void softmax_groups(float* x, int64_t n, int64_t group) {
  const auto small = [&](auto g) PWM_FAST_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; i += g.vectors * W) {
      vf v[g.vectors];
      for (int k = 0; k < g.vectors; ++k) v[k] = load(x + i + k * W);
      vf top = v[0], total = {};
      for (int k = 1; k < g.vectors; ++k) top = larger(top, v[k]);
      top = group_max<g.lanes>(top);
      for (int k = 0; k < g.vectors; ++k) {
        v[k] = exp_below_88(v[k] - top);
        total += v[k];
      }
      const vf inverse = 1.0f / group_sum<g.lanes>(total);
      for (int k = 0; k < g.vectors; ++k) store(x + i + k * W, v[k] * inverse);
    }
  };
  if (with_small_group(group, small)) return;
  for (int64_t i = 0; i < n; i += group) softmax_group(x + i, group);
}

// dx = y (dy - sum over the group of dy y), in padded scratch memory; dx may be dy.
inline void softmax_groups_bwd(const float* dy, const float* y, float* dx, int64_t n,
                               int64_t group) {
  const auto small = [&](auto g) PWM_FAST_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; i += g.vectors * W) {
      vf dot = {};
      for (int k = 0; k < g.vectors; ++k) dot += load(dy + i + k * W) * load(y + i + k * W);
      dot = group_sum<g.lanes>(dot);
      for (int k = 0; k < g.vectors; ++k) {
        store(dx + i + k * W, load(y + i + k * W) * (load(dy + i + k * W) - dot));
      }
    }
  };
  if (with_small_group(group, small)) return;
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
