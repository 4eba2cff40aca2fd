// Vectors of fp32 for the kernels. Private to the sources that are compiled once per instruction set
// (PWM_FAST_TARGET): all of it has internal linkage, and none of it is from std, as the linker could
// keep the AVX-512 copy of a shared inline function and run it on a CPU without AVX-512.
//
// Written with the vector extension of GCC and Clang, so that one source serves all targets.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PWM_FAST_INLINE inline __attribute__((always_inline))
#define PWM_FAST_INLINE_LAMBDA __attribute__((always_inline))

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

// Other lanes than the target's make the tests of its code possible on a CPU without it.
#if !defined(PWM_FAST_LANES)
#if defined(__AVX512F__)
#define PWM_FAST_LANES 16
#elif defined(__AVX2__)
#define PWM_FAST_LANES 8
#else
#define PWM_FAST_LANES 4
#endif
#endif
constexpr int W = PWM_FAST_LANES;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef double vd __attribute__((vector_size(8 * W)));

struct bf16 {
  uint16_t bits;
};

PWM_FAST_INLINE vf splat(float x) { return x - vf{}; }  // not x + 0: -0 must stay -0
// y if either is NaN, as the instructions of x86 do.
PWM_FAST_INLINE vf larger(vf x, vf y) { return x > y ? x : y; }
PWM_FAST_INLINE vf lesser(vf x, vf y) { return x < y ? x : y; }

PWM_FAST_INLINE vf square_root(vf x) {  // a loop that compilers make one instruction
  vf y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

// Lanes 0 .. count - 1 are set.
PWM_FAST_INLINE vi first_lanes(int count) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < count;
}
PWM_FAST_INLINE vf keep(vf x, vi mask) { return (vf)((vi)x & mask); }

// ------------------------------------------------------------------------- loads and stores

