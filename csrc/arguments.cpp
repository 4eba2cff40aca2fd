#include "arguments.h"

#include <new>

#include "dlpack.h"
#include "parallel.h"
#include "type_name.h"

namespace py = pybind11;

namespace pwm_fast {
namespace {

[[noreturn]] void fail_type(const char* name, const char* expected, PyObject* value) {
  throw py::type_error(std::string(name) + " must be " + expected + ", got " +
                       (value == Py_None ? "None" : Py_TYPE(value)->tp_name));
}
[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& found) {
  throw py::value_error(std::string(name) + " must be " + expected + ", got " + found);
}

// The interface of a type; null if it has none.
const dlpack::Exchange* look_up(PyTypeObject* type) {
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), dlpack::attribute);
  if (found == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const py::object capsule = py::reinterpret_steal<py::object>(found);
  if (!PyCapsule_IsValid(found, dlpack::capsule)) return nullptr;
  const auto* exchange =
      static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(found, dlpack::capsule));
  return exchange->major == dlpack::major_version && exchange->view_of_object != nullptr ? exchange
                                                                                        : nullptr;
}

const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;  // kept alive, so that no other one takes its address
    const dlpack::Exchange* exchange;
  };
  static Known known[4] = {};  // torch's Tensor and Parameter, and what else comes first
  for (Known& each : known) {
    if (each.type == type) return each.exchange;
    if (each.type != nullptr) continue;
    const dlpack::Exchange* exchange = look_up(type);
    if (exchange != nullptr) {
      Py_INCREF(type);
      each = {type, exchange};
    }
    return exchange;
  }
  return look_up(type);
}

Type type_of(const char* name, const dlpack::Tensor& tensor) {
  if (tensor.lanes == 1) {
    if (tensor.code == dlpack::code_float && tensor.bits == 32) return fp32;
    if (tensor.code == dlpack::code_bfloat && tensor.bits == 16) return bfloat16;
    if (tensor.code == dlpack::code_float && tensor.bits == 64) return fp64;
    if (tensor.code == dlpack::code_int && tensor.bits == 64) return integer64;
  }
  constexpr const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string kind = tensor.code < 7 ? kinds[tensor.code] : "another type of ";
  fail(name, "float32, bfloat16, float64 or int64", kind + std::to_string(tensor.bits));
}

// All leading dimensions as one: rows must be equally far apart. Without rows no stride matters, and
// PyTorch takes any for contiguous.
void set_rows(View& view, const dlpack::Tensor& tensor) {
  const std::int64_t *shape = tensor.shape, *strides = tensor.strides;
  const std::int32_t last = tensor.ndim - 1;
  view.rows = view.cols = 1;
  if (tensor.ndim == 0) return;
  view.cols = view.stride = shape[last];
  for (std::int32_t i = 0; i < last; ++i) {
    if (shape[i] == 0) {
      view.rows = 0;
      return;
    }
  }
  if (view.cols > 1 && strides[last] != 1) {
    fail(view.name, "a tensor whose last stride is 1", std::to_string(strides[last]));
  }
  for (std::int32_t i = last - 1; i >= 0; --i) {
    if (shape[i] != 1) {
      if (view.rows == 1) {
        view.stride = strides[i];
      } else if (view.rows > 1 && strides[i] != view.rows * view.stride) {
        fail(view.name, "a tensor whose rows are equally far apart", "another");
      }
    }
    view.rows *= shape[i];
  }
}

}  // namespace

Views::~Views() { release(items); }

void Signature::add(const char* name, bool is_optional) {
  names.push_back(PyUnicode_InternFromString(name));
  if (!text.empty()) text += ", ";
  if (!is_optional && kind_ == some_optional) {  // Python has no other way to write that
    text += "*, ";
    kind_ = by_keyword;
  }
  if (is_optional && kind_ == all_given) kind_ = some_optional;
  text += name;
  if (is_optional) text += "=None";
}

