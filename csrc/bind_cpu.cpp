// The Python face of the CPU kernels: plain integers in, checked, and the kernels of this CPU called.
#include "bind_cpu.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu_features.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using namespace pwm_fast;
using Address = std::uintptr_t;
using Size = std::int64_t;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (cpu_isa()) {
#if PWM_FAST_X86
      case Isa::avx512: return avx512::kernels();
      case Isa::avx2: return avx2::kernels();
#endif
      default: return generic::kernels();
    }
  }();
  return chosen;
}

// Runs a kernel, without the GIL if that takes longer than to give the GIL up and to get it back.
template <class Arguments>
void run(void (*kernel)(const Arguments&), const Arguments& arguments, Size elements) {
  constexpr Size long_call = 65536;  // some tens of microseconds
  if (elements < long_call) return kernel(arguments);
  py::gil_scoped_release unlocked;
  kernel(arguments);
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const char* name, Size value, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " +
                              std::to_string(value));
}
void check_size(const char* name, Size value, Size least) {
  if (value < least) fail(name, value, "at least " + std::to_string(least));
}
void check_type(const char* name, Size value) {
  if (value != fp32 && value != bfloat16) fail(name, value, "0 (fp32) or 1 (bf16)");
}
void check_rows(Size rows, Size n, Size threads) {
  check_size("rows", rows, 0);
  check_size("n", n, 1);
  check_size("threads", threads, 1);
}
void check_width(Size width, Size n) {
  if (width < 0 || width > n) fail("width", width, "from 0 to n = " + std::to_string(n));
}
void check_stride(const char* name, Size value, Size n, Size rows) {
  if (rows > 1) check_size(name, value, n);
}
void check_group(Size group, Size n) {
  if (group < 1 || n % group != 0) {
    fail("group", group, "a divisor of n = " + std::to_string(n));
  }
}
void check_act(Size act, Size group, Size n) {
  if (act < act_none || act > act_simnorm) fail("act", act, "0 (none), 1 (mish) or 2 (simnorm)");
  if (act == act_simnorm) check_group(group, n);
}
void check_member_act(Size act, Size rows_per_member) {
  if (act != act_none && act != act_mish) fail("act", act, "0 (none) or 1 (mish)");
  check_size("rows_per_member", rows_per_member, 0);
}

void norm_act_fwd(Address x, Size ld_x, Size x_type, Address add, Size ld_add, Size add_rows,
                  Address tau, Size tau_stride, Address w_tau, Address bias, Address gamma,
                  Address beta, Address y, Size ld_y, Size y_type, Address xhat, Size xhat_type,
                  Address rstd, Size rows, Size n, Size act, Size group, double eps,
                  Size threads, Size width) {
  check_rows(rows, n, threads);
  check_width(width, n);
  check_type("x_type", x_type);
  check_type("y_type", y_type);
  check_type("xhat_type", xhat_type);
  check_stride("ld_x", ld_x, n, rows);
  check_stride("ld_y", ld_y, n, rows);
  if (add != 0) {
    check_size("add_rows", add_rows, 1);
    check_stride("ld_add", ld_add, n, add_rows);
  }
  check_act(act, group, n);
  run(kernels().norm_act_fwd,
      {at<const void>(x), ld_x, x_type, at<const float>(add), ld_add, add_rows,
       at<const float>(tau), tau_stride, at<const float>(w_tau), at<const float>(bias),
       at<const float>(gamma), at<const float>(beta), at<void>(y), ld_y, y_type, at<void>(xhat),
       xhat_type, at<float>(rstd), rows, n, act, group, float(eps), threads, width},
      rows * n);
}

void norm_act_bwd(Address dy, Size ld_dy, Size dy_type, Address xhat, Size xhat_type, Address rstd,
                  Address gamma, Address beta, Address y, Size ld_y, Size y_type, Address dx,
                  Size ld_dx, Size dx_type, Address dgamma, Address dbeta, Address dbias, Size rows,
                  Size n, Size act, Size group, Size threads, Size width) {
  check_rows(rows, n, threads);
  check_width(width, n);
  check_type("dy_type", dy_type);
  check_type("xhat_type", xhat_type);
  check_type("y_type", y_type);
  check_type("dx_type", dx_type);
  check_stride("ld_dy", ld_dy, n, rows);
  check_stride("ld_dx", ld_dx, n, rows);
  check_act(act, group, n);
  if (act == act_simnorm) check_stride("ld_y", ld_y, n, rows);
  run(kernels().norm_act_bwd,
      {at<const void>(dy), ld_dy, dy_type, at<const void>(xhat), xhat_type, at<const float>(rstd),
       at<const float>(gamma), at<const float>(beta), at<const void>(y), ld_y, y_type, at<void>(dx),
       ld_dx, dx_type, at<double>(dgamma), at<double>(dbeta), at<double>(dbias), rows, n, act,
       group, threads, width},
      rows * n);
}

