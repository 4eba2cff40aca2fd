// The list of tensors that the ESNR kernels work through, as 64-bit words in the GPU's memory.
#pragma once

#include <stdint.h>

#include "esnr_math.h"

namespace pwm_fast {
namespace esnr {

// Words: the first chunk of every tensor and the number of chunks [tensors + 1]; their sizes and
// whether all their rows are aligned for vectors [tensors]; the addresses of their rows
// [tensors, rows].
struct Table {
  const int64_t* words;
  int64_t tensors, rows, chunk;  // chunk: elements of a chunk

  static int64_t count(int64_t tensors, int64_t rows) { return 3 * tensors + 1 + tensors * rows; }

  PWM_FAST_BOTH int64_t first(int64_t t) const { return words[t]; }
  PWM_FAST_BOTH int64_t size(int64_t t) const { return words[tensors + 1 + t]; }
  PWM_FAST_BOTH bool aligned(int64_t t) const { return words[2 * tensors + 1 + t] != 0; }
  PWM_FAST_BOTH const int64_t* addresses(int64_t t) const {
    return words + 3 * tensors + 1 + t * rows;
  }

  // Of a chunk: an empty tensor has none.
  PWM_FAST_BOTH int64_t tensor_of(int64_t c) const {
    int64_t low = 0, high = tensors;  // first(low) <= c < first(high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first(middle) <= c ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace esnr
}  // namespace pwm_fast
