// Mish in registers: elements a cycle and multiprocessor, with one exponential and one reciprocal.
//
//   rate   the only part
#include "common.cuh"

#include <cmath>

constexpr int threads = 1024, each = 4, rounds = 2000;

// y tanh(softplus(y)) as kernels/pointwise.py forms it, with the reciprocal alone of a division.
__device__ inline float mish(float y) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fminf(y, 20.0f) * 1.44269504f));
  const float n = e * (e + 2.0f);
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(n + 2.0f));
  return y * (n * r);
}

// y = mish(y) / 2 + x converges, so that errors do not add up and the result is known.
__global__ void __launch_bounds__(threads) repeat(const float* in, float* out, long long* cycles) {
  float x[each], y[each];
  const int first = (blockIdx.x * threads + threadIdx.x) * each;
#pragma unroll
  for (int j = 0; j < each; ++j) x[j] = y[j] = in[first + j];
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int j = 0; j < each; ++j) y[j] = fmaf(0.5f, mish(y[j]), x[j]);
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
#pragma unroll
  for (int j = 0; j < each; ++j) out[first + j] = y[j];
}

static double reference(double x) {
  double y = x;
  for (int i = 0; i < rounds; ++i) y = 0.5 * y * std::tanh(std::log1p(std::exp(y))) + x;
  return y;
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  if (machine.part != "rate") return unknown(machine);
  const int blocks = machine.is.multiProcessorCount;
  std::vector<float> in(size_t(blocks) * threads * each);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(int(word(uint32_t(i)) % 6001) - 3000) / 1000;
  Buffer<float> from(in), to(in.size());
  Buffer<long long> cycles(blocks);
  const double time = slowest(
      [&] { repeat<<<blocks, threads>>>(from.data, to.data, cycles.data); }, cycles);
  const std::vector<float> out = to.host();
  double worst = 0;
  for (size_t i = 0; i < out.size(); i += 997) {
    const double wanted = reference(in[i]), off = std::abs(out[i] - wanted);
    worst = std::max(worst, off / std::max(1.0, std::abs(wanted)));
  }
  if (!(worst < 1e-5)) {
    failed("Mish", text("its error is %.3g", worst));
  } else {
    row("Mish", double(threads) * each * rounds / time, "/clk/SM");
  }
  return 0;
}
