// The Python face of row programs: checked once as they are made, and their tensors at each call.
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "bind_cpu.h"
#include "cpu/row_program.h"
#include "type_name.h"

namespace py = pybind11;

namespace {

using namespace pwm_fast;

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

// How many operands, numbers and factors a step has.
struct StepForm {
  const char* name;
  int operands, numbers, factors;
};
constexpr StepForm forms[steps] = {
    {"gemm", 3, 1, 0},         {"weight_grad", 2, 1, 0},  {"column_sum", 2, 1, 1},
    {"combine", 4, 0, 2},      {"norm_act_fwd", 9, 2, 2}, {"norm_act_bwd", 7, 5, 0},
    {"act_norm_fwd", 8, 1, 1}, {"act_norm_bwd", 6, 4, 0}, {"policy", 4, 0, 0},
    {"policy_bwd", 3, 0, 0},
};

class Program {
 public:
  Program(const py::list& slots, const py::list& packs, const py::list& totals,
          const py::list& instructions) {
    for (const py::handle& each : slots) add_slot(each.cast<py::tuple>());
    for (const py::handle& each : packs) add_pack(each.cast<py::tuple>());
    for (const py::handle& each : totals) add_total(each.cast<py::tuple>());
    for (const py::handle& each : instructions) add_instruction(each.cast<py::tuple>());
  }

