// fp32 GEMMs of a block of rows with weights that are packed or as they lie, and weight gradients:
// tiles of registers, for matrices that stay in the caches of a core. Private to the sources that are
// compiled once per instruction set.
//
// A product's sum is one of sums of at most `longest` terms, each in order, or (gemm_direct) of W sums:
// it errs less than one long sum. A row's result does not depend on the rows that it is computed with,
// but for that choice.
#pragma once

#include "rows.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

// A tile fills most of the registers with sums: 24 of 32 with AVX-512, 12 of 16 elsewhere.
constexpr int tile_rows = W == 16 ? 12 : 6;
constexpr int tile_cols = 2 * W;
constexpr int64_t longest = 64;

constexpr int64_t panels(int64_t n) { return (n + tile_cols - 1) / tile_cols; }
constexpr int64_t packed_floats(int64_t n, int64_t k) { return panels(n) * tile_cols * k; }

// Brings a tile's row into the first cache, to be read or written.
template <bool written>
PWM_FAST_INLINE void fetch(const float* p) {
  for (int i = 0; i < tile_cols; i += 16) __builtin_prefetch(p + i, written, 3);
}

// c[M, tile_cols] = from + a[M, k] b[k, tile_cols]; `from` null: 0. Where `ahead`, what follows b in
// memory is fetched, as much as b.
template <int M, bool ahead>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, const float* from,
          int64_t from_stride, float* c, int64_t ldc) {
  vf left[M], right[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) left[i] = right[i] = vf{};
  for (int64_t j = 0; j < k; ++j, b += ldb) {
    if constexpr (ahead) fetch<false>(b + k * ldb);
    const vf b_left = load(b), b_right = load(b + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf x = splat(a[i * lda + j]);
      left[i] += x * b_left;
      right[i] += x * b_right;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    if (from != nullptr) {
      left[i] += load(from + i * from_stride);
      right[i] += load(from + i * from_stride + W);
    }
    store(c + i * ldc, left[i]);
    store(c + i * ldc + W, right[i]);
  }
}

// c[M, tile_cols] = dy[rows, M]^T x[rows, tile_cols], added to what is there where `add`.
template <int M, bool add>
void grad_tile(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t rows, float* c,
               int64_t ldc) {
  vf left[M], right[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) left[i] = right[i] = vf{};
  for (int64_t r = 0; r < rows; ++r, dy += ldy, x += ldx) {
    const vf x_left = load(x), x_right = load(x + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf d = splat(dy[i]);
      left[i] += d * x_left;
      right[i] += d * x_right;
    }
  }
  // Added at the end: a sum of sums errs less than one long sum.
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    if constexpr (add) {
      left[i] += load(c + i * ldc);
      right[i] += load(c + i * ldc + W);
    }
    store(c + i * ldc, left[i]);
    store(c + i * ldc + W, right[i]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t,
                      float*, int64_t);
using GradTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

#if PWM_FAST_LANES == 16
#define PWM_FAST_TILES(f)                                                                   \
  {nullptr, f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>, f<9>, f<10>, f<11>, f<12>}
#else
#define PWM_FAST_TILES(f) {nullptr, f<1>, f<2>, f<3>, f<4>, f<5>, f<6>}
#endif
template <int M>
constexpr Tile plain_tile = tile<M, false>;
template <int M>
constexpr Tile fetching_tile = tile<M, true>;
constexpr Tile tiles[tile_rows + 1] = PWM_FAST_TILES(plain_tile);
constexpr Tile fetching_tiles[tile_rows + 1] = PWM_FAST_TILES(fetching_tile);
template <int M>
constexpr GradTile first_grad_tile = grad_tile<M, false>;
template <int M>
constexpr GradTile adding_grad_tile = grad_tile<M, true>;
constexpr GradTile first_grad_tiles[tile_rows + 1] = PWM_FAST_TILES(first_grad_tile);
constexpr GradTile grad_tiles[tile_rows + 1] = PWM_FAST_TILES(adding_grad_tile);
#undef PWM_FAST_TILES

// body(first, count) for [0, n) in nearly equal pieces of at most tile_rows.
template <class Body>
PWM_FAST_INLINE void each_tile(int64_t n, Body body) {
  const int64_t pieces = (n + tile_rows - 1) / tile_rows;
  int64_t begin = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t end = n * (i + 1) / pieces;
    body(begin, end - begin);
    begin = end;
  }
}

// Four rows of four numbers, turned: the columns as rows.
typedef float v4 __attribute__((vector_size(16)));
PWM_FAST_INLINE void turn(const float* from, int64_t stride, float* to) {
  v4 rows[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], from + i * stride, sizeof rows[i]);
#if defined(__clang__)
  const v4 a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const v4 b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const v4 c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const v4 d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
#else
  typedef int32_t i4 __attribute__((vector_size(16)));
  const i4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
  const v4 a = __builtin_shuffle(rows[0], rows[1], low), b = __builtin_shuffle(rows[2], rows[3], low);
  const v4 c = __builtin_shuffle(rows[0], rows[1], high);
  const v4 d = __builtin_shuffle(rows[2], rows[3], high);
  rows[0] = __builtin_shuffle(a, b, left), rows[1] = __builtin_shuffle(a, b, right);
  rows[2] = __builtin_shuffle(c, d, left), rows[3] = __builtin_shuffle(c, d, right);
#endif
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * tile_cols, &rows[i], sizeof rows[i]);
}