View view_of(const char* name, PyObject* value, bool may_be_none) {
  View view = {};
  view.name = name;
  if (may_be_none && (value == nullptr || value == Py_None)) return view;
  const dlpack::Exchange* exchange = exchange_of(Py_TYPE(value));
  if (exchange == nullptr) fail_type(name, may_be_none ? "a tensor or None" : "a tensor", value);
  dlpack::Tensor tensor;
  if (exchange->view_of_object(value, &tensor) != 0) throw py::error_already_set();
  if (tensor.device_type != dlpack::cpu) {
    fail(name, "on the CPU", "a tensor on another device (" + std::to_string(tensor.device_type) +
                                 " in DLPack)");
  }
  view.given = true;
  view.type = type_of(name, tensor);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  set_rows(view, tensor);
  return view;
}

void Arguments::set(const char* name, PyObject* value, Views& list, bool) {
  list.name = name;
  const bool is_list = PyList_Check(value);
  if (!is_list && !PyTuple_Check(value)) fail_type(name, "a list of tensors", value);
  const Py_ssize_t count = is_list ? PyList_GET_SIZE(value) : PyTuple_GET_SIZE(value);
  release(list.items);  // of a first reading
  list.items = nullptr;
  list.count = 0;
  list.items = static_cast<View*>(allocate(int64_t(count * Py_ssize_t(sizeof(View)))));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = is_list ? PyList_GET_ITEM(value, i) : PyTuple_GET_ITEM(value, i);
    new (list.items + i) View(view_of(name, item, false));
    ++list.count;
  }
}

void Arguments::set(const char* name, PyObject* value, int64_t& field, bool may_be_none) {
  if (may_be_none && (value == nullptr || value == Py_None)) return;
  if (!PyLong_Check(value)) fail_type(name, "an integer", value);
  field = PyLong_AsLongLong(value);
  if (field == -1 && PyErr_Occurred()) throw py::error_already_set();
}

void Arguments::set(const char* name, PyObject* value, double& field, bool) {
  field = PyFloat_AsDouble(value);
  if (field == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    fail_type(name, "a number", value);
  }
}

void Arguments::set(const char* name, PyObject* value, float& field, bool) {
  double wide;
  set(name, value, wide, false);
  field = float(wide);
}

void Arguments::set(const char* name, PyObject* value, bool& field, bool) {
  if (!PyBool_Check(value)) fail_type(name, "True or False", value);
  field = value == Py_True;
}

void Arguments::set(const char* name, PyObject* value, Act& field, bool) {
  static PyObject* const names[] = {PyUnicode_InternFromString("none"),
                                    PyUnicode_InternFromString("mish"),
                                    PyUnicode_InternFromString("simnorm")};
  for (int act = act_none; act <= act_simnorm; ++act) {
    if (value == names[act]) {
      field = Act(act);
      return;
    }
  }
  if (!PyUnicode_Check(value)) fail_type(name, "none, mish or simnorm", value);
  for (int act = act_none; act <= act_simnorm; ++act) {  // not interned
    if (PyUnicode_Compare(value, names[act]) == 0) {
      field = Act(act);
      return;
    }
  }
  fail(name, "none, mish or simnorm", py::cast<std::string>(value));
}

void Arguments::refuse(const char* name, PyObject* value) {
  if (value == nullptr || value == Py_None) return;
  fail(name, "None: scales belong to fp16, which the CPU kernels do not have", "one");
}

void Arguments::complain(const char* kernel) const {
  const std::string start = std::string(kernel) + "() ";
  if (positional_ > index_) {
    throw py::type_error(start + "takes " + std::to_string(index_) + " arguments, got " +
                         std::to_string(positional_));
  }
  for (Py_ssize_t i = 0; i < named_; ++i) {
    PyObject* name = PyTuple_GET_ITEM(keywords_, i);
    Py_ssize_t field = 0;
    while (field < index_ && signature_.names[std::size_t(field)] != name) ++field;
    const std::string text = py::cast<std::string>(name);
    if (field == index_) throw py::type_error(start + "has no argument '" + text + "'");
    if (field < positional_) throw py::type_error(start + "got '" + text + "' twice");
  }
  throw py::type_error(start + "lacks the argument '" + missing_ + "'");
}

py::object interned(PyObject* keywords) {
  if (keywords == nullptr) return py::none();
  const Py_ssize_t count = PyTuple_GET_SIZE(keywords);
  py::tuple names(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* name = PyTuple_GET_ITEM(keywords, i);
    Py_INCREF(name);
    PyUnicode_InternInPlace(&name);
    PyTuple_SET_ITEM(names.ptr(), i, name);
  }
  return std::move(names);
}

}  // namespace pwm_fast
