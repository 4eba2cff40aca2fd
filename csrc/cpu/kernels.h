// The CPU kernels of ops.def as the Python face sees them: one table of functions per instruction set.
//
// Rows hold their elements with stride 1. Every function writes its outputs in full and reads and
// writes nothing past the elements of a row. Sums over rows go to fp64 accumulators, in an order that
// depends on the sizes alone, so they are bitwise the same for any number of threads.
#pragma once

#define PWM_FAST_KERNEL(name, Arguments, doc)
#include "ops.def"

namespace pwm_fast {

struct Kernels {
#define PWM_FAST_KERNEL(name, Arguments, doc) void (*name)(const Arguments&);
#include "ops.def"
};

namespace generic {
const Kernels& kernels();
}
#if PWM_FAST_X86
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace pwm_fast
