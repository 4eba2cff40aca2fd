#pragma once

#include "view.h"

namespace pwm_fast {

// u = x + bias; y = gamma LN(act(u)) + beta, or act(u) without gamma. The parameters of row r are
// those of member r / rows_per_member, or the only ones if rows_per_member is 0.
struct ActNormFwd {
  View x, y;
  View u, mean, rstd;  // saved for the backward
  View bias, gamma, beta;
  Act act;
  float eps;
  int64_t rows_per_member, threads;

  template <class F>
  void fields(F& f) {
    f("x", x), f("y", y), f("u", u, optional), f("mean", mean, optional), f("rstd", rstd, optional);
    f("bias", bias, optional), f("gamma", gamma, optional), f("beta", beta, optional);
    f("act", act), f("eps", eps);
    f("rows_per_member", rows_per_member, optional), f("threads", threads, optional);
  }
  int64_t check() const {
    check_matrix(x, x), check_matrix(y, x), check_saved(u, x);
    check_vector(mean, x.rows), check_vector(rstd, x.rows);
    check_member_act(act);
    check_least("rows_per_member", rows_per_member, 0);
    check_members(bias, x, rows_per_member), check_members(gamma, x, rows_per_member);
    check_members(beta, x, rows_per_member);
    return x.rows * x.cols;
  }
};

struct ActNormBwd {
  View dy, dx, u, mean, rstd, gamma;
  Act act;
  int64_t rows_per_member;
  View dgamma, dbeta, dbias;
  Absent dy_scale, dx_scale;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("dy", dy), f("dx", dx), f("u", u), f("mean", mean, optional), f("rstd", rstd, optional);
    f("gamma", gamma, optional), f("act", act), f("rows_per_member", rows_per_member, optional);
    f("dgamma", dgamma, optional), f("dbeta", dbeta, optional), f("dbias", dbias, optional);
    f("dy_scale", dy_scale), f("dx_scale", dx_scale), f("threads", threads, optional);
  }
  int64_t check() const {
    check_matrix(dy, dy), check_matrix(dx, dy), check_saved(u, dy);
    if (gamma.given) check_given(mean), check_given(rstd);
    check_vector(mean, dy.rows), check_vector(rstd, dy.rows);
    check_member_act(act);
    check_least("rows_per_member", rows_per_member, 0);
    check_members(gamma, dy, rows_per_member);
    check_members(dgamma, dy, rows_per_member, fp64);
    check_members(dbeta, dy, rows_per_member, fp64);
    check_members(dbias, dy, rows_per_member, fp64);
    return dy.rows * dy.cols;
  }
};

}  // namespace pwm_fast
