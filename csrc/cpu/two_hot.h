#pragma once

#include "view.h"

namespace pwm_fast {

// Centres of bins are evenly spaced from vmin to vmax.
void check_bins(const View& logits, double vmin, double vmax);

// mean = sum of softmax(logits) centres; value = symexp(mean) if transform, else mean.
struct TwoHotDecodeFwd {
  View logits, value;
  View mean, lse;  // for the backward; lse = log(sum(exp(logits)))
  double vmin, vmax;
  bool transform;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("logits", logits), f("value", value), f("mean", mean, nullable), f("lse", lse, nullable);
    f("vmin", vmin), f("vmax", vmax), f("transform", transform), f("threads", threads, optional);
  }
  int64_t check() const {
    check_bins(logits, vmin, vmax);
    const int64_t rows = logits.rows;
    check_vector(value, rows), check_vector(mean, rows), check_vector(lse, rows);
    return rows * logits.cols;
  }
};

struct TwoHotDecodeBwd {
  View dvalue, logits, mean, lse;
  View dlogits;  // of the type of logits
  double vmin, vmax;
  bool transform;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("dvalue", dvalue), f("logits", logits), f("mean", mean), f("lse", lse);
    f("dlogits", dlogits), f("vmin", vmin), f("vmax", vmax), f("transform", transform);
    f("threads", threads, optional);
  }
  int64_t check() const {
    check_bins(logits, vmin, vmax);
    const int64_t rows = logits.rows;
    check_vector(dvalue, rows), check_vector(mean, rows), check_vector(lse, rows);
    check_matrix(dlogits, logits), check_same_type(dlogits, logits);
    return rows * logits.cols;
  }
};

// Cross-entropy of softmax(logits) with the two-hot encoding of symlog(x) if transform, else x.
struct TwoHotCeFwd {
  View logits, x, loss, lse;
  double vmin, vmax;
  bool transform;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("logits", logits), f("x", x), f("loss", loss), f("lse", lse, nullable);
    f("vmin", vmin), f("vmax", vmax), f("transform", transform), f("threads", threads, optional);
  }
  int64_t check() const {
    check_bins(logits, vmin, vmax);
    const int64_t rows = logits.rows;
    check_vector(x, rows), check_vector(loss, rows), check_vector(lse, rows);
    return rows * logits.cols;
  }
};

struct TwoHotCeBwd {
  View dloss, logits, x, lse;
  View dlogits;  // of the type of logits
  double vmin, vmax;
  bool transform;
  int64_t threads;

  template <class F>
  void fields(F& f) {
    f("dloss", dloss), f("logits", logits), f("x", x), f("lse", lse), f("dlogits", dlogits);
    f("vmin", vmin), f("vmax", vmax), f("transform", transform), f("threads", threads, optional);
  }
  int64_t check() const {
    check_bins(logits, vmin, vmax);
    const int64_t rows = logits.rows;
    check_vector(dloss, rows), check_vector(x, rows), check_vector(lse, rows);
    check_matrix(dlogits, logits), check_same_type(dlogits, logits);
    return rows * logits.cols;
  }
};

}  // namespace pwm_fast
