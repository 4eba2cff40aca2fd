// Clusters, barriers that count bytes, and asynchronous copies between blocks: sm_90 and later.
#pragma once

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif

// How a grid of clusters is launched; not to be copied, for it points into itself.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int blocks, int threads, int size, int shared) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

template <class Kernel>
void allow(Kernel kernel, int shared) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

// Clusters of a kernel that run at once.
template <class Kernel>
int at_once(Kernel kernel, int threads, int size, int shared) {
  const ClusterLaunch launch(size, threads, size, shared);
  allow(kernel, shared);
  int clusters = 0;
  CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
  return clusters;
}

template <class... Wanted, class... Given>
void launch_clusters(void (*kernel)(Wanted...), int blocks, int threads, int size, int shared,
                     Given... arguments) {
  const ClusterLaunch launch(blocks, threads, size, shared);
  allow(kernel, shared);
  CHECK(cudaLaunchKernelEx(&launch.config, kernel, Wanted(arguments)...));
}

#if HAS_CLUSTERS

// Volatile: the compiler would rather form such an address again, in the middle of what is timed.
__device__ inline uint32_t shared_address(const void* at) {
  uint32_t address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(uint32_t(__cvta_generic_to_shared(at))));
  return address;
}
__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks; what was written before is seen after.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// The same place in another block of the cluster.
__device__ inline uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ inline uint32_t load_in(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// --- barriers ------------------------------------------------------------------------------------

__device__ inline void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One phase: this arrival, and so many bytes that asynchronous stores bring. They may come first.
__device__ inline void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Acquires for this block alone, as CUTLASS does: what was brought lies in its own shared memory, and
// a wider scope would empty the first-level cache each time.
__device__ inline bool ended(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  if (ended(barrier, parity)) return;
  const long long begin = clock64();
  while (!ended(barrier, parity)) give_up_after(begin);
}

// --- asynchronous stores and copies --------------------------------------------------------------

// Both addresses are of one block of the cluster (address_in).
__device__ inline void store_async(uint32_t to, uint32_t value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
      "r"(value), "r"(barrier)
      : "memory");
}
__device__ inline void store_async(uint32_t to, uint4 value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], "
      "{%1, %2, %3, %4}, [%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}
// What ordinary stores wrote is there for asynchronous copies that are issued afterwards.
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ inline void copy_between_blocks(uint32_t to, uint32_t from, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ inline void copy_from_global(uint32_t to, const void* from, uint32_t bytes,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// To the same place of every block in `mask`, each of whose barriers counts the bytes.
__device__ inline void copy_to_all(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                   uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}

#endif  // HAS_CLUSTERS
