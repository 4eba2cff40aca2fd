"""What an agent costs: parameters per component and FLOPs, counted without allocating either.

The networks are built on the meta device, so a model of any size is counted in a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pwm_fast.agent.imagination import frozen, imagine
from pwm_fast.agent.losses import weighted_loss
from pwm_fast.config import AlgConfig, WorldModelConfig
from pwm_fast.envs import VectorEnv
from pwm_fast.models import CriticEnsemble, GaussianActor, LatentModel, make_world_model
from pwm_fast.ops.extend import discounted_return
from pwm_fast.run import build

META = torch.device("meta")


class Spaces(NamedTuple):
    """What an agent needs to know of an environment.

    Attributes:
        obs_dim: O.
        action_dim: A.
        can_terminate: the world model has a termination head.
    """

    obs_dim: int
    action_dim: int
    can_terminate: bool

    @classmethod
    def of(cls, env: VectorEnv) -> Spaces:
        """Those of ``env``."""
        return cls(*build.dims(env), env.can_terminate)


class Networks(NamedTuple):
    """An agent's networks on the meta device: shapes without storage."""

    world_model: LatentModel
    actor: GaussianActor
    critic: CriticEnsemble

    @classmethod
    def build(cls, config: AlgConfig, spaces: Spaces) -> Networks:
        """The networks that a run with this configuration trains."""
        with META:
            model = make_world_model(
                spaces.obs_dim, spaces.action_dim, config.world_model, spaces.can_terminate
            )
            return cls(
                model,
                GaussianActor(model.latent_dim, spaces.action_dim, config.actor.units),
                CriticEnsemble(model.latent_dim, config.critic.units, config.critic.members),
            )

    def parameters(self) -> dict[str, int]:
        """Parameters per component; ``world_model`` and ``total`` are sums of those before them.

        The transition is called ``dynamics`` (baseline) or ``velocity`` (flow). The termination
        head is left out of every number: the published models have none.
        """
        counts = self.world_model.num_parameters()
        counts.pop("termination", None)
        total = counts.pop("total")
        own = {"actor": _numel(self.actor), "critics": _numel(self.critic)}
        return {**counts, "world_model": total, **own, "total": total + sum(own.values())}


def world_model_parameters(config: WorldModelConfig, spaces: Spaces) -> int:
    """Parameters of a world model, without its termination head."""
    with META:
        model = make_world_model(spaces.obs_dim, spaces.action_dim, config)
    return model.num_parameters()["total"]


class Flops(NamedTuple):
    """FLOPs of one piece of work.

    Attributes:
        forward: of the forward pass.
        total: forward and backward; equal to ``forward`` where nothing is differentiated.
    """

    forward: int
    total: int

    def extended(self, longer: Flops, steps: int) -> Flops:
        """This work with ``steps`` steps more, where ``longer`` is the same with one step more."""
        return Flops(
            self.forward + steps * (longer.forward - self.forward),
            self.total + steps * (longer.total - self.total),
        )


class Costs(NamedTuple):
    """FLOPs of an agent's work, as :func:`count_flops` counts them.

    Attributes:
        macro_step: the dynamics alone, for one latent.
        act: encoder and policy, for one environment step in one env.
        world_model_update: one update, on ``model_learning.batch_size`` windows of H steps.
        actor_update: one update, on ``actor.batch_size`` imagined rollouts of H steps.
        critic_updates: all critic updates that follow one actor update, with their targets.
        learning_per_step: all updates of an epoch divided by its environment steps. The longer
            world-model training at the start of a run (``bootstrap_updates``) is not in it.
    """

    macro_step: Flops
    act: Flops
    world_model_update: Flops
    actor_update: Flops
    critic_updates: Flops
    learning_per_step: float

    @property
    def per_step(self) -> float:
        """Acting and learning, for one environment step in one env."""
        return self.act.total + self.learning_per_step


