// What the kernels over rows share: types, scratch memory, threads, and sums over rows. Private to
// the sources that are compiled once per instruction set, as simd.h is.
#pragma once

#include "../parallel.h"
#include "view.h"
#include "simd.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

template <class T>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
  using type = T;
};
template <class P>
using Pointee = typename PointeeOf<P>::type;
template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Calls f(T*) with the element type that `type` stands for.
template <class F>
PWM_FAST_INLINE void with_type(int64_t type, F f) {
  if (type == bfloat16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// Calls f(Constant<true>) or f(Constant<false>).
template <bool V>
struct Constant {
  static constexpr bool value = V;
};
template <class F>
PWM_FAST_INLINE void with_flag(bool flag, F f) {
  if (flag) {
    f(Constant<true>{});
  } else {
    f(Constant<false>{});
  }
}

template <class T>
PWM_FAST_INLINE T* row(const View& x, int64_t r) {
  return static_cast<T*>(x.data) + r * x.stride;
}
template <class T = float>
PWM_FAST_INLINE T* numbers(const View& x) {
  return static_cast<T*>(x.data);
}

template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : memory_(static_cast<T*>(allocate(count * int64_t(sizeof(T))))) {}
  ~Memory() { release(memory_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* at(int64_t index) const { return memory_ + index; }

 private:
  T* memory_;
};
using Floats = Memory<float>;

// body(thread, begin, end) for the parts of [0, units). Where a part lacks memory, std::bad_alloc is
// thrown after the last one: an exception that left a thread of OpenMP's would end the program.
template <class Body>
void in_parallel(int64_t threads, int64_t units, Body body) {
  struct Context {
    Body& body;
    bool failed;
  } shared = {body, false};
  run_parts(
      threads, units,
      [](void* context, int64_t thread, int64_t begin, int64_t end) {
        Context& own = *static_cast<Context*>(context);
        try {
          own.body(thread, begin, end);
        } catch (...) {
          __atomic_store_n(&own.failed, true, __ATOMIC_RELAXED);
        }
      },
      &shared);
  if (shared.failed) throw_bad_alloc();
}

PWM_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows in blocks, none of which belongs to two members of an ensemble.
struct Blocks {
  static constexpr int64_t rows_each = 32;
  int64_t rows, per_member, blocks_per_member, count;

  Blocks(int64_t rows_, int64_t rows_per_member) : rows(rows_) {
    per_member = rows_per_member > 0 ? rows_per_member : (rows > 0 ? rows : 1);
    blocks_per_member = (per_member + rows_each - 1) / rows_each;
    count = (rows + per_member - 1) / per_member * blocks_per_member;
  }
  int64_t member(int64_t block) const { return block / blocks_per_member; }
  int64_t begin(int64_t block) const {
    const int64_t first = member(block) * per_member;
    return smaller(rows, first + block % blocks_per_member * rows_each);
  }
  int64_t end(int64_t block) const {
    const int64_t stop = (member(block) + 1) * per_member;
    return smaller(rows, smaller(stop, begin(block) + rows_each));
  }
};

// The gradients of up to three parameters of n elements: sums over rows, in fp32 within a block of
// rows; the sums of the blocks are added in their order to fp64 accumulators of [members, n].
class ParameterSums {
 public:
  static constexpr int kinds = 3;

  // One thread adds a block as soon as it is done; several leave them for finish().
  ParameterSums(const View* const (&totals)[kinds], const Blocks& blocks, int64_t n,
                int64_t threads)
      : blocks_(blocks),
        n_(n),
        totals_{of(totals[0]), of(totals[1]), of(totals[2])},
        wanted_(totals_[0] != nullptr || totals_[1] != nullptr || totals_[2] != nullptr),
        kept_(threads > 1),
        memory_(!wanted_ ? 0 : kinds * padded(n) * (kept_ ? blocks.count : 1)) {}

  bool wanted() const { return wanted_; }

  // The sums of a block, [kinds, padded(n)], which start at 0.
  float* start(int64_t block) const {
    if (!wanted_) return nullptr;
    float* sums = of_block(block);
    __builtin_memset(sums, 0, uint64_t(kinds * padded(n_)) * sizeof(float));
    return sums;
  }
  void done(int64_t block) const {
    if (wanted_ && !kept_) add(block, 0, n_);
  }
  void finish(int64_t threads) const {
    if (!wanted_ || !kept_) return;
    threads = useful_threads(threads, n_, blocks_.count * kinds * n_);
    in_parallel(threads, n_, [this](int64_t, int64_t begin, int64_t end) {
      for (int64_t block = 0; block < blocks_.count; ++block) add(block, begin, end);
    });
  }

 private:
  static double* of(const View* total) {
    return total == nullptr ? nullptr : numbers<double>(*total);
  }
  float* of_block(int64_t block) const {
    return memory_.at(kept_ ? block * kinds * padded(n_) : 0);
  }
  void add(int64_t block, int64_t begin, int64_t end) const {
    for (int kind = 0; kind < kinds; ++kind) {
      if (totals_[kind] == nullptr) continue;
      const float* __restrict sums = of_block(block) + kind * padded(n_);
      double* __restrict totals = totals_[kind] + blocks_.member(block) * n_;
      for (int64_t i = begin; i < end; ++i) totals[i] += double(sums[i]);
    }
  }

  const Blocks& blocks_;
  int64_t n_;
  double* totals_[kinds];
  bool wanted_, kept_;
  Floats memory_;
};

}  // namespace
}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
