// Runs a program: each block of rows goes through all its steps, on one thread.
#include "gemm.h"
#include "targets.h"

namespace pwm_fast {
namespace PWM_FAST_TARGET {
namespace {

// Blocks are small enough for a core's caches and, but for few rows, even in number. Those that add
// to gradients are in groups, each with totals of its own, which are added up in their order: sums
// depend on the rows alone, not on the threads.
struct Division {
  // Wide weights do not stay in a core's caches: more rows take more of what was fetched of them.
  static constexpr int64_t narrow = 256, most_narrow = 48, most_wide = 96;
  static_assert(most_wide <= most_grad_rows && most_narrow <= most_grad_rows);
  // Up to how many rows are one block: two groups' totals cost more than a second thread gains. Of wide
  // weights each thread does better to read a part, but for rollouts: those have too many steps to wait
  // for each other after each.
  static constexpr int64_t few = 24, few_with_sums = 48, few_wide = most_wide, most_groups = 8;
  int64_t rows, most, blocks, groups;

  Division(const RowProgram& p, int64_t widest)
      : rows(p.rows), most(widest > narrow ? most_wide : most_narrow) {
    const bool sums = p.total_count > 0;
    blocks = (rows + most - 1) / most;
    const int64_t one = widest > narrow && !p.repeats ? few_wide : sums ? few_with_sums : few;
    if (rows > one) blocks += blocks % 2;
    groups = sums ? smaller(blocks, most_groups) : blocks;
  }
  int64_t first(int64_t group) const { return blocks * group / groups; }
  int64_t begin(int64_t block) const { return rows * block / blocks; }
  int64_t longest_block() const { return blocks > 0 ? (rows + blocks - 1) / blocks : 0; }
};

int64_t widest_of(const RowProgram& p) {
  int64_t widest = 0;
  for (int64_t i = 0; i < p.slot_count; ++i) {
    if (p.slots[i].cols > widest) widest = p.slots[i].cols;
  }
  return widest;
}

constexpr int64_t scratch_stride(int64_t cols) {
  // Not a power of two, whose rows would share few places in the caches.
  const int64_t whole = panels(cols) * tile_cols;
  return whole % 128 == 0 ? whole + 16 : whole;
}

// Where the weight that a pack is of lies.
Place weight_of(const RowProgram& p, const Pack& pack) {
  const Place& place = p.places[pack.weight.slot];
  return {place.data + pack.weight.plane * p.slots[pack.weight.slot].n * place.stride, place.stride};
}

// Whether a weight is multiplied by so many rows that packing it gains more than it costs. Measured:
// tiles take as long on a weight as it lies, but for large ones that leave a core's caches between two
// steps. Sums across lanes lose the more the shorter they are, and where rows are not aligned, and a
// large weight's copy takes the place of what is needed in the caches.
bool worth_packing(const RowProgram& p, const Pack& pack) {
  const int64_t rows = p.rows * pack.steps, k = p.slots[pack.weight.slot].cols;
  if (pack.by_cols) return rows > 256;
  const bool aligned = weight_of(p, pack).stride % W == 0;
  return rows > k * W / (aligned && k > 128 ? 48 : 96);
}

// Where what all steps need lies: packed weights, and the totals of each group.
class Layout {
 public:
  Layout(const RowProgram& p, const Division& division, int64_t threads)
      : program_(p),
        one_block_(division.blocks == 1),
        in_turn_(threads == 1 && division.groups > 0 && division.groups == division.blocks) {
    for (int64_t i = 0; i < p.slot_count; ++i) {
      if (p.slots[i].kind != slot_scratch) continue;
      scratch_ += division.longest_block() * scratch_stride(p.slots[i].cols);
    }
    for (int64_t i = 0; i < p.pack_count; ++i) {
      if (worth_packing(p, p.packs[i])) packed_ += floats_of(p.packs[i]);
    }
    for (int64_t i = 0; i < p.total_count; ++i) totals_ += floats_of(p.totals[i]);
  }
  int64_t scratch() const { return scratch_; }
  int64_t packed() const { return packed_; }
  int64_t totals() const { return totals_; }

