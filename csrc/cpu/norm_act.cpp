// LayerNorm, then the activation: act(gamma LN(x + bias + add + tau w_tau) + beta).
#include "rows.h"
#include "softmax.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

struct NotSaved {};  // stands for an element type

// Ones and zeros for an absent gamma and beta, in scratch memory of 2 padded(n) floats.
void fill_defaults(float* memory, int64_t n, const float*& gamma, const float*& beta) {
  float* const ones = memory;
  float* const zeros = memory + padded(n);
  for (int64_t i = 0; i < padded(n); ++i) {
    ones[i] = 1.0f;
    zeros[i] = 0.0f;
  }
  if (gamma == nullptr) gamma = ones;
  if (beta == nullptr) beta = zeros;
}

// What is added to every row's x.
struct Added {
  Shared bias, w_tau;
};

// v of one row into scratch memory, with zeros behind it; returns its moments.
template <class X, bool BIAS, bool ADD, bool TAU>
Moments gather(const NormActFwd& a, const Added& added, int64_t r, float* v) {
  const int64_t n = a.x.cols;
  const X* x = row<const X>(a.x, r);
  const float* add = ADD ? row<const float>(a.add, r % a.add.rows) : nullptr;
  const float tau = TAU ? numbers(a.tau)[a.tau.rows * a.tau.cols == 1 ? 0 : r] : 0.0f;
  vf sums[4] = {};
  each_vector<4>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    vf value = load_row(kind, x, i, n);
    if constexpr (BIAS) value += added.bias.at(kind, i);
    if constexpr (ADD) value += load_row(kind, add, i, n);
    if constexpr (TAU) value += tau * added.w_tau.at(kind, i);
    store(v + i, value);
    sums[k.value] += value;
  });
  return moments(v, (sums[0] + sums[1]) + (sums[2] + sums[3]), n, a.eps, a.width);
}
using Gather = Moments (*)(const NormActFwd&, const Added&, int64_t, float*);

Gather choose_gather(const NormActFwd& a) {
  Gather chosen = nullptr;
  with_type(a.x.type, [&](auto* x) {
    using X = Pointee<decltype(x)>;
    with_flag(a.bias.data != nullptr, [&](auto bias) {
      with_flag(a.add.data != nullptr, [&](auto add) {
        with_flag(a.tau.data != nullptr && a.w_tau.data != nullptr, [&](auto tau) {
          chosen = gather<X, bias.value, add.value, tau.value>;
        });
      });
    });
  });
  return chosen;
}

// u = gamma xhat + beta, xhat = (v - mean) rstd; y = act(u), or u into v for SimNorm.
template <class XHat, class Y, Act ACT>
void normalize(const NormActFwd& a, const Shared& gamma, const Shared& beta, Moments m, int64_t r,
               float* v) {
  const int64_t n = a.x.cols;
  XHat* xhat = numbers<XHat>(a.xhat);
  if constexpr (!same<XHat, NotSaved>) xhat += r * n;
  Y* y = row<Y>(a.y, r);
  each_vector<ACT == act_mish ? 1 : 2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    const vf h = (load(v + i) - m.mean) * m.rstd;
    if constexpr (!same<XHat, NotSaved>) store_row(kind, xhat, i, n, h);
    const vf u = h * gamma.at(kind, i) + beta.at(kind, i);
    if constexpr (ACT == act_none) store_row(kind, y, i, n, u);
    if constexpr (ACT == act_mish) store_row(kind, y, i, n, mish(u));
    if constexpr (ACT == act_simnorm) store(v + i, u);
  });
  if constexpr (ACT == act_simnorm) {
    softmax_groups(v, n, a.group);
    each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      store_row(kind, y, i, n, load(v + i));
    });
  }
}
using Normalize = void (*)(const NormActFwd&, const Shared&, const Shared&, Moments, int64_t,
                           float*);

