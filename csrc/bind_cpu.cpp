// The Python face of the CPU kernels: functions of ops.def that take tensors by name, check them, and
// call the kernels of this CPU.
#include "bind_cpu.h"

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu_features.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

using namespace pwm_fast;

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
template <class Struct>
void run(void (*kernel)(const Struct&), const Struct& arguments, int64_t elements) {
  constexpr int64_t long_call = 65536;  // some tens of microseconds
  if (elements < long_call) return kernel(arguments);
  py::gil_scoped_release unlocked;
  kernel(arguments);
}

// Tells the number of threads where a call does not: torch.get_num_threads.
PyObject* thread_count = nullptr;

void set_thread_count(const py::object& function) {
  Py_XDECREF(thread_count);
  thread_count = function.inc_ref().ptr();
}

int64_t default_threads() {
  if (thread_count == nullptr) return 1;
  const auto count = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(thread_count));
  if (!count) throw py::error_already_set();
  return count.cast<int64_t>();
}

constexpr int64_t not_given = std::numeric_limits<int64_t>::min();

// What Python passes as the struct of a kernel's arguments, checked; returns the elements of work.
template <class Struct>
int64_t read(const char* name, const Signature& signature, PyObject* const* values,
             Py_ssize_t positional, PyObject* keywords, Struct& into) {
  Arguments arguments(signature, values, positional, keywords);
  into.fields(arguments);
  if (!arguments.complete()) {
    const py::object names = interned(keywords);
    Arguments again(signature, values, positional, keywords == nullptr ? nullptr : names.ptr());
    into.fields(again);
    if (!again.complete()) again.complain(name);
  }
  if (into.threads == not_given) into.threads = default_threads();
  check_least("threads", into.threads, 1);
  return into.check();
}

// A kernel as Python's C interface has it: not through pybind11, whose keywords cost more than a small
// kernel.
template <class Struct>
struct Function {
  static inline const char* name;
  static inline void (*Kernels::*kernel)(const Struct&);
  static inline Signature signature;
  static inline std::string doc;
  static inline PyMethodDef definition;

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional,
                        PyObject* keywords) {
    try {
      Struct arguments = {};
      arguments.threads = not_given;
      const int64_t elements = read(name, signature, values, positional, keywords, arguments);
      run(kernels().*kernel, arguments, elements);
      Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    }
    return nullptr;
  }

  static void bind(py::module_& m, const char* name_, void (*Kernels::*kernel_)(const Struct&),
                   const char* about) {
    name = name_;
    kernel = kernel_;
    signature = {};
    Struct arguments = {};
    arguments.fields(signature);
    // As inspect.signature reads it.
    doc = std::string(name) + "($module, /, " + signature.text + ")\n--\n\n" + about;
    const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    definition = {name, function, METH_FASTCALL | METH_KEYWORDS, doc.c_str()};
    const py::str module_name = m.attr("__name__");
    PyObject* made = PyCFunction_NewEx(&definition, m.ptr(), module_name.ptr());
    if (made == nullptr) throw py::error_already_set();
    m.attr(name) = py::reinterpret_steal<py::object>(made);
  }
};

std::uint64_t checksum(const py::list& pieces, int64_t threads) {
  check_least("threads", threads, 1);
  const int64_t numbers = int64_t(pieces.size());
  if (numbers % 4 != 0) {
    throw py::value_error("pieces must be a list whose length is a multiple of 4, got " +
                          std::to_string(numbers));
  }
  std::vector<int64_t> own(pieces.size());
  int64_t elements = 0;
  for (int64_t i = 0; i < numbers; ++i) {
    own[std::size_t(i)] = PyLong_AsSsize_t(PyList_GET_ITEM(pieces.ptr(), i));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  for (int64_t i = 0; i < numbers; i += 4) {
    const int64_t* piece = &own[std::size_t(i)];
    check_least("rows", piece[1], 0);
    check_least("bytes", piece[2], 0);
    if (piece[1] > 1) check_least("stride", piece[3], piece[2]);
    elements += piece[1] * piece[2] / int64_t(sizeof(float));
  }
  std::uint64_t sum = 0;
  run(kernels().checksum, {own.data(), numbers / 4, &sum, threads}, elements);
  return sum;
}

}  // namespace

void run_row_program(const pwm_fast::RowProgram& program, int64_t elements) {
  run(kernels().row_program, program, elements);
}

void bind_cpu(py::module_& m) {
  m.def("set_openmp", &set_openmp, py::arg("path"),
        "Share the threads of the OpenMP runtime at path, which is loaded already; False if not.");
  m.def("set_thread_count", &set_thread_count, py::arg("function"),
        "Have kernels ask function for the number of threads where a call does not give it.");
  m.def("checksum", &checksum, "One number for all bytes of pieces of memory, and their order.",
        py::arg("pieces"), py::arg("threads"));
  py::list names;
#define PWM_FAST_OTHER_KERNEL(name, Struct)
#define PWM_FAST_KERNEL(name, Struct, doc)                  \
  Function<Struct>::bind(m, #name, &Kernels::name, doc); \
  names.append(#name);
#include "cpu/ops.def"
  m.attr("KERNELS") = py::tuple(names);
  bind_program(m);
}
