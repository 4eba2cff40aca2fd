// The CPU kernels' functions of the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_cpu(pybind11::module_& m);

// Parts of it: row programs.
void bind_program(pybind11::module_& m);
namespace pwm_fast {
struct RowProgram;
}
// On the kernels of this CPU; without the GIL if there are many `elements`.
void run_row_program(const pwm_fast::RowProgram& program, int64_t elements);
