"""Ensembles of value functions: PWM's of latents, and TD-MPC2's of latents and actions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.config import AlgConfig
from pwm_fast.models.layers import act_norm_mlp, init_world_model_, mlp, run_act_norm, task_width
from pwm_fast.ops import Layer


class ValueFunctions(nn.Module, ABC):
    """E value functions whose parameters are stacked along a first axis, as in published files.

    ``params`` holds, in the order of one member's parameters (weight, bias, and weight and bias of
    the LayerNorm of each hidden layer; weight and bias of the last), tensors ``[E, ...]``.

    Wherever they are named, ``a`` are actions ``[..., A]`` and ``task`` embeddings ``[..., E]``;
    members that take none do not look at them.

    Args:
        members: one module for each member, whose parameters are stacked.
        task_dim: E of members that take the embedding; 0 for those that do not.
    """

    def __init__(self, members: Sequence[nn.Module], task_dim: int) -> None:
        super().__init__()
        groups: Iterable[tuple[nn.Parameter, ...]] = zip(
            *(m.parameters() for m in members), strict=True
        )
        self.params = nn.ParameterList(
            nn.Parameter(torch.stack([p.detach() for p in group])) for group in groups
        )
        self.members = len(members)
        self.task_dim = task_dim

    def layers(self) -> list[Layer]:
        """The parameters as the operations take them."""
        *hidden, weight, bias = self.params
        layers = [
            Layer(*group, act="mish")
            for group in zip(hidden[::4], hidden[1::4], hidden[2::4], hidden[3::4], strict=True)
        ]
        return [*layers, Layer(weight, bias)]

    @abstractmethod
    def ensemble(self, *, scale: float = 1.0) -> ops.ValueEnsemble:
        """The parameters as :func:`pwm_fast.ops.plan` takes them.

        Args:
            scale: factor on the values, where rewards have another unit.
        """

    def outputs(
        self,
        z: Tensor,
        a: Tensor | None = None,
        task: Tensor | None = None,
        members: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """What the networks say, ``[E, ..., N]``: values or logits of bins.

        Args:
            z: latents ``[..., D]``.
            a: actions, or None.
            task: embeddings, or None.
            members: numbers ``[M]`` of the members that are computed; None computes all.

        Raises:
            ValueError: members take actions or embeddings, and there are none.
        """
        own = self.ensemble()
        inputs = own.inputs(z, a, task)
        return ops.mlp(inputs, own.layers, order=own.order, members=members)  # type: ignore[arg-type]

    @abstractmethod
    def values(self, z: Tensor, a: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Values ``[E, ...]`` of latents ``[..., D]``.

        Raises:
            ValueError: members take actions or embeddings, and there are none.
        """

    def minimum(self, z: Tensor, a: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """The least of the members' values, ``[...]``; arguments as of :meth:`values`."""
        return self.values(z, a, task).amin(0)


class Critic(nn.Module):
    """One value function: an MLP of Linear, Mish, LayerNorm layers and a Linear of width 1."""

    def __init__(
        self, latent_dim: int, units: Sequence[int] = (400, 200), input_gain: float = 1.0
    ) -> None:
        super().__init__()
        self.critic = act_norm_mlp(latent_dim, units, 1, 2.0**0.5, input_gain)

    def forward(self, z: Tensor) -> Tensor:
        """Values ``[...]`` of latents ``[..., D]``."""
        return run_act_norm(self.critic, z).squeeze(-1)


class CriticEnsemble(ValueFunctions):
    """PWM's: values of latents, each member a :class:`Critic`.

    Args:
        latent_dim: D.
        units: hidden widths.
        members: E.
        input_gain: factor on the first layer's initial weights.
        task_dim: width of the embedding for members of ``[z, task]``; 0 for those of ``z`` alone.
    """

    def __init__(
        self,
        latent_dim: int,
        units: Sequence[int] = (400, 200),
        members: int = 3,
        input_gain: float = 1.0,
        task_dim: int = 0,
    ) -> None:
        width = latent_dim + task_dim
        super().__init__([Critic(width, units, input_gain) for _ in range(members)], task_dim)

    def ensemble(self, *, scale: float = 1.0) -> ops.ValueEnsemble:
        """As :meth:`ValueFunctions.ensemble`; the least of the members counts."""
        return ops.ValueEnsemble(
            self.layers(), reduce="min", scale=scale, task_input=self.task_dim > 0
        )

    def values(self, z: Tensor, a: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Values ``[E, ...]`` of latents ``[..., D]``."""
        return self.outputs(z, a, task).squeeze(-1)

    forward = values


class QEnsemble(ValueFunctions):
    """TD-MPC2's Q functions of ``[z, task, a]``: layers of Linear, LayerNorm, Mish, and bins.

    The parameters are those of the published files, stacked in their order, and start as TD-MPC2's
    do. While TD-MPC2 trains it drops out 1 % of the first layer's outputs, and nothing when it
    acts; these never do.

    Args:
        latent_dim: D.
        action_dim: A.
        units: hidden widths.
        members: E.
        num_bins: two-hot bins of a member's output; 1 is the value itself.
        vmin: first bin centre, in symlog space.
        vmax: last bin centre, in symlog space.
        task_dim: width of the embedding for members that take it; 0 for others.

    Source: Hansen et al. 2024 (arXiv 2310.16828).
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (512, 512),
        members: int = 5,
        num_bins: int = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        task_dim: int = 0,
    ) -> None:
        width = latent_dim + task_dim + action_dim
        nets = [mlp(width, units, num_bins) for _ in range(members)]
        for net in nets:
            init_world_model_(net)
            nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
        super().__init__(nets, task_dim)
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax

    def ensemble(self, *, scale: float = 1.0, reduce: ops.Reduction = "two") -> ops.ValueEnsemble:
        """As :meth:`ValueFunctions.ensemble`.

        Args:
            scale: factor on the values.
            reduce: what counts; the mean of two members as in TD-MPC2, ``"min"`` or ``"mean"``.
        """
        return ops.ValueEnsemble(
            self.layers(),
            "norm_act",
            on_action=True,
            reduce=reduce,
            vmin=self.vmin,
            vmax=self.vmax,
            scale=scale,
            task_input=self.task_dim > 0,
        )

    def forward(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        """Logits ``[E, ..., bins]`` of taking actions ``[..., A]`` in latents ``[..., D]``."""
        return self.outputs(z, a, task)

    def values(self, z: Tensor, a: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        """Values ``[E, ...]`` of taking actions ``[..., A]`` in latents ``[..., D]``."""
        return self._decoded(self.outputs(z, a, task))

    def mean_of_two(
        self,
        z: Tensor,
        a: Tensor,
        task: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean of two members' values, ``[...]``, which are drawn for all rows at once.

        Args:
            z: latents ``[..., D]``.
            a: actions ``[..., A]``.
            task: embeddings ``[..., E]``, or None.
            generator: they are drawn with, on the device of ``z``; None is torch's global one.
        """
        two = torch.randperm(self.members, generator=generator, device=z.device)[:2]
        return self._decoded(self.outputs(z, a, task, two)).mean(0)

    def _decoded(self, logits: Tensor) -> Tensor:
        if self.num_bins == 1:
            return logits.squeeze(-1)
        return ops.two_hot_decode(logits, self.vmin, self.vmax)


def make_critic(latent_dim: int, action_dim: int, config: AlgConfig) -> ValueFunctions:
    """The value functions of the kind that ``config.critic.kind`` names.

    Raises:
        ValueError: they are to see embeddings that the world model does not have.
    """
    own, model = config.critic, config.world_model
    task_dim = task_width(model, own.task_input, "alg.critic.task_input")
    if own.kind == "tdmpc2":
        return QEnsemble(
            latent_dim,
            action_dim,
            own.units,
            own.members,
            model.num_bins,
            model.vmin,
            model.vmax,
            task_dim,
        )
    return CriticEnsemble(latent_dim, own.units, own.members, own.input_gain, task_dim)
