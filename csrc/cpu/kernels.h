// The CPU kernels as the Python face sees them: one table of functions per instruction set.
//
// Rows are `ld` elements apart and hold n elements with stride 1; a null pointer means absent. Types
// are those of enum Type. Every function writes its outputs in full and reads and writes nothing
// past the n elements of a row. Sums over rows go to fp64 accumulators, in an order that depends on
// the sizes alone, so they are bitwise the same for any number of threads.
#pragma once

#include <stdint.h>

namespace pwm_fast {

enum Type : int64_t { fp32 = 0, bfloat16 = 1 };
enum Act : int64_t { act_none = 0, act_mish = 1, act_simnorm = 2 };

// v = x + bias + add[r % add_rows] + tau[r * tau_stride] w_tau; y = act(gamma LN(v) + beta).
struct NormActFwd {
  const void* x;
  int64_t ld_x, x_type;
  const float* add;
  int64_t ld_add, add_rows;
  const float* tau;
  int64_t tau_stride;
  const float *w_tau, *bias, *gamma, *beta;
  void* y;
  int64_t ld_y, y_type;
  void* xhat;  // [rows, n], saved for the backward, as is rstd
  int64_t xhat_type;
  float* rstd;
  int64_t rows, n, act, group;
  float eps;
  int64_t threads;
  int64_t width;  // of rows with mean 0 over their first `width` elements and 0 beyond; or 0
};

struct NormActBwd {
  const void* dy;
  int64_t ld_dy, dy_type;
  const void* xhat;
  int64_t xhat_type;
  const float *rstd, *gamma, *beta;
  const void* y;  // of simnorm
  int64_t ld_y, y_type;
  void* dx;
  int64_t ld_dx, dx_type;
  double *dgamma, *dbeta, *dbias;
  int64_t rows, n, act, group, threads, width;
};

// u = x + bias; y = gamma LN(act(u)) + beta, or act(u) without gamma. The parameters of row r are
// those of member r / rows_per_member, or the only ones if rows_per_member is 0.
struct ActNormFwd {
  const void* x;
  int64_t ld_x, x_type;
  const float *bias, *gamma, *beta;
  void* y;
  int64_t ld_y, y_type;
  void* u;  // [rows, n], saved for the backward, as are mean and rstd
  int64_t u_type;
  float *mean, *rstd;
  int64_t rows, n, act, rows_per_member;
  float eps;
  int64_t threads;
};

struct ActNormBwd {
  const void* dy;
  int64_t ld_dy, dy_type;
  const void* u;
  int64_t u_type;
  const float *mean, *rstd, *gamma;
  void* dx;
  int64_t ld_dx, dx_type;
  double *dgamma, *dbeta, *dbias;
  int64_t rows, n, act, rows_per_member, threads;
};

// Softmax in groups of `group` elements.
struct SimNormFwd {
  const float* x;
  int64_t ld_x;
  float* y;
  int64_t ld_y, rows, n, group, threads;
};

struct SimNormBwd {
  const float* dy;
  int64_t ld_dy;
  const float* y;
  int64_t ld_y;
  float* dx;
  int64_t ld_dx, rows, n, group, threads;
};

// `count` bins, whose centres are evenly spaced from vmin to vmax.
struct Bins {
  int64_t count;
  double vmin, vmax;
};

// mean = sum of softmax(logits) centres; value = symexp(mean) if transform, else mean.
struct TwoHotDecodeFwd {
  const void* logits;
  int64_t ld, x_type;
  float *value, *mean, *lse;  // mean and lse, log(sum(exp(logits))), are for the backward
  int64_t rows;
  Bins bins;
  bool transform;
  int64_t threads;
};

struct TwoHotDecodeBwd {
  const float* dvalue;
  const void* logits;
  int64_t ld, x_type;
  const float *mean, *lse;
  void* dlogits;  // of the type of logits
  int64_t ld_d, rows;
  Bins bins;
  bool transform;
  int64_t threads;
};

// Cross-entropy of softmax(logits) with the two-hot encoding of symlog(x) if transform, else x.
struct TwoHotCeFwd {
  const void* logits;
  int64_t ld, x_type;
  const float* x;
  float *loss, *lse;
  int64_t rows;
  Bins bins;
  bool transform;
  int64_t threads;
};

struct TwoHotCeBwd {
  const float* dloss;
  const void* logits;
  int64_t ld, x_type;
  const float *x, *lse;
  void* dlogits;  // of the type of logits
  int64_t ld_d, rows;
  Bins bins;
  bool transform;
  int64_t threads;
};

// Of m samples of a list of tensors: by tensor, the sum of mu^2 and of mean((g - mu)^2).
struct Esnr {
  const int64_t* grads;  // [m, tensors] addresses of fp32
  const int64_t* sizes;  // [tensors]
  double *signal, *noise;
  int64_t m, tensors, threads;
};

// out = z + c1 k1 + c2 k2; k2 may be absent.
struct Axpby {
  const float *z, *k1, *k2;
  float* out;
  float c1, c2;
  int64_t n, threads;
};

// One number for all bytes of `count` pieces of memory, and their order. Piece i is `rows` rows of
// `bytes` bytes, `stride` bytes apart.
struct Checksum {
  const int64_t* pieces;  // [count, 4]: address, rows, bytes, stride
  int64_t count;
  uint64_t* sum;
  int64_t threads;
};

struct Kernels {
  void (*norm_act_fwd)(const NormActFwd&);
  void (*norm_act_bwd)(const NormActBwd&);
  void (*act_norm_fwd)(const ActNormFwd&);
  void (*act_norm_bwd)(const ActNormBwd&);
  void (*simnorm_fwd)(const SimNormFwd&);
  void (*simnorm_bwd)(const SimNormBwd&);
  void (*two_hot_decode_fwd)(const TwoHotDecodeFwd&);
  void (*two_hot_decode_bwd)(const TwoHotDecodeBwd&);
  void (*two_hot_ce_fwd)(const TwoHotCeFwd&);
  void (*two_hot_ce_bwd)(const TwoHotCeBwd&);
  void (*esnr)(const Esnr&);
  void (*axpby)(const Axpby&);
  void (*checksum)(const Checksum&);
};

namespace generic {
const Kernels& kernels();
}
#if PWM_FAST_X86
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace pwm_fast
