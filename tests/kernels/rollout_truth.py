"""A folded flow in plain PyTorch, random networks, and what a pass of the kernels is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.kernels.rollout import (
    GradBuffers,
    Network,
    RolloutLayout,
    Saved,
    Scheme,
    rollout_backward,
    rollout_forward,
)
from tests.helpers import assert_2x

WEIGHTS = ("w2", "w13")
CENTRED = ("w_tau", "w2", "b2", "w13", "b13")

Linear = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor) -> Tensor:
    """Products in the tensors' own dtype."""
    return F.linear(x, w)


def in_half(x: Tensor, w: Tensor) -> Tensor:
    """Products of fp16 operands and gradients, as PyTorch's autocast forms them."""
    return F.linear(x.half(), w.half()).float()


class Problem(NamedTuple):
    """A rollout's inputs in float64, not centred, without padding."""

    scheme: Scheme
    weights: dict[str, Tensor]
    p: Tensor
    c: Tensor
    g: Tensor
    lp: Tensor


def problem(scheme: Scheme, batch: int, steps: int, seed: int = 0, device: str = "cpu") -> Problem:
    """Random weights and inputs of order 1."""
    generator = torch.Generator().manual_seed(seed)
    u = scheme.width

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return x.float().double().to(device)

    weights = {
        "w_tau": normal(u),
        "w2": normal(u, u, scale=u**-0.5),
        "b2": normal(u, scale=0.3),
        "w13": normal(u, u, scale=u**-0.5),
        "b13": normal(u, scale=0.3),
        "gamma1": 1.0 + normal(u, scale=0.25),
        "beta1": normal(u, scale=0.25),
        "gamma2": 1.0 + normal(u, scale=0.25),
        "beta2": normal(u, scale=0.25),
    }
    return Problem(
        scheme,
        weights,
        normal(batch, u),
        normal(steps, batch, u),
        normal(steps, batch, u),
        _off_mean(normal(batch, u)),
    )


def evaluate(problem: Problem, dtype: torch.dtype, linear: Linear) -> dict[str, Tensor]:
    """Results and all gradients by autograd, with LayerNorm as it is."""
    scheme = problem.scheme
    w = {name: x.to(dtype).requires_grad_() for name, x in problem.weights.items()}
    p0, c = problem.p.to(dtype).requires_grad_(), problem.c.to(dtype).requires_grad_()
    shape = (scheme.width,)

    def hidden(p: Tensor, c: Tensor, tau: float) -> Tensor:
        h = p + c + tau * w["w_tau"]
        m = F.mish(F.layer_norm(h, shape, w["gamma1"], w["beta1"], scheme.eps1))
        h = linear(m, w["w2"]) + w["b2"]
        return F.mish(F.layer_norm(h, shape, w["gamma2"], w["beta2"], scheme.eps2))

    dt = 1.0 / scheme.substeps
    p, totals = p0, []
    for t in range(c.shape[0]):
        total = torch.zeros_like(p)
        for k in range(scheme.substeps):
            m1 = hidden(p, c[t], k * dt)
            q1 = linear(m1, w["w13"]) + w["b13"]
            if scheme.method == "euler":
                p, total = p + dt * q1, total + dt * m1
                continue
            m2 = hidden(p + dt * q1, c[t], (k + 1) * dt)
            q2 = linear(m2, w["w13"]) + w["b13"]
            p, total = p + 0.5 * dt * (q1 + q2), total + 0.5 * dt * (m1 + m2)
        totals.append(total)
    total = torch.stack(totals)
    loss = (total * problem.g.to(dtype)).sum() + (p * problem.lp.to(dtype)).sum()
    grads = torch.autograd.grad(loss, [p0, c, *w.values()])
    named = dict(zip(["d_p", "d_c", *(f"d_{name}" for name in w)], grads, strict=True))
    return {"total": total.detach(), "p": _off_mean(p.detach())} | named


def network(problem: Problem, padded: int, dtype: torch.dtype) -> Network:
    """The problem's weights as the kernels take them."""
    made = {}
    for name, x in problem.weights.items():
        x = x - x.mean(0) if name in CENTRED else x
        kind = dtype if name in WEIGHTS else torch.float32
        made[name] = pad(x, padded, both=name in WEIGHTS).to(kind)
    return Network(**made)


