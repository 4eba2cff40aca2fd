"""Diagnosing checkpoints: what a world model gets right, and how smoothly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast import config as configuration
from pwm_fast import seeding
from pwm_fast.agent import PWM
from pwm_fast.agent.imagination import frozen, imagine
from pwm_fast.agent.view import ModelView, view_of
from pwm_fast.analysis import simulator
from pwm_fast.analysis.gradients import gradient_esnr
from pwm_fast.analysis.jacobians import jacobian_smoothness, rademacher
from pwm_fast.analysis.latents import latent_report
from pwm_fast.analysis.prediction import (
    HeldOut,
    Start,
    cut_windows,
    draw_starts,
    prediction_errors,
)
from pwm_fast.analysis.rewards import model_r2, reward_report
from pwm_fast.analysis.sensitivity import action_sensitivity, imagined
from pwm_fast.analysis.simplex import simplex_drift
from pwm_fast.config import MISSING, Checked, ConfigError, TrainConfig, at_most
from pwm_fast.config.checks import (
    Check,
    at_least,
    checked,
    not_empty,
    or_null,
    positive,
    positive_or_null,
    require,
    seed_range,
    thread_count,
)
from pwm_fast.envs import tasks_of
from pwm_fast.replay import Episode
from pwm_fast.run import build, checkpoint, metrics, provenance
from pwm_fast.run.acting import policy_of
from pwm_fast.run.collection import MixedPolicy, check_policy, first_episodes
from pwm_fast.seeding import Purpose

INTEGRATORS = ("heun", "euler")
MOST = 2**16  # of what is computed and held for each window, point or rollout
INTEGRATION = ("latent_rms", "latent_per_displacement", "reward_rmse")
GROUP = 8  # width of the latents' simplices


def _paths(key: str, value: Any) -> None:
    given = value if isinstance(value, list) else [value]
    ok = bool(given) and all(isinstance(path, str) and path for path in given)
    require(ok, key, value, "a file or list")


def _radius(key: str, value: float) -> None:
    require(0.0 < value < float("inf"), key, value, "positive and finite")


def _action_step(key: str, value: float) -> None:
    require(0.0 < value < 1.0, key, value, "between 0 and 1: actions are in [-1, 1]")


def _integrators(key: str, names: list[str]) -> None:
    ok = bool(names) and all(name in INTEGRATORS for name in names)
    require(ok, key, names, f"null or a list of {', '.join(INTEGRATORS)}")


def _all(least: int, expected: str) -> Check:
    """A list of numbers, each at least ``least`` and at most :data:`MOST`."""

    def check(key: str, numbers: list[int]) -> None:
        require(bool(numbers) and min(numbers) >= least, key, numbers, expected)
        at_most(key, max(numbers), MOST)

    return check


@dataclass
class DiagnoseConfig(Checked):
    """One diagnosis.

    Attributes:
        checkpoint: file of a training run, or a list of them.
        task: of a model of several tasks, the name of the one to look at; null where it knows one.
        out: folder for JSON and figures; null is ``<checkpoint>.diagnosis`` beside the (first)
            checkpoint, ``<checkpoint>.<task>.diagnosis`` with a task, and ``comparison`` in place
            of the checkpoint's name for several.
        policy: who acts in the held-out episodes: ``stochastic`` and ``deterministic`` are the
            checkpoint's policy, ``random`` is uniform random actions.
        random_share: share of the episodes with random actions whatever the policy.
        pool: test every checkpoint on the episodes of all of them.
        episodes: episodes to collect for each checkpoint.
        windows: B, starts of predictions, drawn from the steps of the episodes.
        horizon: H, predicted steps; null is the run's ``alg.horizon``.
        points: states and actions at which Jacobians are taken, from the windows' starts.
        probes: K, random vectors for each.
        radius: how far a nearby latent is, in root-mean-square displacements of one real step, and
            a nearby action, in units of actions.
        action_step: of the central differences that tell what an action changes, in units of
            actions.
        substeps: numbers K of integrator steps with which a flow is tested, too; null tests the
            run's own alone.
        integrators: of ``heun`` and ``euler``, those tested with each of ``substeps``; null is the
            run's own.
        esnr_horizons: horizons of the ESNR; null is 1, 2, 4, ... and H.
        esnr_samples: numbers M of gradient samples.
        esnr_batch: imagined rollouts a gradient sample; null is ``alg.actor.batch_size`` over
            ``esnr.samples`` of the run, as its own ESNR has it.
        seed: of start states, actions and everything drawn.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: torch's CPU threads; null leaves its own choice (or SLURM_CPUS_PER_TASK's).
    """

    checkpoint: Any = checked(MISSING, _paths)
    task: str | None = checked(None, not_empty("a task's name or null"))
    out: str | None = None
    policy: str = "stochastic"
    random_share: float = 0.0
    pool: bool = False
    episodes: int = checked(16, positive())
    windows: int = checked(256, positive())
    horizon: int | None = checked(None, positive_or_null(MOST))
    points: int = checked(64, at_least(2))
    probes: int = checked(16, positive(MOST))
    radius: float = checked(0.1, _radius)
    action_step: float = checked(0.05, _action_step)
    substeps: list[int] | None = checked(None, or_null(_all(1, "a list of positive numbers")))
    integrators: list[str] | None = checked(None, or_null(_integrators))
    esnr_horizons: list[int] | None = checked(None, or_null(_all(1, "a list of positive numbers")))
    esnr_samples: list[int] = checked([8, 32], _all(2, "a list of numbers of at least 2"))
    esnr_batch: int | None = checked(None, positive_or_null(MOST))
    seed: int = checked(0, seed_range)
    device: str = "auto"
    threads: int | None = checked(None, thread_count)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_policy(self.policy, self.random_share)

    @property
    def paths(self) -> list[Path]:
        """The checkpoints' files."""
        given = self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]
        return [checkpoint.named(name) for name in given]


