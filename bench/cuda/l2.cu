// What multiprocessors read from L2, and a flag to and fro through it.
//
//   loads   16-byte loads of 1024 threads a multiprocessor
//   bulk    cp.async.bulk into shared memory, 8 copies of 16 KB in flight
//   flag    st.release and ld.acquire between two blocks
#include "cluster.cuh"

constexpr int mebi = 1 << 20;

// The tiles of a set that a block reads, over and over. Owned: in every pass each tile belongs to one
// block, and to the next block in the next pass, so that no first-level cache ever helps and every
// tile is read once a pass. Whole: the block reads all of them, beginning at its own.
constexpr int tile_bytes = 16 * 1024;

struct Walk {
  int owners, tiles_each;  // tiles in all: their product
  int owner, place;

  __device__ Walk(int owners, int tiles_each)
      : owners(owners),
        tiles_each(tiles_each),
        owner(owners > 1 ? blockIdx.x : 0),
        place(owners > 1 ? 0 : blockIdx.x % tiles_each) {}
  __device__ int next() {
    const int tile = owner + place * owners;
    if (++place == tiles_each) {
      place = 0;
      if (++owner == owners) owner = 0;
    }
    return tile;
  }
};

constexpr int load_threads = 1024, load_ahead = 4;
static_assert(load_threads * 16 == tile_bytes, "a load of every thread is a tile");

__global__ void __launch_bounds__(load_threads)
    read_loads(const uint4* data, int owners, int tiles_each, int visits, uint32_t* sums,
               long long* cycles) {
  const long long begin = clock64();
  Walk walk(owners, tiles_each);
  uint32_t sum = 0;
  for (int i = 0; i < visits; i += load_ahead) {
    uint4 x[load_ahead];
#pragma unroll
    for (int j = 0; j < load_ahead; ++j) {
      const uint4* from = data + size_t(walk.next()) * (tile_bytes / 16) + threadIdx.x;
      asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[j].x), "=r"(x[j].y), "=r"(x[j].z), "=r"(x[j].w)
                   : "l"(from));
    }
#pragma unroll
    for (int j = 0; j < load_ahead; ++j) sum += x[j].x + x[j].y + x[j].z + x[j].w;
  }
  atomicAdd(sums + blockIdx.x, sum);
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
}

constexpr int bulk_stages = 8, bulk_threads = 32, bulk_shared = bulk_stages * tile_bytes;
constexpr int bulk_every = 128;  // bytes of which one word is looked at: not to slow the copies down

__global__ void __launch_bounds__(bulk_threads)
    read_bulk(const uint4* data, int owners, int tiles_each, int visits, uint32_t* sums,
              long long* cycles) {
#if HAS_CLUSTERS
  extern __shared__ __align__(128) uint8_t stage[];
  __shared__ alignas(8) uint64_t full[bulk_stages];
  const int lane = threadIdx.x;
  const uint32_t barriers = shared_address(full), stages = shared_address(stage);
  Walk walk(owners, tiles_each);
  const auto fetch = [&](int at) {  // by one thread
    expect(barriers + at * 8, tile_bytes);
    copy_from_global(stages + at * tile_bytes, data + size_t(walk.next()) * (tile_bytes / 16),
                     tile_bytes, barriers + at * 8);
  };
  if (lane == 0) {
    for (int s = 0; s < bulk_stages; ++s) init_barrier(barriers + s * 8);
    fence_async_shared();
  }
  __syncwarp();
  const long long begin = clock64();
  if (lane == 0) {
    for (int s = 0; s < bulk_stages; ++s) fetch(s);
  }
  uint32_t sum = 0;
  for (int i = 0; i < visits; ++i) {
    const int s = i % bulk_stages;
    wait(barriers + s * 8, i / bulk_stages & 1);
#pragma unroll
    for (int at = 0; at < tile_bytes; at += bulk_every * bulk_threads) {
      sum += *reinterpret_cast<const uint32_t*>(stage + s * tile_bytes + at + lane * bulk_every);
    }
    __syncwarp();
    if (lane == 0 && i + bulk_stages < visits) fetch(s);
  }
  atomicAdd(sums + blockIdx.x, sum);
  __syncwarp();
  if (lane == 0) cycles[blockIdx.x] = clock64() - begin;
#endif
}

enum Share { owned, whole };
struct Reading {
  double bytes_a_second, bytes_a_cycle;  // of all blocks; of the slowest one
  std::string wrong;
};