PWM_FAST_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
PWM_FAST_INLINE vf load(const bf16* p) {
  vh x;
  __builtin_memcpy(&x, p, sizeof x);
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
PWM_FAST_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
PWM_FAST_INLINE void store(bf16* p, vf x) {
  const vu u = (vu)x;
  const vi nan = x != x;  // rounding could carry it into infinity
  const vu rounded = nan ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);  // to nearest even
  const vh h = __builtin_convertvector(rounded >> 16, vh);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` < W elements alone; the other lanes are 0.
template <class T>
PWM_FAST_INLINE vf load_part(const T* p, int count) {
  T part[W] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
PWM_FAST_INLINE void store_part(T* p, vf x, int count) {
  T part[W];
  store(part, x);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}
// The same by instructions that leave the other lanes' memory alone.
#if PWM_FAST_LANES == 16 && defined(__AVX512F__)
PWM_FAST_INLINE vf load_part(const float* p, int count) {
  return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
PWM_FAST_INLINE void store_part(float* p, vf x, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
}
#elif PWM_FAST_LANES == 8 && defined(__AVX2__)
PWM_FAST_INLINE vf load_part(const float* p, int count) {
  return (vf)_mm256_maskload_ps(p, (__m256i)first_lanes(count));
}
PWM_FAST_INLINE void store_part(float* p, vf x, int count) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes(count), (__m256)x);
}
#endif

// -------------------------------------------------------------------------- across the lanes

// Lane i gets lane i ^ D.
template <int D>
PWM_FAST_INLINE vf swap_lanes(vf x) {
#if defined(__clang__)
#if PWM_FAST_LANES == 16
  return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
#elif PWM_FAST_LANES == 8
  return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D);
#else
  return __builtin_shufflevector(x, x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D);
#endif
#else
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i ^ D;
  return __builtin_shuffle(x, lane);
#endif
}

// Lane i: a[i] + a[i ^ D] where bit D of i is clear, b[i] + b[i ^ D] where it is set.
template <int D>
PWM_FAST_INLINE vf merge(vf a, vf b) {
#if defined(__clang__)
#define PWM_FAST_OWN(i) ((i) & D ? W + (i) : (i))
#define PWM_FAST_OTHER(i) ((i) & D ? W + ((i) ^ D) : (i) ^ D)
#define PWM_FAST_4(f, i) f(i), f(i + 1), f(i + 2), f(i + 3)
#if PWM_FAST_LANES == 16
#define PWM_FAST_ALL(f) PWM_FAST_4(f, 0), PWM_FAST_4(f, 4), PWM_FAST_4(f, 8), PWM_FAST_4(f, 12)
#elif PWM_FAST_LANES == 8
#define PWM_FAST_ALL(f) PWM_FAST_4(f, 0), PWM_FAST_4(f, 4)
#else
#define PWM_FAST_ALL(f) PWM_FAST_4(f, 0)
#endif
  return __builtin_shufflevector(a, b, PWM_FAST_ALL(PWM_FAST_OWN)) +
         __builtin_shufflevector(a, b, PWM_FAST_ALL(PWM_FAST_OTHER));
#undef PWM_FAST_ALL
#undef PWM_FAST_4
#undef PWM_FAST_OTHER
#undef PWM_FAST_OWN
#else
  vi own, other;
  for (int i = 0; i < W; ++i) {
    own[i] = i & D ? W + i : i;
    other[i] = i & D ? W + (i ^ D) : i ^ D;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}
// Lane i is the sum of x[i]'s lanes, to the bits of sum().
PWM_FAST_INLINE vf sum_each(vf (&x)[W]) {
  if constexpr (W >= 16) {
    for (int i = 0; i < 8; ++i) x[i] = merge<8>(x[i], x[i + 8]);
  }
  if constexpr (W >= 8) {
    for (int i = 0; i < 4; ++i) x[i] = merge<4>(x[i], x[i + 4]);
  }
  for (int i = 0; i < 2; ++i) x[i] = merge<2>(x[i], x[i + 2]);
  return merge<1>(x[0], x[1]);
}

// The sum, or the largest, of each aligned group of G lanes, in each of its lanes.
template <int G>
PWM_FAST_INLINE vf group_sum(vf x) {
  if constexpr (G >= 16) x += swap_lanes<8>(x);
  if constexpr (G >= 8) x += swap_lanes<4>(x);
  if constexpr (G >= 4) x += swap_lanes<2>(x);
  if constexpr (G >= 2) x += swap_lanes<1>(x);
  return x;
}
template <int G>
PWM_FAST_INLINE vf group_max(vf x) {
  if constexpr (G >= 16) x = larger(x, swap_lanes<8>(x));
  if constexpr (G >= 8) x = larger(x, swap_lanes<4>(x));
  if constexpr (G >= 4) x = larger(x, swap_lanes<2>(x));
  if constexpr (G >= 2) x = larger(x, swap_lanes<1>(x));
  return x;
}
PWM_FAST_INLINE float sum(vf x) { return group_sum<W>(x)[0]; }
PWM_FAST_INLINE double sum(vd x) {
  double total = 0.0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
PWM_FAST_INLINE float max(vf x) { return group_max<W>(x)[0]; }

// -------------------------------------------------------------------------------- functions

// exp(x) for -104 <= x <= 88 or NaN, to 1 ulp, down to the subnormal numbers.
PWM_FAST_INLINE vf exp_clamped(vf x) {
  // Adding 1.5 * 2^23 rounds to an integer n, which is then the low bits of the sum; 254 more make
  // the exponent fields below of it.
  const float magic = 12582912.0f + 254.0f;
  const vf shifted = x * 0x1.715476p+0f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // (exp(r) - 1 - r) / r^2 on [-ln(2) / 2, ln(2) / 2], minimax in the relative error of exp: 3e-9.
  vf q = 0x1.6a23c2p-10f * r + 0x1.123a20p-7f;
  q = q * r + 0x1.5558f4p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const vf p = (r * r) * q + r + 1.0f;
  // 2^n in two factors, as exp may be subnormal where 2^n has no exponent field.
  const vu u = (vu)shifted;
  const vu half = (u >> 1) << 23;
  return p * (vf)half * (vf)((u << 23) - half);
}
// The same for any x <= 88: exp is 0 below -104.
PWM_FAST_INLINE vf exp_below_88(vf x) { return exp_clamped(larger(splat(-104.0f), x)); }

// mish(u) = u t, t = tanh(softplus(u)) = n / (n + 2) with n = e (e + 2), e = exp(u). Nothing here
// cancels, and above 20, where u is clamped, so nothing overflows, t is 1 in fp32.
struct MishParts {
  vf clamped, e, n;
};
PWM_FAST_INLINE MishParts mish_parts(vf u) {
  const vf clamped = lesser(splat(20.0f), larger(splat(-104.0f), u));
  const vf e = exp_clamped(clamped);
  return {clamped, e, e * (e + 2.0f)};
}
PWM_FAST_INLINE vf mish(vf u) {
  const MishParts m = mish_parts(u);
  return u * (m.n / (m.n + 2.0f));
}

// mish(u) and its derivative t + u sigmoid(u) (1 - t^2), where 1 - t^2 = 4 (1 + e)^2 / (n + 2)^2
// and sigmoid(u) = e / (1 + e). The derivative is 0 and 1 at the infinities.
struct MishAndSlope {
  vf value, slope;
};
PWM_FAST_INLINE MishAndSlope mish_and_slope(vf u) {
  const MishParts m = mish_parts(u);
  const vf inverse = 1.0f / (m.n + 2.0f);
  const vf t = m.n * inverse;
  const vf rest = (4.0f * m.e * inverse) * (m.e * inverse + inverse);
  return {u * t, m.clamped * rest + t};
}

// ------------------------------------------------------------------------------------ loops

// Tells a loop's body whether it has a whole vector or the first elements of one.
struct Whole {
  static constexpr bool part = false;
};
struct Part {
  static constexpr bool part = true;
};
template <int K>
struct Index {
  static constexpr int value = K;
};

// body(Whole or Part, i, Index<k>) for i = 0, W, 2 W, ... < n; k counts to U and selects one of the
// accumulators of the body, which hide the latency of an addition.
template <int U, class Body>
PWM_FAST_INLINE void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  if constexpr (U == 4) {
    for (; i + 4 * W <= n; i += 4 * W) {
      body(Whole{}, i, Index<0>{});
      body(Whole{}, i + W, Index<1>{});
      body(Whole{}, i + 2 * W, Index<2>{});
      body(Whole{}, i + 3 * W, Index<3>{});
    }
  }
  if constexpr (U == 2) {
    for (; i + 2 * W <= n; i += 2 * W) {
      body(Whole{}, i, Index<0>{});
      body(Whole{}, i + W, Index<1>{});
    }
  }
  for (; i + W <= n; i += W) body(Whole{}, i, Index<0>{});
  if (i < n) body(Part{}, i, Index<U - 1>{});
}

// A parameter that all rows share, whose last elements are loaded once. Absent: all `otherwise`.
struct Shared {
  const float* p;
  vf rest;
  PWM_FAST_INLINE Shared(const float* pointer, int64_t n) : p(pointer), rest{} {
    if (p != nullptr) rest = load_part(p + n / W * W, int(n % W));
  }
  template <class Kind>
  PWM_FAST_INLINE vf at(Kind, int64_t i) const {
    if constexpr (Kind::part) return rest;
    return load(p + i);
  }
};

template <class Kind, class T>
PWM_FAST_INLINE vf load_row(Kind, const T* row, int64_t i, int64_t n) {
  if constexpr (Kind::part) return load_part(row + i, int(n - i));
  return load(row + i);
}
template <class Kind, class T>
PWM_FAST_INLINE void store_row(Kind, T* row, int64_t i, int64_t n, vf x) {
  if constexpr (Kind::part) {
    store_part(row + i, x, int(n - i));
  } else {
    store(row + i, x);
  }
}
template <class Kind>
PWM_FAST_INLINE vf only_row(Kind, vf x, int64_t i, int64_t n) {  // 0 past the row's end
  if constexpr (Kind::part) return keep(x, first_lanes(int(n - i)));
  return x;
}

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // of any target

// Mean and reciprocal standard deviation of a row of v in padded scratch memory.
struct Moments {
  float mean, rstd;
};
PWM_FAST_INLINE Moments moments(const float* v, vf total, int64_t n, float eps,
                                int64_t width = 0) {
  const float mean = width > 0 ? 0.0f : sum(total) / float(n);
  vf squares[4] = {};
  each_vector<4>(n, [&](auto kind, int64_t i, auto k) PWM_FAST_INLINE_LAMBDA {
    const vf d = only_row(kind, load(v + i) - mean, i, n);
    squares[k.value] += d * d;
  });
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) /
                         float(width > 0 ? width : n);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

}  // namespace
}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