def count_flops(config: AlgConfig, spaces: Spaces, num_envs: int) -> Costs:
    """FLOPs of acting and of every update, counted by running the real losses on meta tensors.

    Windows and rollouts of 2 and 3 steps are run; every further step costs what the third does. It
    is all in Python, so a long horizon would take its time for nothing.

    The rule: a multiply-add in a matrix product is 2 FLOPs, as torch's FlopCounterMode counts it.
    Element-wise work (LayerNorm, Mish, SimNorm, sums of the integrator), the optimisers' steps,
    evaluations, the measurement of ``start_noise=auto`` and the simulator are left out. The
    backward pass is what autograd really computes: the world model is frozen in the actor's update,
    so its weights' gradients cost nothing there.

    Args:
        config: of the agent.
        spaces: of its environment; its termination head is counted where it has one.
        num_envs: N, envs that act at once.
    """
    steps, short = config.imagined_steps, min(config.imagined_steps, 2)
    cut = config.window_steps
    with META:
        few, more = (_Work(config, spaces, horizon) for horizon in (short, short + 1))
        actor_update, one_pass, targets = (
            few_flops.extended(more_flops, steps - short)
            for few_flops, more_flops in zip(few.updates(), more.updates(), strict=True)
        )
        macro_step, act = _count(few.macro_step), _count(few.act)
        least = min(cut, 2)
        few, more = (_Work(config, spaces, steps) for steps in (least, least + 1))
        one, other = (_count(work.model_loss, work.model) for work in (few, more))
        world_model_update = one.extended(other, cut - least)
    passes = config.critic.passes
    critic_updates = Flops(
        targets.forward + passes * one_pass.forward, targets.total + passes * one_pass.total
    )
    epoch = config.model_learning.updates * world_model_update.total
    epoch += config.actor.updates * (actor_update.total + critic_updates.total)
    return Costs(
        macro_step,
        act,
        world_model_update,
        actor_update,
        critic_updates,
        epoch / (config.steps_per_epoch * num_envs),
    )


class _Work:
    """What an agent computes, on inputs without storage, with windows and rollouts of H steps."""

    def __init__(self, config: AlgConfig, spaces: Spaces, horizon: int) -> None:
        self.config, self.spaces, self.horizon = config, spaces, horizon
        self.model, self.actor, self.critic = Networks.build(config, spaces)
        self.rollouts = config.actor.batch_size
        self.latent_dim = self.model.latent_dim

    def updates(self) -> tuple[Flops, Flops, Flops]:
        """Actor update, one pass of the critics, their targets."""
        with frozen(self.model, self.critic):
            actor_update = _count(self.actor_loss, self.actor)
        one_pass = _count(self.critic_loss, self.critic)
        return actor_update, one_pass, _count(self.critic_targets)

    def model_loss(self) -> Tensor:
        """Of windows of H steps, as many as pieces of their length make up a batch."""
        horizon, pieces = self.horizon, self.config.horizon // self.config.window_steps
        batch = self.config.model_learning.batch_size * pieces
        return weighted_loss(
            self.model,
            self._obs(horizon + 1, batch),
            self._action(horizon, batch),
            torch.empty(horizon, batch),
            torch.empty(horizon, batch),
            self.config.model_learning,
            gamma=self.config.gamma,
            task=self._task(batch),
        ).total

    def actor_loss(self) -> Tensor:
        rollout = imagine(
            self.model,
            self.actor,
            self.model.encode(self._obs(self.rollouts), self._task(self.rollouts)),
            self._action(self.horizon, self.rollouts),
            detach=self.config.actor.detach,
            task=self._task(self.rollouts),
            symlog_rewards=self.config.symlog_rewards,
        )
        value = self._values(rollout.z[-1])
        returns = discounted_return(rollout.reward, value, self.config.gamma, rollout.continues)
        return -returns.mean()

    def critic_targets(self) -> Tensor:
        return self._values(torch.empty(self.horizon + 1, self.rollouts, self.latent_dim))

    def critic_loss(self) -> Tensor:
        """Of all rows at once: the minibatches of a pass are parts of them."""
        z = torch.empty(self.horizon * self.rollouts, self.latent_dim)
        values = self.critic.values(z, self._action(len(z)), self._embedding(z))
        return (values - torch.empty(self.horizon * self.rollouts)).square().mean()

    def act(self) -> Tensor:
        z = self.model.encode(self._obs(1), self._task(1))
        return self.actor(z, self._action(1), self._embedding(z))

    def macro_step(self) -> Tensor:
        return self.model.next(torch.empty(1, self.latent_dim), self._action(1), self._task(1))

    def _values(self, z: Tensor) -> Tensor:
        """The least of the members' values; of Q functions, those of the policy's actions."""
        embedding = self._embedding(z)
        a = self.actor(z, None, embedding) if self.config.critic.kind == "tdmpc2" else None
        return self.critic.minimum(z, a, embedding)

    def _embedding(self, z: Tensor) -> Tensor | None:
        return self.model.task_input(self._task(z.shape[-2]), z)

    def _obs(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.spaces.obs_dim)

    def _action(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.spaces.action_dim)

    def _task(self, batch: int) -> Tensor | None:
        if self.config.world_model.task_dim == 0:
            return None
        return torch.zeros(batch, dtype=torch.int64)


def _count(work: Callable[[], Tensor], module: nn.Module | None = None) -> Flops:
    """FLOPs of ``work``, and of its gradient with respect to ``module``'s parameters if given."""
    with FlopCounterMode(display=False) as counter:
        if module is None:
            with torch.no_grad():
                work()
            forward = counter.get_total_flops()
        else:
            loss = work()
            forward = counter.get_total_flops()
            torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        return Flops(forward, counter.get_total_flops())


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
