// ESNR of a list of tensors: what is to be done, whoever does it, a GPU or its emulation.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/esnr_math.h"

namespace pwm_fast {

// Types of gradients; the first two are those of the CPU kernels.
enum EsnrType : int64_t { esnr_fp32 = 0, esnr_bf16 = 1, esnr_fp16 = 2 };

struct EsnrCall {
  esnr::Task task;
  int64_t type, samples, tensors;
  const int64_t* rows;   // addresses [rows, tensors]
  const int64_t* sizes;  // elements [tensors]
  double* squares;       // of update and result
  double *signal, *noise;
  std::int64_t* workspace;  // of esnr_workspace_words, where the kernels run

  std::int64_t row_count() const;
};

// Elements of a chunk: as many as leave enough of them for a large GPU. By the sizes alone, so that
// the order of summation, and with it every bit of the result, is the same on all GPUs.
std::int64_t esnr_chunk(const std::int64_t* sizes, std::int64_t tensors);
std::int64_t esnr_chunks(const std::int64_t* sizes, std::int64_t tensors);

// 64-bit words that a call needs where it runs: the table, then two doubles a chunk.
std::int64_t esnr_workspace_words(const std::int64_t* sizes, std::int64_t tensors,
                                  std::int64_t rows);

// The words of esnr::Table.
std::vector<std::int64_t> esnr_table(const EsnrCall& call);

}  // namespace pwm_fast