Normalize choose_normalize(const NormActFwd& a) {
  Normalize chosen = nullptr;
  const auto choose = [&](auto* xhat) {
    using XHat = Pointee<decltype(xhat)>;
    with_type(a.y.type, [&](auto* y) {
      using Y = Pointee<decltype(y)>;
      chosen = a.act == act_mish      ? normalize<XHat, Y, act_mish>
               : a.act == act_simnorm ? normalize<XHat, Y, act_simnorm>
                                      : normalize<XHat, Y, act_none>;
    });
  };
  if (a.xhat.data == nullptr) {
    choose(static_cast<NotSaved*>(nullptr));
  } else {
    with_type(a.xhat.type, choose);
  }
  return chosen;
}

// du of SimNorm, in fp32.
template <class DY, class Y>
void simnorm_slope(const NormActBwd& a, int64_t r, float* du, float* y_row) {
  const DY* dy = row<const DY>(a.dy, r);
  const Y* y = row<const Y>(a.y, r);
  each_vector<2>(a.dy.cols, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    store(du + i, load_row(kind, dy, i, a.dy.cols));
    store(y_row + i, load_row(kind, y, i, a.dy.cols));
  });
  softmax_groups_bwd(du, y_row, du, a.dy.cols, a.group);
}
using SimNormSlope = void (*)(const NormActBwd&, int64_t, float*, float*);

SimNormSlope choose_simnorm_slope(const NormActBwd& a) {
  SimNormSlope chosen = nullptr;
  with_type(a.dy.type, [&](auto* dy) {
    with_type(a.y.type, [&](auto* y) {
      chosen = simnorm_slope<Pointee<decltype(dy)>, Pointee<decltype(y)>>;
    });
  });
  return chosen;
}

struct Affine {
  Shared gamma, beta;
};

// g = gamma du into scratch memory, and the sums of du xhat and of du; returns the means that the
// gradient of LayerNorm takes away.
struct Means {
  float g, g_xhat;
};
template <class DY, class XHat, bool MISH, bool SUMS>
Means slope(const NormActBwd& a, const Affine& affine, const void* dy_row, int64_t r, float* g,
            float* sums) {
  const int64_t n = a.dy.cols;
  const DY* dy = static_cast<const DY*>(dy_row);
  const XHat* xhat = numbers<const XHat>(a.xhat) + r * n;
  vf total[2] = {}, total_xhat[2] = {};
  each_vector<2>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    const vf h = load_row(kind, xhat, i, n);
    const vf gamma = affine.gamma.at(kind, i);
    vf du = load_row(kind, dy, i, n);
    if constexpr (MISH) du *= mish_and_slope(h * gamma + affine.beta.at(kind, i)).slope;
    const vf gi = du * gamma;
    store(g + i, gi);
    total[k.value] += gi;
    total_xhat[k.value] += gi * h;
    if constexpr (SUMS) {
      store(sums + i, load(sums + i) + du * h);
      store(sums + padded(n) + i, load(sums + padded(n) + i) + du);
    }
  });
  return {sum(total[0] + total[1]) / float(n), sum(total_xhat[0] + total_xhat[1]) / float(n)};
}
using Slope = Means (*)(const NormActBwd&, const Affine&, const void*, int64_t, float*, float*);

Slope choose_slope(const NormActBwd& a, bool sums) {
  Slope chosen = nullptr;
  with_type(a.act == act_simnorm ? int64_t(fp32) : a.dy.type, [&](auto* dy) {
    with_type(a.xhat.type, [&](auto* xhat) {
      with_flag(a.act == act_mish, [&](auto mish) {
        with_flag(sums, [&](auto wanted) {
          chosen =
              slope<Pointee<decltype(dy)>, Pointee<decltype(xhat)>, mish.value, wanted.value>;
        });
      });
    });
  });
  return chosen;
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)), and its sum.
template <class XHat, class DX, bool SUMS>
void project(const NormActBwd& a, Means m, int64_t r, const float* g, float* sums) {
  const int64_t n = a.dy.cols;
  const XHat* xhat = numbers<const XHat>(a.xhat) + r * n;
  DX* dx = row<DX>(a.dx, r);
  const float rstd = numbers(a.rstd)[r];
  each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    const vf d = (load(g + i) - m.g - load_row(kind, xhat, i, n) * m.g_xhat) * rstd;
    store_row(kind, dx, i, n, d);
    if constexpr (SUMS) store(sums + 2 * padded(n) + i, load(sums + 2 * padded(n) + i) + d);
  });
}
using Project = void (*)(const NormActBwd&, Means, int64_t, const float*, float*);

