#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "type_name.h"

namespace pwm_fast {
namespace {

[[noreturn]] void fail(const std::string& name, const std::string& expected,
                       const std::string& found) {
  throw std::invalid_argument(name + " must be " + expected + ", got " + found);
}
std::string text(int64_t x) { return std::to_string(x); }
std::string shape(const View& x) { return "[" + text(x.rows) + ", " + text(x.cols) + "]"; }

void check_type(const View& x, Type type) {
  if (x.type != type) fail(x.name, type_name(type), type_name(x.type));
}
void check_no_gap(const View& x) {
  if (x.rows > 1 && x.stride != x.cols) {
    fail(x.name, "contiguous", "rows of " + text(x.cols) + " that are " + text(x.stride) + " apart");
  }
}
void check_shape(const View& x, const View& like) {
  if (x.type != fp32 && x.type != bfloat16) fail(x.name, "float32 or bfloat16", type_name(x.type));
  if (x.cols < 1) fail("the columns of " + std::string(x.name), "at least 1", text(x.cols));
  if (x.rows != like.rows || x.cols != like.cols) fail(x.name, shape(like), shape(x));
}

}  // namespace

void check_least(const char* name, int64_t value, int64_t least) {
  if (value < least) fail(name, "at least " + text(least), text(value));
}

void check_width(int64_t width, int64_t n) {
  if (width < 0 || width > n) fail("width", "from 0 to n = " + text(n), text(width));
}

void check_group(int64_t group, int64_t n) {
  if (group < 1 || n % group != 0) fail("group", "a divisor of n = " + text(n), text(group));
}

void check_member_act(Act act) {
  if (act == act_simnorm) fail("act", "none or mish", "simnorm");
}

void check_given(const View& x) {
  if (!x.given) fail(x.name, "a tensor here", "None");
}

void check_fp32(const View& x) {
  if (x.given) check_type(x, fp32);
}

void check_same_type(const View& x, const View& like) { check_type(x, like.type); }

void check_matrix(const View& x, const View& like) {
  if (!x.given) return;
  check_shape(x, like);
  if (x.rows > 1) check_least((std::string("the row stride of ") + x.name).c_str(), x.stride, x.cols);
}

void check_saved(const View& x, const View& like) {
  if (!x.given) return;
  check_shape(x, like);
  check_no_gap(x);
}

void check_vector(const View& x, int64_t count, Type type) {
  if (!x.given) return;
  check_type(x, type);
  if (x.rows * x.cols != count) fail(x.name, text(count) + " numbers", text(x.rows * x.cols));
  check_no_gap(x);
}

void check_table(const View& x, int64_t rows, int64_t cols, Type type) {
  if (!x.given) return;
  check_type(x, type);
  if (x.rows != rows || x.cols != cols) {
    fail(x.name, "[" + text(rows) + ", " + text(cols) + "]", shape(x));
  }
  check_no_gap(x);
}

void check_number(const View& x) {
  if (x.type != fp64) check_type(x, fp32);
  check_vector(x, 1, x.type);
}

void check_count(const char* name, int64_t count, int64_t expected) {
  if (count != expected) fail(name, text(expected), text(count));
}

void check_list(const Views& x, const Views& like) {
  if (x.count != like.count) fail(x.name, text(like.count) + " tensors", text(x.count));
  for (int64_t i = 0; i < x.count; ++i) {
    const std::string name = std::string(x.name) + "[" + text(i) + "]";
    View item = x.items[i];
    item.name = name.c_str();
    check_vector(item, like.items[i].rows * like.items[i].cols);
  }
}

void check_members(const View& x, const View& rows, int64_t rows_per_member, Type type) {
  if (!x.given) return;
  if (rows_per_member == 0) return check_vector(x, rows.cols, type);
  const int64_t members = (rows.rows + rows_per_member - 1) / rows_per_member;
  check_type(x, type);
  if (x.cols != rows.cols || x.rows < members) {
    fail(x.name, "[" + text(members) + ", " + text(rows.cols) + "]", shape(x));
  }
  check_no_gap(x);
}

void check_bins(const View& logits, double vmin, double vmax) {
  check_least("the bins of logits", logits.cols, 2);
  check_matrix(logits, logits);
  if (!(vmin < vmax)) {
    throw std::invalid_argument("vmin must be below vmax, got " + std::to_string(vmin) + " and " +
                                std::to_string(vmax));
  }
}

}  // namespace pwm_fast
