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
  static constexpr int64_t most = 48, few = 24, most_groups = 8;
  int64_t rows, blocks, groups;

  Division(int64_t rows_, bool sums) : rows(rows_) {
    blocks = (rows + most - 1) / most;
    if (rows > few) blocks += blocks % 2;
    groups = sums ? smaller(blocks, most_groups) : blocks;
  }
  int64_t first(int64_t group) const { return blocks * group / groups; }
  int64_t begin(int64_t block) const { return rows * block / blocks; }
};

constexpr int64_t scratch_stride(int64_t cols) {
  // Not a power of two, whose rows would share few places in the caches.
  const int64_t whole = panels(cols) * tile_cols;
  return whole % 128 == 0 ? whole + 16 : whole;
}

// Where what all steps need lies: packed weights, and the totals of each group.
class Layout {
 public:
  explicit Layout(const RowProgram& p) : program_(p) {
    for (int64_t i = 0; i < p.slot_count; ++i) {
      if (p.slots[i].kind == slot_scratch) scratch_ += Division::most * scratch_stride(p.slots[i].cols);
    }
    for (int64_t i = 0; i < p.pack_count; ++i) packed_ += floats_of(p.packs[i]);
    for (int64_t i = 0; i < p.total_count; ++i) totals_ += floats_of(p.totals[i]);
  }
  int64_t scratch() const { return scratch_; }
  int64_t packed() const { return packed_; }
  int64_t totals() const { return totals_; }

  int64_t floats_of(const Pack& pack) const {
    const Slot& w = program_.slots[pack.weight.slot];
    return pack.by_cols ? packed_floats(w.cols, w.n) : packed_floats(w.n, w.cols);
  }
  // Those of a vector are fp64.
  static int64_t floats_of(const Total& t) {
    return t.k > 0 ? t.n * panels(t.k) * tile_cols : 2 * padded(t.n);
  }

 private:
  const RowProgram& program_;
  int64_t scratch_ = 0, packed_ = 0, totals_ = 0;
};

// The pointers of one thread, and the block that it is at.
class Executor {
 public:
  Executor(const RowProgram& p, const int64_t* scratch_at, float* scratch,
           const float* const* packs, float* const* totals)
      : p_(p), scratch_at_(scratch_at), scratch_(scratch), packs_(packs), totals_(totals) {}

  void run(int64_t begin, int64_t end) {
    begin_ = begin;
    rows_ = end - begin;
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
    return {"", totals_[index], 1, n, n, fp64, true};
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
    gemm(numbers(in), in.stride, packs_[at.number[0]], rows_, out.cols, in.cols, numbers(from),
         shared ? 0 : from.stride, numbers(out), out.stride);
  }

  void sum_weight(const Instruction& at) const {
    const View dy = view(at.operand[0]), x = view(at.operand[1]);
    weight_grad(numbers(dy), dy.stride, numbers(x), x.stride, rows_, dy.cols, x.cols,
                totals_[at.number[0]]);
  }

  void sum_columns(const Instruction& at) const {
    const View x = view(at.operand[0]), y = view(at.operand[1]);
    double* const sums = reinterpret_cast<double*>(totals_[at.number[0]]);
    each_vector<1>(x.cols, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      vf total = {};
      for (int64_t r = 0; r < rows_; ++r) {
        vf value = load_row(kind, row<const float>(x, r), i, x.cols);
        if (y.given) value *= load_row(kind, row<const float>(y, r), i, x.cols);
        total += value;
      }
      const int64_t count = smaller(W, x.cols - i);
      for (int64_t j = 0; j < count; ++j) sums[i + j] += double(at.factor[0]) * double(total[j]);
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
  float* const* totals_;
  int64_t begin_ = 0, rows_ = 0;
};

// The totals of all groups, in their order, into the gradient.
void write_total(const RowProgram& p, const Total& total, const float* first, int64_t groups,
                 int64_t apart) {
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
  const int64_t stride = panels(total.k) * tile_cols;
  for (int64_t r = 0; r < total.n; ++r) {
    float* const out = place.data + (total.out.plane * total.n + r) * place.stride;
    each_vector<2>(total.k, [&](auto kind, int64_t i, auto) PWM_FAST_INLINE_LAMBDA {
      vf value = {};
      for (int64_t g = 0; g < groups; ++g) value += load(first + g * apart + r * stride + i);
      store_row(kind, out, i, total.k, value);
    });
  }
}

}  // namespace

void row_program(const RowProgram& p) {
  const Layout layout(p);
  const Division division(p.rows, p.total_count > 0);
  const int64_t threads = useful_threads(p.threads, division.groups, p.rows * p.work);

  const Memory<int64_t> scratch_at(p.slot_count);
  int64_t at = 0;
  for (int64_t i = 0; i < p.slot_count; ++i) {
    if (p.slots[i].kind != slot_scratch) continue;
    *scratch_at.at(i) = at;
    at += Division::most * scratch_stride(p.slots[i].cols);
  }
  const Floats scratch(threads * layout.scratch()), packed(layout.packed());
  const Floats sums(division.groups * layout.totals());
  const Memory<const float*> packs(p.pack_count);
  const Memory<float*> totals(division.groups * p.total_count);
  at = 0;
  for (int64_t i = 0; i < p.pack_count && p.rows > 0; ++i) {
    const Pack& pack = p.packs[i];
    const Slot& slot = p.slots[pack.weight.slot];
    const Place& place = p.places[pack.weight.slot];
    const float* weight = place.data + pack.weight.plane * slot.n * place.stride;
    (pack.by_cols ? pack_cols : pack_rows)(weight, place.stride, slot.n, slot.cols, packed.at(at));
    *packs.at(i) = packed.at(at);
    at += layout.floats_of(pack);
  }
  at = 0;
  for (int64_t i = 0; i < p.total_count; ++i) {
    for (int64_t g = 0; g < division.groups; ++g) {
      *totals.at(g * p.total_count + i) = sums.at(g * layout.totals() + at);
    }
    at += Layout::floats_of(p.totals[i]);
  }

  in_parallel(threads, division.groups, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      if (layout.totals() > 0) {
        __builtin_memset(sums.at(group * layout.totals()), 0,
                         uint64_t(layout.totals()) * sizeof(float));
      }
      Executor executor(p, scratch_at.at(0), scratch.at(thread * layout.scratch()), packs.at(0),
                        totals.at(group * p.total_count));
      for (int64_t block = division.first(group); block < division.first(group + 1); ++block) {
        executor.run(division.begin(block), division.begin(block + 1));
      }
    }
  });

  at = 0;
  for (int64_t i = 0; i < p.total_count; ++i) {
    write_total(p, p.totals[i], sums.at(at), division.groups, layout.totals());
    at += Layout::floats_of(p.totals[i]);
  }
}

}  // namespace PWM_FAST_TARGET
}  // namespace pwm_fast
