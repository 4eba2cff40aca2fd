// What one thread of the ESNR kernels computes, for nvcc and for a plain C++ compiler alike: the
// emulation (csrc/esnr_emulation.cpp) runs the same functions in the same order, so that its results
// are those of a GPU to the bit. For that, fused multiply-adds are written out, and both compilers
// are told to make no others.
//
// A chunk of a tensor is one block's work. Its threads take `width` consecutive elements at a time
// and sum over all that they take; then the block sums its threads in a tree. All in fp64, which holds
// the square of every fp32 number: no scale of the samples overflows or underflows. Sums of chunks are added by one block for each tensor, again in an order of its own. Nothing
// depends on which blocks run when, on the size of the GPU, or on how the tensors are aligned.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define PWM_FAST_BOTH __host__ __device__ __forceinline__
#define PWM_FAST_UNROLL _Pragma("unroll")
#else
#define PWM_FAST_BOTH inline
#define PWM_FAST_UNROLL
#endif

namespace pwm_fast {
namespace esnr {

// moments: signal and noise of rows, which are samples.
// update: rows sample, origin and running sum (fp64); adds to the sum, and to the squares.
// result: rows origin and running sum; signal and noise of the samples taken so far.
enum class Task { moments, update, result };

constexpr int width = 4;      // elements that a thread takes at once: 16 bytes of fp32
constexpr int held = 16;      // samples that it holds in registers; more are merged
constexpr int threads = 128;  // of a block
constexpr int lanes = 32;     // of a warp

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

PWM_FAST_BOTH float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  union {
    uint32_t bits;
    float value;
  } same = {bits};
  return same.value;
#endif
}
PWM_FAST_BOTH float to_float(float x) { return x; }
PWM_FAST_BOTH float to_float(Bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
// Exact, as every fp16 is an fp32; by a product, which makes subnormal numbers normal. Infinities and
// NaNs have exponent bits that the product does not fill: they are filled afterwards.
PWM_FAST_BOTH float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float scaled = as_float(magnitude << 13) * 0x1p112f;
  const float value = magnitude >= 0x7c00u ? as_float(0x7f800000u | magnitude << 13) : scaled;
  return x.bits & 0x8000u ? -value : value;
#endif
}

// Of `width` elements: the mean over samples, and the sum of centred squares. Samples that agree to
// 1e-7 lose nothing: their mean is rounded at 1e-16 of it.
struct Statistics {
  double mean[width], squares[width];
};

// The first `count` of M samples, by Welford's recurrence: a sample is widened once, and no register
// holds it any longer.
template <int M>
PWM_FAST_BOTH Statistics of_samples(const float (&g)[M][width], int count) {
  Statistics all = {};
  PWM_FAST_UNROLL
  for (int s = 0; s < M; ++s) {
    if (s < count) {
      PWM_FAST_UNROLL
      for (int k = 0; k < width; ++k) {
        const double x = double(g[s][k]), apart = x - all.mean[k];
        all.mean[k] = fma(apart, 1.0 / double(s + 1), all.mean[k]);
        all.squares[k] = fma(apart, x - all.mean[k], all.squares[k]);
      }
    }
  }
  return all;
}

// Chan's formula: adds the samples of b to those of a.
PWM_FAST_BOTH void merge(Statistics& a, double count_a, const Statistics& b, double count_b) {
  const double share = count_b / (count_a + count_b);
  PWM_FAST_UNROLL
  for (int k = 0; k < width; ++k) {
    const double apart = b.mean[k] - a.mean[k];
    a.mean[k] = fma(apart, share, a.mean[k]);
    a.squares[k] = fma(apart * apart, count_a * share, a.squares[k] + b.squares[k]);
  }
}

// Two sums over elements, and what every kernel fills them with.
struct Sums {
  double first, second;
};
PWM_FAST_BOTH double sum_of(const double (&x)[width]) { return (x[0] + x[1]) + (x[2] + x[3]); }
PWM_FAST_BOTH double squares_of(const double (&x)[width]) {
  return fma(x[1], x[1], x[0] * x[0]) + fma(x[3], x[3], x[2] * x[2]);
}
PWM_FAST_BOTH void add(Sums& to, double first, double second) {
  to.first += first;
  to.second += second;
}
PWM_FAST_BOTH Sums operator+(Sums a, Sums b) {
  return {a.first + b.first, a.second + b.second};
}

// Sums of x[0], x[1], ... x[count - 1], a power of two: in halves, as shuffles within a warp do it.
inline Sums in_halves(Sums* x, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) x[l] = x[l] + x[l + half];
  }
  return x[0];
}