def pad(x: Tensor, padded: int, both: bool = False) -> Tensor:
    """Zeros behind the last dimension (and the one before)."""
    extra = padded - x.shape[-1]
    return F.pad(x, (0, extra, 0, extra) if both else (0, extra))


def _off_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def buffers(problem: Problem, padded: int, dtype: torch.dtype) -> tuple[Saved, GradBuffers]:
    """Buffers for a backward pass with weights, filled with NaN."""
    steps, batch, _ = problem.c.shape
    evals = steps * problem.scheme.evals

    def rows(kind: torch.dtype, *wide: int) -> Tensor:
        shape = (evals, batch, *wide)
        return torch.full(shape, float("nan"), dtype=kind, device=problem.c.device)

    f32 = torch.float32
    wide = [rows(dtype, padded) for _ in range(5)]
    narrow = [rows(f32) for _ in range(4)]
    y2 = rows(f32, padded)
    saved = Saved(wide[0], narrow[0], wide[1], narrow[1], wide[2], y2)
    scaled = dtype == torch.float16
    gradients = GradBuffers(
        wide[3], narrow[2] if scaled else None, wide[4], narrow[3] if scaled else None
    )
    return saved, gradients


def run(
    problem: Problem, padded: int, dtype: torch.dtype, plan: RolloutLayout
) -> dict[str, Tensor]:
    """The same results by the kernels, as the user's gradients are: centred and cut."""
    u = problem.scheme.width
    net = network(problem, padded, dtype)
    saved, gradients = buffers(problem, padded, dtype)
    p, c = (pad(_off_mean(x), padded).float() for x in (problem.p, problem.c))
    forward = rollout_forward(p, c, net, problem.scheme, plan, saved=saved)
    g, lp = (pad(x, padded).float() for x in (problem.g, problem.lp))
    backward = rollout_backward(g, lp, net, problem.scheme, plan, saved, grads=gradients)
    assert backward.sums is not None and saved.y1 is not None and saved.y2 is not None
    assert not forward.total[..., u:].any() and not forward.p[..., u:].any()
    result = {"total": forward.total[..., :u], "p": forward.p[..., :u]}
    result |= {"d_p": _off_mean(backward.lp[..., :u]), "d_c": _off_mean(backward.dc[..., :u])}
    names = ("gamma1", "beta1", "gamma2", "beta2", "b2", "b13", "w_tau")
    for name, x in zip(names, backward.sums, strict=True):
        x = x[:u].float()
        result[f"d_{name}"] = _off_mean(x) if name in CENTRED else x
    for name, dh, scale, y in (
        ("w2", gradients.dh2, gradients.dh2_scale, saved.y1),
        ("w13", gradients.dq, gradients.dq_scale, saved.y2),
    ):
        dh = dh.double() if scale is None else dh.double() * scale.double().unsqueeze(-1)
        dw = dh.flatten(0, 1).t() @ y.double().flatten(0, 1)
        dw = dw[:u, :u]
        result[f"d_{name}"] = (dw - dw.mean(0)).float()
    return result


def check(problem: Problem, results: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The 2x rule for every result and gradient."""
    truth = evaluate(problem, torch.float64, plain)
    theirs = evaluate(problem, torch.float32, in_half if dtype == torch.float16 else plain)

    # One draw of PyTorch's rounding may be next to nothing by luck: that of other draws counts too.
    @functools.cache
    def other(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        like = problem_like(problem, seed)
        rounded = evaluate(like, torch.float32, in_half if dtype == torch.float16 else plain)
        return rounded, evaluate(like, torch.float64, plain)

    for name, reference in truth.items():
        nearby = ((other(seed)[0][name], other(seed)[1][name]) for seed in range(101, 105))
        assert_2x(results[name], theirs[name], reference, name, nearby)


def problem_like(like: Problem, seed: int) -> Problem:
    """Another draw of the same sizes."""
    steps, batch, _ = like.c.shape
    return problem(like.scheme, batch, steps, seed, str(like.c.device))