  void run(const py::list& tensors, int64_t rows, int64_t threads) const {
    check_least("rows", rows, 0);
    check_least("threads", threads, 1);
    const int64_t count = tensors_ + (kept_ > 0);
    if (int64_t(tensors.size()) != count) {
      refuse("tensors must be " + std::to_string(count) + ", got " +
             std::to_string(tensors.size()));
    }
    std::vector<Place> places(slots_.size());
    float* kept = nullptr;  // the last tensor
    if (kept_ > 0) {
      const View whole = view_of("kept", PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(tensors_)), false);
      check_vector(whole, kept_ * rows);
      kept = static_cast<float*>(whole.data);
    }
    std::size_t next = 0;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].kind == slot_scratch) continue;
      if (slots_[i].kept) {
        places[i] = {kept, slots_[i].cols};
        kept += slots_[i].planes * slots_[i].cols * rows;
        continue;
      }
      PyObject* value = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(next++));
      places[i] = place(i, view_of(names_[i].c_str(), value, false), rows);
    }
    const RowProgram program = {
        slots_.data(), packs_.data(), totals_.data(), instructions_.data(),
        int64_t(slots_.size()), int64_t(packs_.size()), int64_t(totals_.size()),
        int64_t(instructions_.size()), places.data(), rows, work_, threads, repeats_};
    run_row_program(program, rows * work_);
  }

 private:
  const Slot& slot(Operand o) const { return slots_[std::size_t(o.slot)]; }
  [[noreturn]] void refuse_operand(const StepForm& form, int64_t index, const std::string& why) {
    refuse(std::string("step ") + form.name + ": operand " + std::to_string(index) + " " + why);
  }

  void add_slot(const py::tuple& given) {
    const Slot made = {given[1].cast<int64_t>(), given[2].cast<int64_t>(), given[3].cast<int64_t>(),
                       given[4].cast<int64_t>(), given[5].cast<int64_t>(),
                       given[6].cast<int64_t>(), false, given[7].cast<bool>()};
    if (made.kind < slot_rows || made.kind > slot_scratch) refuse("there is no such kind of slot");
    check_least("planes", made.planes, 1);
    check_least("n", made.n, 1);
    check_least("cols", made.cols, 1);
    check_least("begin", made.begin, 0);
    check_least("whole", made.whole, made.begin + made.cols);
    if (made.kind != slot_weight && made.whole != made.cols) refuse("weights alone have columns");
    if (made.kept && made.kind != slot_rows) refuse("rows alone lie side by side");
    names_.push_back(given[0].cast<std::string>());
    slots_.push_back(made);
    if (made.kept) {
      kept_ += made.planes * made.cols;
    } else if (made.kind != slot_scratch) {
      ++tensors_;
    }
  }

  Operand operand(const py::handle& given) const {
    const auto pair = given.cast<py::tuple>();
    const Operand o = {pair[0].cast<int64_t>(), pair[1].cast<int64_t>()};
    if (o.slot < 0) return o;
    if (o.slot >= int64_t(slots_.size())) refuse("there is no slot " + std::to_string(o.slot));
    if (o.plane < 0 || o.plane >= slot(o).planes) {
      refuse(names_[std::size_t(o.slot)] + " has no plane " + std::to_string(o.plane));
    }
    return o;
  }
  Operand operand_of_kind(const py::handle& given, int64_t kind, const char* what) const {
    const Operand o = operand(given);
    if (o.slot < 0 || slot(o).kind != kind) refuse(std::string("expected ") + what);
    return o;
  }

  void add_pack(const py::tuple& given) {
    packs_.push_back({operand_of_kind(given[0], slot_weight, "a weight"), given[1].cast<bool>(), 0});
  }

  void add_total(const py::tuple& given) {
    const Operand out = operand(given);
    if (out.slot < 0) refuse("a total needs a slot");
    const Slot& into = slot(out);
    if (into.kind == slot_weight) {
      totals_.push_back({out, into.n, into.cols, 0});
    } else if (into.kind == slot_shared) {
      totals_.push_back({out, into.cols, 0, 0});
    } else {
      refuse("a total must be a weight's or a vector's");
    }
  }

  void add_instruction(const py::tuple& given) {
    Instruction made = {};
    made.step = given[0].cast<int64_t>();
    if (made.step < 0 || made.step >= steps) refuse("there is no such step");
    const StepForm& form = forms[made.step];
    const auto operands = given[1].cast<py::tuple>(), numbers = given[2].cast<py::tuple>(),
               factors = given[3].cast<py::tuple>();
    if (int(operands.size()) != form.operands || int(numbers.size()) != form.numbers ||
        int(factors.size()) != form.factors) {
      refuse(std::string("step ") + form.name + " takes " + std::to_string(form.operands) +
             " operands, " + std::to_string(form.numbers) + " numbers and " +
             std::to_string(form.factors) + " factors");
    }
    for (Operand& o : made.operand) o = {-1, 0};
    for (int i = 0; i < form.operands; ++i) made.operand[i] = operand(operands[std::size_t(i)]);
    for (int i = 0; i < form.numbers; ++i) {
      made.number[i] = numbers[std::size_t(i)].cast<int64_t>();
    }
    for (int i = 0; i < form.factors; ++i) {
      made.factor[i] = factors[std::size_t(i)].cast<float>();
    }
    check(made, form);
    if (made.step == step_gemm && packs_[std::size_t(made.number[0])].steps++ > 0) repeats_ = true;
    if (made.step == step_weight_grad) {
      made.number[1] = totals_[std::size_t(made.number[0])].steps++ == 0;
    }
    instructions_.push_back(made);
  }

  // Operand `index` holds the block's rows, `cols` wide; `shared`: or one row for all of them.
  void check_rows(const Instruction& at, int64_t index, int64_t cols, bool absent, bool shared,
                  bool gapless = false) {
    const StepForm& form = forms[at.step];
    const Operand o = at.operand[index];
    if (o.slot < 0) {
      if (absent) return;
      refuse_operand(form, index, "is absent");
    }
    Slot& s = slots_[std::size_t(o.slot)];
    const bool fits = s.kind == slot_rows || (s.kind == slot_scratch && !gapless) ||
                      (shared && s.kind == slot_shared);
    if (!fits) refuse_operand(form, index, "is of the wrong kind");
    if (s.cols != cols) {
      refuse_operand(form, index, "must be " + std::to_string(cols) + " wide, got " +
                                      std::to_string(s.cols));
    }
    if (gapless) s.gapless = true;
  }
  void check_shared(const Instruction& at, int64_t index, int64_t cols, bool absent) {
    const Operand o = at.operand[index];
    if (o.slot < 0 && absent) return;
    if (o.slot < 0 || slot(o).kind != slot_shared || slot(o).cols != cols) {
      refuse_operand(forms[at.step], index, "must be a vector of " + std::to_string(cols));
    }
  }
  void check_total(int64_t index, int64_t n, int64_t k, bool absent) const {
    if (index < 0 && absent) return;
    if (index < 0 || index >= int64_t(totals_.size()) || totals_[std::size_t(index)].n != n ||
        totals_[std::size_t(index)].k != k) {
      refuse("there is no such total");
    }
  }
  int64_t width(const Instruction& at, int64_t index) {
    if (at.operand[index].slot < 0) refuse_operand(forms[at.step], index, "is absent");
    return slot(at.operand[index]).cols;
  }

  void check(const Instruction& at, const StepForm& form) {
    const int64_t n = width(at, 0);
    work_ += n;
    const bool simnorm = at.number[0] == act_simnorm;
    switch (at.step) {
      case step_gemm: {
        if (at.number[0] < 0 || at.number[0] >= int64_t(packs_.size())) refuse("no such pack");
        const Pack& pack = packs_[std::size_t(at.number[0])];
        const Slot& w = slot(pack.weight);
        check_rows(at, 0, pack.by_cols ? w.cols : w.n, false, false);
        check_rows(at, 1, pack.by_cols ? w.n : w.cols, false, false);
        check_rows(at, 2, n, true, true);
        work_ += w.n * w.cols / 8;
        return;
      }
      case step_weight_grad:
        check_rows(at, 0, n, false, false);
        check_rows(at, 1, width(at, 1), false, false);
        check_total(at.number[0], n, width(at, 1), false);
        work_ += n * width(at, 1) / 8;
        return;
      case step_column_sum:
        check_rows(at, 0, n, false, false), check_rows(at, 1, n, true, false);
        return check_total(at.number[0], n, 0, false);
      case step_combine:
        for (int i = 0; i < 4; ++i) check_rows(at, i, n, i > 0, false);
        return;
      case step_norm_act_fwd:
        check_act(at.number[0], true);
        if (simnorm) check_group(at.number[1], n);
        check_rows(at, 0, n, false, false), check_rows(at, 1, n, false, false);
        check_rows(at, 2, n, true, false, true), check_rows(at, 3, 1, true, false, true);
        for (int i : {4, 5, 6, 8}) check_shared(at, i, n, true);
        return check_rows(at, 7, n, true, true);
      case step_norm_act_bwd:
        check_act(at.number[0], true);
        if (simnorm) check_group(at.number[1], n);
        check_rows(at, 0, n, false, false), check_rows(at, 1, n, false, false);
        check_rows(at, 2, n, false, false, true), check_rows(at, 3, 1, false, false, true);
        check_shared(at, 4, n, true), check_shared(at, 5, n, true);
        check_rows(at, 6, n, !simnorm, false);
        for (int i : {2, 3, 4}) check_total(at.number[i], n, 0, true);
        return;
      case step_act_norm_fwd:
        check_act(at.number[0], false);
        check_rows(at, 0, n, false, false), check_rows(at, 1, n, false, false);
        check_rows(at, 2, n, true, false, true);
        check_rows(at, 3, 1, true, false, true), check_rows(at, 4, 1, true, false, true);
        for (int i : {5, 6, 7}) check_shared(at, i, n, true);
        return;
      case step_act_norm_bwd:
        check_act(at.number[0], false);
        check_rows(at, 0, n, false, false), check_rows(at, 1, n, false, false);
        check_rows(at, 2, n, false, false, true);
        check_rows(at, 3, 1, at.operand[5].slot < 0, false, true);
        check_rows(at, 4, 1, at.operand[5].slot < 0, false, true);
        check_shared(at, 5, n, true);
        for (int i : {1, 2, 3}) check_total(at.number[i], n, 0, true);
        return;
      case step_policy:
        for (int i = 0; i < 3; ++i) check_rows(at, i, n, false, false);
        return check_shared(at, 3, n, false);
      case step_policy_bwd:
        for (int i = 0; i < 3; ++i) check_rows(at, i, n, false, false);
        return;
      default: refuse(form.name);
    }
  }
  static void check_act(int64_t act, bool simnorm) {
    if (act < act_none || act > (simnorm ? act_simnorm : act_mish)) refuse("no such activation");
  }

  // A call's tensor where it is as the slot says.
  Place place(std::size_t index, const View& x, int64_t rows) const {
    const Slot& s = slots_[index];
    check_fp32(x);
    float* const data = static_cast<float*>(x.data);
    const int64_t wanted = s.kind == slot_rows     ? s.planes * rows
                           : s.kind == slot_weight ? s.planes * s.n
                                                   : s.planes;
    const bool gapless = x.rows <= 1 || x.stride == x.cols;
    if (gapless && x.rows * x.cols == wanted * s.whole && (x.rows != wanted || x.cols != s.whole)) {
      // The same numbers under another shape: a vector, or a number for each row.
      if (s.kind == slot_shared || s.cols == 1) return {data, s.cols};
    }
    if (x.rows * (wanted ? x.cols : 0) != wanted * s.whole || (wanted && x.rows != wanted)) {
      refuse(names_[index] + " must be [" + std::to_string(wanted) + ", " + std::to_string(s.whole) +
             "], got [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) + "]");
    }
    if (s.gapless && !gapless) {
      refuse(names_[index] + " must have rows that follow one another, got a row stride of " +
             std::to_string(x.stride) + " for " + std::to_string(x.cols));
    }
    return {data + s.begin, x.rows > 1 ? x.stride : s.whole};
  }

  std::vector<std::string> names_;
  std::vector<Slot> slots_;
  std::vector<Pack> packs_;
  std::vector<Total> totals_;
  std::vector<Instruction> instructions_;
  int64_t tensors_ = 0, kept_ = 0, work_ = 0;  // kept_: numbers a row
  bool repeats_ = false;
};

}  // namespace

void bind_program(py::module_& m) {
  py::dict names;
  for (int64_t i = 0; i < steps; ++i) names[forms[i].name] = i;
  py::class_<Program>(m, "RowProgram",
                      "Steps of work that are done for one block of rows after another.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>(),
           py::arg("slots"), py::arg("packs"), py::arg("totals"), py::arg("instructions"))
      .def("run", &Program::run, py::arg("tensors"), py::arg("rows"), py::arg("threads"),
           "Run all steps on a call's tensors, one for each slot that is no scratch memory.")
      .attr("STEPS") = names;
}