class Subject(NamedTuple):
    """A checkpoint under diagnosis.

    Attributes:
        path: its file.
        run: its configuration, with the environment of one task.
        task: the number of that task, a scalar; None where the environment says of none.
        reads: components of the action, the first ones, that the task reads.
        epoch: epochs behind it.
        agent: restored from it.
        episodes: held out, collected for it.
        states: the simulator's of each step, ``[T, n]``, of each episode; None where they were not
            kept.
        no_states: why the simulator cannot be put into them; None where it can.
        saturation: share of the entries of the policy's actions that are beyond
            :data:`pwm_fast.run.metrics.SATURATED`; NaN where all episodes are of random actions.
    """

    path: Path
    run: TrainConfig
    task: Tensor | None
    reads: int
    epoch: int
    agent: PWM
    episodes: list[Episode]
    states: list[Tensor | None]
    no_states: str | None
    saturation: float

    def view(self) -> ModelView:
        """Its world model, in that task."""
        return view_of(self.agent, self.task)

    def numbers(self, rows: int) -> Tensor | None:
        """The number of the task for each of so many rows."""
        return None if self.task is None else self.task.expand(rows)


def diagnose(config: DiagnoseConfig) -> dict[str, Any]:
    """Collect held-out episodes and measure everything; what ``diagnosis.json`` holds.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: a checkpoint cannot be read or does not fit this program.
    """
    device = build.select_device(config.device)
    subjects = [_subject(path, config, device) for path in config.paths]
    if config.pool:
        _refuse_other_envs(subjects)
        pooled = [episode for subject in subjects for episode in subject.episodes]
        states = [state for subject in subjects for state in subject.states]
        subjects = [subject._replace(episodes=pooled, states=states) for subject in subjects]
    settings = {k: v for k, v in vars(config).items() if k not in ("checkpoint", "out")}
    results = [_measure(subject, config) for subject in subjects]
    for result, label in zip(results, _labels(subjects), strict=True):
        result["label"] = label
    return {
        "settings": settings,
        "checkpoints": results,
        "versions": provenance.versions(),
        "machine": provenance.machine(device),
        "git": provenance.git_state(),
    }