  int64_t floats_of(const Pack& pack) const {
    const Slot& w = program_.slots[pack.weight.slot];
    return pack.by_cols ? packed_floats(w.cols, w.n) : packed_floats(w.n, w.cols);
  }
  // Those of a vector are fp64. In place: a last panel of columns.
  int64_t floats_of(const Total& t) const {
    if (t.k == 0) return 2 * padded(t.n);
    return t.n * (in_place(t) ? panels(t.k % tile_cols) : panels(t.k)) * tile_cols;
  }
  // The only block adds to a weight's gradient itself. So do blocks that come one after another, each a
  // group and with one step: that is to the bits the sum of their totals.
  bool in_place(const Total& t) const {
    return (one_block_ && t.steps > 0) || (in_turn_ && t.steps == 1);
  }

 private:
  const RowProgram& program_;
  bool one_block_, in_turn_;
  int64_t scratch_ = 0, packed_ = 0, totals_ = 0;
};

// Packs a weight; a wide one takes a while.
void pack(const RowProgram& p, const Pack& pack, float* to, int64_t threads) {
  const Slot& slot = p.slots[pack.weight.slot];
  const Place from = weight_of(p, pack);
  const int64_t out = pack.by_cols ? slot.cols : slot.n, in = pack.by_cols ? slot.n : slot.cols;
  const int64_t useful = useful_threads(threads, panels(out), panels(out) * tile_cols * in / 4);
  in_parallel(useful, panels(out), [&](int64_t, int64_t begin, int64_t end) {
    const int64_t first = begin * tile_cols, count = smaller(out, end * tile_cols) - first;
    float* const part = to + first * in;
    if (count <= 0) return;
    if (pack.by_cols) {
      pack_cols(from.data + first, from.stride, in, count, part);
    } else {
      pack_rows(from.data + first * from.stride, from.stride, count, in, part);
    }
  });
}

// Where a group's total lies, and whether nothing is there before its first block.
struct Sum {
  GradPlace place;
  bool empty;
};

// The pointers of one thread, and the block that it is at. `threads` share the columns of its products.
class Executor {
 public:
  Executor(const RowProgram& p, const int64_t* scratch_at, float* scratch,
           const float* const* packs, const Sum* totals, int64_t threads)
      : p_(p),
        scratch_at_(scratch_at),
        scratch_(scratch),
        packs_(packs),
        totals_(totals),
        threads_(threads) {}

  // `first`: of those that add to these totals.
  void run(int64_t begin, int64_t end, bool first) {
    begin_ = begin;
    rows_ = end - begin;
    first_ = first;
    for (int64_t i = 0; i < p_.instruction_count; ++i) step(p_.instructions[i]);
  }

 private:
  View view(Operand o) const {
    View x = {"", nullptr, 0, 0, 0, fp32, false};
    if (o.slot < 0) return x;
    const Slot& slot = p_.slots[o.slot];
    x.cols = slot.cols;
    x.given = true;
    if (slot.kind == slot_scratch) {
      x.rows = rows_;
      x.stride = scratch_stride(slot.cols);
      x.data = scratch_ + scratch_at_[o.slot];
      return x;
    }
    const Place& place = p_.places[o.slot];
    x.stride = place.stride;
    if (slot.kind == slot_shared) {
      x.rows = 1;
      x.data = place.data + o.plane * place.stride;
    } else {
      x.rows = rows_;
      x.data = place.data + (o.plane * p_.rows + begin_) * place.stride;
    }
    return x;
  }
  View total(int64_t index, int64_t n) const {
    if (index < 0) return {"", nullptr, 0, 0, 0, fp64, false};
    return {"", totals_[index].place.data, 1, n, n, fp64, true};
  }

