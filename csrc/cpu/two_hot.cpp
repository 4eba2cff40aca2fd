// Distributional heads: the mean of a softmax over bins, and its cross-entropy with two-hot targets.
// What there is once a row is done in fp64.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

double symlog(double x) { return x < 0.0 ? -__builtin_log1p(-x) : __builtin_log1p(x); }
double symexp(double x) { return x < 0.0 ? -__builtin_expm1(-x) : __builtin_expm1(x); }

struct Bins {
  int64_t count;
  double vmin, vmax;
};
template <class Arguments>
Bins bins_of(const Arguments& a) {
  return {a.logits.cols, a.vmin, a.vmax};
}

double centre(const Bins& bins, int64_t i) {
  return bins.vmin + (bins.vmax - bins.vmin) * (double(i) / double(bins.count - 1));
}

template <class X>
float largest(const X* logits, int64_t n) {
  vf top[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
  each_vector<2>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    vf x = load_row(kind, logits, i, n);
    if constexpr (decltype(kind)::part) {
      x = first_lanes(int(n - i)) ? x : splat(-__builtin_inff());
    }
    top[k.value] = larger(x, top[k.value]);  // NaN is passed over here, and found by the sum
  });
  return max(larger(top[0], top[1]));
}

// Where x lies between two neighbouring bins: it has the weight `upper` of bin `lower + 1`, NaN for
// NaN. Beyond the ends it is at them.
struct TwoHot {
  int64_t lower;
  double upper;
};
TwoHot encode(double x, const Bins& bins, bool transform) {
  if (transform) x = symlog(x);
  const double last = double(bins.count - 1);
  double position = (x - bins.vmin) * (last / (bins.vmax - bins.vmin));
  if (position < 0.0) position = 0.0;
  if (position > last) position = last;
  if (position != position) return {0, position};
  const int64_t lower = smaller(int64_t(position), bins.count - 2);
  return {lower, position - double(lower)};
}

float widen(float x) { return x; }
float widen(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &u, sizeof value);
  return value;
}
// weight x, where no weight counts nothing even of an infinite x
double weighted(double weight, double x) { return weight == 0.0 ? 0.0 : weight * x; }

// softmax(logits) of one row up to a common factor, into scratch memory; returns the factor. It is
// near 1, and takes away the rounding of lse, which grows with a common offset of the logits.
template <class X>
double probabilities(const X* logits, int64_t n, float lse, float* p) {
  vd total = {};
  each_vector<1>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    const vf e = only_row(kind, exp_below_88(load_row(kind, logits, i, n) - lse), i, n);
    store(p + i, e);
    total += __builtin_convertvector(e, vd);
  });
  return 1.0 / sum(total);
}

template <class X>
void decode_rows(const TwoHotDecodeFwd& a, const float* centres, int64_t begin, int64_t end) {
  const int64_t n = a.logits.cols;
  for (int64_t r = begin; r < end; ++r) {
    const X* logits = row<const X>(a.logits, r);
    const float top = largest(logits, n);
    vd total = {}, moment = {};  // in fp64, as symexp multiplies the error of the mean
    each_vector<1>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      const vf e = only_row(kind, exp_below_88(load_row(kind, logits, i, n) - top), i, n);
      const vd wide = __builtin_convertvector(e, vd);
      total += wide;
      moment += wide * __builtin_convertvector(load(centres + i), vd);
    });
    const double s = sum(total);
    const double mean = sum(moment) / s;
    numbers(a.value)[r] = float(a.transform ? symexp(mean) : mean);
    if (a.mean.data != nullptr) numbers(a.mean)[r] = float(mean);
    if (a.lse.data != nullptr) numbers(a.lse)[r] = float(double(top) + __builtin_log(s));
  }
}

template <class X>
void decode_grad_rows(const TwoHotDecodeBwd& a, const float* centres, float* p, int64_t begin,
                      int64_t end) {
  const int64_t n = a.logits.cols;
  for (int64_t r = begin; r < end; ++r) {
    const X* logits = row<const X>(a.logits, r);
    X* dlogits = row<X>(a.dlogits, r);
    const double factor = probabilities(logits, n, numbers(a.lse)[r], p);
    const float mean = numbers(a.mean)[r];
    const double slope = a.transform ? __builtin_exp(__builtin_fabs(double(mean))) : 1.0;
    const float scale = float(factor * double(numbers(a.dvalue)[r]) * slope);
    each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      store_row(kind, dlogits, i, n, load(p + i) * (load(centres + i) - mean) * scale);
    });
  }
}