def _subject(path: Path, config: DiagnoseConfig, device: torch.device) -> Subject:
    run, content = build.load_run(path)
    run = _of_one_task(path, run, content, config.task)
    build.set_threads(config.threads, run.alg, device)
    # The same for every checkpoint, whatever its place.
    build.seed_everything(config.seed, Purpose.DIAGNOSE_AGENT)
    seed = seeding.stream(config.seed, Purpose.DIAGNOSE)
    with closing(build.make_env(run, config.episodes, seed, device)) as env:
        agent, tasks = build.restore_agent(path, run, content, env, device), tasks_of(env)
        act = MixedPolicy(
            agent,
            config.episodes,
            agent.action_dim,
            policy=config.policy,
            random_share=config.random_share,
            random_hold=run.alg.random_hold,
            tasks=tasks,
        )
        no_states = simulator.why_not(env)
        recording = simulator.Recording(env, act) if no_states is None else None
        with policy_of(path):
            episodes = first_episodes(env, recording or act, seed)
    states = [
        None if recording is None else recording.states(i, len(episode.action))
        for i, episode in enumerate(episodes)
    ]
    task, reads = None, agent.action_dim
    if tasks is not None:
        task, (reads,) = tasks.of_env[0], tasks.action_dims
    own = [
        e.action[:, :reads]
        for e, random in zip(episodes, act.random.tolist(), strict=True)
        if not random
    ]
    saturation = metrics.saturation(torch.cat(own)).item() if own else float("nan")
    of_run = path, run, task, reads, content["epoch"], agent
    return Subject(*of_run, episodes, states, no_states, saturation)


def _of_one_task(
    path: Path, run: TrainConfig, content: dict[str, Any], task: str | None
) -> TrainConfig:
    """A run's configuration with the environment of one of its tasks."""
    names = list(build.task_numbers(run.env))
    if task is not None:
        return replace(run, env=build.of_task(run.env, task, *build.dims_of(content)))
    if len(names) > 1:
        raise ConfigError(f"{path} is of several tasks: give task=NAME, one of {', '.join(names)}")
    return run


def _measure(subject: Subject, config: DiagnoseConfig) -> dict[str, Any]:
    """All quantities of one checkpoint, as numbers."""
    run, agent = subject.run, subject.agent
    horizon = config.horizon or run.alg.horizon
    build.seed_everything(config.seed, Purpose.DIAGNOSE_AGENT)
    draws = seeding.stream(config.seed, Purpose.DIAGNOSE_DRAWS)
    generator = torch.Generator().manual_seed(draws)
    starts = draw_starts(subject.episodes, config.windows, generator)
    windows = cut_windows(subject.episodes, starts, horizon)
    returns = torch.stack([episode.reward.sum() for episode in subject.episodes])
    steps = sum(len(episode.action) for episode in subject.episodes)
    windows = windows.to(agent.device)
    with frozen(agent.world_model, agent.critic):
        latents = latent_report(subject.view().encode, subject.episodes, agent.device)
        errors = prediction_errors(subject.view(), windows)
        jacobian = _jacobian(subject, windows, config, generator)
        drift: dict[str, Tensor] = {}
        if agent.world_model.simplices:
            drift = simplex_drift(
                _imagined_latents(subject, windows.obs[0], horizon, config), GROUP
            )
    esnr = _esnr(subject, config, horizon, generator)
    with frozen(agent.world_model, agent.critic):
        rewards = reward_report(
            subject.view(), subject.episodes, starts, horizon, generator, agent.device
        )
        sensitivity = _sensitivity(subject, config, starts, horizon)
        integration = _integration(subject, config, starts, windows)
    return {
        "checkpoint": str(subject.path),
        "env": run.env.name,
        "task": config.task,
        "alg": run.alg.full_name,
        "kind": run.alg.world_model.kind,
        "training_seed": run.seed,
        "epoch": subject.epoch,
        "config_sha256": provenance.config_sha256(configuration.to_dict(run)),
        "horizon": horizon,
        "episodes": len(subject.episodes),
        "steps": steps,
        "return_mean": returns.mean().item(),
        "action_saturation": subject.saturation,
        "latents": latents,
        "prediction": _columns(errors, range(1, horizon + 1)),
        "jacobian": jacobian,
        "simplex": _columns(drift, range(horizon + 1)),
        "esnr": esnr,
        "rewards": rewards,
        "sensitivity": sensitivity,
        "integration": integration,
    }


