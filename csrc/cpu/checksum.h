#pragma once

#include <stdint.h>

namespace pwm_fast {

// One number for all bytes of `count` pieces of memory, and their order. Piece i is `rows` rows of
// `bytes` bytes, `stride` bytes apart.
struct Checksum {
  const int64_t* pieces;  // [count, 4]: address, rows, bytes, stride
  int64_t count;
  uint64_t* sum;
  int64_t threads;
};

}  // namespace pwm_fast