template <class X>
void ce_rows(const TwoHotCeFwd& a, int64_t begin, int64_t end) {
  const int64_t n = a.logits.cols;
  for (int64_t r = begin; r < end; ++r) {
    const X* logits = row<const X>(a.logits, r);
    const float top = largest(logits, n);
    vd total = {};
    each_vector<1>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      const vf e = only_row(kind, exp_below_88(load_row(kind, logits, i, n) - top), i, n);
      total += __builtin_convertvector(e, vd);
    });
    const double log_sum = __builtin_log(sum(total));
    const TwoHot t = encode(double(numbers(a.x)[r]), bins_of(a), a.transform);
    const double lower = double(widen(logits[t.lower])) - double(top);
    const double upper = double(widen(logits[t.lower + 1])) - double(top);
    numbers(a.loss)[r] = float(log_sum - weighted(1.0 - t.upper, lower) - weighted(t.upper, upper));
    if (a.lse.data != nullptr) numbers(a.lse)[r] = float(double(top) + log_sum);
  }
}

template <class X>
void ce_grad_rows(const TwoHotCeBwd& a, float* p, int64_t begin, int64_t end) {
  const int64_t n = a.logits.cols;
  for (int64_t r = begin; r < end; ++r) {
    const X* logits = row<const X>(a.logits, r);
    X* dlogits = row<X>(a.dlogits, r);
    const double factor = probabilities(logits, n, numbers(a.lse)[r], p);
    const TwoHot t = encode(double(numbers(a.x)[r]), bins_of(a), a.transform);
    p[t.lower] = float(double(p[t.lower]) - (1.0 - t.upper) / factor);
    p[t.lower + 1] = float(double(p[t.lower + 1]) - t.upper / factor);
    // A NaN target makes all of the row NaN.
    const float scale = float(t.upper == t.upper ? factor * double(numbers(a.dloss)[r]) : t.upper);
    each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      store_row(kind, dlogits, i, n, load(p + i) * scale);
    });
  }
}

// The centres of the bins, with zeros behind them.
void fill_centres(const Bins& bins, float* centres) {
  for (int64_t i = 0; i < padded(bins.count); ++i) {
    centres[i] = i < bins.count ? float(centre(bins, i)) : 0.0f;
  }
}

}  // namespace

void two_hot_decode_fwd(const TwoHotDecodeFwd& a) {
  const int64_t threads = useful_threads(a.threads, a.logits.rows, a.logits.rows * a.logits.cols);
  const Floats centres(padded(a.logits.cols));
  fill_centres(bins_of(a), centres.at(0));
  in_parallel(threads, a.logits.rows, [&](int64_t, int64_t begin, int64_t end) {
    with_type(a.logits.type, [&](auto* x) {
      decode_rows<Pointee<decltype(x)>>(a, centres.at(0), begin, end);
    });
  });
}

void two_hot_decode_bwd(const TwoHotDecodeBwd& a) {
  const int64_t threads = useful_threads(a.threads, a.logits.rows, a.logits.rows * a.logits.cols);
  const Floats centres(padded(a.logits.cols)), scratch(threads * padded(a.logits.cols));
  fill_centres(bins_of(a), centres.at(0));
  in_parallel(threads, a.logits.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    float* const p = scratch.at(thread * padded(a.logits.cols));
    with_type(a.logits.type, [&](auto* x) {
      decode_grad_rows<Pointee<decltype(x)>>(a, centres.at(0), p, begin, end);
    });
  });
}

void two_hot_ce_fwd(const TwoHotCeFwd& a) {
  const int64_t threads = useful_threads(a.threads, a.logits.rows, a.logits.rows * a.logits.cols);
  in_parallel(threads, a.logits.rows, [&](int64_t, int64_t begin, int64_t end) {
    with_type(a.logits.type, [&](auto* x) { ce_rows<Pointee<decltype(x)>>(a, begin, end); });
  });
}

void two_hot_ce_bwd(const TwoHotCeBwd& a) {
  const int64_t threads = useful_threads(a.threads, a.logits.rows, a.logits.rows * a.logits.cols);
  const Floats scratch(threads * padded(a.logits.cols));
  in_parallel(threads, a.logits.rows, [&](int64_t thread, int64_t begin, int64_t end) {
    with_type(a.logits.type, [&](auto* x) {
      ce_grad_rows<Pointee<decltype(x)>>(a, scratch.at(thread * padded(a.logits.cols)), begin, end);
    });
  });
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
