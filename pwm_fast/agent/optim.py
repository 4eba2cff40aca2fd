"""Adam with gradient clipping, which skips updates that are not finite, without a host sync."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pwm_fast.ops import invalidate
from pwm_fast.ops.adam import Group, GuardedStep, step_kernels, total_norm
from pwm_fast.parallel import ALONE, Ranks


class _Listed(NamedTuple):
    """What a group's parameters have, in their order.

    Attributes:
        places: where their gradients stand in a call.
        states: Adam's state of each.
        steps: its step counts ``[T]``; the states have views of its entries.
    """

    places: list[int]
    states: list[dict[str, Tensor]]
    steps: Tensor


class GuardedAdam:
    """Clip, check and apply gradients.

    Where the loss or the gradient's norm is not finite, parameters and Adam's moments stay as they
    are and the skip is counted on the device; the trainer reads the counts when it logs.

    Args:
        params: parameters to learn.
        lr: learning rate; a device tensor inside, so that it can change under a captured graph.
        betas: Adam's betas.
        grad_norm: the gradient's total norm is clipped to this.
        slow: some of ``params``, which learn at ``slow_scale`` times the rate.
        slow_scale: see ``slow``.

    Attributes:
        ranks: whose gradients and losses are averaged before anything else is done with them.
    """

    ranks: Ranks = ALONE

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: Sequence[float],
        grad_norm: float,
        slow: Iterable[nn.Parameter] = (),
        slow_scale: float = 1.0,
    ) -> None:
        self.params = list(params)
        device = self.params[0].device
        self.initial_lr = float(lr)
        slow_ids = {id(p) for p in slow}
        fast_params = [p for p in self.params if id(p) not in slow_ids]
        slow_params = [p for p in self.params if id(p) in slow_ids]
        self._scales = [s for s, g in ((1.0, fast_params), (slow_scale, slow_params)) if g]
        # On a GPU fused Adam reads a rate in float32 alone.
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self.adam = torch.optim.Adam(
            [
                {
                    "params": group,
                    "lr": torch.full((), self.initial_lr * scale, dtype=exact, device=device),
                }
                for scale, group in ((1.0, fast_params), (slow_scale, slow_params))
                if group
            ],
            betas=(betas[0], betas[1]),
            fused=True,
            capturable=device.type == "cuda",  # without, PyTorch refuses to record a step
        )
        self._grad_norm = grad_norm
        options = (*self.adam.defaults["betas"], self.adam.defaults["eps"], grad_norm)
        self._options = torch.stack(
            [torch.full((), x, dtype=torch.float64, device=device) for x in options]
        )
        self._listed: tuple[Any, list[_Listed]] | None = None
        self.keep_gradients = False  # leave clipped gradients in `.grad`, for histograms
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def step(self, loss: Tensor) -> Tensor:
        """Backpropagate ``loss`` and update; return the gradient's norm before clipping."""
        return self.apply(loss, torch.autograd.grad(loss, self.params, allow_unused=True))

    def apply(self, loss: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
        """Update by gradients of ``loss`` that the caller has; they may be overwritten.

        In one native call on a CPU, with Triton's kernels on a GPU (docs/kernels.md), else with
        PyTorch's fused Adam.

        Args:
            loss: a scalar; it is only looked at.
            grads: one for each of the parameters, None for zeros.

        Returns:
            The gradients' norm before clipping, in their dtype: infinite where that does not hold
            it, which is no reason to skip as long as the gradients are finite.
        """
        kernels = step_kernels(self.params)
        given = [
            torch.zeros_like(p)
            if g is None
            else _laid_out_as(p, g)
            if kernels is None
            else g.contiguous()  # as the parameters then are
            for p, g in zip(self.params, grads, strict=True)
        ]
        if self.ranks.size > 1:
            # Not the loss, but 0 or NaN where it is not finite: all ranks skip an update, or none.
            loss = (loss.detach() * 0.0).to(given[0].dtype)
            self.ranks.average_([*given, loss])
        if kernels is None:
            norm = self._torch_step(loss, given)
        else:
            norm = self._kernel_step(kernels, loss, given)
        if self.params[0].device.type != "cpu":
            invalidate(self.params)  # neither bumps version counters
        for p, g in zip(self.params, given, strict=True):
            p.grad = g if self.keep_gradients else None
        return norm

    def _torch_step(self, loss: Tensor, grads: list[Tensor]) -> Tensor:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        norm = total_norm(grads)
        factor = (self.grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
        bad = ~((norm < math.inf) & torch.isfinite(loss.detach()))  # a NaN is not below
        # Fused Adam leaves parameters, moments and its step count alone where found_inf is 1.
        self.adam.found_inf = bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.skipped.add_(bad)
        self.skipped_in_a_row.add_(1).mul_(bad)
        return norm.to(grads[0].dtype)

    def _kernel_step(self, step: GuardedStep, loss: Tensor, grads: list[Tensor]) -> Tensor:
        groups = [
            Group(
                group["params"],
                [grads[i] for i in listed.places],
                [state["exp_avg"] for state in listed.states],
                [state["exp_avg_sq"] for state in listed.states],
                listed.steps,
                group["lr"],
            )
            for group, listed in zip(self.adam.param_groups, self._lists(), strict=True)
        ]
        return step.guarded_step(
            groups,
            self._options,
            loss.detach(),
            self.skipped,
            self.skipped_in_a_row,
            keep=self.keep_gradients,
        )

    def _lists(self) -> list[_Listed]:
        # Adam makes another state where it loads one.
        if self._listed is None or self._listed[0] is not self.adam.state:
            places = {id(p): i for i, p in enumerate(self.params)}
            self._listed = (
                self.adam.state,
                [self._list_group(g["params"], places) for g in self.adam.param_groups],
            )
        return self._listed[1]

    def _list_group(self, params: list[nn.Parameter], places: dict[int, int]) -> _Listed:
        counts = torch.zeros(len(params), dtype=torch.float32, device=params[0].device)
        states = [self.adam.state[p] for p in params]
        for p, state, count in zip(params, states, counts.unbind(), strict=True):
            if not state:
                state["step"] = count
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] = count.copy_(state["step"])
        return _Listed([places[id(p)] for p in params], states, counts)

    @property
    def grad_norm(self) -> float:
        """What the gradient's total norm is clipped to; it can be set."""
        return self._grad_norm

    @grad_norm.setter
    def grad_norm(self, value: float) -> None:
        self._grad_norm = value
        self._options[3] = value  # kernels read it there

    @property
    def lr(self) -> Tensor:
        """The learning rate, of the parameters that are not slow."""
        return self.adam.param_groups[0]["lr"]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate in place."""
        for group, scale in zip(self.adam.param_groups, self._scales, strict=True):
            group["lr"].fill_(lr * scale)

    def state_dict(self) -> dict[str, Any]:
        """Moments, step count, learning rate and skip counts."""
        return {
            "adam": self.adam.state_dict(),
            "skipped": self.skipped.clone(),
            "skipped_in_a_row": self.skipped_in_a_row.clone(),
        }

    def mismatches(self, name: str, state: Any) -> list[str]:
        """What of a saved state is not of these parameters, or would spoil them; empty if nothing.

        Args:
            name: of the state, for the messages.
            state: what :meth:`load_state_dict` would take.
        """
        adam = state.get("adam") if isinstance(state, dict) else None
        moments = adam.get("state") if isinstance(adam, dict) else None
        groups = adam.get("param_groups") if isinstance(adam, dict) else None
        if not (isinstance(moments, dict) and isinstance(groups, list)):
            return [f"{name}.adam is not the state of an Adam optimiser"]
        problems = []
        own = self.adam.state_dict()["param_groups"]
        listed = [group.get("params") if isinstance(group, dict) else None for group in groups]
        if listed != [group["params"] for group in own]:
            problems.append(f"{name}.adam.param_groups are of other parameters")
        elif not all(_is_rate(group.get("lr")) for group in groups):
            problems.append(f"{name}.adam.param_groups have no learning rates of 0 or more")
        order = [p for group in self.adam.param_groups for p in group["params"]]
        for index, saved in moments.items():
            if type(index) is not int or not 0 <= index < len(order):
                problems.append(f"{name}.adam.state.{index} is of no parameter")
            else:
                problems += _moment_problems(f"{name}.adam.state.{index}", saved, order[index])
        for key in ("skipped", "skipped_in_a_row"):
            count = state.get(key)
            if not (_is_scalar(count) and count.dtype == torch.int64 and int(count) >= 0):
                problems.append(f"{name}.{key} is no count")
        return problems

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; Adam's betas stay those of this run."""
        options = [{**group} for group in self.adam.param_groups]
        # Adam would share tensors with the state that it loads.
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))
        for group, own in zip(self.adam.param_groups, options, strict=True):
            own["lr"].copy_(torch.as_tensor(group["lr"]))
            group.update({k: v for k, v in own.items() if k != "params"})
        self._listed = None  # what was loaded has counts of its own
        self.skipped.copy_(state["skipped"])
        self.skipped_in_a_row.copy_(state["skipped_in_a_row"])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_rate(value: Any) -> bool:
    number = float(value) if type(value) in (int, float) or _is_scalar(value) else math.nan
    return 0.0 <= number < math.inf


