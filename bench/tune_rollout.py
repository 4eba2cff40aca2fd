"""What the tuner runs of a rollout: every layout of the persistent kernels, and layer by layer.

Macro steps of a folded flow, forward and backward without gradients of weights, as an actor's
update has them, compared with float64 before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.internals import (
    EXACT,
    Dynamics,
    DynamicsSpec,
    DynamicsWeights,
    Folded,
    Kernels,
    LayerParams,
    LayerSpec,
    TorchKernels,
    persistent,
    rollout_kernels,
    triton_backend,
)
from bench.tune_products import EPS, PRECISIONS, Wrong

Layout = rollout_kernels.RolloutLayout

LATENT = 64
NAMES = ("z", "dz0", "dc")
ERROR = 5e-2  # relative to the largest entry, after all steps; a wrong layout is off by more


class RolloutWorkload:
    """A random folded flow, shared by its layouts.

    Args:
        batch: B.
        padded: Up, features of both hidden layers.
        rate: of :data:`bench.tune_products.PRECISIONS`.
        device: of the tensors.
        horizon: macro steps.
        substeps: K.
        kernels: what computes, by default this project's Triton kernels.
    """

    def __init__(
        self,
        batch: int,
        padded: int,
        rate: str,
        device: torch.device,
        horizon: int = 16,
        substeps: int = 2,
        kernels: Kernels | None = None,
    ) -> None:
        self.kernels = (
            triton_backend.TritonKernels(PRECISIONS[rate]) if kernels is None else kernels
        )
        self.horizon, self.batch = horizon, batch
        torch.manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, device=device)

        def centred(x: Tensor) -> Tensor:
            return x - x.mean(0)

        hidden = LayerSpec("norm_act", "mish", True, True, 8, EPS, padded)
        head = LayerSpec("norm_act", "none", True, False, 8, EPS)
        self.spec = DynamicsSpec((hidden, hidden, head), "heun", substeps, True)
        u, norms = padded, (1.0 + normal(2, padded, scale=0.1), normal(2, padded, scale=0.1))
        gammas, betas = norms
        w_z = centred(normal(u, LATENT, scale=LATENT**-0.5))
        w3, b3 = normal(LATENT, u, scale=u**-0.5), normal(LATENT, scale=0.1)
        self.weights = DynamicsWeights(
            w_z,
            centred(normal(u)),
            [
                LayerParams(w_z, None, gammas[0], betas[0]),
                LayerParams(
                    centred(normal(u, u, scale=u**-0.5)),
                    centred(normal(u, scale=0.1)),
                    gammas[1],
                    betas[1],
                ),
                LayerParams(w_z @ w3, w_z @ b3, None, None),
            ],
            (w3, b3),
        )
        self.z0 = normal(batch, LATENT)
        c = normal(horizon, batch, u)
        self.c = c - c.mean(-1, keepdim=True)
        self.dz = normal(horizon + 1, batch, LATENT)
        self.results: list[Tensor] = []
        self._truth: list[Tensor] | None = None

    def call(self, plan: Layout | None) -> Callable[[], None]:
        """The call of a layout, after one that was compared; None: layer by layer.

        Raises:
            Wrong: the latents or a gradient are others.
        """

        def call() -> None:
            self.results = self._run(plan)

        call()
        for name, error in self.errors().items():
            if not error <= ERROR:
                raise Wrong(f"relative error {error:.1e} of {name} exceeds {ERROR:.0e}")
        return call

    def errors(self) -> dict[str, float]:
        """Largest errors of the last results, relative to the largest entry in float64."""
        if self._truth is None:
            self._truth = self._run(None, True)
        return {
            name: float((found.double() - wanted).abs().max() / wanted.abs().max())
            for name, found, wanted in zip(NAMES, self.results, self._truth, strict=True)
        }

    def _run(self, plan: Layout | None, exact: bool = False) -> list[Tensor]:
        """Latents, and the gradients towards the first one and the hoisted terms."""
        forward, backward = self.halves(plan, exact)
        return [forward(), *backward()]

    def halves(
        self, plan: Layout | None, exact: bool = False
    ) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
        """The forward pass and the backward pass after it, each to be called again and again.

        ``exact``: PyTorch's in float64.
        """
        kernels, weights, dtype = self.kernels, self.weights, torch.float32
        if exact:
            kernels, weights, dtype = TorchKernels(EXACT), _double(self.weights), torch.float64
        shape = (kernels, self.spec, weights, self.horizon, self.batch)
        dynamics: Dynamics
        if plan is None:
            dynamics = Folded(*shape, save=True, wgrad=False)
        else:
            dynamics = persistent.Persistent(*shape, save=True, wgrad=False, plan=plan)
        z = self.z0.new_empty(self.horizon + 1, self.batch, LATENT, dtype=dtype)
        c, gradient = self.c.to(dtype), self.dz.to(dtype)

        def forward() -> Tensor:
            z[0] = self.z0
            dynamics.rollout(z, c)
            return z

        def backward() -> list[Tensor]:
            dynamics.start_backward()
            dz = dynamics.rollout_backward(gradient)
            found = dynamics.finish_backward(dz, z[0])
            return [found.z0, found.c]

        return forward, backward


def _double(weights: DynamicsWeights) -> DynamicsWeights:
    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    assert weights.head is not None
    layers = [LayerParams(*(double(x) for x in layer)) for layer in weights.layers]  # type: ignore[arg-type]
    head = weights.head[0].double(), double(weights.head[1])
    return DynamicsWeights(weights.w_z.double(), double(weights.w_tau), layers, head)
