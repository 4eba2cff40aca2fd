"""Whole episodes of a policy in an environment, for data sets and diagnostics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError
from pwm_fast.envs import Tasks, VectorEnv, task_of
from pwm_fast.replay import Episode
from pwm_fast.run.acting import PolicyNotFinite

POLICIES = ("stochastic", "deterministic", "random")

Act = Callable[[Tensor], Tensor]  # actions [N, A] for observations [N, O]


def renew_random_actions(held: Tensor, hold: int) -> Tensor:
    """The next uniform random actions ``[N, A]`` in [-1, 1), held for ``hold`` steps on average.

    Args:
        held: the actions of the step before.
        hold: mean number of steps that an action is held for; 1 draws anew at every step.
    """
    drawn = torch.rand(held.shape, device=held.device) * 2.0 - 1.0
    renew = torch.rand(held.shape[0], 1, device=held.device) * hold < 1.0
    return torch.where(renew, drawn, held)


class MixedPolicy:
    """Acts as an agent does, or at random in a share of the envs.

    The random envs are spread evenly among all, or among those of each task. Random actions are
    held as in the first epochs of a training run.

    Args:
        agent: acts; may be None where all envs act at random.
        num_envs: N.
        action_dim: A.
        policy: one of :data:`POLICIES`.
        random_share: share of the envs that act at random whatever ``policy`` is, in [0, 1].
        random_hold: see :func:`renew_random_actions`.
        tasks: of the environment, where it says of any.

    Raises:
        ConfigError: an argument out of range, or no agent for envs that need one.
    """

    def __init__(
        self,
        agent: PWM | None,
        num_envs: int,
        action_dim: int,
        *,
        policy: str,
        random_share: float = 0.0,
        random_hold: int = 1,
        tasks: Tasks | None = None,
    ) -> None:
        check_policy(policy, random_share)
        share = 1.0 if policy == "random" else random_share
        if agent is None and share < 1.0:
            raise ConfigError(f"policy must be random without a checkpoint, got {policy!r}")
        index = torch.arange(num_envs, device="cpu")
        if tasks is not None:  # else every second env might be all of one task
            number = tasks.of_env.cpu()
            index = (number[:, None] == number).tril(-1).sum(1)
        # Bresenham's line: the first k envs hold round(k * share) random ones, for every k.
        self.random = ((index + 1) * share + 0.5).floor() > (index * share + 0.5).floor()
        self._agent = None if share == 1.0 else agent
        self._task = None if tasks is None else tasks.of_env
        self._mask = None if tasks is None else tasks.action_mask.cpu()
        self._deterministic = policy == "deterministic"
        self._hold = random_hold
        self._held = 2.0 * torch.rand(num_envs, action_dim, device="cpu") - 1.0

    def __call__(self, obs: Tensor) -> Tensor:
        """Actions ``[N, A]`` on the CPU for observations ``[N, O]``.

        Raises:
            PolicyNotFinite: one of the agent's is not finite.
        """
        self._held = renew_random_actions(self._held, self._hold)
        drawn = self._held if self._mask is None else self._held * self._mask
        if self._agent is None:
            return drawn
        action = self._agent.act(obs, task=self._task, deterministic=self._deterministic).cpu()
        action = torch.where(self.random[:, None], drawn, action)
        if not bool(action.isfinite().all()):
            raise PolicyNotFinite(self._agent.why_not_finite(obs, self._task))
        return action


def check_policy(policy: str, random_share: float) -> None:
    """Raise ConfigError, naming the key, for a policy that is none or a share out of range."""
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if not 0.0 <= random_share <= 1.0:
        raise ConfigError(f"random_share must be in [0, 1], got {random_share!r}")


@torch.no_grad()
def first_episodes(env: VectorEnv, act: Act, seed: int) -> list[Episode]:
    """The first episode of every env, from start to end, on the CPU.

    The first of each, not those that end first: short episodes would be too many among these.

    Args:
        env: one env an episode.
        act: the policy.
        seed: of the start states.

    Raises:
        RuntimeError: an episode does not end within the environment's time limit.
    """
    obs, _ = env.reset(seed=seed)
    running = torch.ones(env.num_envs, dtype=torch.bool, device="cpu")
    lengths = torch.zeros(env.num_envs, dtype=torch.int64, device="cpu")
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(env.max_episode_steps):
        action = act(obs)
        # Clones, taken at once: an environment or a policy may hand out its own buffers.
        before = [part.detach().cpu().clone() for part in (obs, action)]
        obs, reward, terminated, truncated, info = env.step(action.to(env.device))
        after = [part.detach().cpu().clone() for part in (reward, terminated, info["final_obs"])]
        steps.append((*before, *after))
        lengths += running
        running = running & ~(terminated | truncated).cpu()
        if not bool(running.any()):
            break
    else:
        raise RuntimeError(
            f"{int(running.sum())} episodes were not over after max_episode_steps="
            f"{env.max_episode_steps} steps"
        )
    all_obs, action, reward, terminated, final_obs = (
        torch.stack(part) for part in zip(*steps, strict=True)
    )
    task = task_of(env)
    numbers = [0] * env.num_envs if task is None else task.tolist()
    episodes = []
    for i, length in enumerate(lengths.tolist()):
        last = final_obs[length - 1, i]
        episodes.append(
            Episode(
                torch.cat([all_obs[:length, i], last[None]]),
                action[:length, i].clamp(-1.0, 1.0),
                reward[:length, i].clone(),
                terminated[:length, i].clone(),
                numbers[i],
            )
        )
    return episodes
