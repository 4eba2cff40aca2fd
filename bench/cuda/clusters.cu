// How many clusters run at once, and a small kernel that compute-sanitizer can be tried on.
//
//   count   clusters of 4, 8 and 16 blocks with 512 threads and 200 KB of shared memory each
//   right   blocks of a cluster exchange numbers in every way that the project uses
//   wrong   the same, and a store beyond the end of an allocation, which a sanitizer must find
#include "cluster.cuh"

constexpr int threads = 512, shared = 200 * 1024;

// Every block waits until all have begun, so it ends only if all of them run at once.
__global__ void __launch_bounds__(threads, 1) together(uint32_t* begun, uint32_t* met) {
  if (threadIdx.x != 0) return;
  add_release(begun, 1);
  const long long begin = clock64();
  while (load_acquire(begun) < gridDim.x && clock64() - begin < patience / 8) {
  }
  met[blockIdx.x] = load_acquire(begun) == gridDim.x;
}

static void count(int size, const Machine& machine) {
  const std::string name = text("clusters of %d at once", size);
  if (!machine.has_clusters()) return absent(name, "clusters need sm_90");
  CHECK(cudaFuncSetAttribute(together, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  const int clusters = at_once(together, threads, size, shared), blocks = clusters * size;
  if (clusters == 0) return row(name, 0, "clusters");
  Buffer<uint32_t> begun(1), met(blocks);
  launch_clusters(together, blocks, threads, size, shared, begun.data, met.data);
  CHECK(cudaDeviceSynchronize());
  const std::vector<uint32_t> found = met.host();
  const auto alone = std::count(found.begin(), found.end(), 0u);
  if (alone) return failed(name, text("%d of %d blocks did not meet the others", int(alone), blocks));
  row(name, clusters, "clusters");
}

constexpr int small = 4, lanes = 128;  // blocks of a small cluster, threads of a block

__global__ void exchange(uint32_t* out, int beyond) {
#if HAS_CLUSTERS
  __shared__ alignas(16) uint32_t box[lanes], came[lanes];
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t me = rank_in_cluster(), next = (me + 1) % small, lane = threadIdx.x;
  const uint32_t here = shared_address(&barrier);
  if (lane == 0) {
    init_barrier(here);
    expect(here, sizeof came);
  }
  box[lane] = word(lane, me);
  cluster_sync();
  const uint32_t loaded = load_in(address_in(shared_address(&box[lane]), next));
  store_async(address_in(shared_address(&came[lane]), next), loaded, address_in(here, next));
  wait(here, 0);
  out[blockIdx.x * lanes + lane] = came[lane];  // what the block before read of this one
  if (beyond && blockIdx.x == 0 && lane == 0) out[gridDim.x * lanes] = 1;
  cluster_sync();
#endif
}

static void toy(const Machine& machine, int beyond) {
  const char* name = "toy cluster kernel";
  if (!machine.has_clusters()) return absent(name, "clusters need sm_90");
  const int blocks = 2 * small;
  Buffer<uint32_t> out(size_t(blocks) * lanes);
  launch_clusters(exchange, blocks, lanes, small, 0, out.data, beyond);
  CHECK(cudaDeviceSynchronize());
  const std::vector<uint32_t> found = out.host();
  int bad = 0;
  for (int i = 0; i < blocks * lanes; ++i) bad += found[i] != word(i % lanes, i / lanes % small);
  if (bad) return failed(name, text("%d of %d words are wrong", bad, blocks * lanes));
  row(name, 1, "");
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  if (machine.part == "count") {
    for (int size : {4, 8, 16}) count(size, machine);
  } else if (machine.part == "right" || machine.part == "wrong") {
    toy(machine, machine.part == "wrong");
  } else {
    return unknown(machine);
  }
  return 0;
}