void act_norm_fwd(Address x, Size ld_x, Size x_type, Address bias, Address gamma, Address beta,
                  Address y, Size ld_y, Size y_type, Address u, Size u_type, Address mean,
                  Address rstd, Size rows, Size n, Size act, Size rows_per_member, double eps,
                  Size threads) {
  check_rows(rows, n, threads);
  check_type("x_type", x_type);
  check_type("y_type", y_type);
  check_type("u_type", u_type);
  check_stride("ld_x", ld_x, n, rows);
  check_stride("ld_y", ld_y, n, rows);
  check_member_act(act, rows_per_member);
  run(kernels().act_norm_fwd,
      {at<const void>(x), ld_x, x_type, at<const float>(bias), at<const float>(gamma),
       at<const float>(beta), at<void>(y), ld_y, y_type, at<void>(u), u_type, at<float>(mean),
       at<float>(rstd), rows, n, act, rows_per_member, float(eps), threads},
      rows * n);
}

void act_norm_bwd(Address dy, Size ld_dy, Size dy_type, Address u, Size u_type, Address mean,
                  Address rstd, Address gamma, Address dx, Size ld_dx, Size dx_type, Address dgamma,
                  Address dbeta, Address dbias, Size rows, Size n, Size act, Size rows_per_member,
                  Size threads) {
  check_rows(rows, n, threads);
  check_type("dy_type", dy_type);
  check_type("u_type", u_type);
  check_type("dx_type", dx_type);
  check_stride("ld_dy", ld_dy, n, rows);
  check_stride("ld_dx", ld_dx, n, rows);
  check_member_act(act, rows_per_member);
  run(kernels().act_norm_bwd,
      {at<const void>(dy), ld_dy, dy_type, at<const void>(u), u_type, at<const float>(mean),
       at<const float>(rstd), at<const float>(gamma), at<void>(dx), ld_dx, dx_type,
       at<double>(dgamma), at<double>(dbeta), at<double>(dbias), rows, n, act, rows_per_member,
       threads},
      rows * n);
}

void simnorm_fwd(Address x, Size ld_x, Address y, Size ld_y, Size rows, Size n, Size group,
                 Size threads) {
  check_rows(rows, n, threads);
  check_stride("ld_x", ld_x, n, rows);
  check_stride("ld_y", ld_y, n, rows);
  check_group(group, n);
  run(kernels().simnorm_fwd,
      {at<const float>(x), ld_x, at<float>(y), ld_y, rows, n, group, threads}, rows * n);
}

void simnorm_bwd(Address dy, Size ld_dy, Address y, Size ld_y, Address dx, Size ld_dx, Size rows,
                 Size n, Size group, Size threads) {
  check_rows(rows, n, threads);
  check_stride("ld_dy", ld_dy, n, rows);
  check_stride("ld_y", ld_y, n, rows);
  check_stride("ld_dx", ld_dx, n, rows);
  check_group(group, n);
  run(kernels().simnorm_bwd,
      {at<const float>(dy), ld_dy, at<const float>(y), ld_y, at<float>(dx), ld_dx, rows, n, group,
       threads},
      rows * n);
}

void check_bins(Size rows, Size bins, double vmin, double vmax, Size ld, Size x_type,
                Size threads) {
  check_rows(rows, 1, threads);
  check_size("bins", bins, 2);
  check_type("x_type", x_type);
  check_stride("ld", ld, bins, rows);
  if (!(vmin < vmax)) {
    throw std::invalid_argument("vmin must be below vmax, got " + std::to_string(vmin) + " and " +
                                std::to_string(vmax));
  }
}

void two_hot_decode_fwd(Address logits, Size ld, Size x_type, Address value, Address mean,
                        Address lse, Size rows, Size bins, double vmin, double vmax, bool transform,
                        Size threads) {
  check_bins(rows, bins, vmin, vmax, ld, x_type, threads);
  run(kernels().two_hot_decode_fwd,
      {at<const void>(logits), ld, x_type, at<float>(value), at<float>(mean), at<float>(lse), rows,
       {bins, vmin, vmax}, transform, threads},
      rows * bins);
}

