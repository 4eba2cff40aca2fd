"""Plain types that the operations take and return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["none", "mish", "simnorm"]
Method = Literal["heun", "euler"]
Order = Literal["norm_act", "act_norm"]
VelocityFn = Callable[[Tensor, float], Tensor]

ACTIVATIONS: tuple[Activation, ...] = ("none", "mish", "simnorm")
METHODS: tuple[Method, ...] = ("heun", "euler")
ORDERS: tuple[Order, ...] = ("norm_act", "act_norm")


class Layer(NamedTuple):
    """Parameters of one layer: Linear, then (if ``ln_weight`` is given) LayerNorm, then ``act``.

    Of an ensemble of E, where an operation takes one, the weight is ``[E, N, K]`` and vectors are
    ``[E, N]``.

    Attributes:
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        ln_weight: LayerNorm scale ``[N]``; None for a layer without LayerNorm.
        ln_bias: LayerNorm shift ``[N]``; given exactly when ``ln_weight`` is.
        act: ``"none"``, ``"mish"`` or ``"simnorm"``.
        simnorm_dim: group width of SimNorm; divides N.
        eps: LayerNorm's epsilon.
        dropout: of the Linear's output, before what follows, as TD-MPC2's Q functions have it. A
            rate in [0, 1]: of these entries are set to 0 and the others divided by ``1 - rate``,
            by random numbers of torch's global generator. Or the mask itself, a tensor of the
            shape and dtype of that output, which it is multiplied by. It is never switched off:
            give 0 outside of training. Only :func:`mlp`, :func:`linear_norm_act` and
            :func:`linear_act_norm` take it.
    """

    weight: Tensor
    bias: Tensor | None = None
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    act: Activation = "none"
    simnorm_dim: int = 8
    eps: float = 1e-5
    dropout: float | Tensor = 0.0

    @property
    def drops(self) -> bool:
        """Whether there is a dropout mask, given or to be drawn."""
        return isinstance(self.dropout, Tensor) or self.dropout != 0.0


class FusedStep(NamedTuple):
    """A macro step as the fused passes take it.

    Attributes:
        net: layers of the network that is evaluated, the first with a LayerNorm.
        method: ``"heun"`` or ``"euler"`` integrate its output over tau in [0, 1], from an input
            ``[z, a, tau, task]``; with ``"residual"`` its output of ``[z, a, task]`` is added to
            the latent, with ``"map"`` it is the next latent.
        substeps: K of the integration.
        task_first: the task embedding stands before the action.
        fold: see :class:`pwm_fast.ops.Flow`.
    """

    net: Sequence[Layer]
    method: str = "map"
    substeps: int = 1
    task_first: bool = False
    fold: bool | None = False


class Policy(NamedTuple):
    """A Gaussian policy ``a = tanh(mu(z) + std(z) noise)``.

    Attributes:
        layers: of the network, whose last layer is a Linear. Its outputs are ``mu [A]``, or where
            ``std`` is None ``[mu, x]``, 2A of them.
        std: ``[A]``, the same in all states (PWM). None: each state has its own (TD-MPC2),
            ``log std = min_logstd + 0.5 (max_logstd - min_logstd) (tanh(x) + 1)``.
        order: ``"act_norm"`` (PWM's) or ``"norm_act"`` (TD-MPC2's).
        task_input: the network takes ``[z, task]``, the task's embedding behind the latent.
        min_logstd: lower bound of ``log std`` where ``std`` is None.
        max_logstd: its upper bound.
    """

    layers: Sequence[Layer]
    std: Tensor | None
    order: Order = "act_norm"
    task_input: bool = False
    min_logstd: float = -10.0
    max_logstd: float = 2.0

    @property
    def width(self) -> int:
        """A, as far as ``std`` or the network's outputs say it."""
        if self.std is not None:
            return self.std.numel()
        return self.layers[-1].weight.shape[0] // 2 if len(self.layers) else 0

    def inputs(self, z: Tensor, task: Tensor | None) -> tuple[Tensor, ...]:
        """What the network takes of latents ``[..., D]`` and embeddings ``[..., E]``.

        Raises:
            ValueError: it takes embeddings, and there are none.
        """
        if not self.task_input:
            return (z,)
        if task is None:
            raise ValueError("policy.task_input needs task embeddings, got task=None")
        return z, task


class Heads(NamedTuple):
    """What is read off an imagined rollout, each once over all steps.

    Attributes:
        reward: layers of the reward head on ``[z, task, a]``; one output is the reward itself,
            more are two-hot logits over ``linspace(vmin, vmax)``.
        vmin: first bin centre.
        vmax: last bin centre.
        symlog: the bins live in symlog space and their expectation goes through symexp.
        termination: layers of a logit on ``[z, task, a]`` that the step terminates, or None.
        value: layers of an ensemble of values of ``z`` (Linear, activation, LayerNorm each, weights
            ``[E, N, K]``), of which the least counts; or None.
    """

    reward: Sequence[Layer]
    vmin: float = -10.0
    vmax: float = 10.0
    symlog: bool = True
    termination: Sequence[Layer] | None = None
    value: Sequence[Layer] | None = None


class ImaginedRollout(NamedTuple):
    """An imagined rollout of H macro steps, time first.

    Attributes:
        z: latents ``[H+1, B, D]``.
        action: ``[H, B, A]``.
        reward: ``[H, B]``.
        continues: ``[H, B]``: probability that step t does not terminate; None without that head.
        value: ``[H+1, B]``, or ``[B]`` of the last latent where that was asked for; None without
            that head.
    """

    z: Tensor
    action: Tensor
    reward: Tensor
    continues: Tensor | None = None
    value: Tensor | None = None


class ESNR(NamedTuple):
    """Expected signal-to-noise ratio of a gradient estimator (all tensors float64).

    Attributes:
        signal: squared norm of the mean gradient, scalar (of the debiased one where asked for).
        noise: mean squared distance of the samples from their mean, scalar.
        ratio: ``signal / max(noise, eps)``, scalar.
        db: ``10 log10(ratio)``, scalar.
        tensor_ratio: the same ratio per parameter tensor, ``[T]``.
        tensor_signal: signal per parameter tensor, ``[T]``.
        tensor_noise: noise per parameter tensor, ``[T]``.
    """

    signal: Tensor
    noise: Tensor
    ratio: Tensor
    db: Tensor
    tensor_ratio: Tensor
    tensor_signal: Tensor
    tensor_noise: Tensor