// w[n, k] with a row stride to panels of tile_cols of its rows: [panels, k, tile_cols], so that
// x packed is x w^T. A few columns at a time, so that what is written of them is in the first cache.
void pack_rows(const float* w, int64_t stride, int64_t n, int64_t k, float* packed) {
  constexpr int64_t at_once = 16;
  for (int64_t first = 0; first < n; first += tile_cols, packed += k * tile_cols) {
    const int64_t count = smaller(tile_cols, n - first), whole = count / 4 * 4;
    const float* panel = w + first * stride;
    for (int64_t begin = 0; begin < k; begin += at_once) {
      const int64_t end = smaller(k, begin + at_once), turned = begin + (end - begin) / 4 * 4;
      for (int64_t j = 0; j < whole; j += 4) {
        for (int64_t i = begin; i < turned; i += 4) {
          turn(panel + j * stride + i, stride, packed + i * tile_cols + j);
        }
        for (int64_t i = turned; i < end; ++i) {
          for (int64_t l = j; l < j + 4; ++l) packed[i * tile_cols + l] = panel[l * stride + i];
        }
      }
      for (int64_t i = begin; i < end && whole < tile_cols; ++i) {
        for (int64_t l = whole; l < tile_cols; ++l) {
          packed[i * tile_cols + l] = l < count ? panel[l * stride + i] : 0.0f;
        }
      }
    }
  }
}

// Columns of n rows of w to rows of tile_cols, with zeros past `cols`.
PWM_FAST_INLINE void copy_panel(const float* w, int64_t stride, int64_t n, int64_t cols, float* to) {
  for (int64_t i = 0; i < n; ++i, w += stride, to += tile_cols) {
    for (int64_t j = 0; j < tile_cols; j += W) {
      const int64_t count = smaller(W, cols - j);
      store(to + j, count == W ? load(w + j) : count > 0 ? load_part(w + j, int(count)) : vf{});
    }
  }
}

// w[n, k] to panels of tile_cols of its columns: [panels, n, tile_cols], so that dy packed is dy w.
void pack_cols(const float* w, int64_t stride, int64_t n, int64_t k, float* packed) {
  for (int64_t first = 0; first < k; first += tile_cols, packed += n * tile_cols) {
    copy_panel(w + first, stride, n, smaller(tile_cols, k - first), packed);
  }
}

// c[rows, cols] = from + a[rows, k] b[k, tile_cols], where `from` is null for 0, one row (from_stride
// 0) for all, or c itself. Nothing past the end of c's and from's rows is read or written.
void tile_panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, int64_t rows,
                int64_t cols, bool ahead, const float* from, int64_t from_stride, float* c,
                int64_t ldc) {
  each_tile(rows, [&](int64_t r, int64_t count) PWM_FAST_INLINE_LAMBDA {
    const float* own = from == nullptr ? nullptr : from + r * from_stride;
    float* out = c + r * ldc;
    const Tile multiply = (ahead && r == 0 ? fetching_tiles : tiles)[count];
    if (cols == tile_cols) {
      multiply(a + r * lda, lda, b, ldb, k, own, from_stride, out, ldc);
      return;
    }
    float part[tile_rows * tile_cols];
    if (own != nullptr) copy_panel(own, from_stride, count, cols, part);
    multiply(a + r * lda, lda, b, ldb, k, own == nullptr ? nullptr : part, tile_cols, part,
             tile_cols);
    for (int64_t i = 0; i < count; ++i) {
      each_vector<2>(cols, [&](auto kind, int64_t j, auto) PWM_FAST_INLINE_LAMBDA {
        store_row(kind, out + i * ldc, j, cols, load(part + i * tile_cols + j));
      });
    }
  });
}

