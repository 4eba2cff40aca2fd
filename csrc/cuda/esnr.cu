// Signal and noise of gradient samples on a GPU: one pass over the samples, centred, all tensors in
// one launch. esnr_math.h says what is computed; here are the loads, the blocks and the launches.
//
// A call is three kinds of kernels: the table of tensors written from kernel parameters, one block a
// chunk, one block a tensor. No copy from the host and no synchronisation, so a CUDA graph can
// capture it: the addresses become part of the graph.
#include "esnr.h"

#include <algorithm>

#include "esnr_table.h"
#include "guard.h"

namespace pwm_fast {
namespace esnr {
namespace {

// Kernel parameters hold 4 KB; captured by value, they need no memory of the host's at replay.
constexpr int words_at_once = 500;
struct Words {
  int64_t word[words_at_once];
};

__global__ void write_words(int64_t* to, int count, const __grid_constant__ Words words) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = words.word[i];
}

__device__ __forceinline__ void load(const float* from, float (&to)[width]) {
  const float4 x = __ldcs(reinterpret_cast<const float4*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void load(const double* from, double (&to)[width]) {
  const double2 x = __ldcs(reinterpret_cast<const double2*>(from));
  const double2 y = __ldcs(reinterpret_cast<const double2*>(from) + 1);
  to[0] = x.x, to[1] = x.y, to[2] = y.x, to[3] = y.y;
}
template <class T>  // of 16 bits
__device__ __forceinline__ void load(const T* from, float (&to)[width]) {
  const uint2 x = __ldcs(reinterpret_cast<const uint2*>(from));
  to[0] = to_float(T{uint16_t(x.x & 0xffffu)});
  to[1] = to_float(T{uint16_t(x.x >> 16)});
  to[2] = to_float(T{uint16_t(x.y & 0xffffu)});
  to[3] = to_float(T{uint16_t(x.y >> 16)});
}

// A chunk of a tensor's rows in memory. Read once, so past the caches (ld.global.cs).
template <class T>
struct Rows {
  const int64_t* addresses;
  int64_t start, n, total_row;

  template <bool aligned>
  __device__ __forceinline__ void read(int64_t row, int64_t i, float (&x)[width]) const {
    const T* from = reinterpret_cast<const T*>(__ldg(addresses + row)) + start + i;
    if (aligned) {
      load(from, x);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = i + k < n ? to_float(from[k]) : 0.0f;
    }
  }
  __device__ __forceinline__ double* total(int64_t i) const {
    return reinterpret_cast<double*>(__ldg(addresses + total_row)) + start + i;
  }
  template <bool aligned>
  __device__ __forceinline__ void read_total(int64_t i, double (&x)[width]) const {
    const double* from = total(i);
    if (aligned) {
      load(from, x);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = i + k < n ? from[k] : 0.0;
    }
  }
  template <bool aligned>
  __device__ __forceinline__ void write_total(int64_t i, const double (&x)[width]) const {
    double* to = total(i);
    if (aligned) {
      reinterpret_cast<double2*>(to)[0] = make_double2(x[0], x[1]);
      reinterpret_cast<double2*>(to)[1] = make_double2(x[2], x[3]);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (i + k < n) to[k] = x[k];
      }
    }
  }
};

template <int count>
__device__ __forceinline__ Sums in_warp(Sums x) {
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2) {
    const Sums other = {__shfl_down_sync(~0u, x.first, half), __shfl_down_sync(~0u, x.second, half)};
    x = x + other;
  }
  return x;
}

// Of all threads, in thread 0: as in_halves within warps and then over them.
__device__ __forceinline__ Sums in_block(Sums x) {
  constexpr int warps = threads / lanes;
  __shared__ Sums of_warp[warps];
  x = in_warp<lanes>(x);
  if (threadIdx.x % lanes == 0) of_warp[threadIdx.x / lanes] = x;
  __syncthreads();
  if (threadIdx.x < lanes) x = in_warp<warps>(of_warp[threadIdx.x % warps]);
  return x;
}

template <class T, class Work>
__global__ void __launch_bounds__(threads, Work::blocks)
    chunks(Table table, Work work, Sums* slots) {
  const int64_t c = blockIdx.x, t = table.tensor_of(c);
  const int64_t start = (c - table.first(t)) * table.chunk, rest = table.size(t) - start;
  const int64_t n = rest < table.chunk ? rest : table.chunk;
  const Rows<T> rows = {table.addresses(t), start, n, table.rows - 1};
  const Sums sums = in_block(sums_of_thread(work, rows, n, table.aligned(t), threadIdx.x));
  if (threadIdx.x == 0) slots[c] = sums;
}

__global__ void __launch_bounds__(threads)
    tensors(Table table, const Sums* slots, Task task, double samples, double* squares,
            double* signal, double* noise) {
  const int64_t t = blockIdx.x;
  const Sums sums =
      in_block(sums_of_slots(slots, table.first(t), table.first(t + 1), threadIdx.x));
  if (threadIdx.x == 0) finish(task, sums, samples, t, squares, signal, noise);
}

template <class T>
void launch_chunks(const EsnrCall& call, Table table, Sums* slots, unsigned blocks,
                   cudaStream_t stream) {
  if (call.task == Task::update) {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Update{}, slots);
  } else if (call.task == Task::result) {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Result{1.0 / double(call.samples)}, slots);
  } else if (call.samples <= 2) {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Moments<2>{call.samples}, slots);
  } else if (call.samples <= 4) {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Moments<4>{call.samples}, slots);
  } else if (call.samples <= 8) {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Moments<8>{call.samples}, slots);
  } else {
    chunks<T><<<blocks, threads, 0, stream>>>(table, Moments<held>{call.samples}, slots);
  }
}

}  // namespace
}  // namespace esnr

void esnr_launch(const EsnrCall& call, int device, std::uintptr_t stream_address) {
  using namespace esnr;
  if (call.tensors == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_address);
  cudaGetLastError();
  const std::vector<int64_t> words = esnr_table(call);
  const int64_t count = int64_t(words.size());
  for (int64_t done = 0; done < count; done += words_at_once) {
    Words part;
    const int many = int(std::min<int64_t>(words_at_once, count - done));
    std::copy_n(words.begin() + done, many, part.word);
    write_words<<<1, 128, 0, stream>>>(call.workspace + done, many, part);
    check_launch("the launch of esnr's table failed");
  }
  const Table table = {call.workspace, call.tensors, call.row_count(),
                       esnr_chunk(call.sizes, call.tensors)};
  Sums* slots = reinterpret_cast<Sums*>(call.workspace + count);
  const unsigned blocks = unsigned(words[call.tensors]);
  if (blocks > 0) {
    if (call.type == esnr_fp32) {
      launch_chunks<float>(call, table, slots, blocks, stream);
    } else if (call.type == esnr_bf16) {
      launch_chunks<Bfloat16>(call, table, slots, blocks, stream);
    } else {
      launch_chunks<Half>(call, table, slots, blocks, stream);
    }
    check_launch("the launch of esnr's chunks failed");
  }
  esnr::tensors<<<unsigned(call.tensors), threads, 0, stream>>>(
      table, slots, call.task, double(call.samples), call.squares, call.signal, call.noise);
  check_launch("the launch of esnr's sums failed");
}

}  // namespace pwm_fast
