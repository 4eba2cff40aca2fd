"""Evaluation of a policy, or of a planner, on real episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pwm_fast import files, ops, seeding
from pwm_fast.agent import PWM, Planner
from pwm_fast.config import MISSING, Checked, PlanningConfig
from pwm_fast.config.checks import (
    SIZE,
    checked,
    not_empty,
    positive,
    positive_or_null,
    require,
    seed_range,
    thread_count,
)
from pwm_fast.envs import Tasks, VectorEnv, task_of, tasks_of
from pwm_fast.run import build, checkpoint, video
from pwm_fast.run.acting import PolicyNotFinite, acting, policy_of
from pwm_fast.run.open_loop import Held
from pwm_fast.run.video import Film, Filming, TrainingFilm
from pwm_fast.seeding import Purpose

LOOK_EVERY = 32  # steps between looks at a GPU whether all episodes are over
GOAL_STEPS = 60  # a goal counts as held through the last second of an episode, at 60 Hz


@dataclass(frozen=True)
class Evaluation:
    """Results of N episodes.

    Attributes:
        returns: undiscounted returns ``[N]``.
        lengths: steps ``[N]``.
        held: where the task's goal held through the last second, ``[N]``; None without a goal.
        diverged: where the simulation broke down, bool ``[N]``: return and length stop there, and
            no goal was held.
        tasks: of the environment, where it has several.
        model: how well the world model predicts the episodes, for a training run's log.
    """

    returns: Tensor
    lengths: Tensor
    held: Tensor | None
    diverged: Tensor
    tasks: Tasks | None = None
    model: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The figures as numbers."""
        row = {
            "eval_reward": self.returns.mean().item(),
            "eval_reward_std": self.returns.std(correction=0).item(),
            "eval_episode_length": self.lengths.float().mean().item(),
            "eval_diverged": int(self.diverged.sum()),
        }
        if self.held is not None:
            row["eval_success"] = self.held.float().mean().item()
        for name, episodes in self._by_task().items():
            row[f"eval_reward/{name}"] = self.returns[episodes].mean().item()
        return {**row, **self.model}

    def _by_task(self) -> dict[str, Tensor]:
        """Which episodes, bool ``[N]``, are of each task; empty where there is one."""
        tasks = self.tasks
        if tasks is None or len(tasks.names) == 1:
            return {}
        pairs = zip(tasks.names, tasks.numbers, strict=True)
        return {name: tasks.of_env.cpu() == number for name, number in pairs}

    def on_cpu(self) -> Evaluation:
        """The same without tensors on a GPU, for another process."""
        tasks = self.tasks
        if tasks is not None:
            of_env, mask = tasks.of_env.cpu(), tasks.action_mask.cpu()
            tasks = replace(tasks, of_env=of_env, action_mask=mask)
        return replace(self, tasks=tasks)

    def summary(self) -> dict[str, Any]:
        """The figures and every single return, for a JSON file."""
        return {
            "episodes": len(self.returns),
            "reward_mean": self.returns.mean().item(),
            "reward_std": self.returns.std(correction=0).item(),
            "reward_min": self.returns.min().item(),
            "reward_max": self.returns.max().item(),
            "episode_length_mean": self.lengths.float().mean().item(),
            "episode_length_std": self.lengths.float().std(correction=0).item(),
            "success": None if self.held is None else self.held.float().mean().item(),
            "diverged": int(self.diverged.sum()),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            "tasks": {
                name: {
                    "episodes": int(episodes.sum()),
                    "reward_mean": self.returns[episodes].mean().item(),
                    "reward_std": self.returns[episodes].std(correction=0).item(),
                    "returns": self.returns[episodes].tolist(),
                }
                for name, episodes in self._by_task().items()
            },
        }


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of one agent in envs of one kind as one of all their episodes."""
    first = parts[0]
    tasks = first.tasks
    if tasks is not None:
        of_env, mask = (
            torch.cat([getattr(part.tasks, name) for part in parts])
            for name in ("of_env", "action_mask")
        )
        tasks = replace(tasks, of_env=of_env, action_mask=mask)
    held = None
    if first.held is not None:
        held = torch.cat([part.held for part in parts if part.held is not None])
    return Evaluation(
        torch.cat([part.returns for part in parts]),
        torch.cat([part.lengths for part in parts]),
        held,
        torch.cat([part.diverged for part in parts]),
        tasks,
        first.model,
    )


@torch.no_grad()
def evaluate(
    agent: PWM,
    env: VectorEnv,
    seed: int,
    *,
    deterministic: bool = True,
    planner: Planner | None = None,
    check: Callable[[], None] = lambda: None,
    record: Held | None = None,
    film: Film | TrainingFilm | None = None,
) -> Evaluation:
    """Run the first episode of every env of ``env`` to its end.

    Args:
        agent: acts; its random numbers are untouched where ``deterministic``.
        env: one env an episode.
        seed: of the start states.
        deterministic: act with the mean of the policy.
        planner: acts in place of the policy; of ``agent``.
        check: called before every step; it may raise to stop.
        record: takes the steps of the episodes.
        film: is shown the envs before every step.

    Raises:
        PolicyNotFinite: an action of a running episode is not finite.
        RuntimeError: an episode does not end within the environment's time limit.
    """
    obs, _ = env.reset(seed=seed)
    n, task = env.num_envs, task_of(env)
    running = torch.ones(n, dtype=torch.bool, device=env.device)
    returns = torch.zeros(n, device=env.device)
    lengths = torch.zeros(n, dtype=torch.int64, device=env.device)
    streak = torch.zeros(n, dtype=torch.int64, device=env.device)
    diverged = torch.zeros(n, dtype=torch.bool, device=env.device)
    unusable = torch.zeros(n, dtype=torch.bool, device=env.device)
    first = torch.ones(n, dtype=torch.bool, device=env.device)
    has_goal = False
    look_every = 1 if env.device.type == "cpu" else LOOK_EVERY
    for i in range(1, env.max_episode_steps + 1):
        check()
        if film is not None:
            film.add(running)
        if planner is None:
            action = agent.act(obs, task=task, deterministic=deterministic).to(env.device)
        else:
            action = planner.act(obs, first).to(env.device)
        unusable |= running & ~torch.isfinite(action).all(-1)  # not every environment looks
        before = obs
        with acting(agent, before, task):
            obs, reward, terminated, truncated, info = env.step(action)
        if record is not None:
            record.add(before, action, reward, running)
        returns += torch.where(running, reward, 0.0)
        lengths += running
        if "diverged" in info:
            diverged |= running & info["diverged"]
        if "goal" in info:
            has_goal = True
            streak = torch.where(running, (streak + 1) * info["goal"], streak)
        first = terminated | truncated
        running = running & ~first
        if i % look_every == 0 and not bool(running.any()):
            break
    if bool(unusable.any()):
        raise PolicyNotFinite(agent.why_not_finite(before, task))
    if bool(running.any()):
        raise RuntimeError(
            f"{int(running.sum())} episodes were not over after max_episode_steps="
            f"{env.max_episode_steps} steps"
        )
    held = (streak >= GOAL_STEPS) & ~diverged
    goal = held.cpu() if has_goal else None
    return Evaluation(returns.cpu(), lengths.cpu(), goal, diverged.cpu(), tasks_of(env))


def picture_size(key: str, value: list[int]) -> None:
    """Width and height of a picture that can be encoded."""
    ok = len(value) == 2 and all(16 <= n <= video.MOST_PIXELS and n % 2 == 0 for n in value)
    expected = f"[width, height], both even and in [16, {video.MOST_PIXELS}]"
    require(ok, key, list(value), expected)


@dataclass
class EvaluateConfig(Checked):
    """One evaluation.

    Attributes:
        checkpoint: file of a training run; its configuration makes the environment and the agent.
        episodes: number of episodes, each in an env of its own.
        seed: of the start states, the same for every checkpoint and in no training run.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: torch's CPU threads; null leaves its own choice (or SLURM_CPUS_PER_TASK's).
        json: where the JSON goes; null is ``<checkpoint>.evaluation.json`` beside the checkpoint,
            ``-`` is stdout (then the table goes to stderr).
        video: a film of the evaluated episodes themselves, ending in ``.mp4`` or ``.gif``; null for
            none.
        video_episodes: how many of them, the first ones, side by side.
        video_size: ``[width, height]`` of one of them, in pixels.
        video_seconds: of each, simulated ones; null is to the end.
        video_fps: the most pictures a second; null is 60 for ``.mp4`` and 25 for ``.gif``.
        planning: a planner that acts in place of the policy.
    """

    checkpoint: str = MISSING
    episodes: int = checked(12, positive(SIZE))
    seed: int = checked(0, seed_range)
    device: str = "auto"
    threads: int | None = checked(None, thread_count)
    json: str | None = None
    video: str | None = checked(None, not_empty("a path or null"))
    video_episodes: int = checked(1, positive(SIZE))
    video_size: list[int] = checked([640, 480], picture_size)
    video_seconds: float | None = checked(None, positive_or_null())
    video_fps: float | None = checked(None, positive_or_null())
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.video is None:
            expected = "a path where other keys of the film are given"
            require(self.filming == Filming(), "video", None, expected)
            return
        most = self.episodes
        ok = self.video_episodes <= most
        require(ok, "video_episodes", self.video_episodes, f"at most episodes={most}")

    @property
    def filming(self) -> Filming:
        """What of the episodes is filmed, if anything."""
        width, height = self.video_size
        return Filming(self.video_episodes, (width, height), self.video_seconds, self.video_fps)


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, Any]:
    """Run the episodes; return what the JSON file holds.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: the checkpoint cannot be read or does not fit this program.
        CannotRender: a film was asked for, and the environment shows no pictures, or not here.
        OSError: the film cannot be written.
    """
    path = checkpoint.named(config.checkpoint)
    target = None if config.video is None else files.user_path(config.video)
    if target is not None:
        video.check(target, config.filming)
    device = build.select_device(config.device)
    run, content = build.load_run(path)
    if target is not None:
        run = replace(run, env=video.visible(run.env))
    planning = config.planning
    # A planner's many rows are work for all threads, however small the agent is.
    build.set_threads(config.threads, run.alg if planning.kind == "none" else None, device)
    engine = build.physics(run, device)
    seed = seeding.stream(config.seed, Purpose.EVALUATE)
    with ExitStack() as stack:
        env = stack.enter_context(closing(build.make_env(run, config.episodes, seed, device)))
        agent = build.restore_agent(path, run, content, env, device)
        film = None
        if target is not None:
            film = stack.enter_context(closing(Film(env, target, config.filming)))
        with policy_of(path):
            planner = _planner(config, agent, env)
            result = evaluate(agent, env, seed, planner=planner, film=film)
        if film is not None:
            film.finish()
    return {
        "checkpoint": str(path),
        "env": run.env.name,
        "alg": run.alg.full_name,
        "training_seed": run.seed,
        "imported": content.get("imported"),
        "epoch": content["epoch"],
        "env_steps": content["epoch"] * run.alg.steps_per_epoch * run.env_count,
        "seed": config.seed,
        "physics": None if engine is None else engine.name,
        "planning": None if planning.kind == "none" else asdict(planning),
        "video": None if target is None else str(target),
        **result.summary(),
    }


def _planner(config: EvaluateConfig, agent: PWM, env: VectorEnv) -> Planner | None:
    if config.planning.kind == "none":
        return None
    seed = seeding.stream(config.seed, Purpose.PLANNING)
    options = ops.MPPI(**config.planning.parameters())
    return Planner(agent, options, seed, task=task_of(env))


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    returns, lengths = result["returns"], result["lengths"]
    imported = result["imported"]
    origin = (
        f"trained     {result['env']}, {result['alg']}, seed {result['training_seed']}: "
        f"{result['epoch']} epochs, {result['env_steps']:,} environment steps"
        if imported is None
        else f"imported    for {result['env']}, of {imported['of']}: {imported['file']}"
    )
    width = max([16, *(len(name) + 2 for name in result["tasks"])])
    lines = [
        f"checkpoint  {result['checkpoint']}",
        origin,
        f"evaluated   {result['episodes']} episodes, {_actor(result)}, seed {result['seed']}"
        + (f", physics {result['physics']}" if result["physics"] else ""),
        "",
        f"{'':{width}}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}",
    ]
    for label, key, values in (
        ("return", "reward", returns),
        ("episode length", "episode_length", lengths),
    ):
        numbers = (result[f"{key}_mean"], result[f"{key}_std"], min(values), max(values))
        lines.append(f"{label:{width}}" + "".join(f"{n:12.1f}" for n in numbers))
    for name, own in result["tasks"].items():
        numbers = own["reward_mean"], own["reward_std"], min(own["returns"]), max(own["returns"])
        lines.append(f"{name:{width}}" + "".join(f"{n:12.1f}" for n in numbers))
    if result["success"] is not None:
        lines.append(f"{'goal held':{width}}{result['success']:12.0%}")
    if result["diverged"]:
        lines.append(diverged_line(result))
    return "\n".join(lines)


def _actor(result: dict[str, Any]) -> str:
    """Who acted."""
    plan = result["planning"]
    if plan is None:
        return "deterministic policy"
    return (
        f"planner {plan['kind']} (horizon {plan['horizon']}, {plan['iterations']} iterations, "
        f"{plan['samples']} samples)"
    )


def diverged_line(result: dict[str, Any]) -> str:
    """What people should know of episodes that diverged, of an evaluation's summary."""
    count, episodes = result["diverged"], result["episodes"]
    return f"diverged: {count} of {episodes} episodes (their returns stop there)"