def _moment_problems(name: str, saved: Any, p: Tensor) -> list[str]:
    """What is wrong with the saved moments of a parameter.

    A second moment may have overflowed to infinity, which only stops its parameter.
    """
    if not isinstance(saved, dict):
        return [f"{name} is a {type(saved).__name__} instead of moments"]
    problems = []
    if not _is_rate(saved.get("step")):
        problems.append(f"{name}.step is no number of steps")
    for key in ("exp_avg", "exp_avg_sq"):
        moment = saved.get(key)
        if not isinstance(moment, Tensor) or not moment.is_floating_point():
            problems.append(f"{name}.{key} is no tensor of numbers")
        elif moment.shape != p.shape:
            problems.append(f"{name}.{key} is {list(moment.shape)} instead of {list(p.shape)}")
        elif key == "exp_avg" and not bool(moment.isfinite().all()):
            problems.append(f"{name}.{key} has NaN or infinite values")
        elif key == "exp_avg_sq" and not bool((moment >= 0).all()):
            problems.append(f"{name}.{key} has NaN or negative values")
    return problems


def _laid_out_as(p: Tensor, g: Tensor) -> Tensor:
    """``g`` in the memory order of ``p``.

    Fused Adam walks through both in the order of memory: a transposed gradient, such as a batched
    GEMM's, would update the wrong entries (torch 2.13 on the CPU).
    """
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
