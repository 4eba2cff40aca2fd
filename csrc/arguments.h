// From what Python passes to the struct of a kernel's arguments, by its `fields`.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <vector>

#include "cpu/view.h"

namespace pwm_fast {

// How a kernel is called from Python: the names of its arguments, interned.
struct Signature {
  std::vector<PyObject*> names;
  std::string text;  // "x, y, xhat=None"

  template <class T>
  void operator()(const char* name, T&) { add(name, false); }
  template <class T>
  void operator()(const char* name, T&, Nullable) { add(name, false); }
  template <class T>
  void operator()(const char* name, T&, Optional) { add(name, true); }
  void operator()(const char* name, Absent&) { add(name, true); }

 private:
  enum { all_given, some_optional, by_keyword } kind_ = all_given;

  void add(const char* name, bool is_optional);
};

// The numbers of a tensor, or with may_be_none an absent view.
View view_of(const char* name, PyObject* value, bool may_be_none);

// Fills the fields in from the arguments of one call: positional ones, then those of `keywords`. A
// field that is not given stays as it is, but for a View, which gets its name.
class Arguments {
 public:
  Arguments(const Signature& signature, PyObject* const* values, Py_ssize_t positional,
            PyObject* keywords)
      : signature_(signature),
        values_(values),
        keywords_(keywords),
        positional_(positional),
        named_(keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords)) {}

  template <class T>
  void operator()(const char* name, T& field) { set_given(name, field, false); }
  void operator()(const char* name, View& field, Nullable) { set_given(name, field, true); }
  template <class T>
  void operator()(const char* name, T& field, Optional) {
    set(name, next(), field, true);
  }
  void operator()(const char* name, Absent&) { refuse(name, next()); }

  // Whether all fields were found, and all arguments were fields.
  bool complete() const {
    return missing_ == nullptr && taken_ == named_ && positional_ <= index_;
  }
  [[noreturn]] void complain(const char* kernel) const;  // of what is not

 private:
  template <class T>
  void set_given(const char* name, T& field, bool may_be_none) {
    PyObject* value = next();
    if (value != nullptr) {
      set(name, value, field, may_be_none);
    } else if (missing_ == nullptr) {
      missing_ = name;
    }
  }
  PyObject* next() {
    const Py_ssize_t index = index_++;
    if (index < positional_) return values_[index];
    PyObject* name = signature_.names[std::size_t(index)];
    for (Py_ssize_t i = 0; i < named_; ++i) {  // from the last one on: they mostly keep the order
      if (++last_ >= named_) last_ = 0;
      if (PyTuple_GET_ITEM(keywords_, last_) != name) continue;
      ++taken_;
      return values_[positional_ + last_];
    }
    return nullptr;
  }
  static void set(const char* name, PyObject* value, View& field, bool may_be_none) {
    field = view_of(name, value, may_be_none);
  }
  static void set(const char* name, PyObject* value, Views& list, bool);
  static void set(const char* name, PyObject* value, int64_t& field, bool may_be_none);
  static void set(const char* name, PyObject* value, double& field, bool may_be_none);
  static void set(const char* name, PyObject* value, float& field, bool may_be_none);
  static void set(const char* name, PyObject* value, bool& field, bool may_be_none);
  static void set(const char* name, PyObject* value, Act& field, bool may_be_none);
  static void refuse(const char* name, PyObject* value);

  const Signature& signature_;
  PyObject* const* values_;
  PyObject* keywords_;
  Py_ssize_t positional_, named_, index_ = 0, taken_ = 0, last_ = -1;
  const char* missing_ = nullptr;
};

// The same names, interned: those of a call with ** need not be.
pybind11::object interned(PyObject* keywords);

}  // namespace pwm_fast
