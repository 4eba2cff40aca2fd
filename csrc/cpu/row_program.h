// Steps of work that are done for one block of rows after another, so that what lies between the
// steps stays in a core's caches: MLPs, rollouts, and their gradients (bind_program.cpp makes them).
#pragma once

#include <stdint.h>

#include "view.h"

namespace pwm_fast {

// What a step refers to: a tensor of the call, or scratch memory of the thread.
enum SlotKind : int64_t {
  slot_rows,     // [planes, R, cols]: R rows of the call, of which a block is worked on
  slot_shared,   // [planes, cols]: one row that all rows have in common
  slot_weight,   // [planes, n, cols]
  slot_scratch,  // [R, cols]
};
struct Slot {
  int64_t kind, planes, n, cols;
  int64_t begin, whole;  // of a weight: its columns are some of the tensor's
  bool gapless;  // its rows must follow one another
  bool kept;     // one of those that lie side by side in one tensor
};

struct Operand {
  int64_t slot, plane;  // slot < 0: absent
};

// A weight [n, k] in the order of gemm.h, where packing it gains more than it costs.
struct Pack {
  Operand weight;
  bool by_cols;   // for dy w, not for x w^T
  int64_t steps;  // that multiply by it
};

enum Step : int64_t {
  step_gemm,           // out, in, from or absent; pack
  step_weight_grad,    // dy, x; total, whether it is the first step of that total
  step_column_sum,     // x, y or absent; total, factor: of factor x y
  step_combine,        // out, z or absent, k1 or absent, k2 or absent; factors c1, c2
  step_norm_act_fwd,   // x, y, xhat, rstd, gamma, beta, bias, add, w_tau; act, group, eps, tau
  step_norm_act_bwd,   // dy, dx, xhat, rstd, gamma, beta, y; act, group, three totals
  step_act_norm_fwd,   // x, y, u, mean, rstd, gamma, beta, bias; act, eps
  step_act_norm_bwd,   // dy, dx, u, mean, rstd, gamma; act, three totals
  step_policy,         // action, mu, noise, std: tanh(mu + noise std)
  step_policy_bwd,     // dmu, da, action: da (1 - action^2)
  steps,
};
constexpr int most_operands = 9, most_numbers = 5, most_factors = 2;

struct Instruction {
  int64_t step;
  Operand operand[most_operands];
  int64_t number[most_numbers];
  float factor[most_factors];
};

// A gradient: a sum over all rows, of a weight or (k = 0) of a vector of n numbers.
struct Total {
  Operand out;
  int64_t n, k;
  int64_t steps;  // step_weight_grad that add to it; of none, the sum starts at 0
};

struct Place {  // of a slot in a call
  float* data;
  int64_t stride;
};

struct RowProgram {
  const Slot* slots;
  const Pack* packs;
  const Total* totals;
  const Instruction* instructions;
  int64_t slot_count, pack_count, total_count, instruction_count;
  const Place* places;
  int64_t rows;
  int64_t work;  // of a row, in elements of an elementwise kernel
  int64_t threads;
  bool repeats;  // some weight takes part in several steps, as in a rollout
};

}  // namespace pwm_fast
