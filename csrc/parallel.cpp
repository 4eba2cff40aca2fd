#include "parallel.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
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

// Before what allocate() returns.
struct alignas(64) Header {
  int64_t bytes;  // after it
};

// Blocks that a thread has released, the last one last. They are mapped on their own: in malloc's heap
// they would stand between what others free there.
class Kept {
 public:
  ~Kept() {
    for (int i = 0; i < count_; ++i) unmap(at(i));
    count_ = -1;  // threads may release memory while they end
  }
  static bool takes(int64_t bytes) { return bytes >= least && bytes <= most; }
  static void* map(int64_t bytes) {
    void* const memory = mmap(nullptr, sizeof(Header) + std::size_t(bytes), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
  }
  // The smallest that is large enough, and not more than twice as large.
  Header* take(int64_t bytes) {
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      const int64_t size = at(i)->bytes;
      if (size >= bytes && size <= 2 * bytes && (best < 0 || size < at(best)->bytes)) best = i;
    }
    return best < 0 ? nullptr : remove(best);
  }
  void put(Header* block) {
    if (count_ < 0) return unmap(block);
    while (count_ == int(blocks_.size()) || bytes_ + block->bytes > most) unmap(remove(0));
    blocks_[std::size_t(count_++)] = block;
    bytes_ += block->bytes;
  }

 private:
  // Smaller blocks come from malloc as fast.
  static constexpr int64_t least = int64_t(1) << 16, most = int64_t(1) << 24;
  static void unmap(Header* block) { munmap(block, sizeof(Header) + std::size_t(block->bytes)); }
  Header* at(int index) const { return blocks_[std::size_t(index)]; }
  Header* remove(int index) {
    Header* const block = at(index);
    std::copy(blocks_.begin() + index + 1, blocks_.begin() + count_, blocks_.begin() + index);
    --count_;
    bytes_ -= block->bytes;
    return block;
  }
  std::array<Header*, 8> blocks_;
  int count_ = 0;
  int64_t bytes_ = 0;
};
thread_local Kept kept;

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
  Header* block = Kept::takes(bytes) ? kept.take(bytes) : nullptr;
  if (block == nullptr) {
    void* memory = nullptr;
    if (Kept::takes(bytes)) {
      memory = Kept::map(bytes);
    } else if (posix_memalign(&memory, alignof(Header), sizeof(Header) + size_t(bytes)) != 0) {
      memory = nullptr;
    }
    if (memory == nullptr) throw_bad_alloc();
    block = new (memory) Header{bytes};
  }
  return block + 1;
}

void throw_bad_alloc() { throw std::bad_alloc(); }

void release(void* memory) noexcept {
  if (memory == nullptr) return;
  Header* const block = static_cast<Header*>(memory) - 1;
  if (Kept::takes(block->bytes)) return kept.put(block);
  free(block);
}

}  // namespace pwm_fast
