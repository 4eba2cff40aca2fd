"""Latent rollouts: H macro steps of a velocity field or of one-shot dynamics, and their gradients.

The first layer's GEMM is linear in its inputs, so everything in it that does not change within a
macro step (action, task, bias) arrives as one term ``c``, and the flow time as a rank-1 term.

Here is what the ways to run macro steps have in common: :class:`pwm_fast.fused.layered.Layered`,
:class:`pwm_fast.fused.folded.Folded` and :class:`pwm_fast.fused.persistent.Persistent`.
:mod:`pwm_fast.fused.rollout` chooses among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams, split_params
from pwm_fast.fused.gemm import Gemm
from pwm_fast.fused.mlp import FusedMLP
from pwm_fast.fused.mlp_backward import LayerGrads, MLPBackward, flatten_grads
from pwm_fast.fused.policy import Policy
from pwm_fast.fused.saved import saved_buffers
from pwm_fast.fused.wgrad import takes_16bit


class DynamicsWeights(NamedTuple):
    """Tensors of a dynamics network, its first layer split by inputs.

    Attributes:
        w_z: ``[U, D]``, the part of the first weight that takes the latent.
        w_tau: ``[U]``, the part that takes the flow time, or None.
        layers: parameters a layer; the first one's ``weight`` is ``w_z``. With fold the last one's
            are ``W13 [U, U]`` and ``b13``.
        head: fold's ``W3 [D, U]`` and ``b3``, or None.
    """

    w_z: Tensor
    w_tau: Tensor | None
    layers: list[LayerParams]
    head: tuple[Tensor, Tensor | None] | None


@dataclass
class DynamicsGrads:
    """Gradients of a rollout; parameters' are None unless they were asked for."""

    z0: Tensor
    c: Tensor
    w_z: Tensor | None = None
    w_tau: Tensor | None = None
    layers: list[LayerGrads] | None = None
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None


class Dynamics(ABC):
    """H macro steps on B rows, forward and backward, in one way.

    Args:
        kernels: elementwise kernels, which say the precision.
        spec: what the dynamics do.
        weights: their tensors.
        horizon: H.
        batch: B.
        save: keep what a backward pass needs.
        wgrad: keep what gradients of the parameters need; implies ``save``.
        saved: buffers of an earlier forward pass, to go backward on.
    """

    #: The first layer of a policy between the macro steps is carried along with the hidden state.
    carries_policy: ClassVar[bool] = False

    def __init__(
        self,
        kernels: Kernels,
        spec: DynamicsSpec,
        weights: DynamicsWeights,
        horizon: int,
        batch: int,
        *,
        save: bool,
        wgrad: bool,
        saved: Sequence[Tensor] | None = None,
    ) -> None:
        self.kernels, self.spec, self.weights = kernels, spec, weights
        self.horizon, self.batch = horizon, batch
        self.save, self.wgrad = save, wgrad
        self.stages = len(spec.stages)
        like = weights.w_z
        self.hidden, self.latent = like.shape
        self.compute_dtype = kernels.precision.dtype(like.dtype)
        self.inputs_16bit = wgrad and not spec.fold and takes_16bit(kernels, like)
        if saved is None:
            self.inputs = _input_buffers(kernels, spec, weights, horizon, batch, wgrad)
        else:
            inputs = (2 if spec.fold else 1) if wgrad else 0
            self.inputs, saved = list(saved[:inputs]), saved[inputs:]
        # Folded hidden layers run without the head: its input has two uses.
        self.specs = spec.layers[:-1] if spec.fold else spec.layers
        params = weights.layers[:-1] if spec.fold else weights.layers
        evals = horizon * self.stages
        self.mlp = FusedMLP(
            kernels, self.specs, params, evals, batch, save=save, wgrad=wgrad, saved=saved
        )
        self.w_z = Gemm(kernels, weights.w_z, batch)
        # The latent of the next macro step in the compute dtype, if it is there already.
        self._cast: Tensor | None = None
        self._cast_wanted = False  # by a policy

    @cached_property
    def taus(self) -> list[Tensor]:
        """Flow times of a macro step's evaluations, ``[1]`` each."""
        # Filled on the device: copied from the host they would make it wait, and break a capture.
        return [self.weights.w_z.new_full((1,), t) for t in self.spec.stages]

    def saved(self) -> list[Tensor]:
        """What a backward pass needs."""
        return [*self.inputs, *self.mlp.saved] if self.save else []

    # --- forward --------------------------------------------------------------------------------

    @abstractmethod
    def step(self, t: int, z: Tensor, c: Tensor, out: Tensor) -> None:
        """Macro step ``t``: ``out [B, D]`` from ``z [B, D]`` and the hoisted term ``c [B, U]``."""

    def rollout(self, z: Tensor, c: Tensor) -> None:
        """All macro steps: ``z[1:]`` from ``z[0]`` of ``z [H+1, B, D]``, and ``c [H, B, U]``."""
        for t in range(self.horizon):
            self.step(t, z[t], c[t], z[t + 1])

    def imagine(self, policy: Policy, z: Tensor, action: Tensor) -> None:
        """All macro steps under the actions ``[H, B, A]`` of a policy, which are written too."""
        for t in range(self.horizon):
            h = policy.first(self._cast_latent(t, z[t]))
            self.step(t, z[t], policy.act(t, h, action[t]), z[t + 1])

    def _cast_latent(self, t: int, z: Tensor) -> Tensor:
        """Macro step ``t``'s latent in the compute dtype, for policy and dynamics together."""
        self._cast_wanted = True
        if self._cast is None:
            cast = self._cast_buffer(t, 0, z)
            if cast is not None:
                self.kernels.cast(z, cast, None)
                self._cast = cast
        return z if self._cast is None else self._cast

    def _cast_buffer(self, t: int, e: int, z: Tensor) -> Tensor | None:
        """For evaluation ``e``'s latent in the compute dtype, None where that is its own."""
        compute = self.kernels.precision.compute
        if self.inputs_16bit:
            return self.inputs[0][t * self.stages + e]
        return None if compute is None else torch.empty_like(z, dtype=compute)

    # --- backward -------------------------------------------------------------------------------

    def start_backward(self) -> None:
        """Begin at the last macro step."""
        self._backward = MLPBackward(self.mlp, keep_first=True)

    @abstractmethod
    def step_backward(self, t: int, dz: Tensor) -> Tensor:
        """Macro step ``t`` backward: gradient towards ``z_t`` for that towards ``z_{t+1}``."""

    def rollout_backward(self, dz: Tensor) -> Tensor:
        """All macro steps backward: gradient towards ``z_0`` for ``dz [H+1, B, D]`` to them."""
        grad = dz[self.horizon]
        for t in range(self.horizon - 1, -1, -1):
            grad = self.step_backward(t, grad) + dz[t]
        return grad

    def c_grad(self, t: int) -> Tensor:
        """Gradient towards macro step ``t``'s hoisted term, ``[B, U]``."""
        first, scale = self._backward.first_gradients()
        evals = slice(t * self.stages, (t + 1) * self.stages)
        return to_fp32(first[evals], None if scale is None else scale[evals]).sum(0)

    @abstractmethod
    def finish_backward(self, dz: Tensor, z0: Tensor) -> DynamicsGrads:
        """All gradients, once macro step 0 is done and ``dz`` is the one towards ``z0``."""

    def _c_grads(self, first: Tensor) -> Tensor:
        """Gradients towards all hoisted terms from ``first [T, B, U]`` of the evaluations."""
        return first.view(self.horizon, self.stages, self.batch, self.hidden).sum(1)

    def _w_tau_grad(self, first: Tensor) -> Tensor | None:
        if self.weights.w_tau is None:
            return None
        # float64, as the other sums over rows: one long sum in float32 would lose more than the
        # several short ones of step-by-step gradients.
        taus = torch.cat(self.taus).repeat(self.horizon).double()
        return (taus @ first.sum(1, dtype=torch.float64)).to(first.dtype)


