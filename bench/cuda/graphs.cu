// From one kernel of a CUDA graph to the next, with ordinary and with programmatic edges.
//
//   plain          ordinary edges
//   programmatic   the next kernel starts while this one runs and waits for it itself
//
// Every kernel checks that all before it have written what they had to.
#include "common.cuh"

constexpr int nodes = 1000;

template <bool programmatic>
__global__ void node(uint32_t* done, uint32_t index, uint32_t* wrong) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (programmatic) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const uint32_t before = *done;
    if (before % nodes != index) atomicAdd(wrong, 1);
    *done = before + 1;
  }
}

// Edges of a graph that are programmatic.
static int programmatic_edges(cudaGraph_t graph) {
#if CUDART_VERSION >= 13000
#define GET_EDGES cudaGraphGetEdges
#else
#define GET_EDGES cudaGraphGetEdges_v2
#endif
#if CUDART_VERSION >= 12030
  size_t count = nodes;
  std::vector<cudaGraphNode_t> from(count), to(count);
  std::vector<cudaGraphEdgeData> edges(count);
  CHECK(GET_EDGES(graph, from.data(), to.data(), edges.data(), &count));
  edges.resize(count);
  return int(std::count_if(edges.begin(), edges.end(), [](const cudaGraphEdgeData& edge) {
    return edge.type == cudaGraphDependencyTypeProgrammatic;
  }));
#else
  return -1;
#endif
}

template <bool programmatic>
void chain(const std::string& name, int blocks, int threads) {
  Buffer<uint32_t> done(1), wrong(1);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (uint32_t i = 0; i < nodes; ++i) {
    CHECK(cudaLaunchKernelEx(&config, node<programmatic>, done.data, i, wrong.data));
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  const int edges = programmatic_edges(graph);
  cudaGraphExec_t run;
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  const double time = seconds([&] { CHECK(cudaGraphLaunch(run, stream)); }, 15, stream);
  const uint32_t ran = done.host()[0], bad = wrong.host()[0];
  if (bad || ran != 16 * nodes) {
    failed(name, text("%u of %u kernels ran out of order", bad, ran));
  } else if (edges >= 0 && edges != (programmatic ? nodes - 1 : 0)) {
    failed(name, text("%d of %d edges are programmatic", edges, nodes - 1));
  } else {
    row(name, 1e6 * time / nodes, "µs");
  }
  CHECK(cudaGraphExecDestroy(run));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

int main(int argc, char** argv) {
  const Machine machine = start(argc, argv);
  const int all = machine.is.multiProcessorCount;
  if (machine.part == "plain") {
    chain<false>("graph node, one warp", 1, 32);
    chain<false>("graph node, all SMs", all, 512);
  } else if (machine.part == "programmatic") {
    if (machine.is.major < 9) {
      absent("graph node, PDL", "programmatic launches need sm_90");
    } else {
      chain<true>("graph node, PDL", 1, 32);
      chain<true>("graph node, PDL, all SMs", all, 512);
    }
  } else {
    return unknown(machine);
  }
  return 0;
}