// c[rows, n] = from + a[rows, k] packed, where `packed` holds panels of n columns; `from` as above.
//
// A panel goes through all of k before the next, so that c stays in the first cache, and `packed` is
// read once, from beginning to end: the first rows that need a part of it fetch the next part.
void gemm(const float* a, int64_t lda, const float* packed, int64_t rows, int64_t n, int64_t k,
          const float* from, int64_t from_stride, float* c, int64_t ldc) {
  for (int64_t first = 0; first < n; first += tile_cols) {
    const int64_t cols = smaller(tile_cols, n - first);
    const float* own = from == nullptr ? nullptr : from + first;
    for (int64_t start = 0; start == 0 || start < k; start += longest) {
      const int64_t run = smaller(longest, k - start);
      const bool more = first + cols < n || start + run < k;
      tile_panel(a + start, lda, packed + first * k + start * tile_cols, tile_cols, run, rows, cols,
                 more, start > 0 ? c + first : own, start > 0 ? ldc : from_stride, c + first, ldc);
    }
  }
}

// --- weights as they lie: for rows so few that packing takes longer than it gains -----------------

constexpr int dot_rows = 4, dot_cols = W / dot_rows < 2 ? 2 : W / dot_rows;
// How many rows stay in a cache beside rows of the weight: the first one, or, where the weight does
// not stay in the second, that one.
PWM_FAST_INLINE int64_t rows_at_once(int64_t weights) { return weights > 524288 ? 48 : 12; }

// c[R, C] = from + a[R, k] w[C, k]^T.
template <int R, int C>
void dots(const float* a, int64_t lda, const float* w, int64_t ldw, int64_t k, const float* from,
          int64_t from_stride, float* c, int64_t ldc) {
  vf sums[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) sums[i] = vf{};
  each_vector<1>(k, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    vf columns[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) columns[j] = load_row(kind, w + j * ldw, i, k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf x = load_row(kind, a + r * lda, i, k);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r * C + j] += x * columns[j];
    }
  });
  float totals[R * C];
  if constexpr (R * C == W) {
    store(totals, sum_each(sums));
  } else {
    for (int i = 0; i < R * C; ++i) totals[i] = sum(sums[i]);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) {
      c[r * ldc + j] = (from == nullptr ? 0.0f : from[r * from_stride + j]) + totals[r * C + j];
    }
  }
}
using Dots = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t,
                      float*, int64_t);
template <int C>
constexpr Dots dots_of[dot_rows + 1] = {nullptr, dots<1, C>, dots<2, C>, dots<3, C>, dots<4, C>};

// c[rows, n] = from + a[rows, k] w[n, k]^T, as gemm.
void gemm_direct(const float* a, int64_t lda, const float* w, int64_t ldw, int64_t rows, int64_t n,
                 int64_t k, const float* from, int64_t from_stride, float* c, int64_t ldc) {
  const int64_t at_once = rows_at_once(n * k);
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const int64_t end = smaller(rows, begin + at_once);
    int64_t j = 0;
    const auto at = [&](const Dots* run) PWM_FAST_INLINE_LAMBDA {
      for (int64_t r = begin; r < end; r += dot_rows) {
        run[smaller(dot_rows, end - r)](a + r * lda, lda, w + j * ldw, ldw, k,
                                        from == nullptr ? nullptr : from + r * from_stride + j,
                                        from_stride, c + r * ldc + j, ldc);
      }
    };
    for (; j + dot_cols <= n; j += dot_cols) at(dots_of<dot_cols>);
    for (; j < n; ++j) at(dots_of<1>);
  }
}

