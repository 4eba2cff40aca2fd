// Issue rates of the tensor cores with the left operand in registers, fp16 with fp32 sums.
//
//   wgmma   wgmma m64nNk16, N of 8 to 64: a weight slice of 64 x 512 in registers (sm_90a alone)
//   mma     mma.sync m16n8k16, on 1 to 16 warps of a multiprocessor
//
// The operands are small integers, so the result is known to the last bit.
#include "cluster.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

__host__ __device__ constexpr int left(int m, int k) { return (m * 7 + k * 3) % 5 - 2; }
__host__ __device__ constexpr int right(int k, int n) { return (k * 5 + n * 11) % 7 - 3; }

static int wrong_entries(const std::vector<float>& found, int m, int n, int depth, int times) {
  int bad = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int k = 0; k < depth; ++k) sum += left(i, k) * right(k, j);
      bad += found[size_t(i) * n + j] != float(sum * times);
    }
  }
  return bad;
}

__device__ inline uint32_t half_bits(int value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(float(value)));
  return bits;
}
__device__ inline uint32_t two_halves(int low, int high) {
  return half_bits(low) | half_bits(high) << 16;
}
// The part of 16 x 16 entries of the left operand that a thread holds, for both instructions.
__device__ inline void load_left(uint32_t (&a)[4], int row, int k) {
  const int lane = threadIdx.x % 32, m = row + lane / 4, at = k + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = m + j % 2 * 8, first = at + j / 2 * 8;
    a[j] = two_halves(left(i, first), left(i, first + 1));
  }
}

// --- wgmma ---------------------------------------------------------------------------------------

constexpr int depth = 512, steps = depth / 16;  // the slice of a layer that a block holds

#if HAS_WGMMA
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define WGMMA(n, sums, operands) \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" sums "}, " operands ", 1, 1, 1, 0;"

__device__ inline void wgmma(float (&d)[4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(WGMMA(8, "%0,%1,%2,%3", "{%4,%5,%6,%7}, %8") : D4(0) : A4, "l"(b));
}
__device__ inline void wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(WGMMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11}, %12") : D8(0) : A4, "l"(b));
}
__device__ inline void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(WGMMA(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15",
                     "{%16,%17,%18,%19}, %20")
               : D16(0)
               : A4, "l"(b));
}
__device__ inline void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(WGMMA(64,
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                     "{%32,%33,%34,%35}, %36")
               : D16(0), D16(16)
               : A4, "l"(b));
}
#endif

// A layer is `steps` instructions that follow one another; `alone`, each waits for the layer before.
template <int n, bool alone>
__global__ void __launch_bounds__(256, 1) layers(int times, float* out, long long* cycles) {
#if HAS_WGMMA
  extern __shared__ __align__(128) uint8_t operand[];
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  // Without swizzling: 8 x 8 entries are 128 bytes in a row, first all of N, then the other half of
  // the 16 of K, then the next 16.
  for (int i = threadIdx.x; i < depth * n; i += blockDim.x) {
    const int k = i / n, j = i % n;
    const int at = k / 16 * n * 32 + k % 16 / 8 * n * 16 + j / 8 * 128 + j % 8 * 16 + k % 8 * 2;
    *reinterpret_cast<uint16_t*>(operand + at) = uint16_t(half_bits(right(k, j)));
  }
  fence_async_shared();
  __syncthreads();
  const uint64_t along_k = n * 16 / 16, along_n = 128 / 16;
  const uint64_t b = (shared_address(operand) >> 4 & 0x3fff) | along_k << 16 | along_n << 32;
  uint32_t a[steps][4];
#pragma unroll
  for (int s = 0; s < steps; ++s) load_left(a[s], warp * 16, s * 16);
  float d[n / 2] = {};
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < times; ++i) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; ++s) wgmma(d, a[s], b + s * (n * 32 / 16));
    wgmma_commit();
    wgmma_wait<alone ? 0 : 1>();
  }
  wgmma_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  float* const to = out + (size_t(blockIdx.x) * 2 + group) * 64 * n;
#pragma unroll
  for (int j = 0; j < n / 2; ++j) {
    const int row = warp * 16 + lane / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
    to[row * n + column] = d[j];
  }
#endif
}

