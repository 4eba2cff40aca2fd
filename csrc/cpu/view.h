// What the arguments of kernels are made of, and what is checked of them.
//
// The struct of a kernel's arguments has `fields`, which names them for Python, in the order of
// positional ones, and `check`, which throws std::invalid_argument that names what is wrong and
// returns how many elements there are to work on. Both are called by bind_cpu.cpp alone: code for one
// instruction set must not emit them, as the linker could keep that copy for all.
#pragma once

#include <stdint.h>

namespace pwm_fast {

enum Type : int64_t { fp32, bfloat16, fp64, integer64 };
enum Act : int64_t { act_none, act_mish, act_simnorm };

// Rows of numbers in the CPU's memory; a vector is one row. Leading dimensions of a tensor are rows.
struct View {
  const char* name;
  void* data;  // null: absent, or without elements
  int64_t rows, cols, stride;  // `stride` elements from one row to the next
  Type type;
  bool given;
};

// A list of tensors. It owns the array of views, not their data.
struct Views {
  const char* name = nullptr;
  View* items = nullptr;
  int64_t count = 0;

  Views() = default;
  Views(const Views&) = delete;
  Views& operator=(const Views&) = delete;
  ~Views();  // not inline: see above
};

struct Absent {};  // an argument of other backends' kernels: None
constexpr struct Nullable {
} nullable;  // marks a field that may be None
constexpr struct Optional {
} optional;  // marks a field that is None or keeps its value where it is not given

// A size against bounds.
void check_least(const char* name, int64_t value, int64_t least);
void check_width(int64_t width, int64_t n);
void check_group(int64_t group, int64_t n);
void check_member_act(Act act);  // none or mish

// Tensors. One that is absent passes all checks but check_given and check_same_type.
// Rows of the shape of `like`, in fp32 or bf16: any distance apart, or without a gap.
void check_matrix(const View& x, const View& like);
void check_saved(const View& x, const View& like);
void check_fp32(const View& x);
void check_same_type(const View& x, const View& like);
void check_given(const View& x);
// `count` numbers without a gap.
void check_vector(const View& x, int64_t count, Type type = fp32);
// [members, n] without a gap, with a member for all rows; `n` numbers if rows_per_member is 0.
void check_members(const View& x, const View& rows, int64_t rows_per_member, Type type = fp32);
// [rows, cols] of `type` without a gap.
void check_table(const View& x, int64_t rows, int64_t cols, Type type);
// One fp32 or fp64.
void check_number(const View& x);
// As many tensors as `like` has, of as many fp32 without a gap.
void check_list(const Views& x, const Views& like);
void check_count(const char* name, int64_t count, int64_t expected);

}  // namespace pwm_fast
