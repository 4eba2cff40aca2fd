"""Lambda returns as a torch operator, for kernels that take all steps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.ops.library import define, first_order_only, register_gradient


def _td_lambda(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    from pwm_fast.kernels import returns

    return returns.returns_fwd(rewards, values, continues, gamma, lam)


define(
    "td_lambda",
    "(Tensor rewards, Tensor values, Tensor? continues, float gamma, float lam) -> Tensor",
    _td_lambda,
    lambda rewards, values, continues, gamma, lam: torch.empty_like(rewards),
)


def _td_lambda_backward(
    dout: Tensor,
    values: Tensor,
    continues: Tensor | None,
    out: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from pwm_fast.kernels import returns

    grads = returns.returns_bwd(dout.contiguous(), values, continues, out, gamma, lam)
    return grads[0], grads[1], out.new_empty(0) if grads[2] is None else grads[2]


def _td_lambda_backward_fake(
    dout: Tensor,
    values: Tensor,
    continues: Tensor | None,
    out: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ends = out.new_empty(0) if continues is None else torch.empty_like(continues)
    return torch.empty_like(out), torch.empty_like(values), ends


define(
    "td_lambda_backward",
    "(Tensor dout, Tensor values, Tensor? continues, Tensor out, float gamma, float lam)"
    " -> (Tensor, Tensor, Tensor)",
    _td_lambda_backward,
    _td_lambda_backward_fake,
)
first_order_only("td_lambda_backward")


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, values, continues, *ctx.constants = inputs
    ctx.save_for_backward(values, continues, output)


def _grad(ctx: Any, dout: Tensor) -> Any:
    values, continues, out = ctx.saved_tensors
    operator = torch.ops.pwm_fast.td_lambda_backward
    drewards, dvalues, dcontinues = operator(dout, values, continues, out, *ctx.constants)
    return drewards, dvalues, None if continues is None else dcontinues, None, None


register_gradient("td_lambda", _grad, _setup)
