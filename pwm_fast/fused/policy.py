"""A Gaussian policy between the macro steps of an imagined rollout, forward.

Where the latents follow linearly from what a macro step leaves, so does the policy's first layer:
``z += S W3^T + b3`` makes its GEMM ``h = z W1^T`` grow by ``S (W1 W3)^T + W1 b3``. Then ``h`` is
carried, and nobody waits for the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.fused_gemm import FusedPolicy
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused import weight_cache
from pwm_fast.fused.gemm import Gemm, cast_together, fp32_mode
from pwm_fast.fused.gemm_axpby import GemmAxpby
from pwm_fast.fused.mlp import FusedMLP


class Policy:
    """``a = tanh(mu(z) + std noise)`` and ``c = base + a W_a^T``, step by step.

    Args:
        kernels: elementwise kernels, which say the precision.
        specs: of the layers of ``mu``, each but the last of order ``"act_norm"``.
        layers: their tensors.
        std: ``[A]``.
        noise: ``[H, B, A]``.
        base: ``[1 or B, U]``, what the dynamics' first GEMM has beside latent and action.
        w_a: ``[U, A]``, the part of its weight that takes the action.
        head: ``W3 [D, U]`` and ``b3`` by which latents follow from a macro step, to carry the first
            layer's GEMM; None where it is made of each latent.
        save: keep what a backward pass needs.
        wgrad: keep what gradients of the parameters need.
    """

    def __init__(
        self,
        kernels: Kernels,
        specs: Sequence[LayerSpec],
        layers: Sequence[LayerParams],
        *,
        std: Tensor,
        noise: Tensor,
        base: Tensor,
        w_a: Tensor,
        head: tuple[Tensor, Tensor | None] | None,
        save: bool,
        wgrad: bool,
    ) -> None:
        horizon, batch, _ = noise.shape
        self.mlp = FusedMLP(kernels, specs, layers, horizon, batch, save=save, wgrad=wgrad)
        self.std, self.base = std.contiguous(), base.contiguous()
        self.noise, self.w_a = noise, w_a
        #: The first layer's GEMM of latents ``[B, D]``, which may be in the compute dtype already.
        self.first = self.mlp.gemms[0]
        weights = [p.weight for p in layers]
        self._carry: GemmAxpby | None = None
        if head is not None:
            weight, bias = _carried(layers[0].weight, *head)
            self._carry = GemmAxpby(Gemm(kernels, weight, batch), batch, bias)
            weights.append(weight)
        cast_together(kernels, weights)
        self._fused = self._fuse(batch)

    def _fuse(self, batch: int) -> FusedPolicy | None:
        """All that follows the first GEMM in one launch, where the kernels have such a way."""
        mlp, gemms = self.mlp, self.mlp.kernels.gemms
        if gemms is None:
            return None
        device, compute = self.std.device, self.first.precision.compute
        fused = gemms.policy(mlp.specs, mlp.widths, batch, compute, device)
        if fused is not None and not mlp.wgrad:  # else each step's outputs are kept
            self._between = [
                torch.empty(batch, n, dtype=compute, device=device) for n in mlp.widths[:-1]
            ]
        return fused

    def follow(self, total: Tensor, h: Tensor) -> Tensor:
        """The first layer's GEMM after a macro step with sums ``[B, U]`` of hidden outputs."""
        assert self._carry is not None
        following = torch.empty_like(h)
        self._carry(total, h, following, 1.0)
        return following

    def act(self, t: int, h: Tensor, action: Tensor) -> Tensor:
        """Step ``t``: write ``action [B, A]`` and return ``c [B, U]``, for the first GEMM."""
        if self._fused is None:
            own = self._carry is None
            if self.mlp.specs[0].plain and not own:  # it adds its bias in place
                h = h.clone()
            mu = self.mlp.forward(t, h, own=own)
            torch.tanh(torch.addcmul(mu, self.noise[t], self.std), out=action)
            return torch.addmm(self.base, action, self.w_a.t())
        mlp, hidden = self.mlp, range(len(self.mlp.specs) - 1)
        outputs = [mlp.output_of(i, t) for i in hidden]
        c = h.new_empty(h.shape[0], self.w_a.shape[0])
        self._fused(
            h,
            mlp.params,
            [None, *(gemm.cast_weight() for gemm in mlp.gemms[1:])],
            [y for y in outputs if y is not None] or self._between,
            [mlp.saved_of(i, t) for i in hidden],
            std=self.std,
            noise=self.noise[t],
            base=self.base,
            w_a=self.w_a,
            action=action,
            c=c,
        )
        return c


def _carried(w: Tensor, w3: Tensor, b3: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``W1 W3`` and ``W1 b3`` in fp32, kept as other packed weights are."""

    def make(w: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
        with fp32_mode(False, w):
            return tuple(w @ x for x in head)

    tensors = (w, w3) if b3 is None else (w, w3, b3)
    weight, *bias = weight_cache.kept(("carried policy",), tensors, make)
    return weight, bias[0] if bias else None
