// fp32 GEMMs of a few rows with packed weights, and their weight gradients: tiles of registers, for
// matrices that stay in the caches of a core. Private to the sources that are compiled once per
// instruction set.
//
// A sum is one of sums of at most `longest` terms, each in order: it errs less than one long sum. But for
// few rows, a row's result does not depend on the rows that it is computed with.
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

// c[M, tile_cols] += dy[rows, M]^T x[rows, tile_cols].
template <int M>
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
  // Added to what is there at the end: a sum of sums errs less than one long sum.
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(c + i * ldc, load(c + i * ldc) + left[i]);
    store(c + i * ldc + W, load(c + i * ldc + W) + right[i]);
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
constexpr GradTile grad_tiles[tile_rows + 1] = PWM_FAST_TILES(grad_tile);
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
// x packed is x w^T.
void pack_rows(const float* w, int64_t stride, int64_t n, int64_t k, float* packed) {
  for (int64_t first = 0; first < n; first += tile_cols, packed += k * tile_cols) {
    const int64_t count = smaller(tile_cols, n - first);
    const float* panel = w + first * stride;
    for (int64_t j = 0; j < tile_cols; j += 4) {
      int64_t i = 0;
      if (j + 4 <= count) {
        for (; i + 4 <= k; i += 4) turn(panel + j * stride + i, stride, packed + i * tile_cols + j);
      }
      for (; i < k; ++i) {
        for (int64_t l = j; l < j + 4; ++l) {
          packed[i * tile_cols + l] = l < count ? panel[l * stride + i] : 0.0f;
        }
      }
    }
  }
}

// w[n, k] to panels of tile_cols of its columns: [panels, n, tile_cols], so that dy packed is dy w.
void pack_cols(const float* w, int64_t stride, int64_t n, int64_t k, float* packed) {
  for (int64_t first = 0; first < k; first += tile_cols) {
    const int64_t count = smaller(tile_cols, k - first);
    for (int64_t i = 0; i < n; ++i, packed += tile_cols) {
      const float* source = w + i * stride + first;
      for (int64_t j = 0; j < count; ++j) packed[j] = source[j];
      for (int64_t j = count; j < tile_cols; ++j) packed[j] = 0.0f;
    }
  }
}

// c[rows, n] = from + a[rows, k] packed, where `packed` holds panels of n columns. `from` is null
// for 0, one row (from_stride 0) for all, or c itself.
//
// A panel goes through all of k before the next, so that c stays in the first cache, and `packed` is
// read once, from beginning to end: the first rows that need a part of it fetch the next part.
void gemm(const float* a, int64_t lda, const float* packed, int64_t rows, int64_t n, int64_t k,
          const float* from, int64_t from_stride, float* c, int64_t ldc) {
  for (int64_t first = 0; first < n; first += tile_cols) {
    const int64_t cols = smaller(tile_cols, n - first);
    for (int64_t start = 0; start == 0 || start < k; start += longest) {
      const int64_t run = smaller(longest, k - start);
      const float* b = packed + first * k + start * tile_cols;
      const float* before = start > 0 ? c : from;
      const int64_t stride = start > 0 ? ldc : from_stride;
      const bool more = first + cols < n || start + run < k;
      each_tile(rows, [&](int64_t r, int64_t count) PWM_FAST_INLINE_LAMBDA {
        const float* a_rows = a + r * lda + start;
        const float* own = before == nullptr ? nullptr : before + r * stride + first;
        float* out = c + r * ldc + first;
        const Tile multiply = (more && r == 0 ? fetching_tiles : tiles)[count];
        if (cols == tile_cols) {
          multiply(a_rows, lda, b, tile_cols, run, own, stride, out, ldc);
          return;
        }
        // Nothing past the end of a row is read or written.
        float part[tile_rows * tile_cols] = {};
        if (own != nullptr) {
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < cols; ++j) part[i * tile_cols + j] = own[i * stride + j];
          }
        }
        multiply(a_rows, lda, b, tile_cols, run, part, tile_cols, part, tile_cols);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < cols; ++j) out[i * ldc + j] = part[i * tile_cols + j];
        }
      });
    }
  }
}

// --- few rows, for which packing would take longer than multiplying -----------------------------

constexpr int64_t few_rows = 16;
constexpr int dot_rows = 4, dot_cols = W == 16 ? 4 : 2;

// c[R, C] = from + a[R, k] w[C, k]^T.
template <int R, int C>
void dots(const float* a, int64_t lda, const float* w, int64_t ldw, int64_t k, const float* from,
          int64_t from_stride, float* c, int64_t ldc) {
  vf sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[r][j] = vf{};
  }
  each_vector<1>(k, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
    vf columns[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) columns[j] = load_row(kind, w + j * ldw, i, k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf x = load_row(kind, a + r * lda, i, k);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] += x * columns[j];
    }
  });
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < C; ++j) {
      const float start = from == nullptr ? 0.0f : from[r * from_stride + j];
      c[r * ldc + j] = start + sum(sums[r][j]);
    }
  }
}
using Dots = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t,
                      float*, int64_t);