void two_hot_decode_bwd(Address dvalue, Address logits, Size ld, Size x_type, Address mean,
                        Address lse, Address dlogits, Size ld_d, Size rows, Size bins, double vmin,
                        double vmax, bool transform, Size threads) {
  check_bins(rows, bins, vmin, vmax, ld, x_type, threads);
  check_stride("ld_d", ld_d, bins, rows);
  run(kernels().two_hot_decode_bwd,
      {at<const float>(dvalue), at<const void>(logits), ld, x_type, at<const float>(mean),
       at<const float>(lse), at<void>(dlogits), ld_d, rows, {bins, vmin, vmax}, transform, threads},
      rows * bins);
}

void two_hot_ce_fwd(Address logits, Size ld, Size x_type, Address x, Address loss, Address lse,
                    Size rows, Size bins, double vmin, double vmax, bool transform, Size threads) {
  check_bins(rows, bins, vmin, vmax, ld, x_type, threads);
  run(kernels().two_hot_ce_fwd,
      {at<const void>(logits), ld, x_type, at<const float>(x), at<float>(loss), at<float>(lse),
       rows, {bins, vmin, vmax}, transform, threads},
      rows * bins);
}

void two_hot_ce_bwd(Address dloss, Address logits, Size ld, Size x_type, Address x, Address lse,
                    Address dlogits, Size ld_d, Size rows, Size bins, double vmin, double vmax,
                    bool transform, Size threads) {
  check_bins(rows, bins, vmin, vmax, ld, x_type, threads);
  check_stride("ld_d", ld_d, bins, rows);
  run(kernels().two_hot_ce_bwd,
      {at<const float>(dloss), at<const void>(logits), ld, x_type, at<const float>(x),
       at<const float>(lse), at<void>(dlogits), ld_d, rows, {bins, vmin, vmax}, transform, threads},
      rows * bins);
}

void esnr(Address grads, Address sizes, Address signal, Address noise, Size m, Size tensors,
          Size threads) {
  check_size("m", m, 1);
  check_size("tensors", tensors, 0);
  check_size("threads", threads, 1);
  const Size* size = at<const Size>(sizes);
  Size elements = 0;
  for (Size t = 0; t < tensors; ++t) {
    check_size("sizes", size[t], 0);
    elements += size[t];
  }
  run(kernels().esnr,
      {at<const Size>(grads), size, at<double>(signal), at<double>(noise), m, tensors, threads},
      elements * m);
}

void axpby(Address z, Address k1, Address k2, Address out, double c1, double c2, Size n,
           Size threads) {
  check_rows(1, n > 0 ? n : 1, threads);
  check_size("n", n, 0);
  run(kernels().axpby,
      {at<const float>(z), at<const float>(k1), at<const float>(k2), at<float>(out), float(c1),
       float(c2), n, threads},
      n);
}

