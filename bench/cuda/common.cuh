// What the microbenchmarks share: one JSON line a result, memory, clocks, and an end to every wait.
//
// A program takes the number of the GPU and the name of a part, prints its figures line by line (so
// that a crash loses only what comes after it) and checks what it computed: a part that computed
// something else prints no figure.
#pragma once

#include <cuda_runtime.h>
#include <stdarg.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define CHECK(call) check((call), #call, __FILE__, __LINE__)

inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  const char* name = strrchr(file, '/');
  fprintf(stderr, "error: %s:%d: %s: %s\n", name ? name + 1 : file, line, call,
          cudaGetErrorString(status));
  _exit(1);  // after a trap the runtime's own cleaning up would fail as well
}

// --- results -------------------------------------------------------------------------------------

// Names and reasons are the programs' own: no quotes, no backslashes.
inline void print_row(const char* name, const char* value, const char* unit, const char* reason) {
  printf("{\"name\": \"%s\", \"value\": %s, \"unit\": \"%s\"%s%s%s}\n", name, value, unit,
         reason ? ", \"reason\": \"" : "", reason ? reason : "", reason ? "\"" : "");
  fflush(stdout);
}
inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof buffer, format, list);
  va_end(list);
  return buffer;
}
inline void row(const std::string& name, double value, const char* unit) {
  print_row(name.c_str(), text("%.6g", value).c_str(), unit, nullptr);
}
// What this GPU has not got.
inline void absent(const std::string& name, const std::string& reason) {
  print_row(name.c_str(), "null", "", ("absent: " + reason).c_str());
}
// A result that is not what it must be: its time says nothing.
inline void failed(const std::string& name, const std::string& reason) {
  print_row(name.c_str(), "null", "", ("failed: " + reason).c_str());
}

// --- the program ---------------------------------------------------------------------------------

// Seconds after which it ends itself: nobody else would if what started it was killed.
constexpr unsigned whole_program = 25;

struct Machine {
  int device = 0;
  std::string part;
  cudaDeviceProp is{};

  bool has_clusters() const { return is.major >= 9; }
};

inline Machine start(int argc, char** argv) {
  alarm(whole_program);
  if (argc != 3) {
    fprintf(stderr, "error: usage: %s DEVICE PART\n", argv[0]);
    exit(2);
  }
  Machine machine;
  machine.device = atoi(argv[1]);
  machine.part = argv[2];
  CHECK(cudaSetDevice(machine.device));
  CHECK(cudaGetDeviceProperties(&machine.is, machine.device));
  return machine;
}
inline int unknown(const Machine& machine) {
  fprintf(stderr, "error: there is no part %s\n", machine.part.c_str());
  return 2;
}

// --- memory --------------------------------------------------------------------------------------

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count;

  explicit Buffer(size_t n) : count(n) {
    CHECK(cudaMalloc(&data, n * sizeof(T)));
    CHECK(cudaMemset(data, 0, n * sizeof(T)));
  }
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
    CHECK(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }

  std::vector<T> host() const {
    std::vector<T> found(count);
    CHECK(cudaMemcpy(found.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return found;
  }
};

// Words that differ everywhere, so that what lands in a wrong place shows.
__host__ __device__ inline uint32_t word(uint32_t place, uint32_t who = 0) {
  uint32_t x = place * 0x9E3779B9u + who * 0x85EBCA6Bu + 1u;
  x ^= x >> 15;
  return x * 0x2C1B3C6Du;
}

// --- time ----------------------------------------------------------------------------------------

template <class T>
T median(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Median seconds of what a function puts on a stream, after one call that warms up.
template <class Call>
double seconds(Call call, int rounds = 7, cudaStream_t stream = nullptr) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> found;
  for (int i = 0; i <= rounds; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    call();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaGetLastError());
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i > 0) found.push_back(milliseconds);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return 1e-3 * median(found);
}

// Median over several launches of the slowest block's cycles; `cycles` has one of each block.
template <class Call>
double slowest(Call call, const Buffer<long long>& cycles, int rounds = 7) {
  std::vector<long long> found;
  for (int i = 0; i <= rounds; ++i) {
    call();
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    const std::vector<long long> all = cycles.host();
    if (i > 0) found.push_back(*std::max_element(all.begin(), all.end()));
  }
  return double(median(found));
}

// A kernel gives up after about a second, which ends the program with an error.
constexpr long long patience = 1500000000;  // cycles

__device__ inline void give_up_after(long long begin) {
  if (clock64() - begin > patience) __trap();
}

// --- flags in global memory ----------------------------------------------------------------------

__device__ inline uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ inline void store_release(uint32_t* at, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ inline void add_release(uint32_t* at, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ inline void wait_for(const uint32_t* at, uint32_t value) {
  const long long begin = clock64();
  while (load_acquire(at) < value) give_up_after(begin);
}