Project choose_project(const NormActBwd& a, bool sums) {
  Project chosen = nullptr;
  with_type(a.xhat.type, [&](auto* xhat) {
    with_type(a.dx.type, [&](auto* dx) {
      with_flag(sums, [&](auto wanted) {
        chosen = project<Pointee<decltype(xhat)>, Pointee<decltype(dx)>, wanted.value>;
      });
    });
  });
  return chosen;
}

}  // namespace

void norm_act_fwd(const NormActFwd& a) {
  const int64_t rows = a.x.rows, n = a.x.cols;
  const int64_t threads = useful_threads(a.threads, rows, rows * n);
  const bool defaults = a.gamma.data == nullptr || a.beta.data == nullptr;
  const Floats scratch((threads + (defaults ? 2 : 0)) * padded(n));
  const float *gamma_row = numbers(a.gamma), *beta_row = numbers(a.beta);
  if (defaults) fill_defaults(scratch.at(threads * padded(n)), n, gamma_row, beta_row);
  const Added added = {Shared(numbers(a.bias), n), Shared(numbers(a.w_tau), n)};
  const Shared gamma(gamma_row, n), beta(beta_row, n);
  const Gather gather_row = choose_gather(a);
  const Normalize normalize_row = choose_normalize(a);
  in_parallel(threads, rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const v = scratch.at(thread * padded(n));
    for (int64_t r = begin; r < end; ++r) {
      const Moments m = gather_row(a, added, r, v);
      normalize_row(a, gamma, beta, m, r, v);
      if (a.rstd.data != nullptr) numbers(a.rstd)[r] = m.rstd;
    }
  });
}

void norm_act_bwd(const NormActBwd& a) {
  const int64_t rows = a.dy.rows, n = a.dy.cols;
  const Blocks blocks(rows, 0);
  const int64_t threads = useful_threads(a.threads, blocks.count, rows * n);
  const bool defaults = a.gamma.data == nullptr || a.beta.data == nullptr;
  const Floats scratch((2 * threads + (defaults ? 2 : 0)) * padded(n));
  const float *gamma_row = numbers(a.gamma), *beta_row = numbers(a.beta);
  if (defaults) fill_defaults(scratch.at(2 * threads * padded(n)), n, gamma_row, beta_row);
  const Affine affine = {Shared(gamma_row, n), Shared(beta_row, n)};
  const ParameterSums sums({&a.dgamma, &a.dbeta, &a.dbias}, blocks, n, threads);
  const SimNormSlope simnorm_row = choose_simnorm_slope(a);
  const Slope slope_row = choose_slope(a, sums.wanted());
  const Project project_row = choose_project(a, sums.wanted());
  const int64_t dy_bytes = a.dy.type == bfloat16 ? 2 : 4;
  in_parallel(threads, blocks.count, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const g = scratch.at(2 * thread * padded(n));
    for (int64_t block = begin; block < end; ++block) {
      float* const block_sums = sums.start(block);
      for (int64_t r = blocks.begin(block); r < blocks.end(block); ++r) {
        const void* dy = static_cast<const char*>(a.dy.data) + r * a.dy.stride * dy_bytes;
        if (a.act == act_simnorm) {
          simnorm_row(a, r, g, g + padded(n));
          dy = g;
        }
        Means m = slope_row(a, affine, dy, r, g, block_sums);
        if (a.width > 0) m = {0.0f, m.g_xhat * (float(n) / float(a.width))};
        project_row(a, m, r, g, block_sums);
      }
      sums.done(block);
    }
  });
  sums.finish(a.threads);
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
