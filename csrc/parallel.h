// Threads: those of the OpenMP runtime that torch has loaded, or none. Also memory for the kernels.
// Nothing here is inline, as sources with the flags of one instruction set include this.
#pragma once

#include <stdint.h>

namespace pwm_fast {

// Share the threads of the OpenMP runtime at `path`, which must be loaded already. False, and serial
// from then on, if it is not or lacks what is needed; so "" makes the kernels serial.
bool set_openmp(const char* path);

// How many of `threads` to use for `units` pieces of work that hold `elements` in all: at least a
// grain of elements each, never more than units, 1 without OpenMP or inside a parallel region.
int64_t useful_threads(int64_t threads, int64_t units, int64_t elements);

// Calls part(context, thread, begin, end) for `threads` contiguous parts of [0, units), whatever
// number of threads the runtime then grants. `threads` is of useful_threads.
void run_parts(int64_t threads, int64_t units,
               void (*part)(void* context, int64_t thread, int64_t begin, int64_t end),
               void* context);

// Memory aligned to 64 bytes; throws std::bad_alloc, which must not leave a part of run_parts. What a
// thread releases it keeps for the next call, up to 16 MiB: the system would take it back and map other
// pages, one by one, as they are written.
void* allocate(int64_t bytes);
[[noreturn]] void throw_bad_alloc();
void release(void* memory) noexcept;

}  // namespace pwm_fast