  void step(const Instruction& at) const {
    switch (at.step) {
      case step_gemm: return product(at);
      case step_weight_grad: return sum_weight(at);
      case step_column_sum: return sum_columns(at);
      case step_combine: return combine(at);
      case step_norm_act_fwd: {
        NormActFwd a = {};
        a.x = view(at.operand[0]), a.y = view(at.operand[1]), a.xhat = view(at.operand[2]);
        a.rstd = view(at.operand[3]), a.gamma = view(at.operand[4]), a.beta = view(at.operand[5]);
        a.bias = view(at.operand[6]), a.add = view(at.operand[7]), a.w_tau = view(at.operand[8]);
        a.act = Act(at.number[0]), a.group = at.number[1], a.eps = at.factor[0], a.threads = 1;
        float tau = at.factor[1];
        a.tau = {"", &tau, 1, 1, 1, fp32, true};
        return norm_act_fwd(a);
      }
      case step_norm_act_bwd: {
        NormActBwd a = {};
        a.dy = view(at.operand[0]), a.dx = view(at.operand[1]), a.xhat = view(at.operand[2]);
        a.rstd = view(at.operand[3]), a.gamma = view(at.operand[4]), a.beta = view(at.operand[5]);
        a.y = view(at.operand[6]);
        a.act = Act(at.number[0]), a.group = at.number[1], a.threads = 1;
        a.dgamma = total(at.number[2], a.dy.cols), a.dbeta = total(at.number[3], a.dy.cols);
        a.dbias = total(at.number[4], a.dy.cols);
        return norm_act_bwd(a);
      }
      case step_act_norm_fwd: {
        ActNormFwd a = {};
        a.x = view(at.operand[0]), a.y = view(at.operand[1]), a.u = view(at.operand[2]);
        a.mean = view(at.operand[3]), a.rstd = view(at.operand[4]), a.gamma = view(at.operand[5]);
        a.beta = view(at.operand[6]), a.bias = view(at.operand[7]);
        a.act = Act(at.number[0]), a.eps = at.factor[0], a.threads = 1;
        return act_norm_fwd(a);
      }
      case step_act_norm_bwd: {
        ActNormBwd a = {};
        a.dy = view(at.operand[0]), a.dx = view(at.operand[1]), a.u = view(at.operand[2]);
        a.mean = view(at.operand[3]), a.rstd = view(at.operand[4]), a.gamma = view(at.operand[5]);
        a.act = Act(at.number[0]), a.threads = 1;
        a.dgamma = total(at.number[1], a.dy.cols), a.dbeta = total(at.number[2], a.dy.cols);
        a.dbias = total(at.number[3], a.dy.cols);
        return act_norm_bwd(a);
      }
      case step_policy: return act(at);
      case step_policy_bwd: return act_bwd(at);
      default: return;
    }
  }

  void product(const Instruction& at) const {
    const View out = view(at.operand[0]), in = view(at.operand[1]), from = view(at.operand[2]);
    const int64_t shared = from.given && p_.slots[at.operand[2].slot].kind == slot_shared;
    const int64_t from_stride = shared ? 0 : from.stride, k = in.cols;
    const Pack& pack = p_.packs[at.number[0]];
    const Place weight = weight_of(p_, pack);
    const float* const packed = packs_[at.number[0]];
    in_columns(out.cols, tile_cols, k, [&](int64_t first, int64_t n) PWM_FAST_INLINE_LAMBDA {
      const float* const own = from.given ? numbers(from) + first : nullptr;
      float* const to = numbers(out) + first;
      if (packed != nullptr) {
        gemm(numbers(in), in.stride, packed + first * k, rows_, n, k, own, from_stride, to,
             out.stride);
      } else if (pack.by_cols) {  // whose sums are over the weight's rows
        dgrad_direct(numbers(in), in.stride, weight.data + first, weight.stride, rows_, k, n, own,
                     from_stride, to, out.stride);
      } else {
        gemm_direct(numbers(in), in.stride, weight.data + first * weight.stride, weight.stride,
                    rows_, n, k, own, from_stride, to, out.stride);
      }
    });
  }

