#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace pwm_fast {
namespace {

constexpr int64_t grain = 16384;  // elements a thread: below it, waking a thread costs more

// libgomp's entry for `#pragma omp parallel`, which Intel's and LLVM's runtimes have too.
void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*thread_number)() = nullptr;
int (*team_size)() = nullptr;
int (*in_parallel)() = nullptr;

struct Team {
  int64_t threads, units;
  void (*part)(void*, int64_t, int64_t, int64_t);
  void* context;
};

void run_part(const Team& team, int64_t index) {
  team.part(team.context, index, team.units * index / team.threads,
            team.units * (index + 1) / team.threads);
}

void run_member(void* data) {
  const Team& team = *static_cast<const Team*>(data);
  const int64_t stride = team_size();
  for (int64_t index = thread_number(); index < team.threads; index += stride) {
    run_part(team, index);
  }
}

template <class Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

bool set_openmp(const char* path) {
  gomp_parallel = nullptr;
  // NOLOAD: a second runtime in a process means two pools of threads, and crashes with some.
  // An empty path would be the program itself.
  void* library = *path == '\0' ? nullptr : dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  decltype(gomp_parallel) parallel = nullptr;
  const bool found = look_up(library, "omp_get_thread_num", thread_number) &&
                     look_up(library, "omp_get_num_threads", team_size) &&
                     look_up(library, "omp_in_parallel", in_parallel) &&
                     look_up(library, "GOMP_parallel", parallel);
  if (found) gomp_parallel = parallel;
  return found;
}

int64_t useful_threads(int64_t threads, int64_t units, int64_t elements) {
  const int64_t useful = std::min({threads, units, elements / grain});
  if (useful <= 1 || gomp_parallel == nullptr || in_parallel()) return 1;
  return useful;
}

void run_parts(int64_t threads, int64_t units,
               void (*part)(void* context, int64_t thread, int64_t begin, int64_t end),
               void* context) {
  Team team = {threads, units, part, context};
  if (threads == 1) {
    if (units > 0) run_part(team, 0);
  } else {
    gomp_parallel(run_member, &team, unsigned(threads), 0);
  }
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<size_t>(size_t(bytes), 1)) != 0) throw_bad_alloc();
  return memory;
}

void throw_bad_alloc() { throw std::bad_alloc(); }

void release(void* memory) noexcept { free(memory); }

}  // namespace pwm_fast
