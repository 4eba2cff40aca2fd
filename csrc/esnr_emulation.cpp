#include "esnr_emulation.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "cuda/esnr_table.h"

namespace pwm_fast {
namespace {

using namespace esnr;

// As esnr.cu's, with plain loads: `aligned` says how, never what.
template <class T>
struct Rows {
  const int64_t* addresses;
  int64_t start, n, total_row;

  template <bool aligned>
  void read(int64_t row, int64_t i, float (&x)[width]) const {
    const T* from = reinterpret_cast<const T*>(addresses[row]) + start + i;
    for (int k = 0; k < width; ++k) x[k] = aligned || i + k < n ? to_float(from[k]) : 0.0f;
  }
  double* total(int64_t i) const {
    return reinterpret_cast<double*>(addresses[total_row]) + start + i;
  }
  template <bool aligned>
  void read_total(int64_t i, double (&x)[width]) const {
    for (int k = 0; k < width; ++k) x[k] = aligned || i + k < n ? total(i)[k] : 0.0;
  }
  template <bool aligned>
  void write_total(int64_t i, const double (&x)[width]) const {
    for (int k = 0; k < width; ++k) {
      if (aligned || i + k < n) total(i)[k] = x[k];
    }
  }
};

Sums in_block(Sums (&x)[threads]) {
  Sums of_warp[threads / lanes];
  for (int w = 0; w < threads / lanes; ++w) of_warp[w] = in_halves(x + w * lanes, lanes);
  return in_halves(of_warp, threads / lanes);
}

template <class T, class Work>
Sums block(const Table& table, const Work& work, int64_t c) {
  const int64_t t = table.tensor_of(c), start = (c - table.first(t)) * table.chunk;
  const int64_t n = std::min(table.chunk, table.size(t) - start);
  const Rows<T> rows = {table.addresses(t), start, n, table.rows - 1};
  Sums of_thread[threads];
  for (int i = 0; i < threads; ++i) {
    of_thread[i] = sums_of_thread(work, rows, n, table.aligned(t), i);
  }
  return in_block(of_thread);
}

template <class T>
Sums block(const EsnrCall& call, const Table& table, int64_t c) {
  if (call.task == Task::update) return block<T>(table, Update{}, c);
  if (call.task == Task::result) return block<T>(table, Result{1.0 / double(call.samples)}, c);
  if (call.samples <= 2) return block<T>(table, Moments<2>{call.samples}, c);
  if (call.samples <= 4) return block<T>(table, Moments<4>{call.samples}, c);
  if (call.samples <= 8) return block<T>(table, Moments<8>{call.samples}, c);
  return block<T>(table, Moments<held>{call.samples}, c);
}

std::vector<int64_t> in_some_order(int64_t count, std::uint64_t order) {
  std::vector<int64_t> indices(count);
  std::iota(indices.begin(), indices.end(), int64_t(0));
  if (order != 0) std::shuffle(indices.begin(), indices.end(), std::mt19937_64(order));
  return indices;
}

}  // namespace

void esnr_emulate(const EsnrCall& call, std::uint64_t order) {
  const std::vector<int64_t> words = esnr_table(call);
  std::copy(words.begin(), words.end(), call.workspace);
  const Table table = {call.workspace, call.tensors, call.row_count(),
                       esnr_chunk(call.sizes, call.tensors)};
  Sums* slots = reinterpret_cast<Sums*>(call.workspace + words.size());
  for (const int64_t c : in_some_order(words[call.tensors], order)) {
    slots[c] = call.type == esnr_fp32   ? block<float>(call, table, c)
               : call.type == esnr_bf16 ? block<Bfloat16>(call, table, c)
                                        : block<Half>(call, table, c);
  }
  for (const int64_t t : in_some_order(call.tensors, order)) {
    Sums of_thread[threads];
    for (int i = 0; i < threads; ++i) {
      of_thread[i] = sums_of_slots(slots, table.first(t), table.first(t + 1), i);
    }
    finish(call.task, in_block(of_thread), double(call.samples), t, call.squares, call.signal,
           call.noise);
  }
}

}  // namespace pwm_fast
