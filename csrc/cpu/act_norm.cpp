// The activation, then LayerNorm: gamma LN(act(x + bias)) + beta, for one layer or an ensemble.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

struct NotSaved {};  // stands for an element type

struct Parameters {  // of one member
  Shared bias, gamma, beta;
};

// u = x + bias and m = act(u); m into scratch memory, or into y where no LayerNorm follows.
template <class X, class U, class Y, bool MISH, bool NORM>
Moments activate(const ActNormFwd& a, const Parameters& parameters, int64_t r, float* m) {
  const int64_t n = a.x.cols;
  const X* x = row<const X>(a.x, r);
  Y* y = row<Y>(a.y, r);
  U* u = numbers<U>(a.u);
  if constexpr (!same<U, NotSaved>) u += r * n;
  vf sums[2] = {};
  each_vector<2>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    vf value = load_row(kind, x, i, n);
    if (parameters.bias.p != nullptr) value += parameters.bias.at(kind, i);
    if constexpr (!same<U, NotSaved>) store_row(kind, u, i, n, value);
    if constexpr (MISH) value = mish(value);
    if constexpr (NORM) {
      store(m + i, value);
      sums[k.value] += value;
    } else {
      store_row(kind, y, i, n, value);
    }
  });
  if constexpr (NORM) return moments(m, sums[0] + sums[1], n, a.eps);
  return {0.0f, 0.0f};
}
using Activate = Moments (*)(const ActNormFwd&, const Parameters&, int64_t, float*);

Activate choose_activate(const ActNormFwd& a) {
  Activate chosen = nullptr;
  const auto choose = [&](auto* u) {
    using U = Pointee<decltype(u)>;
    with_type(a.x.type, [&](auto* x) {
      using X = Pointee<decltype(x)>;
      with_flag(a.act == act_mish, [&](auto mish) {
        if (a.gamma.data != nullptr) {
          chosen = activate<X, U, float, mish.value, true>;
        } else {
          with_type(a.y.type, [&](auto* y) {
            chosen = activate<X, U, Pointee<decltype(y)>, mish.value, false>;
          });
        }
      });
    });
  };
  if (a.u.data == nullptr) {
    choose(static_cast<NotSaved*>(nullptr));
  } else {
    with_type(a.u.type, choose);
  }
  return chosen;
}

template <class Y>
void normalize(const ActNormFwd& a, const Parameters& parameters, Moments s, int64_t r,
               const float* m) {
  const int64_t n = a.x.cols;
  Y* y = row<Y>(a.y, r);
  each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    vf value = (load(m + i) - s.mean) * s.rstd * parameters.gamma.at(kind, i);
    if (parameters.beta.p != nullptr) value += parameters.beta.at(kind, i);
    store_row(kind, y, i, n, value);
  });
}

// xhat and the derivative of act at u into scratch memory (act_none: xhat alone), the sums of
// dy xhat and of dy; returns the means that the gradient of LayerNorm takes away.
struct Means {
  float g, g_xhat;
};
template <class DY, class U, bool MISH, bool NORM, bool SUMS>
Means slope(const ActNormBwd& a, const Shared& gamma, int64_t r, float* xhat, float* slopes,
            float* sums) {
  const int64_t n = a.dy.cols;
  const DY* dy = row<const DY>(a.dy, r);
  const U* u = numbers<const U>(a.u) + r * n;
  const float mean = NORM ? numbers(a.mean)[r] : 0.0f, rstd = NORM ? numbers(a.rstd)[r] : 1.0f;
  vf total[2] = {}, total_xhat[2] = {};
  each_vector<2>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    vf value = load_row(kind, u, i, n);
    if constexpr (MISH) {
      const MishAndSlope m = mish_and_slope(value);
      store(slopes + i, m.slope);
      value = m.value;
    }
    if constexpr (NORM) {
      const vf h = (value - mean) * rstd;
      const vf d = load_row(kind, dy, i, n);
      const vf g = d * gamma.at(kind, i);
      store(xhat + i, h);
      total[k.value] += g;
      total_xhat[k.value] += g * h;
      if constexpr (SUMS) {
        store(sums + i, load(sums + i) + d * h);
        store(sums + padded(n) + i, load(sums + padded(n) + i) + d);
      }
    }
  });
  if constexpr (!NORM) return {0.0f, 0.0f};
  return {sum(total[0] + total[1]) / float(n), sum(total_xhat[0] + total_xhat[1]) / float(n)};
}
using Slope = Means (*)(const ActNormBwd&, const Shared&, int64_t, float*, float*, float*);