def to_fp32(x: Tensor, scale: Tensor | None) -> Tensor:
    """Gradients in fp32 (fp64 ones stay), multiplied by their row scales."""
    if scale is not None:
        return x * scale.unsqueeze(-1)
    return x.float() if x.dtype == torch.bfloat16 else x


# --- an op's flat lists ---------------------------------------------------------------------------


def dynamics_weights(
    spec: DynamicsSpec, w_z: Tensor, w_tau: Tensor | None, params: Sequence[Tensor]
) -> DynamicsWeights:
    """Sort an op's flat list: the first layer's ``gamma, beta``, the others, then fold's head."""
    first, *others = spec.layers
    n = 2 if first.norm else 0
    gamma, beta = (params[0], params[1]) if n else (None, None)
    rest = sum(s.fields for s in others)
    layers = [
        LayerParams(w_z, None, gamma, beta),
        *split_params(others, params[n : n + rest]),
    ]
    head = None
    if spec.fold:
        tail = list(params[n + rest :])
        head = (tail[0], tail[1] if len(tail) > 1 else None)
    return DynamicsWeights(w_z, w_tau, layers, head)


def flat_grads(spec: DynamicsSpec, grads: DynamicsGrads, count: int) -> list[Tensor | None]:
    """Gradients in the order of that list of ``count`` tensors."""
    if grads.layers is None:
        return [None] * count
    flat = flatten_grads(spec.layers, grads.layers, first=False)
    if spec.fold:
        flat.append(grads.head_weight)
        if grads.head_bias is not None:
            flat.append(grads.head_bias)
    return flat


def _input_buffers(
    kernels: Kernels,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    horizon: int,
    batch: int,
    wgrad: bool,
) -> list[Tensor]:
    """What :class:`Dynamics` keeps beside its MLP's buffers."""
    if not wgrad:
        return []
    like, evals = weights.w_z, horizon * len(spec.stages)
    if spec.fold:
        last = weights.layers[-1].weight.shape[1]
        return [like.new_empty(horizon, batch, last), like.new_empty(evals, batch, last)]
    # As the first weight's gradient takes them.
    rounded = takes_16bit(kernels, like)
    dtype = kernels.precision.dtype(like.dtype) if rounded else like.dtype
    return [like.new_empty(evals, batch, like.shape[1], dtype=dtype)]


def saved_by_dynamics(
    kernels: Kernels,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    horizon: int,
    batch: int,
    *,
    save: bool,
    wgrad: bool,
) -> list[Tensor]:
    """Buffers as those of :meth:`Dynamics.saved`."""
    if not save:
        return []
    hidden = len(spec.layers) - spec.fold
    return _input_buffers(kernels, spec, weights, horizon, batch, wgrad) + saved_buffers(
        kernels,
        spec.layers[:hidden],
        weights.layers[:hidden],
        horizon * len(spec.stages),
        batch,
        save,
        wgrad,
    )