template <int C>
constexpr Dots dots_of[dot_rows + 1] = {nullptr, dots<1, C>, dots<2, C>, dots<3, C>, dots<4, C>};

// c[rows, n] = from + a[rows, k] w[n, k]^T, as gemm.
void gemm_few(const float* a, int64_t lda, const float* w, int64_t ldw, int64_t rows, int64_t n,
              int64_t k, const float* from, int64_t from_stride, float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r += dot_rows) {
    const int64_t count = smaller(dot_rows, rows - r);
    const float* own = from == nullptr ? nullptr : from + r * from_stride;
    int64_t j = 0;
    const auto at = [&](Dots run) PWM_FAST_INLINE_LAMBDA {
      run(a + r * lda, lda, w + j * ldw, ldw, k, own == nullptr ? nullptr : own + j, from_stride,
          c + r * ldc + j, ldc);
    };
    for (; j + dot_cols <= n; j += dot_cols) at(dots_of<dot_cols>[count]);
    for (; j < n; ++j) at(dots_of<1>[count]);
  }
}

// c[rows, k] = from + dy[rows, n] w[n, k], as gemm.
void dgrad_few(const float* dy, int64_t ldy, const float* w, int64_t ldw, int64_t rows, int64_t n,
               int64_t k, const float* from, int64_t from_stride, float* c, int64_t ldc) {
  for (int64_t start = 0; start == 0 || start < n; start += longest) {
    const int64_t run = smaller(longest, n - start);
    if (start > 0) {
      from = c;
      from_stride = ldc;
    }
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int64_t count = smaller(tile_rows, rows - r);
      const float* a = dy + r * ldy + start;
      const float* own = from == nullptr ? nullptr : from + r * from_stride;
      int64_t j = 0;
      for (; j + tile_cols <= k; j += tile_cols) {
        tiles[count](a, ldy, w + start * ldw + j, ldw, run, own == nullptr ? nullptr : own + j,
                     from_stride, c + r * ldc + j, ldc);
      }
      for (; j < k; j += W) {
        const int64_t cols = smaller(W, k - j);
        for (int64_t i = 0; i < count; ++i) {
          vf total = {};
          for (int64_t l = 0; l < run; ++l) {
            const float* source = w + (start + l) * ldw + j;
            total += a[i * ldy + l] * (cols == W ? load(source) : load_part(source, int(cols)));
          }
          if (own != nullptr) total += load_part(own + i * from_stride + j, int(cols));
          store_part(c + (r + i) * ldc + j, total, int(cols));
        }
      }
    }
  }
}

constexpr int64_t most_grad_rows = 96;

// Where the sum of a weight's gradients [n, k] lies, of whole panels of its columns (those past k get
// zeros added): as rows, or one panel after another, whose tiles follow one another in memory.
struct GradPlace {
  float* data;
  int64_t row_stride, panel_stride;
};
PWM_FAST_INLINE GradPlace as_rows(float* data, int64_t k) { return {data, k, tile_cols}; }
PWM_FAST_INLINE GradPlace as_panels(float* data, int64_t n) {
  return {data, tile_cols, n * tile_cols};
}

// dw[n, k] += dy[rows, n]^T x[rows, k], for at most most_grad_rows rows.
void weight_grad(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t rows,
                 int64_t n, int64_t k, GradPlace dw) {
  float part[most_grad_rows * tile_cols];
  const int64_t runs = (rows + longest - 1) / longest;
  for (int64_t first = 0; first < k; first += tile_cols, dw.data += dw.panel_stride) {
    const int64_t cols = smaller(tile_cols, k - first);
    const float* x_panel = x + first;
    int64_t stride = ldx;
    if (cols < tile_cols) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < tile_cols; ++j) {
          part[r * tile_cols + j] = j < cols ? x[r * ldx + first + j] : 0.0f;
        }
      }
      x_panel = part;
      stride = tile_cols;
    }
    each_tile(n, [&](int64_t i, int64_t count) PWM_FAST_INLINE_LAMBDA {
      float* const own = dw.data + i * dw.row_stride;
      const int64_t next = smaller(count, n - i - count);
      for (int64_t j = 0; j < next; ++j) fetch<true>(own + (count + j) * dw.row_stride);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t r = rows * run / runs;
        grad_tiles[count](dy + r * ldy + i, ldy, x_panel + r * stride, stride,
                          rows * (run + 1) / runs - r, own, dw.row_stride);
      }
    });
  }
}

}  // namespace
}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