Slope choose_slope(const ActNormBwd& a, bool sums) {
  Slope chosen = nullptr;
  with_type(a.dy.type, [&](auto* dy) {
    using DY = Pointee<decltype(dy)>;
    with_type(a.u.type, [&](auto* u) {
      using U = Pointee<decltype(u)>;
      with_flag(a.act == act_mish, [&](auto mish) {
        if (a.gamma.data == nullptr) {
          chosen = slope<DY, U, mish.value, false, false>;
        } else {
          with_flag(sums, [&](auto wanted) {
            chosen = slope<DY, U, mish.value, true, wanted.value>;
          });
        }
      });
    });
  });
  return chosen;
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) act'(u), g = dy gamma, and its sum.
template <class DY, class DX, bool MISH, bool NORM, bool SUMS>
void project(const ActNormBwd& a, const Shared& gamma, Means m, int64_t r, const float* xhat,
             const float* slopes, float* sums) {
  const int64_t n = a.dy.cols;
  const DY* dy = row<const DY>(a.dy, r);
  DX* dx = row<DX>(a.dx, r);
  const float rstd = NORM ? numbers(a.rstd)[r] : 1.0f;
  each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    vf d = load_row(kind, dy, i, n);
    if constexpr (NORM) {
      d = (d * gamma.at(kind, i) - m.g - load(xhat + i) * m.g_xhat) * rstd;
    }
    if constexpr (MISH) d *= load(slopes + i);
    store_row(kind, dx, i, n, d);
    if constexpr (SUMS) store(sums + 2 * padded(n) + i, load(sums + 2 * padded(n) + i) + d);
  });
}
using Project = void (*)(const ActNormBwd&, const Shared&, Means, int64_t, const float*,
                         const float*, float*);

Project choose_project(const ActNormBwd& a, bool sums) {
  Project chosen = nullptr;
  with_type(a.dy.type, [&](auto* dy) {
    using DY = Pointee<decltype(dy)>;
    with_type(a.dx.type, [&](auto* dx) {
      using DX = Pointee<decltype(dx)>;
      with_flag(a.act == act_mish, [&](auto mish) {
        with_flag(a.gamma.data != nullptr, [&](auto norm) {
          with_flag(sums, [&](auto wanted) {
            chosen = project<DY, DX, mish.value, norm.value, wanted.value>;
          });
        });
      });
    });
  });
  return chosen;
}

Shared of_member(const View& parameter, int64_t member, int64_t n) {
  const float* first = numbers(parameter);
  return Shared(first == nullptr ? nullptr : first + member * n, n);
}

}  // namespace

void act_norm_fwd(const ActNormFwd& a) {
  const int64_t rows = a.x.rows, n = a.x.cols;
  const Blocks blocks(rows, a.rows_per_member);
  const int64_t threads = useful_threads(a.threads, rows, rows * n);
  const Floats scratch(threads * padded(n));
  const Activate activate_row = choose_activate(a);
  const auto normalize_row = a.y.type == bfloat16 ? normalize<bf16> : normalize<float>;
  in_parallel(threads, rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const m = scratch.at(thread * padded(n));
    while (begin < end) {
      const int64_t member = begin / blocks.per_member;
      const int64_t stop = smaller(end, (member + 1) * blocks.per_member);
      const Parameters parameters = {of_member(a.bias, member, n),
                                     of_member(a.gamma, member, n),
                                     of_member(a.beta, member, n)};
      for (; begin < stop; ++begin) {
        const Moments s = activate_row(a, parameters, begin, m);
        if (a.gamma.data == nullptr) continue;
        normalize_row(a, parameters, s, begin, m);
        if (a.mean.data != nullptr) numbers(a.mean)[begin] = s.mean;
        if (a.rstd.data != nullptr) numbers(a.rstd)[begin] = s.rstd;
      }
    }
  });
}

void act_norm_bwd(const ActNormBwd& a) {
  const int64_t rows = a.dy.rows, n = a.dy.cols;
  const Blocks blocks(rows, a.rows_per_member);
  const int64_t threads = useful_threads(a.threads, blocks.count, rows * n);
  const Floats scratch(2 * threads * padded(n));
  // Without LayerNorm there is nothing to sum for its parameters.
  const bool norm = a.gamma.data != nullptr;
  const ParameterSums sums({norm ? &a.dgamma : nullptr, norm ? &a.dbeta : nullptr, &a.dbias}, blocks,
                           n, threads);
  const Slope slope_row = choose_slope(a, sums.wanted());
  const Project project_row = choose_project(a, sums.wanted());
  in_parallel(threads, blocks.count, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const xhat = scratch.at(2 * thread * padded(n));
    float* const slopes = xhat + padded(n);
    for (int64_t block = begin; block < end; ++block) {
      const Shared gamma = of_member(a.gamma, blocks.member(block), n);
      float* const block_sums = sums.start(block);
      for (int64_t r = blocks.begin(block); r < blocks.end(block); ++r) {
        const Means m = slope_row(a, gamma, r, xhat, slopes, block_sums);
        project_row(a, gamma, m, r, xhat, slopes, block_sums);
      }
      sums.done(block);
    }
  });
  sums.finish(a.threads);
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
