"""A Gaussian policy between the macro steps of an imagined rollout, forward.

Where the latents follow linearly from what a macro step leaves, so does the policy's first layer:
``z += S W3^T + b3`` makes its product ``h = z W1^T`` grow by ``S (W1 W3)^T + W1 b3``. Then ``h`` is
carried, and nobody waits for the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.fused_gemm import FusedPolicy, products_of
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused import weight_cache
from pwm_fast.fused.gemm import Gemm, fp32_products, round_together
from pwm_fast.fused.gemm_axpby import Update
from pwm_fast.fused.stack import Stack


class Policy:
    """``a = tanh(mu(z) + std noise)`` and ``c = base + a W_a^T``, step by step.

    Args:
        kernels: element kernels, which say the precision.
        specs: of the layers of ``mu``, each but the last of order ``"act_norm"``.
        layers: their tensors.
        std: ``[A]``.
        noise: ``[H, B, A]``.
        base: ``[1 or B, U]``, what the dynamics' first product has beside latent and action.
        w_a: ``[U, A]``, the part of its weight that takes the action.
        head: ``W3 [D, U]`` and ``b3`` by which latents follow from a macro step, to carry the first
            layer's product; None where it is made of each latent.
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
        self.stack = Stack(kernels, specs, layers, horizon, batch, save=save, wgrad=wgrad)
        self.std, self.base = std.contiguous(), base.contiguous()
        self.noise, self.w_a = noise, w_a
        #: The first layer's product of latents ``[B, D]``, which products may take already.
        self.first = self.stack.gemms[0]
        weights = [p.weight for p in layers]
        self._carry: Update | None = None
        if head is not None:
            weight, bias = _carried(layers[0].weight, *head)
            self._carry = Update(Gemm(kernels, weight, batch), batch, bias)
            weights.append(weight)
        round_together(kernels, weights)
        self._fused = self._fuse(batch)

    def _fuse(self, batch: int) -> FusedPolicy | None:
        """All that follows the first product in one launch, where the kernels have such a way."""
        stack, products = self.stack, products_of(self.stack.kernels)
        if products is None:
            return None
        device, operand = self.std.device, self.first.precision.operand
        fused = products.policy(stack.specs, stack.widths, batch, operand, device)
        if fused is not None and not stack.wgrad:  # else each step's outputs are kept
            self._between = [
                torch.empty(batch, n, dtype=operand, device=device) for n in stack.widths[:-1]
            ]
        return fused

    def follow(self, total: Tensor, h: Tensor) -> Tensor:
        """The first layer's product after a macro step with sums ``[B, U]`` of hidden outputs."""
        assert self._carry is not None
        following = torch.empty_like(h)
        self._carry(total, h, following, 1.0)
        return following

    def act(self, t: int, h: Tensor, action: Tensor) -> Tensor:
        """Step ``t``: write ``action [B, A]`` and return ``c [B, U]``, for the first product."""
        if self._fused is None:
            own = self._carry is None
            if self.stack.specs[0].plain and not own:  # it adds its bias in place
                h = h.clone()
            mu = self.stack.forward(t, h, own=own)
            torch.tanh(torch.addcmul(mu, self.noise[t], self.std), out=action)
            return torch.addmm(self.base, action, self.w_a.t())
        stack, hidden = self.stack, range(len(self.stack.specs) - 1)

        def kept(name: str) -> list[Tensor | None]:
            return [stack.buffer_of(i, name, t) for i in hidden]

        c = h.new_empty(h.shape[0], self.w_a.shape[0])
        self._fused(
            h,
            stack.params,
            [None, *(gemm.operand_weight() for gemm in stack.gemms[1:])],
            [y for y in kept("y") if y is not None] or self._between,
            list(zip(kept("hat"), kept("mean"), kept("rstd"), strict=True)),
            std=self.std,
            noise=self.noise[t],
            base=self.base,
            w_a=self.w_a,
            action=action,
            c=c,
        )
        return c


def _carried(w: Tensor, w3: Tensor, b3: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``W1 W3`` and ``W1 b3`` in float32, kept as other packs are."""

    def make(w: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
        with fp32_products(False, w):
            return tuple(w @ x for x in head)

    tensors = (w, w3) if b3 is None else (w, w3, b3)
    weight, *bias = weight_cache.kept(("carried policy",), tensors, make)
    return weight, bias[0] if bias else None
