"""What every world model shares: encoder, reward and termination heads around a transition.

A kind of dynamics is a file ``<kind>_dynamics.py`` here, which says :func:`register` of its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor, nn

from pwm_fast import config as configuration
from pwm_fast import ops
from pwm_fast.config import ModelLearningConfig, WorldModelConfig
from pwm_fast.models.layers import MLP, init_world_model_, known_layers, mlp


class LatentModel(nn.Module, ABC):
    """Encoder, reward and termination heads around a latent transition.

    Latents live on a product of simplices: groups of 8, non-negative, each summing to 1. Where
    ``config.encoder`` is ``identity`` they are the observations, D is O, and nothing encodes.

    Args:
        obs_dim: O.
        action_dim: A.
        config: widths, bins and options.
        can_terminate: add a termination head.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, config: WorldModelConfig, can_terminate: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.simplices = config.encodes
        self.latent_dim = config.latent_width(obs_dim)
        self.action_dim = action_dim
        self.task_dim = config.task_dim
        pair = self.latent_dim + config.task_dim + action_dim
        self._encoder: MLP | None = None
        if self.simplices:
            self._encoder = mlp(
                obs_dim + config.task_dim, config.encoder_units, self.latent_dim, last="simnorm"
            )
        self._build_transition(pair)
        self._reward = mlp(pair, config.reward_units, config.num_bins)
        self._termination = mlp(pair, config.reward_units, 1) if can_terminate else None
        self._task_emb = (
            nn.Embedding(config.num_tasks, config.task_dim) if config.task_dim else None
        )
        init_world_model_(self)
        nn.init.zeros_(self._last_weight(self._reward))
        self._init_transition()
        if self._termination is not None:
            nn.init.zeros_(self._last_weight(self._termination))
        if self._task_emb is not None:
            nn.init.uniform_(self._task_emb.weight, -0.02, 0.02)

    @staticmethod
    def _last_weight(head: nn.Sequential) -> Tensor:
        weight = head[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    @abstractmethod
    def _build_transition(self, pair_dim: int) -> None:
        """Create the transition's network; ``pair_dim`` is D + E + A."""

    def _init_transition(self) -> None:
        """Initialise the transition where it departs from the common initialisation."""

    @abstractmethod
    def _transition(self) -> MLP:
        """The transition's network."""

    @abstractmethod
    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> ops.Dynamics:
        """The transition with those layers of its network, as the operations take it."""

    def next(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        """Next latents ``[..., D]`` of latents ``[..., D]`` and actions ``[..., A]``."""
        net = self._transition()

        def run(inputs: Sequence[Tensor], layers: Sequence[ops.Layer], order: ops.Order) -> Tensor:
            found = net(*inputs)
            assert isinstance(found, Tensor)
            return found

        step = self._dynamics_of(()).step
        return step(z, a, self.task_input(task, z), z.dtype, run)

    def cautions(self, learning: ModelLearningConfig) -> list[str]:
        """What to warn of where the model is trained in that way."""
        config, kind = self.config, self.config.kind
        ignored = {"project": config.project, "head": config.head != "linear"}
        found = [
            f"alg.world_model.{key}={getattr(config, key)} does nothing for dynamics of kind {kind}"
            for key, given in ignored.items()
            if given and kind in ("mlp", "residual", "shortcut")
        ]
        if learning.start_grad == "encoder" and not self.simplices:
            found.append(
                "alg.model_learning.start_grad=encoder is the same as none where no encoder learns "
                "(alg.world_model.encoder=identity)"
            )
        return found

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters; none where latents are observations."""
        return iter(()) if self._encoder is None else self._encoder.parameters()

    def encoder_layers(self) -> tuple[ops.Layer, ...]:
        """The encoder's parameters as the operations take them; raises as :meth:`dynamics`."""
        return () if self._encoder is None else self._encoder.layers()

    def dynamics(self) -> ops.Dynamics:
        """The transition's parameters as the operations take them.

        Raises:
            Skipped: whole operations would skip what a module does (a hook, a Dropout).
        """
        return self._dynamics_of(self._transition().layers())

    def learned_dynamics(self, learning: ModelLearningConfig) -> ops.Dynamics:
        """The transition's parameters as its loss takes them; raises as :meth:`dynamics`."""
        return self.dynamics()

    def heads(self, *, symlog_rewards: bool = False) -> ops.Heads:
        """The reward and termination heads as the operations take them.

        ``symlog_rewards`` leaves a two-hot head's rewards in symlog space. Raises as
        :meth:`dynamics`.
        """
        return ops.Heads(
            self._reward.layers(),
            self.config.vmin,
            self.config.vmax,
            symlog=not symlog_rewards,
            termination=None if self._termination is None else self._termination.layers(),
        )

    def rollout(self, z: Tensor, action: Tensor, task: Tensor | None = None) -> Tensor:
        """Latents ``[H+1, B, D]`` from ``z [B, D]`` under actions ``[H, B, A]``."""
        layers = known_layers(self._transition(), "norm_act", root=True)
        if layers is None:
            latents = [z]
            for a in action.unbind(0):
                latents.append(self.next(latents[-1], a, task))
            return torch.stack(latents)
        return ops.latent_rollout(
            z, action, self._dynamics_of(layers), task=self.task_input(task, z)
        )

    def embed(self, task: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        """Task embeddings ``[..., E]`` of task numbers, in a tuple; empty for a single-task model.

        Rows of the table that have grown beyond norm 1 are scaled back to it, as published.

        Args:
            task: integers, a scalar or of the leading shape of ``like`` (or one that broadcasts
                to it); None for a single-task model.
            like: a tensor ``[..., K]`` that the embeddings accompany.

        Raises:
            TypeError: task numbers that are no integers.
            ValueError: task numbers missing, given to a single-task model, or of another shape.
        """
        if self._task_emb is None:
            if task is not None:
                raise ValueError("task must be None: this is a single-task model (task_dim=0)")
            return ()
        if task is None:
            raise ValueError(f"task numbers are required: the model has task_dim={self.task_dim}")
        if task.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"task must hold integers (int64 or int32), got {task.dtype}")
        rows = like.shape[:-1]
        if task.dim() > len(rows) or any(
            n not in (1, m) for n, m in zip(reversed(task.shape), reversed(rows), strict=False)
        ):
            raise ValueError(f"task must broadcast to {tuple(rows)}, got {tuple(task.shape)}")
        with torch.no_grad():  # not nn.Embedding(max_norm=1): on CUDA that waits for the device
            self._task_emb.weight.renorm_(2, 0, 1.0)
        return (self._task_emb(task).expand(*rows, -1),)

    def task_input(self, task: Tensor | None, like: Tensor) -> Tensor | None:
        """As :meth:`embed`, the way the operations take it: None for a single-task model."""
        embedding = self.embed(task, like)
        return embedding[0] if embedding else None

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        """Latents ``[..., D]`` of observations ``[..., O]``.

        Raises:
            TypeError: observations are not floating.
            ValueError: they are of another width, or task numbers do not fit (:meth:`embed`).
        """
        if self._encoder is None:
            if not obs.is_floating_point():
                raise TypeError(f"obs must have a floating dtype, got {obs.dtype}")
            if obs.dim() == 0 or obs.shape[-1] != self.latent_dim:
                raise ValueError(f"obs must be [..., {self.latent_dim}], got {tuple(obs.shape)}")
            self.embed(task, obs)
            return obs
        return self._encoder(obs, *self.embed(task, obs))

    def reward(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        """Reward logits ``[..., bins]`` of taking actions ``[..., A]`` in latents ``[..., D]``."""
        return self._reward(z, *self.embed(task, z), a)

    def decode_reward(self, logits: Tensor, *, symlog: bool = False) -> Tensor:
        """Rewards ``[...]`` of reward logits ``[..., bins]``; one bin is the reward itself.

        ``symlog=True`` leaves a two-hot head's rewards in symlog space.
        """
        if self.config.num_bins == 1:
            return logits.squeeze(-1)
        return ops.two_hot_decode(logits, self.config.vmin, self.config.vmax, transform=not symlog)

    def termination(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor | None:
        """Logits ``[...]`` that the step terminates; None for a model without that head."""
        if self._termination is None:
            return None
        return self._termination(z, *self.embed(task, z), a).squeeze(-1)

    def step(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next latents ``[..., D]`` and reward logits ``[..., bins]``."""
        return self.next(z, a, task), self.reward(z, a, task)

    def num_parameters(self) -> dict[str, int]:
        """Parameters per component, and ``total``.

        ``total`` leaves out the termination head, which the published models do not have.
        """
        counts = {
            name.lstrip("_"): sum(p.numel() for p in child.parameters())
            for name, child in self.named_children()
        }
        counts["total"] = sum(n for name, n in counts.items() if name != "termination")
        return counts


Model = TypeVar("Model", bound=type[LatentModel])
_KINDS: dict[str, type[LatentModel]] = {}


def register(kind: str) -> Callable[[Model], Model]:
    """Decorate a subclass of :class:`LatentModel`: ``alg.world_model.kind`` can name it.

    A file ``pwm_fast/models/<kind>_dynamics.py`` is found by itself. A class elsewhere counts from
    the moment its module is imported.
    """

    def note(model: Model) -> Model:
        _KINDS[kind] = model
        configuration.WORLD_MODELS.add(kind)
        return model

    return note


def make_world_model(
    obs_dim: int, action_dim: int, config: WorldModelConfig, can_terminate: bool = False
) -> LatentModel:
    """The world model that ``config.kind`` names: ``"mlp"`` (baseline), ``"flow"``, or another."""
    if config.kind not in _KINDS:
        import_module(f"pwm_fast.models.{config.kind}_dynamics")
    return _KINDS[config.kind](obs_dim, action_dim, config, can_terminate)