// What the kernels do with `width` elements of a tensor from i on. `Access` reads them as fp32, of
// row r, and reads and writes the running sums of a streamed estimate. Elements at n and beyond are
// read as 0, which changes no sum, and are not written. `blocks` of them have room for their registers
// on a multiprocessor, so that some load while others compute.

// The squared means, and the centred squares, of `count` samples: at most M, unless M is `held`.
template <int M>
struct Moments {
  static constexpr int blocks = M <= 4 ? 8 : M <= 8 ? 5 : 3;
  int64_t count;
  template <bool aligned, class Access>
  PWM_FAST_BOTH void take(const Access& access, int64_t i, Sums& sums) const {
    const int first = count < M ? int(count) : M;
    Statistics all = some<aligned>(access, 0, first, i);
    if (M == held) {
      for (int64_t done = M; done < count; done += M) {
        const int next = count - done < M ? int(count - done) : M;
        merge(all, double(done), some<aligned>(access, done, next, i), double(next));
      }
    }
    add(sums, squares_of(all.mean), sum_of(all.squares));
  }
  template <bool aligned, class Access>
  PWM_FAST_BOTH Statistics some(const Access& access, int64_t from, int many, int64_t i) const {
    float g[M][width];
    PWM_FAST_UNROLL
    for (int s = 0; s < M; ++s) {
      if (s < many) access.template read<aligned>(from + s, i, g[s]);
    }
    return of_samples<M>(g, many);
  }
};

// Rows: a sample and the origin. Adds their distance to the running sum; its square.
struct Update {
  static constexpr int blocks = 10;
  template <bool aligned, class Access>
  PWM_FAST_BOTH void take(const Access& access, int64_t i, Sums& sums) const {
    float sample[width], origin[width];
    double distance[width], total[width];
    access.template read<aligned>(0, i, sample);
    access.template read<aligned>(1, i, origin);
    access.template read_total<aligned>(i, total);
    PWM_FAST_UNROLL
    for (int k = 0; k < width; ++k) {
      distance[k] = double(sample[k]) - double(origin[k]);
      total[k] += distance[k];
    }
    access.template write_total<aligned>(i, total);
    add(sums, squares_of(distance), 0.0);
  }
};

// Row: the origin. The squared mean, origin + share * running sum, and the squared share of the sum.
struct Result {
  static constexpr int blocks = 10;
  double share;
  template <bool aligned, class Access>
  PWM_FAST_BOTH void take(const Access& access, int64_t i, Sums& sums) const {
    float origin[width];
    double mean[width], shift[width];
    access.template read<aligned>(0, i, origin);
    access.template read_total<aligned>(i, shift);
    PWM_FAST_UNROLL
    for (int k = 0; k < width; ++k) {
      shift[k] *= share;
      mean[k] = double(origin[k]) + shift[k];
    }
    add(sums, squares_of(mean), squares_of(shift));
  }
};

// One thread's part of a chunk of n elements.
template <class Work, class Access>
PWM_FAST_BOTH Sums sums_of_thread(const Work& work, const Access& access, int64_t n, bool aligned,
                                  int thread) {
  Sums sums = {0.0, 0.0};
  for (int64_t i = int64_t(thread) * width; i < n; i += threads * width) {
    if (aligned && i + width <= n) {
      work.template take<true>(access, i, sums);
    } else {
      work.template take<false>(access, i, sums);
    }
  }
  return sums;
}

// One thread's part of a tensor's chunks.
PWM_FAST_BOTH Sums sums_of_slots(const Sums* slots, int64_t begin, int64_t end, int thread) {
  Sums sums = {0.0, 0.0};
  for (int64_t c = begin + thread; c < end; c += threads) sums = sums + slots[c];
  return sums;
}

// A tensor's results from its sums.
PWM_FAST_BOTH void finish(Task task, Sums sums, double samples, int64_t t, double* squares,
                          double* signal, double* noise) {
  if (task == Task::update) {
    squares[t] += sums.first;
    return;
  }
  signal[t] = sums.first;
  if (task == Task::moments) {
    noise[t] = sums.second / samples;
  } else {
    const double spread = squares[t] / samples - sums.second;
    noise[t] = spread < 0.0 ? 0.0 : spread;  // a NaN stays one
  }
}

}  // namespace esnr
}  // namespace pwm_fast
