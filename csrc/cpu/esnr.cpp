// Signal and noise of gradient samples: per tensor, the sums over its elements of mu^2 and of
// mean((g - mu)^2), with the mean mu over the samples. Centred, as the difference of totals cancels.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

constexpr int64_t block_size = 4096;  // elements summed in one piece, whoever does it

// Mean and sum of centred squares of each lane's samples. In fp64, which holds the square of every
// fp32 number, and in which the distance of samples that agree to 1e-7 loses nothing.
struct Statistics {
  vd mean, squares;
};
PWM_FAST_INLINE vd widened(vf x) { return __builtin_convertvector(x, vd); }
PWM_FAST_INLINE vd sum_of_4(const vd (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }
template <int M, class Kind>
PWM_FAST_INLINE Statistics of_samples(Kind kind, const float* const* samples, int64_t i, int64_t n) {
  vf g[M];
  vd total[4] = {}, squares[4] = {};  // 4 sums hide the latency of an addition
  for (int s = 0; s < M; ++s) {
    g[s] = load_row(kind, samples[s], i, n);
    total[s % 4] += widened(g[s]);
  }
  const vd mean = sum_of_4(total) * (1.0 / M);
  for (int s = 0; s < M; ++s) {
    const vd d = widened(g[s]) - mean;
    squares[s % 4] += d * d;
  }
  return {mean, sum_of_4(squares)};
}

// Chan's formula for two sets of samples.
PWM_FAST_INLINE Statistics merge(Statistics a, double count_a, Statistics b, double count_b) {
  const vd apart = b.mean - a.mean;
  const double share = count_b / (count_a + count_b);
  return {a.mean + apart * share, a.squares + b.squares + apart * apart * (count_a * share)};
}

// Sums over elements.
struct Totals {
  vd signal = {}, noise = {};
  PWM_FAST_INLINE void add(const Statistics& x) {
    signal += x.mean * x.mean;
    noise += x.squares;
  }
};

// M samples, which stay in registers.
template <int M>
PWM_FAST_INLINE Totals few_samples(const float* const* samples, int64_t n) {
  Totals totals;
  each_vector<1>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    totals.add(of_samples<M>(kind, samples, i, n));
  });
  return totals;
}

// Any number, as many at once as a CPU reads well side by side: `chunk`, then R = m % chunk.
constexpr int chunk = 16;
template <int R>
PWM_FAST_INLINE Totals many_samples(const float* const* samples, int64_t m, int64_t n) {
  constexpr int64_t vectors = 32;
  Statistics held[vectors];
  Totals totals;
  for (int64_t start = 0; start < n; start += vectors * W) {
    const int64_t count = smaller(vectors * W, n - start);
    const auto take = [&](auto number, int64_t done) PWM_FAST_INLINE_LAMBDA {
      constexpr int M = decltype(number)::value;
      each_vector<1>(count, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        const Statistics all = of_samples<M>(kind, samples + done, start + i, n);
        Statistics& h = held[i / W];
        h = done > 0 ? merge(h, double(done), all, double(M)) : all;
      });
    };
    int64_t done = 0;
    for (; done + chunk <= m; done += chunk) take(Index<chunk>{}, done);
    if constexpr (R > 0) take(Index<R>{}, done);
    for (int64_t i = 0; i < count; i += W) totals.add(held[i / W]);
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
  const int64_t* const sizes = numbers<int64_t>(a.sizes);
  const int64_t* const grads = numbers<int64_t>(a.grads);
  const int64_t m = a.grads.rows, tensors = a.grads.cols;
  int64_t blocks = 0, elements = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    blocks += blocks_of(sizes[t]);
    elements += sizes[t];
  }
  const int64_t threads = useful_threads(a.threads, blocks, elements * m);
  const OfBlock of = of_block_by_rest[m % chunk];
  const Memory<double> sums(2 * blocks);
  const Memory<const float*> samples(threads * m);
  in_parallel(threads, blocks, [&](int64_t thread, int64_t begin, int64_t end) {
    const float** const pointers = samples.at(thread * m);
    int64_t first = 0;  // block of tensor t
    for (int64_t t = 0; t < tensors && first < end; ++t) {
      const int64_t next = first + blocks_of(sizes[t]);
      for (int64_t block = begin > first ? begin : first; block < smaller(end, next); ++block) {
        const int64_t start = (block - first) * block_size;
        for (int64_t s = 0; s < m; ++s) {
          pointers[s] = reinterpret_cast<const float*>(grads[s * tensors + t]) + start;
        }
        of(pointers, m, smaller(block_size, sizes[t] - start), sums.at(2 * block),
           sums.at(2 * block + 1));
      }
      first = next;
    }
  });
  int64_t block = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    double signal = 0.0, noise = 0.0;
    for (const int64_t stop = block + blocks_of(sizes[t]); block < stop; ++block) {
      signal += *sums.at(2 * block);
      noise += *sums.at(2 * block + 1);
    }
    numbers<double>(a.signal)[t] = signal;
    numbers<double>(a.noise)[t] = noise / double(m);
  }
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
