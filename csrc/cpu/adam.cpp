// Adam with clipping that skips what is not finite (Kingma and Ba 2015, algorithm 1), in PyTorch's
// form: bias corrections in fp64, moments and parameters in fp32.
#include "adam.h"

#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

// Elements that are worked on in one piece, whoever does it: whole vectors, so that no number of
// threads changes an element's place in one, nor the order of the sums.
constexpr int64_t block_size = 4096;
constexpr double infinity = __builtin_inf();

int64_t size_of(const View& x) { return x.rows * x.cols; }
int64_t blocks_of(const View& x) { return (size_of(x) + block_size - 1) / block_size; }
double number(const View& x) { return x.type == fp64 ? *numbers<double>(x) : *numbers(x); }

// body(tensor, first element, elements, block) for blocks begin to end of all tensors' blocks.
template <class Body>
PWM_FAST_INLINE void each_block(const Views& tensors, int64_t begin, int64_t end, Body body) {
  int64_t first = 0;  // block of tensor t
  for (int64_t t = 0; t < tensors.count && first < end; ++t) {
    const int64_t next = first + blocks_of(tensors.items[t]), size = size_of(tensors.items[t]);
    for (int64_t block = begin > first ? begin : first; block < smaller(end, next); ++block) {
      const int64_t start = (block - first) * block_size;
      body(t, start, smaller(block_size, size - start), block);
    }
    first = next;
  }
}

// In fp64, which holds the square of every fp32 number.
double squares_of(const float* x, int64_t n) {
  vd total[4] = {};  // 4 sums hide the latency of an addition
  each_vector<4>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    const vd wide = __builtin_convertvector(load_row(kind, x, i, n), vd);
    total[k.value] += wide * wide;
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// What a tensor's elements are updated with.
struct Factors {
  float rate, root;  // rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
};
struct Constants {
  float keep1, share1, keep2, share2, epsilon, clip;
};

template <class Keep>
PWM_FAST_INLINE void update(Keep, const Constants& c, const Factors& f, float* __restrict p,
                            float* __restrict g, float* __restrict m, float* __restrict v,
                            int64_t n) {
  each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    const vf gradient = load_row(kind, g, i, n) * c.clip;
    if constexpr (Keep::value) store_row(kind, g, i, n, gradient);
    const vf mean = load_row(kind, m, i, n) * c.keep1 + gradient * c.share1;
    const vf square = load_row(kind, v, i, n) * c.keep2 + gradient * gradient * c.share2;
    store_row(kind, m, i, n, mean);
    store_row(kind, v, i, n, square);
    const vf distance = square_root(square) * f.root + c.epsilon;
    store_row(kind, p, i, n, load_row(kind, p, i, n) - mean * f.rate / distance);
  });
}

void scale(float* x, float factor, int64_t n) {
  each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    store_row(kind, x, i, n, load_row(kind, x, i, n) * factor);
  });
}

}  // namespace

void adam(const Adam& a) {
  int64_t blocks = 0, elements = 0;
  for (int64_t t = 0; t < a.params.count; ++t) {
    blocks += blocks_of(a.params.items[t]);
    elements += size_of(a.params.items[t]);
  }
  const int64_t threads = useful_threads(a.threads, blocks, elements);
  const Memory<double> sums(blocks);
  const Memory<Factors> factors(a.params.count);
  in_parallel(threads, blocks, [&](int64_t, int64_t begin, int64_t end) {
    each_block(a.grads, begin, end, [&](int64_t t, int64_t start, int64_t n, int64_t block) {
      *sums.at(block) = squares_of(numbers(a.grads.items[t]) + start, n);
    });
  });
  double total = 0.0;
  for (int64_t block = 0; block < blocks; ++block) total += *sums.at(block);
  const double* const options = numbers<double>(a.options);
  const double beta1 = options[0], beta2 = options[1];
  const double norm = __builtin_sqrt(total), loss = number(a.loss);
  const bool finite = norm < infinity && __builtin_fabs(loss) < infinity;  // a NaN is not below
  double clip = options[3] / (norm + 1e-6);
  if (clip > 1.0) clip = 1.0;  // a NaN stays

  *numbers(a.norm) = float(norm);
  int64_t &skipped = *numbers<int64_t>(a.skipped), &in_a_row = *numbers<int64_t>(a.in_a_row);
  skipped += !finite;
  in_a_row = finite ? 0 : in_a_row + 1;
  const auto clipped = [&](int64_t, int64_t begin, int64_t end) {
    each_block(a.grads, begin, end, [&](int64_t t, int64_t start, int64_t n, int64_t) {
      scale(numbers(a.grads.items[t]) + start, float(clip), n);
    });
  };
  if (!finite) {
    if (a.keep) in_parallel(threads, blocks, clipped);
    return;
  }

  for (int64_t group = 0, t = 0; group < a.steps.count; ++group) {
    const double rate = number(a.rates.items[group]);
    float* const steps = numbers(a.steps.items[group]);
    for (int64_t i = 0; i < size_of(a.steps.items[group]); ++i, ++t) {
      const float before = steps[i];
      steps[i] = before + 1.0f;
      if (i > 0 && steps[i] == steps[i - 1]) {  // as they mostly are
        *factors.at(t) = *factors.at(t - 1);
        continue;
      }
      const double step = double(steps[i]);
      *factors.at(t) = {float(rate / (1.0 - __builtin_pow(beta1, step))),
                        float(1.0 / __builtin_sqrt(1.0 - __builtin_pow(beta2, step)))};
    }
  }
  const Constants c = {float(beta1),       float(1.0 - beta1), float(beta2),
                       float(1.0 - beta2), float(options[2]),  float(clip)};
  with_flag(a.keep, [&](auto keep) {
    in_parallel(threads, blocks, [&](int64_t, int64_t begin, int64_t end) {
      each_block(a.params, begin, end, [&](int64_t t, int64_t start, int64_t n, int64_t) {
        update(keep, c, *factors.at(t), numbers(a.params.items[t]) + start,
               numbers(a.grads.items[t]) + start, numbers(a.means.items[t]) + start,
               numbers(a.squares.items[t]) + start, n);
      });
    });
  });
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
