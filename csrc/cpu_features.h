// The instruction set that CPU kernels are chosen by.
#pragma once

namespace pwm_fast {

// Ordered: a CPU that has one of these has all before it.
enum class Isa { generic, avx2, avx512 };

const char* isa_name(Isa isa);

// The best instruction set of this CPU, or the one that the environment variable PWM_FAST_ISA names.
// Throws std::invalid_argument if that name is unknown or the CPU lacks it.
Isa cpu_isa();

}  // namespace pwm_fast