static Reading read(bool bulk, const Buffer<uint32_t>& data, const std::vector<uint32_t>& words,
                    size_t size, int blocks, Share share) {
  const int owners = share == owned ? blocks : 1;
  const int tiles_each = int((size + owners * tile_bytes / 2) / tile_bytes / owners);
  const int passes = load_ahead * std::max(1, 64 * mebi / tile_bytes / tiles_each / load_ahead);
  const int visits = passes * tiles_each;
  Buffer<uint32_t> sums(blocks);
  Buffer<long long> cycles(blocks);
  const auto* from = reinterpret_cast<const uint4*>(data.data);
  uint32_t calls = 0;
  const double time = seconds([&] {
    ++calls;
    if (bulk) {
      read_bulk<<<blocks, bulk_threads, bulk_shared>>>(from, owners, tiles_each, visits, sums.data,
                                                       cycles.data);
    } else {
      read_loads<<<blocks, load_threads>>>(from, owners, tiles_each, visits, sums.data,
                                           cycles.data);
    }
  });
  uint32_t found = 0, once = 0;
  for (uint32_t sum : sums.host()) found += sum;
  const size_t count = size_t(owners) * tiles_each * tile_bytes / 4;
  for (size_t i = 0; i < count; i += bulk ? bulk_every / 4 : 1) once += words[i];
  const uint32_t wanted = once * passes * (share == owned ? 1 : blocks) * calls;
  const std::vector<long long> all = cycles.host();
  const double bytes = double(visits) * tile_bytes;
  Reading reading{bytes * blocks / time, bytes / *std::max_element(all.begin(), all.end()), ""};
  if (found != wanted) reading.wrong = text("the sum of what was read is %u, not %u", found, wanted);
  return reading;
}

static void bandwidth(bool bulk, const Machine& machine) {
  const char* by = bulk ? " by TMA" : "";
  if (bulk && !machine.has_clusters()) return absent("L2 read by TMA", "TMA needs sm_90");
  const int all = machine.is.multiProcessorCount;
  if (bulk) {
    CHECK(cudaFuncSetAttribute(read_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               bulk_shared));
  }
  std::vector<uint32_t> words(64 * mebi / 4);  // more than 56: sets are rounded to whole tiles
  for (size_t i = 0; i < words.size(); ++i) words[i] = word(uint32_t(i));
  Buffer<uint32_t> data(words);
  const auto put = [](const std::string& name, const Reading& r, double value, const char* unit) {
    r.wrong.empty() ? row(name, value, unit) : failed(name, r.wrong);
  };
  for (int size : {12, 56}) {
    const Reading r = read(bulk, data, words, size_t(size) * mebi, all, owned);
    put(text("L2 read%s, %d MB", by, size), r, r.bytes_a_second / 1e12, "TB/s");
    if (size == 12) {
      put(text("L2 read%s by each SM", by), r, r.bytes_a_second / all / 1e9, "GB/s");
      put(text("L2 read%s by each SM, a cycle", by), r, r.bytes_a_cycle, "B");
    }
  }
  const Reading same = read(bulk, data, words, mebi, all, whole);
  put(text("L2 read%s, the same 1 MB by all", by), same, same.bytes_a_second / 1e12, "TB/s");
  const Reading one = read(bulk, data, words, 4 * mebi, 1, whole);
  put(text("L2 read%s by one SM", by), one, one.bytes_a_second / 1e9, "GB/s");
  put(text("L2 read%s by one SM, a cycle", by), one, one.bytes_a_cycle, "B");
}

// --- a flag --------------------------------------------------------------------------------------

__global__ void flag(uint32_t* flags, uint32_t rounds, uint32_t* where) {
  const uint32_t me = blockIdx.x;
  uint32_t *mine = flags + 32 * me, *other = flags + 32 * (1 - me);  // lines of their own
  asm volatile("mov.u32 %0, %%smid;" : "=r"(where[me]));
  for (uint32_t i = 1; i <= rounds; ++i) {
    if (me == 0) store_release(mine, i);
    wait_for(other, i);
    if (me == 1) store_release(mine, i);
  }
}

static void flags(const Machine& machine) {
  const char* name = "flag round trip, st.release and ld.acquire";
  uint32_t rounds = 5000;
  const int apart = int(machine.is.sharedMemPerBlockOptin);  // so that no SM holds both blocks
  CHECK(cudaFuncSetAttribute(flag, cudaFuncAttributeMaxDynamicSharedMemorySize, apart));
  Buffer<uint32_t> state(64), where(2);
  void* arguments[] = {&state.data, &rounds, &where.data};
  const double time = seconds([&] {
    CHECK(cudaMemsetAsync(state.data, 0, 64 * sizeof(uint32_t)));
    CHECK(cudaLaunchCooperativeKernel(flag, dim3(2), dim3(1), arguments, size_t(apart), nullptr));
  });
  const std::vector<uint32_t> last = state.host(), sm = where.host();
  if (last[0] != rounds || last[32] != rounds) {
    failed(name, text("%u and %u of %u rounds", last[0], last[32], rounds));
  } else if (sm[0] == sm[1]) {
    failed(name, text("both blocks ran on SM %u", sm[0]));
  } else {
    row(name, 1e6 * time / rounds, "µs");
  }
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  if (machine.part == "loads" || machine.part == "bulk") {
    bandwidth(machine.part == "bulk", machine);
  } else if (machine.part == "flag") {
    flags(machine);
  } else {
    return unknown(machine);
  }
  return 0;
}