// How many columns of `rows` rows stay in the first cache, in whole tiles. Columns are worked on so
// many at a time where rows of a weight lie far apart: each has a page of its own.
PWM_FAST_INLINE int64_t columns_at_once(int64_t rows) {
  const int64_t cols = 6144 / (rows * tile_cols) * tile_cols;
  return cols < tile_cols ? tile_cols : cols;
}

// c[rows, k] = from + dy[rows, n] w[n, k], to the same bits as gemm with pack_cols.
void dgrad_direct(const float* dy, int64_t ldy, const float* w, int64_t ldw, int64_t rows, int64_t n,
                  int64_t k, const float* from, int64_t from_stride, float* c, int64_t ldc) {
  float last[longest * tile_cols];  // of w's columns, where a tile would read past its rows
  const int64_t at_once = columns_at_once(rows);
  for (int64_t begin = 0; begin < k; begin += at_once) {
    const int64_t end = smaller(k, begin + at_once);
    for (int64_t start = 0; start == 0 || start < n; start += longest) {
      const int64_t run = smaller(longest, n - start);
      const bool more = at_once == tile_cols && start + run < n;
      for (int64_t first = begin; first < end; first += tile_cols) {
        const int64_t cols = smaller(tile_cols, k - first);
        const float *b = w + start * ldw + first, *own = from == nullptr ? nullptr : from + first;
        if (cols < tile_cols) copy_panel(b, ldw, run, cols, last);
        const bool whole = cols == tile_cols;
        tile_panel(dy + start, ldy, whole ? b : last, whole ? ldw : tile_cols, run, rows, cols,
                   more && whole, start > 0 ? c + first : own, start > 0 ? ldc : from_stride,
                   c + first, ldc);
      }
    }
  }
}

constexpr int64_t most_grad_rows = 96;

// Where the sum of a weight's gradients [n, k] lies, panel by panel of its columns: as rows, or one
// panel after another, whose tiles follow one another in memory. `last`: a panel that k does not
// fill, with zeros past k, its rows one after another.
struct GradPlace {
  float* data;
  int64_t row_stride, panel_stride;
  float* last;
};
PWM_FAST_INLINE GradPlace as_rows(float* data, int64_t stride, float* last) {
  return {data, stride, tile_cols, last};
}
PWM_FAST_INLINE GradPlace as_panels(float* data, int64_t n, int64_t k) {
  return {data, tile_cols, n * tile_cols, data + k / tile_cols * n * tile_cols};
}

PWM_FAST_INLINE GradPlace from_row(GradPlace p, int64_t first) {
  return {p.data + first * p.row_stride, p.row_stride, p.panel_stride, p.last + first * tile_cols};
}

// dw[n, k] = dy[rows, n]^T x[rows, k], for at most most_grad_rows rows, at least one. Added to what
// is there but for the first of a sum.
void weight_grad(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t rows, int64_t n,
                 int64_t k, bool first_of_sum, GradPlace dw) {
  const GradTile* const add = first_of_sum ? first_grad_tiles : grad_tiles;
  const int64_t whole = k / tile_cols * tile_cols, at_once = columns_at_once(rows);
  const auto tile = [&](int64_t i, int64_t count, const float* from, int64_t stride, float* to,
                        int64_t to_stride) PWM_FAST_INLINE_LAMBDA {
    float* const own = to + i * to_stride;
    const int64_t next = smaller(count, n - i - count);
    for (int64_t j = 0; j < next; ++j) fetch<true>(own + (count + j) * to_stride);
    add[count](dy + i, ldy, from, stride, rows, own, to_stride);
  };
  for (int64_t begin = 0; begin < whole; begin += at_once) {
    const int64_t end = smaller(whole, begin + at_once);
    each_tile(n, [&](int64_t i, int64_t count) PWM_FAST_INLINE_LAMBDA {
      float* to = dw.data + begin / tile_cols * dw.panel_stride;
      for (int64_t first = begin; first < end; first += tile_cols, to += dw.panel_stride) {
        tile(i, count, x + first, ldx, to, dw.row_stride);
      }
    });
  }
  if (whole == k) return;
  float part[most_grad_rows * tile_cols];
  copy_panel(x + whole, ldx, rows, k - whole, part);
  each_tile(n, [&](int64_t i, int64_t count) PWM_FAST_INLINE_LAMBDA {
    tile(i, count, part, tile_cols, dw.last, tile_cols);
  });
}

}  // namespace
}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