template <int n, bool alone>
void layer(const std::string& name, int groups, double per) {
  constexpr int times = 200, shared = depth * n * 2, blocks = 8;
  CHECK(cudaFuncSetAttribute(layers<n, alone>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  Buffer<float> out(size_t(blocks) * 2 * 64 * n);
  Buffer<long long> cycles(blocks);
  const double time = slowest(
      [&] { layers<n, alone><<<blocks, groups * 128, shared>>>(times, out.data, cycles.data); },
      cycles);
  const std::vector<float> all = out.host();
  int bad = 0;
  for (int i = 0; i < blocks * 2; ++i) {
    if (i % 2 >= groups) continue;
    const auto from = all.begin() + size_t(i) * 64 * n;
    bad += wrong_entries(std::vector<float>(from, from + 64 * n), 64, n, depth, times);
  }
  if (bad) return failed(name, text("%d of %d entries are wrong", bad, blocks * groups * 64 * n));
  row(name, time / times / per, "cycles");
}

template <int n>
void width() {
  layer<n, false>(text("wgmma RS m64n%dk16", n), 1, steps);
  layer<n, false>(text("wgmma RS m64n%dk16, two warpgroups", n), 2, 2 * steps);
  layer<n, true>(text("wgmma RS, layer of 64 x 512 by %d", n), 1, 1);
}

// --- mma.sync ------------------------------------------------------------------------------------

constexpr int mma_depth = 64;

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Every warp forms the same 16 high x 8 wide tiles, each a chain of its own.
template <int high, int wide>
__global__ void __launch_bounds__(512, 1) tiles(int times, float* out, long long* cycles) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t a[mma_depth / 16][high][4], b[mma_depth / 16][wide][2];
#pragma unroll
  for (int s = 0; s < mma_depth / 16; ++s) {
#pragma unroll
    for (int i = 0; i < high; ++i) load_left(a[s][i], i * 16, s * 16);
#pragma unroll
    for (int j = 0; j < wide; ++j) {
      const int column = j * 8 + lane / 4, k = s * 16 + lane % 4 * 2;
      b[s][j][0] = two_halves(right(k, column), right(k + 1, column));
      b[s][j][1] = two_halves(right(k + 8, column), right(k + 9, column));
    }
  }
  float d[high][wide][4] = {};
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int t = 0; t < times; ++t) {
#pragma unroll
    for (int s = 0; s < mma_depth / 16; ++s) {
#pragma unroll
      for (int i = 0; i < high; ++i) {
#pragma unroll
        for (int j = 0; j < wide; ++j) mma(d[i][j], a[s][i], b[s][j]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  float* const to = out + (size_t(blockIdx.x) * 16 + warp) * high * 16 * wide * 8;
#pragma unroll
  for (int i = 0; i < high; ++i) {
#pragma unroll
    for (int j = 0; j < wide; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i * 16 + lane / 4 + e / 2 * 8, column = j * 8 + lane % 4 * 2 + e % 2;
        to[row * wide * 8 + column] = d[i][j][e];
      }
    }
  }
}

template <int high, int wide>
void chains(const std::string& name, int warps) {
  constexpr int times = 500, blocks = 8, entries = high * 16 * wide * 8;
  Buffer<float> out(size_t(blocks) * 16 * entries);
  Buffer<long long> cycles(blocks);
  const double time = slowest(
      [&] { tiles<high, wide><<<blocks, warps * 32>>>(times, out.data, cycles.data); }, cycles);
  const std::vector<float> all = out.host();
  int bad = 0;
  for (int i = 0; i < blocks * 16; ++i) {
    if (i % 16 >= warps) continue;
    const auto from = all.begin() + size_t(i) * entries;
    const std::vector<float> one(from, from + entries);
    bad += wrong_entries(one, high * 16, wide * 8, mma_depth, times);
  }
  if (bad) return failed(name, text("%d of %d entries are wrong", bad, blocks * warps * entries));
  row(name, time / times / (mma_depth / 16 * high * wide * warps), "cycles");
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  if (machine.part == "wgmma") {
    if (machine.is.major != 9) {
      absent("wgmma RS", "only sm_90a has wgmma");
      return 0;
    }
    width<8>();
    width<16>();
    width<32>();
    width<64>();
  } else if (machine.part == "mma") {
    chains<1, 1>("mma.sync m16n8k16, one after another", 1);
    for (int warps : {4, 8, 16}) chains<2, 4>(text("mma.sync m16n8k16, %d warps", warps), warps);
  } else {
    return unknown(machine);
  }
  return 0;
}
