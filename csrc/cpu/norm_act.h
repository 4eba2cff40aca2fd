#pragma once

#include "view.h"

namespace pwm_fast {

// v = x + bias + add[r % add.rows] + tau[r] w_tau; y = act(gamma LN(v) + beta).
struct NormActFwd {
  View x, y;
  View xhat, rstd;  // saved for the backward
  View gamma, beta;
  Act act;
  int64_t group;
  float eps;
  View bias, add;
  View tau, w_tau;  // tau: one number, or one a row
  int64_t width;    // of rows with mean 0 over their first `width` elements and 0 beyond; or 0
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("x", x), f("y", y), f("xhat", xhat, optional), f("rstd", rstd, optional);
    f("gamma", gamma, optional), f("beta", beta, optional);
    f("act", act), f("group", group), f("eps", eps);
    f("bias", bias, optional), f("add", add, optional);
    f("tau", tau, optional), f("w_tau", w_tau, optional);
    f("width", width, optional), f("threads", threads, optional);
  }
  int64_t check() const {
    const int64_t n = x.cols;
    check_matrix(x, x), check_matrix(y, x), check_saved(xhat, x), check_vector(rstd, x.rows);
    check_width(width, n);
    if (act == act_simnorm) check_group(group, n);
    check_vector(gamma, n), check_vector(beta, n), check_vector(bias, n), check_vector(w_tau, n);
    if (add.given) {
      check_least("the rows of add", add.rows, x.rows ? 1 : 0);
      check_fp32(add), check_matrix(add, {"", nullptr, add.rows, n, n, fp32, true});
    }
    check_vector(tau, tau.rows * tau.cols == 1 ? 1 : x.rows);
    return x.rows * n;
  }
};

struct NormActBwd {
  View dy, dx, xhat, rstd, gamma, beta;
  View y;  // of simnorm
  Act act;
  int64_t group;
  View dgamma, dbeta, dbias;
  int64_t width;
  Absent dy_scale, dx_scale;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("dy", dy), f("dx", dx), f("xhat", xhat), f("rstd", rstd);
    f("gamma", gamma, optional), f("beta", beta, optional), f("y", y, optional);
    f("act", act), f("group", group);
    f("dgamma", dgamma, optional), f("dbeta", dbeta, optional), f("dbias", dbias, optional);
    f("width", width, optional), f("dy_scale", dy_scale), f("dx_scale", dx_scale);
    f("threads", threads, optional);
  }
  int64_t check() const {
    const int64_t n = dy.cols;
    check_matrix(dy, dy), check_matrix(dx, dy), check_saved(xhat, dy), check_vector(rstd, dy.rows);
    check_width(width, n);
    check_matrix(y, dy);
    if (act == act_simnorm) check_given(y), check_group(group, n);
    check_vector(gamma, n), check_vector(beta, n);
    check_vector(dgamma, n, fp64), check_vector(dbeta, n, fp64), check_vector(dbias, n, fp64);
    return dy.rows * n;
  }
};

}  // namespace pwm_fast
