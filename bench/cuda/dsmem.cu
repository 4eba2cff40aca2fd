// Shared memory of other blocks in a cluster of 8.
//
//   hop            one number to another block and its answer: st.async and a barrier that counts bytes
//   store          every block gives its eighth to all: st.async from registers,
//   copy           cp.async.bulk from shared memory to shared memory,
//   multicast      through L2: written, then read once by TMA for all eight,
//   loads          through L2: written, a flag in L2, then read by ordinary loads of every block
#include "cluster.cuh"

constexpr int size = 8, threads = 512;

// --- one hop -------------------------------------------------------------------------------------

// Thread 0 of block 0 and of block `partner` send a number to and fro, each time one more.
__global__ void hop(int partner, int rounds, long long* cycles, uint32_t* last) {
#if HAS_CLUSTERS
  __shared__ alignas(8) uint64_t barrier;
  __shared__ uint32_t box;
  const uint32_t me = rank_in_cluster();
  const uint32_t here = shared_address(&barrier), place = shared_address(&box);
  if (threadIdx.x == 0) init_barrier(here);
  cluster_sync();
  if (threadIdx.x == 0 && (me == 0 || me == partner)) {
    const uint32_t other = me == 0 ? partner : 0;
    const uint32_t there = address_in(place, other), signal = address_in(here, other);
    uint32_t value = 0;
    if (me != 0) expect(here, sizeof box);
    const long long begin = clock64();
#pragma unroll 1
    for (int i = 0; i < rounds; ++i) {
      if (me == 0) {
        store_async(there, value + 1, signal);
        expect(here, sizeof box);
      }
      wait(here, i & 1);
      value = load_shared(place);
      if (me != 0) {
        store_async(there, value + 1, signal);
        if (i + 1 < rounds) expect(here, sizeof box);
      }
    }
    if (me == 0) {
      *cycles = clock64() - begin;
      *last = value;
    }
  }
  cluster_sync();  // until then the others' shared memory must exist
#endif
}

// Loads of another block's shared memory, each at the place that the one before gave.
__global__ void chase(int partner, int steps, long long* cycles, uint32_t* last) {
#if HAS_CLUSTERS
  __shared__ uint32_t following[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) following[i] = (i * 4 + 37 * 4) % 1024;
  cluster_sync();
  if (threadIdx.x == 0 && rank_in_cluster() == 0) {
    const uint32_t there = address_in(shared_address(following), partner);
    uint32_t at = 0;
    const long long begin = clock64();
#pragma unroll 8
    for (int i = 0; i < steps; ++i) at = load_in(there + at);
    *cycles = clock64() - begin;
    *last = at;
  }
  cluster_sync();
#endif
}

static void latencies() {
  constexpr int rounds = 4000;
  Buffer<long long> cycles(1);
  Buffer<uint32_t> last(1);
  std::vector<double> hops, loads;
  for (int partner = 1; partner < size; ++partner) {
    auto there_and_back = [&] {
      launch_clusters(hop, size, 32, size, 0, partner, rounds, cycles.data, last.data);
    };
    hops.push_back(slowest(there_and_back, cycles, 3) / (2 * rounds));
    if (last.host()[0] != 2 * rounds) {
      failed("DSMEM hop", text("%u numbers came of %d", last.host()[0], 2 * rounds));
      return;
    }
    auto follow = [&] {
      launch_clusters(chase, size, 32, size, 0, partner, rounds, cycles.data, last.data);
    };
    loads.push_back(slowest(follow, cycles, 3) / rounds);
    if (last.host()[0] != 37u * 4 * rounds % 1024) {
      failed("DSMEM load", text("the last place is %u", last.host()[0]));
      return;
    }
  }
  row("DSMEM load", median(loads), "cycles");
  row("DSMEM hop", median(hops), "cycles");
  row("DSMEM hop, slowest pair", *std::max_element(hops.begin(), hops.end()), "cycles");
}

// --- all-gather ----------------------------------------------------------------------------------

enum Way { store, copy, multicast, loads };

