// Signal and noise of gradient samples: per tensor, the sums over its elements of mu^2 and of
// mean((g - mu)^2), with the mean mu over the samples. Centred, as the difference of totals cancels.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

constexpr int64_t block_size = 4096;  // elements summed in one piece, whoever does it

// Mean and sum of centred squares of each lane's samples. What fp32 rounds off the mean is in `rest`:
// samples that agree to 1e-6 lie so close to their mean that its rounding alone would be 0.4 % of their
// variance. Their distances from the rounded mean are exact, so `rest` and the correction are too.
struct Statistics {
  vf mean, rest, squares;
};
PWM_FAST_INLINE vf sum_of_4(const vf (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }
template <int M, class Kind>
PWM_FAST_INLINE Statistics of_samples(Kind kind, const float* const* samples, int64_t i, int64_t n) {
  vf g[M], total[4] = {}, rest[4] = {}, squares[4] = {};  // 4 sums hide the latency of an addition
  for (int s = 0; s < M; ++s) {
    g[s] = load_row(kind, samples[s], i, n);
    total[s % 4] += g[s];
  }
  const vf mean = sum_of_4(total) * (1.0f / M);
  for (int s = 0; s < M; ++s) {
    const vf d = g[s] - mean;
    rest[s % 4] += d;
    squares[s % 4] += d * d;
  }
  const vf off = sum_of_4(rest) * (1.0f / M);
  return {mean, off, sum_of_4(squares) - off * off * float(M)};
}

// Chan's formula for two sets of samples.
PWM_FAST_INLINE Statistics merge(Statistics a, float count_a, Statistics b, float count_b) {
  const vf apart = (b.mean - a.mean) + (b.rest - a.rest);
  const float share = count_b / (count_a + count_b);
  const vf step = apart * share + a.rest;
  const vf mean = a.mean + step;
  return {mean, step - (mean - a.mean), a.squares + b.squares + apart * apart * (count_a * share)};
}

// Sums over elements, in fp32 over a few vectors and in fp64 over those.
struct Totals {
  vd signal = {}, noise = {};
  PWM_FAST_INLINE void add(vf run_signal, vf run_noise) {
    signal += __builtin_convertvector(run_signal, vd);
    noise += __builtin_convertvector(run_noise, vd);
  }
};
constexpr int64_t run = 16 * W;

// M samples, which stay in registers.
template <int M>
PWM_FAST_INLINE Totals few_samples(const float* const* samples, int64_t n) {
  Totals totals;
  for (int64_t start = 0; start < n; start += run) {
    vf signal = {}, noise = {};
    each_vector<1>(smaller(run, n - start), [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      const Statistics all = of_samples<M>(kind, samples, start + i, n);
      signal += all.mean * all.mean;
      noise += all.squares;
    });
    totals.add(signal, noise);
  }
  return totals;
}

// Any number, as many at once as a CPU reads well side by side: `chunk`, then R = m % chunk.
constexpr int chunk = 16;
template <int R>
PWM_FAST_INLINE Totals many_samples(const float* const* samples, int64_t m, int64_t n) {
  constexpr int64_t part = 4 * run;
  float means[part], rests[part], squares[part];
  Totals totals;
  for (int64_t start = 0; start < n; start += part) {
    const int64_t count = smaller(part, n - start);
    const auto take = [&](auto number, int64_t done) PWM_FAST_INLINE_LAMBDA {
      constexpr int M = decltype(number)::value;
      each_vector<1>(count, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        Statistics all = of_samples<M>(kind, samples + done, start + i, n);
        if (done > 0) {
          const Statistics before = {load(means + i), load(rests + i), load(squares + i)};
          all = merge(before, float(done), all, float(M));
        }
        store(means + i, all.mean);
        store(rests + i, all.rest);
        store(squares + i, all.squares);
      });
    };
    int64_t done = 0;
    for (; done + chunk <= m; done += chunk) take(Index<chunk>{}, done);
    if constexpr (R > 0) take(Index<R>{}, done);
    for (int64_t at = 0; at < count; at += run) {
      vf signal = {}, noise = {};
      for (int64_t i = at; i < smaller(count, at + run); i += W) {
        signal += load(means + i) * load(means + i);
        noise += load(squares + i);
      }
      totals.add(signal, noise);
    }
  }
  return totals;
}

template <int R>
void of_block(const float* const* samples, int64_t m, int64_t n, double* signal, double* noise) {
  const Totals totals = m <= chunk ? few_samples<R == 0 ? chunk : R>(samples, n)
                                   : many_samples<R>(samples, m, n);
  *signal = sum(totals.signal);
  *noise = sum(totals.noise);
}
using OfBlock = void (*)(const float* const*, int64_t, int64_t, double*, double*);

constexpr OfBlock of_block_by_rest[chunk] = {
    of_block<0>,  of_block<1>,  of_block<2>,  of_block<3>, of_block<4>,  of_block<5>,
    of_block<6>,  of_block<7>,  of_block<8>,  of_block<9>, of_block<10>, of_block<11>,
    of_block<12>, of_block<13>, of_block<14>, of_block<15>};

int64_t blocks_of(int64_t size) { return (size + block_size - 1) / block_size; }

}  // namespace

void esnr(const Esnr& a) {
  int64_t blocks = 0, elements = 0;
  for (int64_t t = 0; t < a.tensors; ++t) {
    blocks += blocks_of(a.sizes[t]);
    elements += a.sizes[t];
  }
  const int64_t threads = useful_threads(a.threads, blocks, elements * a.m);
  const OfBlock of = of_block_by_rest[a.m % chunk];
  const Memory<double> sums(2 * blocks);
  const Memory<const float*> samples(threads * a.m);
  in_parallel(threads, blocks, [&](int64_t thread, int64_t begin, int64_t end) {
    const float** const pointers = samples.at(thread * a.m);
    int64_t first = 0;  // block of tensor t
    for (int64_t t = 0; t < a.tensors && first < end; ++t) {
      const int64_t next = first + blocks_of(a.sizes[t]);
      for (int64_t block = begin > first ? begin : first; block < smaller(end, next); ++block) {
        const int64_t start = (block - first) * block_size;
        for (int64_t s = 0; s < a.m; ++s) {
          pointers[s] = reinterpret_cast<const float*>(a.grads[s * a.tensors + t]) + start;
        }
        of(pointers, a.m, smaller(block_size, a.sizes[t] - start), sums.at(2 * block),
           sums.at(2 * block + 1));
      }
      first = next;
    }
  });
  int64_t block = 0;
  for (int64_t t = 0; t < a.tensors; ++t) {
    double signal = 0.0, noise = 0.0;
    for (const int64_t stop = block + blocks_of(a.sizes[t]); block < stop; ++block) {
      signal += *sums.at(2 * block);
      noise += *sums.at(2 * block + 1);
    }
    a.signal[t] = signal;
    a.noise[t] = noise / double(a.m);
  }
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
