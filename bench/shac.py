"""A first-order anchor without a model: SHAC, by gradients through the simulator.

python -m bench.shac cartpole --steps 460800        # to runs/study/cartpole/shac/seed_0.json, where
                                                    # `python -m bench.study collect` finds it
python -m bench.shac hopper --steps 204800 --seed 1

Short-Horizon Actor-Critic (Xu et al. 2022, arXiv 2204.07137): N envs act for H steps, and the
policy follows the gradient of what they earn and of a critic's values behind it. The networks are
PWM's. The gradients of a control step are finite differences (:mod:`bench.differentiable`), for
which each env is simulated ``2 nv + nu + 1`` times more: ``env_steps`` do not count that,
``seconds`` do. Evaluations, of the episodes that ``python -m pwm_fast.evaluate`` takes, are in
neither. An update whose gradient is not finite is left out.

Exit status: 0 trained, 2 one line says what is missing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import anchors
from bench.differentiable import Physics, State
from pwm_fast import envs, ops, seeding
from pwm_fast.agent.normalizers import RunningMeanStd
from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.envs import MujocoEnv
from pwm_fast.models import Critic, GaussianActor
from pwm_fast.seeding import Purpose

NAME = "shac"  # of its folder beside those of a study's arms, and of what is stored of it
PACKAGE = "mujoco"
LAST_LR = 1e-5


@dataclass(frozen=True)
class Settings:
    """Those of the published code, but for ``horizon`` and the rates of robots with contacts.

    Attributes:
        horizon: H, in control steps.
        actor_units: hidden widths.
        critic_units: hidden widths.
        actor_lr: Adam's rate, which falls linearly to 1e-5.
        critic_lr: likewise.
        betas: Adam's.
        grad_norm: what gradients are clipped to.
        gamma: discount.
        lam: lambda of the critic's targets.
        passes: of the critic over the states of an update.
        minibatches: of a pass.
        target_kept: share of the target critic that an update keeps.
    """

    horizon: int = 16
    actor_units: tuple[int, ...] = (128, 64, 32)
    critic_units: tuple[int, ...] = (64, 64)
    actor_lr: float = 5e-3
    critic_lr: float = 1e-3
    betas: tuple[float, float] = (0.7, 0.95)
    grad_norm: float = 1.0
    gamma: float = 0.99
    lam: float = 0.95
    passes: int = 16
    minibatches: int = 4
    target_kept: float = 0.2


SETTINGS = {
    "cartpole": Settings(horizon=32, actor_units=(64, 64), actor_lr=1e-2),
    "ant": Settings(horizon=8, actor_lr=2e-3),  # with 16 and 5e-3 it keeps standing
}


def label(run: dict[str, Any]) -> str:
    """What tables call a stored run."""
    return f"SHAC, H = {run['horizon']}, through MuJoCo {run['versions'][PACKAGE]}"


class Rollout(NamedTuple):
    """H steps of N envs, time first.

    Attributes:
        obs: ``[H + 1, N, O]``, without gradients; where an episode ended, the next one's.
        rewards: ``[H, N]``; where an episode was cut by its time limit, with the discounted value
            of its last state.
        continues: ``[H, N]``, 0 where an episode ended.
        last_value: ``[N]``, of the last observations.
    """

    obs: Tensor
    rewards: Tensor
    continues: Tensor
    last_value: Tensor


class SHAC:
    """The learner; it draws from torch's global generator.

    Args:
        env: to learn in.
        settings: see there.
        steps: of all envs, over which the rates fall.
        threads: of the differences' physics.
    """

    def __init__(self, env: MujocoEnv, settings: Settings, steps: int, threads: int = 1) -> None:
        obs_dim, task = env.task.obs_dim, env.task
        self.env, self.config, self.steps = env, settings, steps
        self.settings = {"num_envs": env.num_envs, **asdict(settings)}
        self.env_steps = 0
        self.physics = Physics(env, threads)
        self.actor = GaussianActor(obs_dim, task.action_dim, settings.actor_units)
        self.critic = Critic(obs_dim, settings.critic_units)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.obs_rms = RunningMeanStd((obs_dim,))
        self.optimizers = [
            GuardedAdam(net.parameters(), lr, settings.betas, settings.grad_norm)
            for net, lr in ((self.actor, settings.actor_lr), (self.critic, settings.critic_lr))
        ]

    def learn(self, steps: int) -> None:
        """Update until that many more steps are taken."""
        end = self.env_steps + steps
        while self.env_steps < end:
            self.update()

    @torch.no_grad()
    def act(
        self, obs: Tensor, *, task: Tensor | None = None, deterministic: bool = False
    ) -> Tensor:
        """Actions ``[N, A]`` for observations ``[N, O]``."""
        noise = None if deterministic else torch.randn(len(obs), self.actor.action_dim)
        return self.actor(self.obs_rms.normalize(obs), noise)

    def why_not_finite(self, obs: Tensor, task: Tensor | None = None) -> str | None:
        """Nothing is known."""
        return None

    def update(self) -> Tensor:
        """Update the policy once and the critic some times.

        Returns:
            The norm of the policy's gradient.
        """
        left = max(1.0 - self.env_steps / self.steps, 0.0)
        for optimizer in self.optimizers:
            optimizer.set_lr(LAST_LR + left * (optimizer.initial_lr - LAST_LR))
        rollout = self.rollout()
        norm = self.optimizers[0].step(self.loss(rollout))
        self._fit_critic(rollout)
        self.obs_rms.update(rollout.obs[:-1])
        self.env_steps += rollout.rewards.numel()
        return norm

    def rollout(self) -> Rollout:
        """Act for H steps, with gradients to the policy."""
        config, task = self.config, self.env.task
        noise = torch.randn(config.horizon, self.env.num_envs, task.action_dim)
        seen, rewards, continues = [], [], []
        state = self.physics.state()
        for drawn in noise:
            obs = task.observation(*state).float()
            action = self.actor(self.obs_rms.normalize(obs), drawn)
            reward = task.reward(obs, action)
            state = self.physics.step(state, action)
            _, _, terminated, truncated, _ = self.env.step(action.detach())
            done = terminated | truncated
            if bool(done.any()):
                cut = truncated & ~terminated
                reward = reward + torch.where(cut, config.gamma * self._value(state), 0.0)
                pairs = zip(self.physics.state(), state, strict=True)
                state = State(*(torch.where(done.unsqueeze(-1), new, old) for new, old in pairs))
            seen.append(obs.detach())
            rewards.append(reward)
            continues.append((~done).float())
        seen.append(task.observation(*state).float().detach())
        stacked = (torch.stack(x) for x in (seen, rewards, continues))
        return Rollout(*stacked, self._value(state))

    def loss(self, rollout: Rollout) -> Tensor:
        """Of the policy: what each env earns from the first step on, and anew after each reset."""
        c = rollout.continues
        values = torch.cat((torch.zeros_like(c), rollout.last_value.unsqueeze(0)))
        gamma = self.config.gamma
        returns = ops.td_lambda(rollout.rewards, values, gamma=gamma, lam=1.0, continues=c)
        begins = torch.cat((torch.ones_like(c[:1]), 1.0 - c[:-1]))
        return -(returns * begins).mean()

    def _value(self, state: State) -> Tensor:
        """Of states, by the target critic, ``[N]``."""
        return self.target(self.obs_rms.normalize(self.env.task.observation(*state).float()))

    def _fit_critic(self, rollout: Rollout) -> None:
        config = self.config
        with torch.no_grad():
            obs = self.obs_rms.normalize(rollout.obs)
            targets = ops.td_lambda(
                rollout.rewards,
                self.target(obs),
                gamma=config.gamma,
                lam=config.lam,
                continues=rollout.continues,
            ).flatten()
            obs = obs[:-1].flatten(0, 1)
        for _ in range(config.passes):
            for rows in torch.randperm(len(obs)).chunk(config.minibatches):
                error = self.critic(obs[rows]) - targets[rows]
                self.optimizers[1].step(error.square().mean())
        with torch.no_grad():
            for kept, new in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                kept.lerp_(new, 1.0 - config.target_kept)


def learner(name: str, num_envs: int, steps: int, seed: int, threads: int = 1) -> SHAC:
    """A new one on so many envs of a robot.

    Raises:
        ImportError: MuJoCo is missing.
    """
    own = seeding.stream(seed, Purpose.TRAINING)
    env = MujocoEnv(envs.TASKS[name](), num_envs, seed=own, threads=threads)
    torch.manual_seed(seeding.stream(seed, Purpose.AGENT))
    return SHAC(env, SETTINGS.get(name, Settings()), steps, threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0, or 2 for what a user can mend."""
    parser = anchors.parser("python -m bench.shac", __doc__)
    parser.add_argument("--envs", type=anchors.positive, default=64)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        new = learner(options.env, options.envs, options.steps, options.seed, options.threads)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    anchors.follow(new, options, [PACKAGE], NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