def _sensitivity(
    subject: Subject, config: DiagnoseConfig, starts: Sequence[Start], horizon: int
) -> dict[str, Any]:
    """What an action changes in the simulator and in the model, or why that is not known."""
    if subject.no_states is not None:
        return {"unavailable": subject.no_states}
    agent, run = subject.agent, subject.run
    chosen = [(e, t, subject.states[e]) for e, t in starts]
    known = [(e, t, states) for e, t, states in chosen if states is not None][: config.points]
    if not known:
        return {"unavailable": "no state of these episodes was kept"}
    # One step more than n: the reward after n steps is of the action there.
    windows = cut_windows(subject.episodes, [(e, t) for e, t, _ in known], horizon + 1)
    physics = torch.stack([states[t] for _, t, states in known])
    view, obs = subject.view(), windows.obs[0]
    rows = 2 * agent.action_dim * len(known)
    after = sorted({n for n in (1, 4, horizon) if n <= horizon})
    seed = seeding.stream(config.seed, Purpose.DIAGNOSE)
    with closing(build.make_env(run, rows, seed, agent.device)) as env:

        def encode(now: Tensor) -> Tensor:
            return view.encode(now.to(agent.device)).cpu()

        found = action_sensitivity(
            simulator.simulated(env, physics, obs, encode),
            imagined(view, obs.to(agent.device)),
            windows.action,
            windows.valid,
            after,
            config.action_step,
        )
    return {"step": config.action_step, "starts": len(known), **found}


def _integration(
    subject: Subject, config: DiagnoseConfig, starts: Sequence[Start], windows: HeldOut
) -> dict[str, Any] | None:
    """Open-loop errors of a flow by integrator and its steps; None where none were asked for."""
    if config.substeps is None and config.integrators is None:
        return None
    own = subject.run.alg.world_model
    if own.kind != "flow":
        return {"unavailable": f"dynamics of kind {own.kind} are not integrated as flows are"}
    agent, horizon = subject.agent, len(windows.action)
    rows = []
    for integrator in config.integrators or [own.integrator]:
        for substeps in config.substeps or [own.substeps]:
            with _integrating(agent, integrator, substeps):
                errors = prediction_errors(subject.view(), windows)
                scores = model_r2(subject.view(), subject.episodes, starts, horizon, agent.device)
            rows.append(
                {
                    "integrator": integrator,
                    "substeps": substeps,
                    "evaluations": substeps * (2 if integrator == "heun" else 1),
                    "own": (integrator, substeps) == (own.integrator, own.substeps),
                    **{k: errors[k].cpu().tolist() for k in INTEGRATION},
                    "reward_r2": scores,
                }
            )
    return {"step": list(range(1, horizon + 1)), "rows": rows}


@contextmanager
def _integrating(agent: PWM, integrator: str, substeps: int) -> Iterator[None]:
    """Inside, the agent's flow is integrated in this way."""
    model = agent.world_model
    own = model.config
    model.config = replace(own, integrator=integrator, substeps=substeps)
    try:
        yield
    finally:
        model.config = own