  // body(first, count) for parts of n columns, each of whole tiles, of products with k numbers.
  template <class Body>
  PWM_FAST_INLINE void in_columns(int64_t n, int64_t tile, int64_t k, Body body) const {
    if (threads_ == 1) return body(0, n);
    // Wakes a thread for some 5 us of work: few rows wait for the weight to arrive.
    const int64_t units = (n + tile - 1) / tile, elements = n * k / 4 + rows_ * n * k / 32;
    in_parallel(useful_threads(threads_, units, elements), units,
                [&](int64_t, int64_t begin, int64_t end) {
                  body(begin * tile, smaller(n, end * tile) - begin * tile);
                });
  }

  void sum_weight(const Instruction& at) const {
    const View dy = view(at.operand[0]), x = view(at.operand[1]);
    const Sum& sum = totals_[at.number[0]];
    const bool begins = first_ && sum.empty && at.number[1] != 0;
    in_columns(dy.cols, tile_rows, x.cols, [&](int64_t first, int64_t n) PWM_FAST_INLINE_LAMBDA {
      weight_grad(numbers(dy) + first, dy.stride, numbers(x), x.stride, rows_, n, x.cols, begins,
                  from_row(sum.place, first));
    });
  }

  void sum_columns(const Instruction& at) const {
    const View x = view(at.operand[0]), y = view(at.operand[1]);
    double* const sums = reinterpret_cast<double*>(totals_[at.number[0]].place.data);
    each_vector<1>(x.cols, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      vd total = {};
      for (int64_t r = 0; r < rows_; ++r) {
        vf value = load_row(kind, row<const float>(x, r), i, x.cols);
        if (y.given) value *= load_row(kind, row<const float>(y, r), i, x.cols);
        total += __builtin_convertvector(value, vd);
      }
      const int64_t count = smaller(W, x.cols - i);
      for (int64_t j = 0; j < count; ++j) sums[i + j] += double(at.factor[0]) * total[j];
    });
  }

  void combine(const Instruction& at) const {
    const View out = view(at.operand[0]), z = view(at.operand[1]);
    const View k1 = view(at.operand[2]), k2 = view(at.operand[3]);
    const float c1 = at.factor[0], c2 = at.factor[1];
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t n = out.cols;
      const float *from = row<const float>(z, r), *x1 = row<const float>(k1, r),
                  *x2 = row<const float>(k2, r);
      float* to = row<float>(out, r);
      each_vector<2>(n, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
        vf step = {};
        if (k1.given) step = load_row(kind, x1, i, n) * c1;
        if (k2.given) step += load_row(kind, x2, i, n) * c2;
        store_row(kind, to, i, n, z.given ? load_row(kind, from, i, n) + step : step);
      });
    }
  }

  void act(const Instruction& at) const {
    const View action = view(at.operand[0]), mu = view(at.operand[1]);
    const View noise = view(at.operand[2]), std = view(at.operand[3]);
    for (int64_t r = 0; r < rows_; ++r) {
      const float *m = row<const float>(mu, r), *e = row<const float>(noise, r);
      float* a = row<float>(action, r);
      for (int64_t i = 0; i < action.cols; ++i) {
        a[i] = __builtin_tanhf(m[i] + e[i] * numbers(std)[i]);
      }
    }
  }

  void act_bwd(const Instruction& at) const {
    const View dmu = view(at.operand[0]), da = view(at.operand[1]), action = view(at.operand[2]);
    for (int64_t r = 0; r < rows_; ++r) {
      const float *d = row<const float>(da, r), *a = row<const float>(action, r);
      float* out = row<float>(dmu, r);
      for (int64_t i = 0; i < dmu.cols; ++i) out[i] = d[i] * (1.0f - a[i] * a[i]);
    }
  }

  const RowProgram& p_;
  const int64_t* scratch_at_;
  float* scratch_;
  const float* const* packs_;
  const Sum* totals_;
  int64_t threads_;
  int64_t begin_ = 0, rows_ = 0;
  bool first_ = false;
};

