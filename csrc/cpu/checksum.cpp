// A checksum of tensors' bytes: whether weights are still those that a packed copy was made of.
//
// 64 lanes of 32 bits take turns at the words of memory. A step (h ^= word, h *= p, h ^= h >> 15,
// h *= q) maps words to sums one to one, so a single changed word always shows. One product alone
// would leave a change of the highest bit, the sign of an fp32, where it is, for another sign to
// cancel; the second spreads it. After each turn two lanes are mixed, 32 apart, a pair to a pair one to
// one: what a change did to one lane is then in both, and no change of one word takes it back.
#include "rows.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

constexpr int lanes = 64, vectors = lanes / W, half = vectors / 2;
constexpr int64_t stripe = 4 * lanes;        // bytes of a turn of all lanes
constexpr int64_t unit_size = 256 * stripe;  // bytes summed in one piece, whoever does it
constexpr uint32_t p = 0x9e3779b1, q = 0x85ebca77;
constexpr uint64_t wide_p = 0x9e3779b185ebca87, wide_q = 0xc2b2ae3d27d4eb4f;
constexpr uint64_t start = 0x9e3779b97f4a7c15;

PWM_FAST_INLINE uint64_t step(uint64_t h, uint64_t word) {
  h = (h ^ word) * wide_p;
  return (h ^ h >> 32) * wide_q;
}
PWM_FAST_INLINE vu step(vu h, vu word) {
  h = (h ^ word) * p;
  return (h ^ h >> 15) * q;
}

struct Lanes {
  vu h[vectors];

  PWM_FAST_INLINE explicit Lanes(uint64_t unit) {
    for (int i = 0; i < lanes; ++i) {
      h[i / W][i % W] = uint32_t(step(start * uint64_t(i + 1), unit) >> 32);
    }
  }
  PWM_FAST_INLINE void take(const char* from) {
    vu words[vectors];
    __builtin_memcpy(words, from, sizeof words);
    for (int v = 0; v < half; ++v) {
      const vu a = step(h[v], words[v]), b = step(h[v + half], words[v + half]);
      h[v] = a + b;
      h[v + half] = a + b + b;
    }
  }
  PWM_FAST_INLINE void take(const char* from, int64_t bytes) {
    int64_t i = 0;
    for (; i + stripe <= bytes; i += stripe) take(from + i);
    if (i == bytes) return;
    char rest[stripe] = {};
    __builtin_memcpy(rest, from + i, uint64_t(bytes - i));
    take(rest);
  }
  PWM_FAST_INLINE uint64_t sum() const {
    uint64_t total = start;
    for (int i = 0; i < lanes / 2; ++i) {
      const uint64_t low = h[i / W][i % W], high = h[i / W + half][i % W];
      total = step(total, high << 32 | low);
    }
    return total;
  }
};

// A piece in units: parts of its only row, or whole rows.
struct Units {
  const char* address;
  int64_t rows, bytes, stride, rows_each, count;

  explicit Units(const int64_t* piece)
      : address(reinterpret_cast<const char*>(piece[0])),
        rows(piece[1]),
        bytes(piece[2]),
        stride(piece[3]) {
    if (bytes == 0) rows = 0;
    if (rows == 1) {
      rows = (bytes + unit_size - 1) / unit_size;
      stride = unit_size;
      rows_each = 1;
    } else {
      rows_each = bytes < unit_size && bytes > 0 ? unit_size / bytes : 1;
    }
    count = (rows + rows_each - 1) / rows_each;
  }
  // `number` tells the units of all pieces apart.
  uint64_t sum(int64_t unit, int64_t number, bool only_row) const {
    Lanes all{uint64_t(number)};
    if (only_row) {
      const int64_t first = unit * unit_size;
      all.take(address + first, smaller(unit_size, bytes - first));
    } else {
      const int64_t end = smaller(rows, (unit + 1) * rows_each);
      for (int64_t row = unit * rows_each; row < end; ++row) all.take(address + row * stride, bytes);
    }
    return all.sum();
  }
};

}  // namespace

void checksum(const Checksum& a) {
  int64_t units = 0, elements = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t* const piece = a.pieces + 4 * i;
    units += Units(piece).count;
    elements += piece[1] * piece[2] / 4;
  }
  const int64_t threads = useful_threads(a.threads, units, elements);
  const Memory<uint64_t> sums(units);
  in_parallel(threads, units, [&](int64_t, int64_t begin, int64_t end) {
    int64_t first = 0;  // unit of piece i
    for (int64_t i = 0; i < a.count && first < end; ++i) {
      const int64_t* const piece = a.pieces + 4 * i;
      const Units own(piece);
      const int64_t next = first + own.count;
      for (int64_t unit = begin > first ? begin : first; unit < smaller(end, next); ++unit) {
        *sums.at(unit) = own.sum(unit - first, unit, piece[1] == 1);
      }
      first = next;
    }
  });
  uint64_t total = start;
  for (int64_t unit = 0; unit < units; ++unit) total = step(total, *sums.at(unit));
  *a.sum = total;
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