def _jacobian(
    subject: Subject, windows: HeldOut, config: DiagnoseConfig, generator: torch.Generator
) -> dict[str, float]:
    """Of the latents, and of the components of the action that the task reads."""
    agent, view, reads = subject.agent, subject.view(), subject.reads

    def step(z: Tensor, a: Tensor) -> Tensor:
        return view.step(z, F.pad(a, (0, agent.action_dim - reads)))

    with torch.no_grad():
        z = view.encode(windows.obs[:2])
        moved = (z[1] - z[0]).double().square().sum(-1).mean().sqrt().item()
        start, action = z[0, : config.points], windows.action[0, : config.points, :reads]
    result = jacobian_smoothness(
        step,
        start,
        action,
        rademacher(config.probes, start, generator),
        radius_z=config.radius * moved,
        radius_a=config.radius,
        group=GROUP if agent.world_model.simplices else None,
        generator=generator,
    )
    return {
        **result,
        "points": len(start),
        "probes": config.probes,
        "radius_z": config.radius * moved,
        "radius_a": config.radius,
    }


@torch.no_grad()
def _imagined_latents(
    subject: Subject, obs: Tensor, horizon: int, config: DiagnoseConfig
) -> Tensor:
    """Latents ``[H+1, B, D]`` of rollouts as the agent imagines them when it learns."""
    agent, rows = subject.agent, obs.shape[0]
    task = agent.task_numbers((rows,), subject.numbers(rows))
    noise = agent._noise(horizon, rows)
    if config.policy == "deterministic":
        noise = torch.zeros_like(noise)
    z = agent.encode(obs, task)
    mask = agent._mask(task)
    return imagine(agent.world_model, agent.actor, z, noise, task=task, action_mask=mask).z


def _esnr(
    subject: Subject, config: DiagnoseConfig, horizon: int, generator: torch.Generator
) -> dict[str, Any]:
    run, agent = subject.run, subject.agent
    horizons = config.esnr_horizons
    if horizons is None:
        horizons = sorted({2**k for k in range(horizon.bit_length()) if 2**k < horizon} | {horizon})
    batch = config.esnr_batch or max(run.alg.actor.batch_size // run.esnr.samples, 1)
    pool = torch.cat([episode.obs[:-1] for episode in subject.episodes])
    # With replacement, as in training: the samples are then independent.
    rows = torch.randint(len(pool), (batch * max(config.esnr_samples),), generator=generator)
    obs = pool[rows].to(agent.device)

    def gradients(steps: int, samples: int) -> list[tuple[Tensor, ...]]:
        chosen = obs[: batch * samples]
        return agent.actor_gradients(chosen, samples, steps, task=subject.numbers(len(chosen)))

    return {"batch": batch, "rows": gradient_esnr(gradients, horizons, config.esnr_samples)}


def _columns(values: dict[str, Tensor], steps: range) -> dict[str, list[float]]:
    """Numbers over the steps; the steps themselves under ``step``."""
    columns = {name: value.cpu().tolist() for name, value in values.items()}
    return {"step": list(steps), **columns}


def _refuse_other_envs(subjects: list[Subject]) -> None:
    first = subjects[0]
    for subject in subjects[1:]:
        here, there = (
            (s.run.env.name, s.run.env.options, s.run.env.max_episode_steps)
            for s in (first, subject)
        )
        if here != there:
            raise ConfigError(
                f"pool=true needs checkpoints of one environment; {first.path} has {here}, "
                f"{subject.path} has {there}"
            )


def _labels(subjects: list[Subject]) -> list[str]:
    """Names for tables and legends, all different."""
    labels = [f"{s.run.alg.full_name} seed {s.run.seed} epoch {s.epoch}" for s in subjects]
    if len({s.run.env.name for s in subjects}) > 1:
        labels = [f"{s.run.env.name} {label}" for s, label in zip(subjects, labels, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({s.path})" for s, label in zip(subjects, labels, strict=True)]
    return labels