// The totals of all groups, in their order, into the gradient, or a panel of columns of them.
void write_total(const RowProgram& p, const Total& total, int64_t first_column, const float* first,
                 int64_t groups, int64_t apart, int64_t threads) {
  const Place& place = p.places[total.out.slot];
  if (total.k == 0) {
    float* const out = place.data + total.out.plane * place.stride;
    for (int64_t i = 0; i < total.n; ++i) {
      double value = 0.0;
      for (int64_t g = 0; g < groups; ++g) {
        value += reinterpret_cast<const double*>(first + g * apart)[i];
      }
      out[i] = float(value);
    }
    return;
  }
  // Panels of the weight's columns, one after another.
  const int64_t panel_floats = total.n * tile_cols;
  const int64_t count = panels(total.k - first_column);
  const int64_t useful = useful_threads(threads, count, groups * count * panel_floats);
  in_parallel(useful, count, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = first_column + panel * tile_cols;
      const int64_t cols = smaller(tile_cols, total.k - column);
      const float* from = first + panel * panel_floats;
      for (int64_t r = 0; r < total.n; ++r, from += tile_cols) {
        float* const out =
            place.data + (total.out.plane * total.n + r) * place.stride + column;
        each_vector<2>(cols, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
          vf value = {};
          for (int64_t g = 0; g < groups; ++g) value += load(from + g * apart + i);
          store_row(kind, out, i, cols, value);
        });
      }
    }
  });
}

}  // namespace

void row_program(const RowProgram& p) {
  const Division division(p, widest_of(p));
  const int64_t threads = useful_threads(p.threads, division.groups, p.rows * p.work);
  const Layout layout(p, division, threads);

  const Memory<int64_t> scratch_at(p.slot_count);
  int64_t at = 0;
  for (int64_t i = 0; i < p.slot_count; ++i) {
    if (p.slots[i].kind != slot_scratch) continue;
    *scratch_at.at(i) = at;
    at += division.longest_block() * scratch_stride(p.slots[i].cols);
  }
  const Floats scratch(threads * layout.scratch()), packed(layout.packed());
  const Floats sums(division.groups * layout.totals());
  const Memory<const float*> packs(p.pack_count);
  const Memory<Sum> totals(division.groups * p.total_count);
  at = 0;
  for (int64_t i = 0; i < p.pack_count && p.rows > 0; ++i) {
    *packs.at(i) = nullptr;
    if (!worth_packing(p, p.packs[i])) continue;
    pack(p, p.packs[i], packed.at(at), threads);
    *packs.at(i) = packed.at(at);
    at += layout.floats_of(p.packs[i]);
  }
  at = 0;
  for (int64_t i = 0; i < p.total_count; ++i) {
    const Total& total = p.totals[i];
    const Place& place = p.places[total.out.slot];
    float* const out = place.data + total.out.plane * total.n * place.stride;
    for (int64_t g = 0; g < division.groups; ++g) {
      *totals.at(g * p.total_count + i) =
          layout.in_place(total)
              ? Sum{as_rows(out, place.stride, sums.at(at)), g == 0}
              : Sum{as_panels(sums.at(g * layout.totals() + at), total.n, total.k), true};
    }
    at += layout.floats_of(total);
  }

  in_parallel(threads, division.groups, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t i = 0; i < p.total_count; ++i) {
        if (p.totals[i].steps > 0) continue;
        __builtin_memset(totals.at(group * p.total_count + i)->place.data, 0,
                         uint64_t(layout.floats_of(p.totals[i])) * sizeof(float));
      }
      Executor executor(p, scratch_at.at(0), scratch.at(thread * layout.scratch()), packs.at(0),
                        totals.at(group * p.total_count), division.blocks == 1 && !p.repeats ? p.threads : 1);
      for (int64_t block = division.first(group); block < division.first(group + 1); ++block) {
        executor.run(division.begin(block), division.begin(block + 1),
                     block == division.first(group));
      }
    }
  });

  at = 0;
  for (int64_t i = 0; i < p.total_count; ++i) {
    const Total& total = p.totals[i];
    if (layout.in_place(total)) {
      if (total.k % tile_cols != 0) {
        write_total(p, total, total.k / tile_cols * tile_cols, sums.at(at), 1, 0, threads);
      }
    } else {
      write_total(p, total, 0, sums.at(at), division.groups, layout.totals(), threads);
    }
    at += layout.floats_of(total);
  }
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
