"""What the tuner runs of a fused GEMM: every plan, and the plain GEMM with its elementwise kernel.

Each call does what :class:`pwm_fast.fused.mlp.FusedMLP` does for one layer, on operands in the
GEMMs' compute dtype, and is compared with float64 before it is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.internals import EXACT, FAST, TF32, gemm, planning, triton_backend, triton_gemm

GemmPlan, GemmShape = planning.GemmPlan, planning.GemmShape

EPS = 1e-5
ERROR = 2e-2  # relative to the largest entry, in every precision; a wrong tile is off by more
PRECISIONS = {"16": FAST, "tf32": TF32, "ieee": EXACT}
C1, C2 = 0.25, 0.5  # of an update


class Wrong(Exception):
    """A choice computes something else."""


class Workload(ABC):
    """Operands of one GEMM, shared by its choices, which write the same results.

    Args:
        shape: what is computed.
        device: of the tensors.
    """

    def __init__(self, shape: GemmShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.precision = PRECISIONS[shape.rate]
        self.kernels = triton_backend.TritonKernels(self.precision)
        self.members = shape.members if shape.members > 1 else 0
        self.rows = shape.rows * shape.members
        self.operand = self.precision.dtype(torch.float32)
        torch.manual_seed(0)
        self._lead = (self.members,) if self.members else ()
        n, k = shape.n, shape.k
        self.x = self.normal(self.rows, k).to(self.operand)
        backward = shape.kernel.endswith("bwd")
        weight = (k, n) if backward else (n, k)
        self.weight = self.normal(*self._lead, *weight, scale=k**-0.5)
        self.out = self.empty(self.rows, n)
        self.scale = self.empty(self.rows, dtype=torch.float32) if self.precision.scaled else None
        self.x_scale = torch.ones(self.rows, device=device) if self.precision.scaled else None
        self.vectors = [
            base + self.normal(*self._lead, n, scale=0.1) for base in (1.0, 0.0, 0.0)
        ]  # gamma, beta, bias
        self.prepare()
        self.gemm = gemm.Gemm(self.kernels, self.weight, self.rows)
        self.cast_weight = self.gemm.cast_weight()

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random float32."""
        return scale * torch.randn(*shape, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """NaN in the operands' dtype, so that what no choice writes is seen."""
        return torch.full(shape, float("nan"), dtype=dtype or self.operand, device=self.device)

    def call(self, plan: GemmPlan | None) -> Callable[[], Any]:
        """A choice's call, after one that was compared; None: plain GEMM, elementwise kernel.

        Raises:
            Wrong: the result is another.
        """
        made = self.plain if plan is None else self.fused(plan)
        self.out.fill_(float("nan"))
        made()
        found = self.out.double()
        if self.shape.kernel.endswith("bwd") and self.scale is not None:
            found = found * self.scale.double().unsqueeze(-1)
        wanted = self.wanted()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= ERROR:
            raise Wrong(f"relative error {error:.1e} exceeds {ERROR:.0e}")
        return made

    def runner(self, plan: GemmPlan) -> Any:
        """Of :data:`pwm_fast.backends.triton_gemm.FUSED`."""
        run = triton_gemm.FUSED[self.shape.kernel]
        precision = self.shape.input_precision
        return run(plan, self.rows, self.device, precision, self.members)

    def gemm64(self) -> Tensor:
        """``x W^T``, or ``dy W``, ``[R, N]`` of the rounded operands."""
        x, w = self.x.double(), self.cast_weight.double()
        w = w if self.shape.kernel.endswith("bwd") else w.transpose(-1, -2)
        if self.members:
            x = x.view(self.members, -1, x.shape[-1])
        return (x @ w).reshape(self.rows, -1)

    def over_rows(self, vector: Tensor) -> Tensor:
        """A parameter in float64, ``[R, n]`` of an ensemble's."""
        if self.members:
            vector = vector.repeat_interleave(self.shape.rows, 0)
        return vector.double()

    # Of each kernel:

    def prepare(self) -> None:  # noqa: B027 (not every kernel has any)
        """Make further operands."""

    @abstractmethod
    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        """The call of a plan."""

    @abstractmethod
    def plain(self) -> None:
        """Run the plain GEMM and its elementwise kernel."""

    @abstractmethod
    def wanted(self) -> Tensor:
        """The result in float64."""


class NormActForward(Workload):
    """A centred layer, Mish, keeping what a backward pass needs."""

    def prepare(self) -> None:
        self.weight -= self.weight.mean(0)
        self.vectors[2] -= self.vectors[2].mean()
        self.hat = self.empty(self.rows, self.shape.n)
        self.rstd = self.empty(self.rows, dtype=torch.float32)
        gamma, beta, bias = self.vectors
        self.options: dict[str, Any] = {"gamma": gamma, "beta": beta, "bias": bias, "act": "mish"}
        self.options |= {"group": 8, "eps": EPS, "width": self.shape.n}

    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        results = (self.out, self.hat, self.rstd)
        return partial(self.runner(plan), self.x, self.cast_weight, *results, **self.options)

    def plain(self) -> None:
        h = self.gemm(self.x, fp32=False)
        self.kernels.norm_act_fwd(h, self.out, self.hat, self.rstd, **self.options)

    def wanted(self) -> Tensor:
        gamma, beta, bias = (self.over_rows(v) for v in self.vectors)
        h = self.gemm64() + bias
        hat = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return F.mish(hat * gamma + beta)


class NormActBackward(Workload):
    """The following layer's gradient to that of a centred layer, frozen, as in a rollout."""

    def prepare(self) -> None:
        self.hat = self.normal(self.rows, self.shape.n).to(self.operand)
        self.rstd = 0.5 + self.normal(self.rows).abs()
        gamma, beta, _ = self.vectors
        self.options: dict[str, Any] = {"gamma": gamma, "beta": beta, "act": "mish"}
        self.options["width"] = self.shape.n

    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        return partial(
            self.runner(plan),
            self.x,
            self.cast_weight,
            self.out,
            self.hat,
            self.rstd,
            **self.options,
            dy_scale=self.x_scale,
            dx_scale=self.scale,
            sums=None,
        )

    def plain(self) -> None:
        dm, scale = self.gemm.scaled_dgrad(self.x, 0, self.x_scale, fp32=False)
        scales = {"dy_scale": scale, "dx_scale": self.scale}
        extra = {"y": None, "group": 8, **self.options, **scales}
        self.kernels.norm_act_bwd(dm, self.out, self.hat, self.rstd, **extra)

    def wanted(self) -> Tensor:
        gamma, beta, _ = (self.over_rows(v) for v in self.vectors)
        hat = self.hat.double()
        u = (hat * gamma + beta).requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(F.mish(u).sum(), u)
        gain = self.gemm64() * slope * gamma
        along = (gain * hat).mean(-1, keepdim=True)
        return self.rstd.double()[:, None] * (gain - hat * along)


class ActNormForward(Workload):
    """A layer of actors or critics, keeping what a backward pass needs."""

    def prepare(self) -> None:
        gamma, beta, bias = self.vectors
        self.u = self.empty(self.rows, self.shape.n)
        self.mean, self.rstd = (self.empty(self.rows, dtype=torch.float32) for _ in range(2))
        self.options: dict[str, Any] = {"gamma": gamma, "beta": beta, "bias": bias, "act": "mish"}
        self.options["eps"] = EPS

    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        results = (self.out, self.u, self.rstd)
        extra = {"group": 8, "width": 0, "mean": self.mean, **self.options}
        return partial(self.runner(plan), self.x, self.cast_weight, *results, **extra)

    def plain(self) -> None:
        h = self.gemm(self.x, self.members, fp32=False)
        results = (self.out, self.u, self.mean, self.rstd)
        own = self.shape.rows if self.members else 0
        self.kernels.act_norm_fwd(h, *results, **self.options, rows_per_member=own)

    def wanted(self) -> Tensor:
        gamma, beta, bias = (self.over_rows(v) for v in self.vectors)
        v = F.mish(self.gemm64() + bias)
        return F.layer_norm(v, v.shape[-1:], eps=EPS) * gamma + beta


class ActNormBackward(Workload):
    """The following layer's gradient to that of a layer that learns, as actors and critics do."""

    def prepare(self) -> None:
        self.u = self.normal(self.rows, self.shape.n).to(self.operand)
        v = F.mish(self.u.float())
        self.mean = v.mean(-1)
        self.rstd = (v.var(-1, unbiased=False) + EPS).rsqrt()
        gamma, self.beta, _ = self.vectors
        self.options: dict[str, Any] = {"gamma": gamma, "act": "mish"}
        shape = (*self._lead, self.shape.n)
        names = ("dgamma", "dbeta", "dbias")
        self.grads = {m: torch.zeros(shape, dtype=torch.float64, device=self.device) for m in names}

    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        run = self.runner(plan)
        shape = (1, 3, *self._lead, run.blocks, self.shape.n)
        sums = torch.empty(shape, device=self.device)

        def call() -> None:
            run(
                self.x,
                self.cast_weight,
                self.out,
                self.u,
                self.rstd,
                **self.options,
                beta=self.beta,
                width=0,
                dy_scale=self.x_scale,
                dx_scale=self.scale,
                sums=sums[0],
                mean=self.mean,
            )
            sums.sum((0, -2), dtype=torch.float64)

        return call

    def plain(self) -> None:
        own = self.shape.rows if self.members else 0
        d, scale = self.gemm.scaled_dgrad(self.x, self.members, self.x_scale, fp32=False)
        scales = {"dy_scale": scale, "dx_scale": self.scale}
        extra = {**self.options, **self.grads, **scales, "rows_per_member": own}
        self.kernels.act_norm_bwd(d, self.out, self.u, self.mean, self.rstd, **extra)

    def wanted(self) -> Tensor:
        gamma = self.over_rows(self.vectors[0])
        u = self.u.double().requires_grad_(True)
        with torch.enable_grad():
            y = F.layer_norm(F.mish(u), u.shape[-1:], eps=EPS) * gamma
            (dx,) = torch.autograd.grad(y, u, self.gemm64())
        return dx


class Update(Workload):
    """A Heun step's second half: state, its operand for the next GEMM, nothing kept."""

    def prepare(self) -> None:
        shape = (self.rows, self.shape.n)
        self.z, self.k1 = self.normal(*shape), self.normal(*shape)
        self.out = self.empty(*shape, dtype=torch.float32)
        cast = self.operand != torch.float32
        self.options = {"cast": self.empty(*shape) if cast else None}
        self.bias = self.vectors[2]

    def fused(self, plan: GemmPlan) -> Callable[[], Any]:
        tensors = (self.x, self.cast_weight, self.z, self.k1, self.out)
        extra = {"bias": self.bias, "x_scale": None, "raw": None, **self.options}
        return partial(self.runner(plan), *tensors, C1, C2, **extra)

    def plain(self) -> None:
        p = self.gemm(self.x)
        p.add_(self.bias)
        self.kernels.axpby(self.z, self.k1, p, self.out, C1, C2, **self.options)

    def wanted(self) -> Tensor:
        p = self.gemm64() + self.bias.double()
        return self.z.double() + C1 * self.k1.double() + C2 * p


WORKLOADS: dict[str, type[Workload]] = {
    "linear_norm_act_fwd": NormActForward,
    "linear_norm_act_bwd": NormActBackward,
    "linear_act_norm_fwd": ActNormForward,
    "linear_act_norm_bwd": ActNormBackward,
    "linear_axpby": Update,
}
