#include "esnr_plan.h"

#include "cuda/esnr_table.h"

namespace pwm_fast {

using std::int64_t;

int64_t EsnrCall::row_count() const {
  switch (task) {
    case esnr::Task::update: return 3;
    case esnr::Task::result: return 2;
    case esnr::Task::moments: break;
  }
  return samples;
}

int64_t esnr_chunk(const int64_t* sizes, int64_t tensors) {
  constexpr int64_t smallest = 4096, largest = 65536, wanted = 1024;
  int64_t elements = 0;
  for (int64_t t = 0; t < tensors; ++t) elements += sizes[t];
  int64_t chunk = smallest;
  while (chunk < largest && elements / (2 * chunk) >= wanted) chunk *= 2;
  return chunk;
}

int64_t esnr_chunks(const int64_t* sizes, int64_t tensors) {
  const int64_t chunk = esnr_chunk(sizes, tensors);
  int64_t chunks = 0;
  for (int64_t t = 0; t < tensors; ++t) chunks += (sizes[t] + chunk - 1) / chunk;
  return chunks;
}

int64_t esnr_workspace_words(const int64_t* sizes, int64_t tensors, int64_t rows) {
  return esnr::Table::count(tensors, rows) + 2 * esnr_chunks(sizes, tensors);
}

std::vector<int64_t> esnr_table(const EsnrCall& call) {
  const int64_t rows = call.row_count(), tensors = call.tensors;
  const int64_t chunk = esnr_chunk(call.sizes, tensors);
  const int64_t vector = esnr::width * (call.type == esnr_fp32 ? 4 : 2);
  std::vector<int64_t> words;
  words.reserve(esnr::Table::count(tensors, rows));
  words.push_back(0);
  for (int64_t t = 0; t < tensors; ++t) {
    words.push_back(words.back() + (call.sizes[t] + chunk - 1) / chunk);
  }
  words.insert(words.end(), call.sizes, call.sizes + tensors);
  for (int64_t t = 0; t < tensors; ++t) {
    bool aligned = true;
    for (int64_t r = 0; r < rows; ++r) {
      const bool running_sum = call.task != esnr::Task::moments && r == rows - 1;
      const int64_t bytes = running_sum ? 16 : vector;  // two fp64 numbers at a time
      aligned = aligned && call.rows[r * tensors + t] % bytes == 0;
    }
    words.push_back(aligned);
  }
  for (int64_t t = 0; t < tensors; ++t) {
    for (int64_t r = 0; r < rows; ++r) words.push_back(call.rows[r * tensors + t]);
  }
  return words;
}

}  // namespace pwm_fast