// Round i gives every block the slices of all. A block's next slice is its right neighbour's of this
// round plus one, so no round can begin before the last has ended, and what is there in the end tells
// whether all of them were right. Two sets of buffers: a block that has gathered round i knows that
// every other has read round i - 1 and sent round i, so it may write where round i - 1 stood.
template <Way way, int bytes>
__global__ void __launch_bounds__(threads)
    gather(int rounds, uint4* l2, uint32_t* flags, long long* cycles, uint32_t* wrong) {
#if HAS_CLUSTERS
  constexpr int slice = bytes / size, pieces = slice / 16, share = size * pieces / threads;
  static_assert(share * threads * 16 == bytes && pieces <= threads, "every thread has its share");
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const gathered = dynamic;             // [2][size][slice]
  uint8_t* const staged = dynamic + 2 * bytes;   // [2][slice], of `copy` alone
  __shared__ alignas(8) uint64_t barriers[2];
  const uint32_t me = rank_in_cluster(), next = (me + 1) % size;
  const int thread = threadIdx.x, cluster = blockIdx.x / size;
  uint4* const shared_by_l2 = l2 + size_t(cluster) * 2 * size * pieces;
  uint32_t* const flag = flags + cluster * 32;
  if (thread < 2) init_barrier(shared_address(&barriers[thread]));
  cluster_sync();

  const auto piece = [&](uint32_t who, int k) {  // of round 0
    const uint32_t at = 4 * k;
    return make_uint4(word(at, who), word(at + 1, who), word(at + 2, who), word(at + 3, who));
  };
  const auto following = [&](int i, int k) {  // of this block's slice in round i
    if (i == 0) return piece(me, k);
    const uint8_t* from = gathered + ((i - 1) & 1) * bytes + next * slice + k * 16;
    uint4 x = *reinterpret_cast<const uint4*>(from);
    ++x.x, ++x.y, ++x.z, ++x.w;
    return x;
  };

  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
    const int set = i & 1, parity = i >> 1 & 1;
    uint8_t* const to = gathered + set * bytes;
    const uint32_t barrier = shared_address(&barriers[set]);
    const uint32_t mine = shared_address(to + me * slice);
    uint4* const slot = shared_by_l2 + (set * size + me) * pieces;
    if (way != loads && thread == 0) expect(barrier, bytes);
    if constexpr (way == store) {
#pragma unroll
      for (int j = 0; j < share; ++j) {
        const int item = thread + j * threads, whose = item / pieces, k = item % pieces;
        store_async(address_in(mine + k * 16, whose), following(i, k), address_in(barrier, whose));
      }
    } else if constexpr (way == copy) {
      uint8_t* const from = staged + set * slice;
      if (thread < pieces) *reinterpret_cast<uint4*>(from + thread * 16) = following(i, thread);
      fence_async_shared();
      __syncthreads();
      if (thread < size) {
        copy_between_blocks(address_in(mine, thread), shared_address(from), slice,
                            address_in(barrier, thread));
      }
    } else {
      if (thread < pieces) __stcg(slot + thread, following(i, thread));
      if (way == multicast) fence_async_global();
      __syncthreads();
      if (way == multicast && thread == 0) {
        fence_async_global();
        copy_to_all(mine, slot, slice, barrier, (1 << size) - 1);
      } else if (way == loads) {
        if (thread == 0) {
          add_release(flag, 1);
          wait_for(flag, size * (i + 1));
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < share; ++j) {
          const int item = thread + j * threads;
          reinterpret_cast<uint4*>(to)[item] = __ldcg(shared_by_l2 + set * size * pieces + item);
        }
        __syncthreads();
      }
    }
    if constexpr (way != loads) wait(barrier, parity);
  }
  if (thread == 0) cycles[blockIdx.x] = clock64() - begin;

  uint32_t bad = 0;
  for (int i = rounds - 2; i < rounds; ++i) {
    for (int item = thread; item < size * pieces; item += threads) {
      const uint4 x = reinterpret_cast<const uint4*>(gathered + (i & 1) * bytes)[item];
      const uint4 y = piece((item / pieces + i) % size, item % pieces);
      const uint32_t more = i;
      bad += x.x != y.x + more || x.y != y.y + more || x.z != y.z + more || x.w != y.w + more;
    }
  }
  if (bad) atomicAdd(wrong, bad);
  cluster_sync();
#endif
}

template <Way way, int bytes>
void measure(const char* by) {
  constexpr int rounds = 1000, shared = 200 * 1024;  // one block a multiprocessor
  static_assert(2 * bytes + 2 * bytes / size <= shared, "its buffers");
  const int most = at_once(gather<way, bytes>, threads, size, shared);
  for (int clusters : {1, most}) {
    const int blocks = clusters * size;
    Buffer<uint4> l2(size_t(clusters) * 2 * bytes / 16);
    Buffer<uint32_t> flags(32 * clusters), wrong(1);
    Buffer<long long> cycles(blocks);
    const std::string name =
        text("all-gather of %d KB, %s%s", bytes / 1024, by, clusters == 1 ? "" : ", all clusters");
    const double time = slowest(
        [&] {
          CHECK(cudaMemset(flags.data, 0, flags.count * sizeof(uint32_t)));
          launch_clusters(gather<way, bytes>, blocks, threads, size, shared, rounds, l2.data,
                          flags.data, cycles.data, wrong.data);
        },
        cycles, 5);
    if (const uint32_t bad = wrong.host()[0]) {
      failed(name, text("%u pieces of 16 bytes are wrong", bad));
    } else {
      row(name, time / rounds, "cycles");
    }
  }
}

template <Way way>
void all_sizes(const char* by) {
  measure<way, 8 * 1024>(by);
  measure<way, 32 * 1024>(by);
  measure<way, 64 * 1024>(by);
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  const std::string& part = machine.part;
  if (!machine.has_clusters()) {
    absent("DSMEM, " + part, "clusters need sm_90");
  } else if (part == "hop") {
    latencies();
  } else if (part == "store") {
    all_sizes<store>("st.async");
  } else if (part == "copy") {
    all_sizes<copy>("cp.async.bulk");
  } else if (part == "multicast") {
    all_sizes<multicast>("L2 and TMA multicast");
  } else if (part == "loads") {
    all_sizes<loads>("L2 and loads");
  } else {
    return unknown(machine);
  }
  return 0;
}