std::uint64_t checksum(const py::list& pieces, Size threads) {
  check_size("threads", threads, 1);
  const Size numbers = Size(pieces.size());
  if (numbers % 4 != 0) fail("pieces", numbers, "a list whose length is a multiple of 4");
  std::vector<Size> own(pieces.size());
  Size elements = 0;
  for (Size i = 0; i < numbers; ++i) {
    own[std::size_t(i)] = PyLong_AsSsize_t(PyList_GET_ITEM(pieces.ptr(), i));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  for (Size i = 0; i < numbers; i += 4) {
    const Size* piece = &own[std::size_t(i)];
    check_size("rows", piece[1], 0);
    check_size("bytes", piece[2], 0);
    check_stride("stride", piece[3], piece[2], piece[1]);
    elements += piece[1] * piece[2] / Size(sizeof(float));
  }
  std::uint64_t sum = 0;
  run(kernels().checksum, {own.data(), numbers / 4, &sum, threads}, elements);
  return sum;
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("set_openmp", &set_openmp, py::arg("path"),
        "Share the threads of the OpenMP runtime at path, which is loaded already; False if not.");
  m.def("norm_act_fwd", &norm_act_fwd, "act(gamma LN(x + bias + add + tau w_tau) + beta).",
        py::arg("x"), py::arg("ld_x"), py::arg("x_type"), py::arg("add"), py::arg("ld_add"),
        py::arg("add_rows"), py::arg("tau"), py::arg("tau_stride"), py::arg("w_tau"),
        py::arg("bias"), py::arg("gamma"), py::arg("beta"), py::arg("y"), py::arg("ld_y"),
        py::arg("y_type"), py::arg("xhat"), py::arg("xhat_type"), py::arg("rstd"), py::arg("rows"),
        py::arg("n"), py::arg("act"), py::arg("group"), py::arg("eps"), py::arg("threads"),
        py::arg("width") = 0);
  m.def("norm_act_bwd", &norm_act_bwd, "Gradients of norm_act_fwd.", py::arg("dy"),
        py::arg("ld_dy"), py::arg("dy_type"), py::arg("xhat"), py::arg("xhat_type"),
        py::arg("rstd"), py::arg("gamma"), py::arg("beta"), py::arg("y"), py::arg("ld_y"),
        py::arg("y_type"), py::arg("dx"), py::arg("ld_dx"), py::arg("dx_type"), py::arg("dgamma"),
        py::arg("dbeta"), py::arg("dbias"), py::arg("rows"), py::arg("n"), py::arg("act"),
        py::arg("group"), py::arg("threads"), py::arg("width") = 0);
  m.def("act_norm_fwd", &act_norm_fwd, "gamma LN(act(x + bias)) + beta, one layer or an ensemble.",
        py::arg("x"), py::arg("ld_x"), py::arg("x_type"), py::arg("bias"), py::arg("gamma"),
        py::arg("beta"), py::arg("y"), py::arg("ld_y"), py::arg("y_type"), py::arg("u"),
        py::arg("u_type"), py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("n"),
        py::arg("act"), py::arg("rows_per_member"), py::arg("eps"), py::arg("threads"));
  m.def("act_norm_bwd", &act_norm_bwd, "Gradients of act_norm_fwd.", py::arg("dy"),
        py::arg("ld_dy"), py::arg("dy_type"), py::arg("u"), py::arg("u_type"), py::arg("mean"),
        py::arg("rstd"), py::arg("gamma"), py::arg("dx"), py::arg("ld_dx"), py::arg("dx_type"),
        py::arg("dgamma"), py::arg("dbeta"), py::arg("dbias"), py::arg("rows"), py::arg("n"),
        py::arg("act"), py::arg("rows_per_member"), py::arg("threads"));
  m.def("simnorm_fwd", &simnorm_fwd, "Softmax in groups of a row's elements.", py::arg("x"),
        py::arg("ld_x"), py::arg("y"), py::arg("ld_y"), py::arg("rows"), py::arg("n"),
        py::arg("group"), py::arg("threads"));
  m.def("simnorm_bwd", &simnorm_bwd, "Gradient of simnorm_fwd.", py::arg("dy"), py::arg("ld_dy"),
        py::arg("y"), py::arg("ld_y"), py::arg("dx"), py::arg("ld_dx"), py::arg("rows"),
        py::arg("n"), py::arg("group"), py::arg("threads"));
  m.def("two_hot_decode_fwd", &two_hot_decode_fwd, "The value that logits over bins stand for.",
        py::arg("logits"), py::arg("ld"), py::arg("x_type"), py::arg("value"), py::arg("mean"),
        py::arg("lse"), py::arg("rows"), py::arg("bins"), py::arg("vmin"), py::arg("vmax"),
        py::arg("transform"), py::arg("threads"));
  m.def("two_hot_decode_bwd", &two_hot_decode_bwd, "Gradient of two_hot_decode_fwd.",
        py::arg("dvalue"), py::arg("logits"), py::arg("ld"), py::arg("x_type"), py::arg("mean"),
        py::arg("lse"), py::arg("dlogits"), py::arg("ld_d"), py::arg("rows"), py::arg("bins"),
        py::arg("vmin"), py::arg("vmax"), py::arg("transform"), py::arg("threads"));
  m.def("two_hot_ce_fwd", &two_hot_ce_fwd, "Cross-entropy with the two-hot encoding of x.",
        py::arg("logits"), py::arg("ld"), py::arg("x_type"), py::arg("x"), py::arg("loss"),
        py::arg("lse"), py::arg("rows"), py::arg("bins"), py::arg("vmin"), py::arg("vmax"),
        py::arg("transform"), py::arg("threads"));
  m.def("two_hot_ce_bwd", &two_hot_ce_bwd, "Gradient of two_hot_ce_fwd.", py::arg("dloss"),
        py::arg("logits"), py::arg("ld"), py::arg("x_type"), py::arg("x"), py::arg("lse"),
        py::arg("dlogits"), py::arg("ld_d"), py::arg("rows"), py::arg("bins"), py::arg("vmin"),
        py::arg("vmax"), py::arg("transform"), py::arg("threads"));
  m.def("esnr", &esnr, "Signal and noise of gradient samples, by tensor.", py::arg("grads"),
        py::arg("sizes"), py::arg("signal"), py::arg("noise"), py::arg("m"), py::arg("tensors"),
        py::arg("threads"));
  m.def("axpby", &axpby, "out = z + c1 k1 + c2 k2.", py::arg("z"), py::arg("k1"), py::arg("k2"),
        py::arg("out"), py::arg("c1"), py::arg("c2"), py::arg("n"), py::arg("threads"));
  m.def("checksum", &checksum, "One number for all bytes of pieces of memory, and their order.",
        py::arg("pieces"), py::arg("threads"));
}
