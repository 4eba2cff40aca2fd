"""Policies: PWM's Gaussian, TD-MPC2's, whose deviation depends on the state, and flows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.config import AlgConfig
from pwm_fast.hooks import why_not_itself
from pwm_fast.models.layers import (
    ADVICE,
    Skipped,
    act_norm_layers,
    act_norm_mlp,
    init_orthogonal_,
    init_world_model_,
    mlp,
    run_act_norm,
    taken_apart,
    task_width,
)
from pwm_fast.ops.extend import act, moments

INITS = ("orthogonal", "torch")

#: A gate's biases at the start, as in SAC Flow's code: it is open, ``sigmoid(5) = 0.993``.
OPEN = 5.0


class Actor(nn.Module, ABC):
    """A policy ``a = tanh(mu(z) + std(z) * noise)`` of one network, or a :class:`FlowActor`.

    ``task`` is the task's embedding ``[..., E]`` for a network of ``[z, task]``; one of ``z`` alone
    does not look at it.

    Args:
        action_dim: A.
        task_dim: E of a network of ``[z, task]``; 0 for one of ``z`` alone.
    """

    def __init__(self, action_dim: int, task_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.task_dim = task_dim

    @abstractmethod
    def std(self, z: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Standard deviations before the tanh, ``[A]`` or, where it depends on them, ``[..., A]``.

        Args:
            z: latents ``[..., D]``; not needed where all have the same.
            task: embeddings ``[..., E]``, or None.
        """

    @abstractmethod
    def _layers(self) -> Sequence[ops.Layer]:
        """The network as the operations take it; raises as :meth:`policy`."""

    @abstractmethod
    def _policy(self, layers: Sequence[ops.Layer]) -> ops.Policy | ops.FlowPolicy:
        """The policy with those layers for its network."""

    @abstractmethod
    def _run(
        self, inputs: Sequence[Tensor], layers: Sequence[ops.Layer], order: ops.Order
    ) -> Tensor:
        """The network's outputs; it knows its layers and their order itself."""

    def policy(self) -> ops.Policy | ops.FlowPolicy:
        """The parameters as the operations take them.

        Raises:
            Skipped: whole operations would skip what a module does (a hook, a Dropout).
        """
        reason = why_not_itself(self, Actor.forward)
        if reason is not None:
            raise Skipped(f"{type(self).__name__} {reason}, {ADVICE}")
        return self._policy(self._layers())

    def forward(
        self,
        z: Tensor,
        noise: Tensor | None = None,
        task: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Actions ``[..., A]`` in (-1, 1) of latents ``[..., D]``.

        Args:
            z: latents.
            noise: standard normal ``[..., A]``; None gives the deterministic action: ``tanh(mu)``,
                or what a flow makes of noise 0.
            task: embeddings ``[..., E]``, or None.
            mask: ``[..., A]``, bool or floating: 1 for the components that a task has, and 0 for
                others, which are 0 in the action. None: all of them.

        Raises:
            ValueError: the network takes embeddings, and there are none.
        """
        return act(self._policy(()), z, noise, task, mask, self._run)

    def spread(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """How much actions vary before the tanh: the mean standard deviation, a scalar.

        Args:
            z: latents ``[..., D]``.
            task: embeddings ``[..., E]``, or None.
        """
        return self.std(z, task).mean()

    def entropy(
        self,
        action: Tensor,
        noise: Tensor,
        z: Tensor | None = None,
        task: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``-log pi(a|z)`` of actions ``[..., A]`` that were drawn with ``noise``, ``[...]``.

        Its mean is the policy's entropy. ``1 - a^2`` is kept above 1e-6, as in SAC's and TD-MPC2's
        code, so that it is finite where an action is at its bound.

        Components that the mask leaves out do not count. In TD-MPC2's code each of them adds a
        constant 0.92, and its policy learns from another quantity: the entropy before the tanh,
        times the number of the task's components.

        Args:
            action: what was drawn.
            noise: standard normal ``[..., A]``.
            z: latents ``[..., D]`` that it was drawn in, as :meth:`std` needs them.
            task: embeddings ``[..., E]``, or None.
            mask: as of :meth:`forward`.
        """
        density = 0.5 * noise.square() + self.std(z, task).log() + 0.5 * math.log(2.0 * math.pi)
        each = density + torch.log(1.0 - action.square() + 1e-6)
        return (each if mask is None else each * mask).sum(-1)


class GaussianActor(Actor):
    """PWM's: the standard deviation is learned, and the same in all states.

    Args:
        latent_dim: D.
        action_dim: A.
        units: hidden widths; each layer is Linear, Mish, LayerNorm.
        init_logstd: log standard deviation at the start.
        min_logstd: its lower bound.
        input_gain: factor on the first layer's initial weights.
        init: ``"orthogonal"`` (weights of gain 1, biases 0) or ``"torch"`` (as ``torch.nn.Linear``
            draws both).
        task_dim: E of a network of ``[z, task]``; 0 for one of ``z`` alone.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (400, 200, 100),
        init_logstd: float = -1.0,
        min_logstd: float = -1.427,
        input_gain: float = 1.0,
        init: str = "orthogonal",
        task_dim: int = 0,
    ) -> None:
        super().__init__(action_dim, task_dim)
        gain = _gain(init)
        self.mu_net = act_norm_mlp(latent_dim + task_dim, units, action_dim, gain, input_gain)
        self.logstd = nn.Parameter(torch.full((action_dim,), float(init_logstd)))
        self.min_logstd = min_logstd

    def std(self, z: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Standard deviations before the tanh, ``[A]``."""
        return self.logstd.clamp_min(self.min_logstd).exp()

    def _layers(self) -> Sequence[ops.Layer]:
        return act_norm_layers(self.mu_net)

    def _policy(self, layers: Sequence[ops.Layer]) -> ops.Policy:
        return ops.Policy(layers, self.std(), task_input=self.task_dim > 0)

    def _run(
        self, inputs: Sequence[Tensor], layers: Sequence[ops.Layer], order: ops.Order
    ) -> Tensor:
        return run_act_norm(self.mu_net, *inputs)


class TDMPC2Actor(Actor):
    """TD-MPC2's: the network gives mean and standard deviation of each state.

    ``log std = min_logstd + 0.5 (max_logstd - min_logstd) (tanh(x) + 1)`` of outputs ``[mu, x]``.
    Its parameters have the names of the published files, ``_pi.0.weight`` and so on, and start as
    TD-MPC2's do.

    Args:
        latent_dim: D.
        action_dim: A.
        units: hidden widths; each layer is Linear, LayerNorm, Mish.
        min_logstd: lower bound of the log standard deviation.
        max_logstd: its upper bound.
        task_dim: E of a network of ``[z, task]``; 0 for one of ``z`` alone.

    Source: Hansen et al. 2024 (arXiv 2310.16828).
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (512, 512),
        min_logstd: float = -10.0,
        max_logstd: float = 2.0,
        task_dim: int = 0,
    ) -> None:
        super().__init__(action_dim, task_dim)
        self._pi = mlp(latent_dim + task_dim, units, 2 * action_dim)
        init_world_model_(self._pi)
        self.min_logstd = min_logstd
        self.max_logstd = max_logstd

    def std(self, z: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Standard deviations before the tanh, ``[..., A]`` in float32 at least.

        Raises:
            ValueError: there are no latents, or none of the embeddings that the network takes.
        """
        if z is None:
            raise ValueError("z must be latents, which the standard deviation depends on, got None")
        policy = self._policy(())
        return moments(self._run(policy.inputs(z, task), (), policy.order), policy)[1]

    def _layers(self) -> Sequence[ops.Layer]:
        return self._pi.layers()

    def _policy(self, layers: Sequence[ops.Layer]) -> ops.Policy:
        return ops.Policy(
            layers, None, "norm_act", self.task_dim > 0, self.min_logstd, self.max_logstd
        )

    def _run(
        self, inputs: Sequence[Tensor], layers: Sequence[ops.Layer], order: ops.Order
    ) -> Tensor:
        found = self._pi(*inputs)
        assert isinstance(found, Tensor)
        return found


class FlowActor(Actor):
    """A flow that leads noise to actions: :class:`pwm_fast.ops.FlowPolicy`.

    The noise's standard deviation is learned, and the same in all states, as PWM's of actions.

    Args:
        latent_dim: D.
        action_dim: A.
        units: hidden widths of the velocity network.
        form: ``"ode"``, ``"gated"`` or ``"meanflow"``.
        substeps: K.
        integrator: ``"euler"`` or ``"heun"``.
        order: of its layers, ``"norm_act"`` (Linear, LayerNorm, Mish; then a flow without gate is
            one operation) or ``"act_norm"`` (Linear, Mish, LayerNorm, as PWM's policies).
        init_logstd: log standard deviation of the noise at the start.
        min_logstd: its lower bound.
        input_gain: factor on the initial weights of latents and embeddings in the first layer.
        init: as of :class:`GaussianActor`. A gate's weights are 0 and its biases :data:`OPEN`.
        task_dim: E of a network of ``[z, task]``; 0 for one of ``z`` alone.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (400, 200, 100),
        form: ops.Form = "ode",
        substeps: int = 4,
        integrator: ops.Method = "euler",
        order: ops.Order = "norm_act",
        init_logstd: float = -1.0,
        min_logstd: float = -1.427,
        input_gain: float = 1.0,
        init: str = "orthogonal",
        task_dim: int = 0,
    ) -> None:
        super().__init__(action_dim, task_dim)
        inputs = action_dim + latent_dim + 1 + task_dim + (form == "meanflow")
        outputs = 2 * action_dim if form == "gated" else action_dim
        gain = _gain(init)
        self.velocity_net: nn.Sequential
        if order == "act_norm":
            self.velocity_net = act_norm_mlp(inputs, units, outputs, gain)
        else:
            self.velocity_net = mlp(inputs, units, outputs)
            if gain is not None:
                init_orthogonal_(self.velocity_net, gain)
        self.init_logstd = nn.Parameter(torch.full((action_dim,), float(init_logstd)))
        self.min_logstd = min_logstd
        self.form, self.substeps, self.integrator, self.order = form, substeps, integrator, order
        first, last = self.velocity_net[0], self.velocity_net[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        tau = action_dim + latent_dim
        with torch.no_grad():
            first.weight[:, action_dim:tau] *= input_gain
            first.weight[:, tau + 1 : tau + 1 + task_dim] *= input_gain
            if form == "gated":
                last.weight[action_dim:] = 0.0
                last.bias[action_dim:] = OPEN

    def std(self, z: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Standard deviations ``[A]`` of the noise that the flow starts from."""
        return self.init_logstd.clamp_min(self.min_logstd).exp()

    @torch.no_grad()
    def spread(self, z: Tensor, task: Tensor | None = None) -> Tensor:
        """How much actions vary before the tanh, by two draws in each of the latents.

        The root of a mean variance over components and latents, a scalar; see :class:`Actor`.
        """
        policy = self._policy(())
        shape = *z.shape[:-1], self.action_dim
        one, other = (
            policy.transport(
                self.std() * torch.randn(shape, device=z.device, dtype=z.dtype),
                z, task, None, self._run,
            )
            for _ in range(2)
        )  # fmt: skip
        return (0.5 * (one - other).square().mean()).sqrt()

    def entropy(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not known of a flow.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the density of a flow policy's actions is not computed")

    def _layers(self) -> Sequence[ops.Layer]:
        return taken_apart(self.velocity_net, self.order, root=True)

    def _policy(self, layers: Sequence[ops.Layer]) -> ops.FlowPolicy:
        return ops.FlowPolicy(
            layers,
            self.std(),
            self.form,
            self.substeps,
            self.integrator,
            self.order,
            self.task_dim > 0,
        )

    def _run(
        self, inputs: Sequence[Tensor], layers: Sequence[ops.Layer], order: ops.Order
    ) -> Tensor:
        if order == "act_norm":
            return run_act_norm(self.velocity_net, *inputs)
        found = self.velocity_net(*inputs)
        assert isinstance(found, Tensor)
        return found


def _gain(init: str) -> float | None:
    """Of orthogonal weights; None for those that ``torch.nn.Linear`` draws.

    Raises:
        ValueError: there are no such weights.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    return 1.0 if init == "orthogonal" else None


def make_actor(latent_dim: int, action_dim: int, config: AlgConfig) -> Actor:
    """The policy of the kind that ``config.actor.kind`` names.

    Raises:
        ValueError: it is to see embeddings that the world model does not have.
    """
    own = config.actor
    task_dim = task_width(config.world_model, own.task_input, "alg.actor.task_input")
    if own.kind == "tdmpc2":
        return TDMPC2Actor(
            latent_dim, action_dim, own.units, own.min_logstd, own.max_logstd, task_dim
        )
    if own.kind == "flow":
        return FlowActor(
            latent_dim,
            action_dim,
            own.units,
            own.form,  # type: ignore[arg-type]
            own.substeps,
            own.integrator,  # type: ignore[arg-type]
            own.order,  # type: ignore[arg-type]
            own.init_logstd,
            own.min_logstd,
            own.input_gain,
            own.init,
            task_dim,
        )
    return GaussianActor(
        latent_dim,
        action_dim,
        own.units,
        own.init_logstd,
        own.min_logstd,
        own.input_gain,
        own.init,
        task_dim,
    )
