// Signal and noise of gradient samples: per tensor, the sums over its elements of mu^2 and of
// mean((g - mu)^2), with the mean mu over the samples. Centred, as the difference of totals cancels.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

constexpr int64_t block_size = 4096;  // elements summed in one piece, whoever does it

// Mean and sum of centred squares of each lane's samples, M of them, or m if M is 0.
struct Statistics {
  vf mean, squares;
};
template <int M, class Kind>
PWM_FAST_INLINE Statistics statistics(Kind kind, const float* const* samples, int64_t m, int64_t i,
                                      int64_t n) {
  vf total = {}, squares = {};
  if constexpr (M == 0) {  // too many for the registers: read again, from the cache
    for (int64_t s = 0; s < m; ++s) total += load_row(kind, samples[s], i, n);
    const vf mean = total * (1.0f / float(m));
    for (int64_t s = 0; s < m; ++s) {
      const vf d = load_row(kind, samples[s], i, n) - mean;
      squares += d * d;
    }
    return {mean, squares};
  } else {
    vf g[M];
    for (int s = 0; s < M; ++s) {
      g[s] = load_row(kind, samples[s], i, n);
      total += g[s];
    }
    const vf mean = total * (1.0f / M);
    for (int s = 0; s < M; ++s) squares += (g[s] - mean) * (g[s] - mean);
    return {mean, squares};
  }
}

template <int M>
void of_block(const float* const* samples, int64_t m, int64_t n, double* signal, double* noise) {
  vd total_signal = {}, total_noise = {};
  constexpr int64_t run = 16 * W;  // elements summed in fp32, before the rounding of sums counts
  for (int64_t start = 0; start < n; start += run) {
    vf run_signal = {}, run_noise = {};
    each_vector<1>(smaller(run, n - start), [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      const Statistics all = statistics<M>(kind, samples, m, start + i, n);
      run_signal += all.mean * all.mean;
      run_noise += all.squares;
    });
    total_signal += __builtin_convertvector(run_signal, vd);
    total_noise += __builtin_convertvector(run_noise, vd);
  }
  *signal = sum(total_signal);
  *noise = sum(total_noise);
}
using OfBlock = void (*)(const float* const*, int64_t, int64_t, double*, double*);

constexpr OfBlock of_block_by_samples[] = {
    of_block<0>,  of_block<1>,  of_block<2>,  of_block<3>,  of_block<4>,  of_block<5>,
    of_block<6>,  of_block<7>,  of_block<8>,  of_block<9>,  of_block<10>, of_block<11>,
    of_block<12>, of_block<13>, of_block<14>, of_block<15>, of_block<16>};

int64_t blocks_of(int64_t size) { return (size + block_size - 1) / block_size; }

}  // namespace

void esnr(const Esnr& a) {
  int64_t blocks = 0, elements = 0;
  for (int64_t t = 0; t < a.tensors; ++t) {
    blocks += blocks_of(a.sizes[t]);
    elements += a.sizes[t];
  }
  const int64_t threads = useful_threads(a.threads, blocks, elements * a.m);
  const OfBlock of = of_block_by_samples[a.m <= 16 ? a.m : 0];
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
