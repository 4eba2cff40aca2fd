"""Typed configuration of a run: the schema behind the YAML files in ``configs/``.

The defaults here are ours. ``configs/alg/pwm.yaml`` has PWM's published single-task values;
``docs/published.md`` says where the two differ. Every class checks its own values, so a wrong
number is named before any work starts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pwm_fast import seeding

MISSING = "???"  # OmegaConf's mark of a value that has to be given


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names the key and the value."""


# Mappings whose keys are not known beforehand: Hydra wants a + before a key that they lack.
_OPEN = re.compile(r"(env\.kwargs|hydra\.launcher\.additional_parameters)(\.[^=]+)?=")


def open_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides with Hydra's ``++`` before those within open mappings, such as ``env.kwargs.x=1``.

    Args:
        overrides: as on the command line; other arguments may be among them.
    """
    return [f"++{given}" if _OPEN.match(given) else given for given in overrides]


def check_choices(overrides: Iterable[str]) -> None:
    """Look at the overrides that choose files of ``configs/``, such as ``env=ant``.

    Hydra itself answers ``env=null`` and ``alg=5`` with errors that are not its own.

    Args:
        overrides: as on the command line; other arguments, and what cannot be read, are left alone.

    Raises:
        ConfigError: the value is neither a name nor a list of names; the message names the key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
    from hydra.errors import HydraException

    files = resources.files("pwm_fast.configs")
    groups = {"hydra", *(entry.name for entry in files.iterdir() if entry.is_dir())}
    parser = OverridesParser.create()
    for given in overrides:
        key = given.partition("=")[0].lstrip("+").partition("@")[0]
        if key not in groups and not key.startswith("hydra/"):
            continue
        try:
            override = parser.parse_override(given)
        except HydraException:  # Hydra says so
            continue
        value: Any = override.value()
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            names = choice if isinstance(choice, list) else [choice]
            ok = all(isinstance(name, str | QuotedString | Glob) for name in names)
            _require(ok, key, choice, "a name, or a list of names, of its files")


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {expected}, got {value!r}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"one of {', '.join(allowed)}")


# The most that a key may be: far above what anybody needs, and below what would overflow, or run
# for days without a word.
COUNT = 2**31 - 1  # of what is done again and again
SIZE = 2**63 - 1  # of what takes memory: that is looked at where it is made
WIDTH = 2**20  # of a layer
EPISODE = 10**7  # steps
FLOAT = 3e38  # float32 has no larger numbers
LOGSTD = 88.0  # whose exponential is a float32


def at_most(key: str, value: float | None, most: float) -> None:
    """Raise :class:`ConfigError` for a number above ``most``; None and infinity are none."""
    ok = value is None or value <= most or value == math.inf
    _require(ok, key, value, f"at most {most}")


def _widths(key: str, units: list[int]) -> None:
    ok = all(isinstance(u, int) and u > 0 for u in units)
    _require(ok, key, list(units), "a list of positive widths")
    _require(max(units, default=0) <= WIDTH, key, list(units), f"a list of widths up to {WIDTH}")


def _most(value: float, whole: int) -> float:
    return FLOAT if isinstance(value, float) else whole


def _positive(prefix: str, config: Any, *names: str, most: int = COUNT) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{prefix}.{name}", value, "positive")
        at_most(f"{prefix}.{name}", value, _most(value, most))


def _not_negative(prefix: str, config: Any, *names: str, most: int = COUNT) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{prefix}.{name}", value, "0 or more")
        at_most(f"{prefix}.{name}", value, _most(value, most))


MAX_THREADS = 1024  # with many more the system has none left, for anybody
THREADS = f"positive and at most {MAX_THREADS}, or null"


def are_threads(value: int | None) -> bool:
    """Whether a number of CPU threads is one, or null."""
    return value is None or 0 < value <= MAX_THREADS


def allotted_threads() -> int | None:
    """What Slurm allots to this task, at most :data:`MAX_THREADS`; None where it says nothing.

    Raises:
        ConfigError: SLURM_CPUS_PER_TASK is no positive number.
    """
    text = os.environ.get("SLURM_CPUS_PER_TASK", "").strip()
    if not text:
        return None
    ok = re.fullmatch("0*[1-9][0-9]*", text) is not None
    _require(ok, "SLURM_CPUS_PER_TASK", text, "a positive number, or unset")
    digits = text.lstrip("0")
    return min(int(digits[:5]), MAX_THREADS)  # of more digits it is larger


def _finite(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value), f"{prefix}.{name}", value, "finite")
        _require(abs(value) <= FLOAT, f"{prefix}.{name}", value, f"at most {FLOAT} in size")


def _adam(prefix: str, config: Any) -> None:
    _positive(prefix, config, "lr", "grad_norm")
    _finite(prefix, config, "lr")  # an infinite grad_norm clips nothing
    ok = len(config.betas) == 2 and all(
        isinstance(b, (int, float)) and 0.0 <= b < 1.0 for b in config.betas
    )
    _require(ok, f"{prefix}.betas", list(config.betas), "two numbers in [0, 1)")


@dataclass
class WorldModelConfig:
    """Networks of the world model.

    Attributes:
        kind: ``mlp`` (PWM's baseline) or ``flow``.
        latent_dim: D, a multiple of 8 (the SimNorm groups).
        units: hidden widths of the dynamics, or of the velocity field.
        encoder_units: hidden widths of the encoder.
        reward_units: hidden widths of the reward and termination heads.
        num_bins: two-hot bins of the reward head; 1 is a scalar head.
        vmin: first bin centre, in symlog space.
        vmax: last bin centre, in symlog space.
        task_dim: width E of the task embedding; 0 is a single-task model.
        num_tasks: number of tasks with an embedding. A training run has 1 (:func:`check_tasks`).
        zero_velocity: start with a zero last weight of a linear velocity head, so that the model
            starts as the identity, which is close to the truth, and not as a random drift.
        head: last layer of the velocity field, ``linear`` or ``simnorm`` (cannot fit its target).
        integrator: ``heun`` or ``euler``.
        substeps: K, integrator steps a macro step.
        project: put latents back on the simplices after every macro step.
    """

    kind: str = "flow"
    latent_dim: int = 512
    units: list[int] = field(default_factory=lambda: [512, 512])
    encoder_units: list[int] = field(default_factory=lambda: [256])
    reward_units: list[int] = field(default_factory=lambda: [512, 512])
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    task_dim: int = 0
    num_tasks: int = 1
    head: str = "linear"
    zero_velocity: bool = False
    integrator: str = "heun"
    substeps: int = 2
    project: bool = False

    def __post_init__(self) -> None:
        key = "alg.world_model"
        _one_of(f"{key}.kind", self.kind, ("mlp", "flow"))
        _one_of(f"{key}.head", self.head, ("linear", "simnorm"))
        _one_of(f"{key}.integrator", self.integrator, ("heun", "euler"))
        _positive(key, self, "latent_dim", "num_tasks", most=WIDTH)
        _positive(key, self, "num_bins", most=2**16)
        _positive(key, self, "substeps", most=1024)
        groups = self.latent_dim % 8 == 0
        _require(groups, f"{key}.latent_dim", self.latent_dim, "a multiple of 8 (SimNorm)")
        _not_negative(key, self, "task_dim", most=WIDTH)
        _require(
            self.task_dim > 0 or self.num_tasks == 1,
            f"{key}.num_tasks",
            self.num_tasks,
            "1 where task_dim is 0",
        )
        _finite(key, self, "vmin", "vmax")
        _require(self.vmin < self.vmax, f"{key}.vmin", self.vmin, f"below vmax ({self.vmax})")
        for name in ("units", "encoder_units", "reward_units"):
            _widths(f"{key}.{name}", getattr(self, name))


@dataclass
class ModelLearningConfig:
    """World-model updates.

    Attributes:
        updates: updates an epoch.
        bootstrap_updates: updates before the first policy update; null is one episode's length.
        batch_size: windows a batch.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        encoder_lr_scale: the encoder learns at this times the rate. Below 1 the latents that the
            dynamics chase move more slowly (TD-MPC2 has 0.3).
        betas: Adam's betas. PWM's world model has torch's own, 0.9 and 0.999.
        grad_norm: the gradient's norm is clipped to this.
        dynamics_coef: weight of the dynamics (or flow-matching) loss. 20 and 0.1 are TD-MPC2's
            weights for a cross-entropy reward.
        reward_coef: weight of the reward loss.
        mean_reward_loss: the reward loss is the mean over a window's H steps where the other losses
            are sums over them, so it weighs 1/H as much: PWM's code divides it by H twice.
        termination_coef: weight of the termination loss.
        tau_sampling: flow times of the flow-matching loss, ``uniform``, or ``midpoint`` (0.5 alone,
            an ablation: Heun also evaluates 0 and 1).
        flow_start: where a flow-matching path starts: ``rollout`` (the model's own latent) or
            ``teacher`` (the encoded observation; no rollout is computed).
        start_noise: standard deviation of noise on the path's start. The target still is the
            encoded successor, so the field learns to lead stray latents back, as ``rollout`` starts
            teach it, without computing a rollout.
        target_grad: let the gradient reach the start latent through the velocity target too.
    """

    updates: int = 8
    bootstrap_updates: int | None = None
    batch_size: int = 256
    lr: float = 3e-4
    encoder_lr_scale: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.7, 0.95])
    grad_norm: float = 20.0
    dynamics_coef: float = 20.0
    reward_coef: float = 0.1
    mean_reward_loss: bool = False
    termination_coef: float = 0.1
    tau_sampling: str = "uniform"
    flow_start: str = "rollout"
    start_noise: float = 0.0
    target_grad: bool = True

    def __post_init__(self) -> None:
        key = "alg.model_learning"
        _one_of(f"{key}.tau_sampling", self.tau_sampling, ("uniform", "midpoint"))
        _one_of(f"{key}.flow_start", self.flow_start, ("rollout", "teacher"))
        _positive(key, self, "batch_size", "encoder_lr_scale", most=SIZE)
        _finite(key, self, "encoder_lr_scale")
        _adam(key, self)
        sizes = ("dynamics_coef", "reward_coef", "termination_coef", "start_noise")
        _not_negative(key, self, "updates", *sizes)
        _finite(key, self, *sizes)
        if self.bootstrap_updates is not None:
            value = self.bootstrap_updates
            _require(value >= 0, f"{key}.bootstrap_updates", value, "0 or more, or null")
            at_most(f"{key}.bootstrap_updates", value, COUNT)


@dataclass
class ActorConfig:
    """Policy network and updates.

    Attributes:
        units: hidden widths.
        init_logstd: log standard deviation at the start.
        min_logstd: its lower bound.
        input_gain: factor on the first layer's initial weights. Latents vary by about 0.1 around
            1/8: at a gain of 1 small networks start, and long stay, in Mish's linear range.
        init: initial weights and biases: ``orthogonal`` (gain 1, biases 0) or ``torch`` (as
            ``torch.nn.Linear`` draws both, PWM's; its weights are 0.58 times as large).
        updates: updates an epoch, each on freshly imagined rollouts.
        batch_size: imagined rollouts a update, started from replayed observations.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        betas: Adam's betas.
        grad_norm: the gradient's norm is clipped to this.
        detach: the policy sees latents without their gradient (the dynamics still carry it).
    """

    units: list[int] = field(default_factory=lambda: [400, 200, 100])
    init_logstd: float = -1.0
    min_logstd: float = -1.427
    input_gain: float = 1.0
    init: str = "orthogonal"
    updates: int = 1
    batch_size: int = 128
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.7, 0.95])
    grad_norm: float = 1.0
    detach: bool = True

    def __post_init__(self) -> None:
        _widths("alg.actor.units", self.units)
        _one_of("alg.actor.init", self.init, ("orthogonal", "torch"))
        _positive("alg.actor", self, "batch_size", "input_gain", most=SIZE)
        _finite("alg.actor", self, "init_logstd", "min_logstd", "input_gain")
        for name in ("init_logstd", "min_logstd"):
            at_most(f"alg.actor.{name}", getattr(self, name), LOGSTD)
        _not_negative("alg.actor", self, "updates")
        _adam("alg.actor", self)


@dataclass
class CriticConfig:
    """Value functions and their updates, which follow every actor update.

    Attributes:
        units: hidden widths.
        members: size of the ensemble; the value is its minimum.
        input_gain: as the actor's.
        passes: passes over the imagined states an actor update leaves.
        minibatches: minibatches a pass.
        shuffle: deal the imagined states out to minibatches at random, anew in every pass; false
            takes them in order of time, as PWM's code does.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        betas: Adam's betas.
        grad_norm: the gradient's norm is clipped to this.
        lam: lambda of the TD(lambda) targets. PWM's code has 0.95 while it steps an environment;
            offline its targets are those of 0 whatever it is set to.
    """

    units: list[int] = field(default_factory=lambda: [400, 200])
    members: int = 3
    input_gain: float = 1.0
    passes: int = 8
    minibatches: int = 4
    shuffle: bool = True
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.7, 0.95])
    grad_norm: float = 100.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        _widths("alg.critic.units", self.units)
        _positive("alg.critic", self, "members", most=1024)
        _positive("alg.critic", self, "minibatches", "input_gain", most=2**16)
        _finite("alg.critic", self, "input_gain")
        _not_negative("alg.critic", self, "passes")
        _require(0.0 <= self.lam <= 1.0, "alg.critic.lam", self.lam, "in [0, 1]")
        _adam("alg.critic", self)


@dataclass
class AlgConfig:
    """The PWM agent.

    Attributes:
        name: of the configuration, for run directories and tables.
        world_model: networks of the world model.
        model_learning: its updates.
        actor: policy.
        critic: value functions.
        horizon: H, macro steps of replay windows and imagined rollouts.
        imagination_horizon: macro steps of imagined rollouts where they differ from ``horizon``.
        gamma: discount a step.
        steps_per_epoch: environment steps every world takes an epoch.
        random_epochs: epochs of uniform random actions before any update.
        random_hold: steps that a random action is held for on average. Actions drawn anew at every
            step of 1/60 s hardly move a robot.
        replay_capacity: transitions that replay holds, over all worlds.
        normalize_obs: encode observations less their running mean, divided by their running
            standard deviation.
        obs_clip: normalised observations are clipped to plus and minus this; null clips nothing.
        normalize_rewards: train a scalar reward head on rewards divided by theirs.
        centre_rewards: normalised rewards are less their running mean, too. In a task that can
            terminate this changes what is best: a living bonus is gone.
        reward_clip: normalised rewards are clipped to plus and minus this; null clips nothing.
        normalize_returns: divide the actor's loss by the returns' running standard deviation.
        value_scale: imagined rewards are multiplied by this before returns and values are formed
            from them. A critic whose targets are in the hundreds takes thousands of updates to
            reach them.
        value_delay: discount the last state's value in the actor's loss by so many steps more:
            ``gamma^(H + value_delay) V(z_H)``. 0 is the definition, 1 what PWM's code computes.
        symlog_rewards: leave a two-hot head's imagined rewards in symlog space, as PWM's published
            actor loss does: large penalties then weigh less.
        final_lr: what all learning rates decay to, linearly, over the run.
        max_skipped_updates: stop after this many updates in a row were skipped as non-finite.
    """

    name: str = "pwm"
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    model_learning: ModelLearningConfig = field(default_factory=ModelLearningConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    horizon: int = 16
    imagination_horizon: int | None = None
    gamma: float = 0.99
    steps_per_epoch: int = 16
    random_epochs: int = 2
    random_hold: int = 1
    replay_capacity: int = 1_000_000
    normalize_obs: bool = False
    obs_clip: float | None = 10.0
    normalize_rewards: bool = False
    centre_rewards: bool = False
    reward_clip: float | None = None
    normalize_returns: bool = True
    value_scale: float = 1.0
    value_delay: int = 0
    symlog_rewards: bool = False
    final_lr: float = 1e-5
    max_skipped_updates: int = 20

    def __post_init__(self) -> None:
        _positive("alg", self, "horizon", "steps_per_epoch", "value_scale")
        _positive("alg", self, "replay_capacity", "max_skipped_updates", most=SIZE)
        if self.imagination_horizon is not None:
            _positive("alg", self, "imagination_horizon")
        for name in ("obs_clip", "reward_clip"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"alg.{name}", value, "positive, or null")
            at_most(f"alg.{name}", value, FLOAT)
        _not_negative("alg", self, "value_delay", "final_lr")
        _require(0.0 < self.gamma <= 1.0, "alg.gamma", self.gamma, "in (0, 1]")
        _finite("alg", self, "value_scale", "final_lr")
        for name in ("random_hold", "random_epochs"):
            _require(getattr(self, name) >= 1, f"alg.{name}", getattr(self, name), "at least 1")
            at_most(f"alg.{name}", getattr(self, name), COUNT)
        _require(
            not (self.normalize_rewards and self.world_model.num_bins > 1),
            "alg.normalize_rewards",
            self.normalize_rewards,
            "false for a two-hot reward head (num_bins > 1), whose bins are in symlog units",
        )
        _require(
            not (self.symlog_rewards and self.world_model.num_bins == 1),
            "alg.symlog_rewards",
            self.symlog_rewards,
            "false for a scalar reward head (num_bins = 1)",
        )

    @property
    def imagined_steps(self) -> int:
        """Macro steps of imagined rollouts."""
        return self.imagination_horizon or self.horizon


@dataclass
class EvalConfig:
    """Evaluation on real episodes, with the deterministic policy.

    Attributes:
        every: epochs between evaluations; 0 evaluates at the start and the end alone.
        episodes: episodes an evaluation.
        final_episodes: episodes of the evaluation at the end.
    """

    every: int = 25
    episodes: int = 12
    final_episodes: int = 32

    def __post_init__(self) -> None:
        _not_negative("eval", self, "every", most=SIZE)
        _positive("eval", self, "episodes", "final_episodes", most=SIZE)


@dataclass
class CheckpointConfig:
    """Checkpoints in ``run_dir/checkpoints``.

    Attributes:
        every: epochs between ``latest`` checkpoints; 0 writes none but at the end or on a signal.
    """

    every: int = 50

    def __post_init__(self) -> None:
        _not_negative("checkpoint", self, "every", most=SIZE)


@dataclass
class EsnrConfig:
    """Signal-to-noise ratio of the actor's gradient.

    Attributes:
        every: epochs between measurements; 0 measures never.
        samples: M, gradient samples, each of ``alg.actor.batch_size`` / M imagined rollouts.
    """

    every: int = 10
    samples: int = 8

    def __post_init__(self) -> None:
        _not_negative("esnr", self, "every", most=SIZE)
        _require(self.samples >= 2, "esnr.samples", self.samples, "at least 2")
        at_most("esnr.samples", self.samples, SIZE)


@dataclass
class WandbConfig:
    """Logging to Weights & Biases, beside the run directory's own files.

    Attributes:
        mode: ``disabled``, ``offline`` (no login, no network) or ``online``.
        project: project name.
        entity: team or user; null is the login's.
        name: run name; null composes one of environment, algorithm and seed.
        gradients: log histograms of the gradients at evaluations.
    """

    mode: str = "disabled"
    project: str = "pwm_fast"
    entity: str | None = None
    name: str | None = None
    gradients: bool = False

    def __post_init__(self) -> None:
        _one_of("wandb.mode", self.mode, ("disabled", "offline", "online"))


@dataclass
class DataConfig:
    """Offline data that the replay holds before the first epoch (``docs/reproducibility.md``).

    Attributes:
        path: a registered folder of episodes, .npz or .pt, or one such file; null for none.
        manifest: its manifest; null is ``manifest.json`` in the folder, or
            ``<file>.manifest.json`` beside the file.
    """

    path: str | None = None
    manifest: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "manifest"):
            value = getattr(self, name)
            _require(value != "", f"data.{name}", value, "a path or null")
        _require(
            self.manifest is None or self.path is not None,
            "data.manifest",
            self.manifest,
            "null where data.path is null",
        )


@dataclass
class EnvConfig:
    """Worlds to act in.

    Attributes:
        name: of the robot or adapter.
        num_envs: default number of worlds.
        max_episode_steps: time limit; null is the task's own.
        threads: physics threads of the native engine.
        engine: physics of the built-in robots: ``mujoco`` (native, CPU threads), ``mujoco_warp``
            (on the run's device, extra ``[gpu]``) or ``auto`` (``mujoco_warp`` where the device is
            a CUDA GPU and it can run there, else ``mujoco``; the run says which).
        options: what the task itself takes, such as ``start`` of the cart-pole.
    """

    name: str
    num_envs: int = 64
    max_episode_steps: int | None = None
    threads: int = 1
    engine: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive("env", self, "num_envs", most=SIZE)
        _positive("env", self, "threads", most=MAX_THREADS)
        _one_of("env.engine", self.engine, ("auto", "mujoco", "mujoco_warp"))
        if self.max_episode_steps is not None:
            steps = self.max_episode_steps
            _positive("env", self, "max_episode_steps", most=SIZE)
            expected = f"below 2^31, and at most {EPISODE}"
            _require(steps <= EPISODE, "env.max_episode_steps", steps, expected)


@dataclass
class TrainConfig:
    """One training run; ``python -m pwm_fast.train --cfg job`` prints it resolved.

    Attributes:
        env: the worlds.
        alg: the agent.
        seed: of every random number; runs of other seeds share no start state.
        epochs: epochs of ``alg.steps_per_epoch`` steps in each world.
        num_envs: number of worlds; null is ``env.num_envs``.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of matrix products: ``auto`` (``fast`` on a GPU, ``exact`` on a CPU), ``exact``,
            ``tf32``, ``bf16`` or ``fast`` (fp16). A run whose ``fast`` updates were skipped as
            non-finite goes on in ``bf16``.
        graphs: replay updates from CUDA graphs: ``auto`` (on a GPU), ``true`` or ``false``.
        threads: torch's CPU threads; null is SLURM_CPUS_PER_TASK or OMP_NUM_THREADS where they are
            set, else as many of the machine's cores as the agent's products have work for (one for
            a small agent on a CPU).
        deterministic: the same metrics to the bit whenever the run is repeated on one machine with
            as many threads; an operation that cannot give that raises.
        record_host: write the machine's host name into the run's ``provenance.json``.
        run_dir: where everything of the run is written.
        resume: ``auto`` continues a run found in ``run_dir``, a path continues that checkpoint,
            null refuses a ``run_dir`` that holds a run.
        init: a checkpoint whose networks and running statistics a new run starts with, whatever
            its number of worlds; null starts with random weights. A run that goes on has its own.
        data: offline data.
        checkpoint: checkpoints.
        eval: evaluation.
        esnr: gradient signal-to-noise ratio.
        wandb: Weights & Biases.
    """

    env: EnvConfig
    alg: AlgConfig = field(default_factory=AlgConfig)
    seed: int = 0
    epochs: int = 1000
    num_envs: int | None = None
    device: str = "auto"
    precision: str = "auto"
    graphs: str = "auto"
    threads: int | None = None
    deterministic: bool = False
    record_host: bool = False
    run_dir: str = "runs/default"
    resume: str | None = "auto"
    init: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    esnr: EsnrConfig = field(default_factory=EsnrConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        at_most("epochs", self.epochs, SIZE)
        _require(seeding.in_range(self.seed), "seed", self.seed, "in [0, 2^63)")
        ok = self.device in ("auto", "cpu", "cuda") or (
            self.device.startswith("cuda:") and self.device[5:].isdigit()
        )
        _require(ok, "device", self.device, "auto, cpu, cuda or cuda:N")
        _one_of("precision", self.precision, ("auto", "exact", "tf32", "bf16", "fast"))
        self.graphs = self.graphs.lower()  # a YAML true arrives as "True"
        _one_of("graphs", self.graphs, ("auto", "true", "false"))
        _require(
            not (self.graphs == "true" and self.device == "cpu"),
            "graphs",
            self.graphs,
            "auto or false where device is cpu",
        )
        worlds = self.num_envs
        _require(worlds is None or worlds > 0, "num_envs", worlds, "positive or null")
        at_most("num_envs", worlds, SIZE)
        _require(are_threads(self.threads), "threads", self.threads, THREADS)
        _require(self.run_dir != "", "run_dir", self.run_dir, "a path")
        _require(self.init != "", "init", self.init, "a path or null")
        named = self.resume not in (None, "auto")
        _require(
            not (named and self.init is not None),
            "init",
            self.init,
            f"null where resume names a checkpoint ({self.resume}), which has weights of its own",
        )
        if self.esnr.every:
            samples, batch = self.esnr.samples, self.alg.actor.batch_size
            _require(
                samples <= batch, "esnr.samples", samples, f"at most alg.actor.batch_size ({batch})"
            )

    @property
    def worlds(self) -> int:
        """Number of worlds of the run."""
        return self.num_envs or self.env.num_envs


def check_tasks(config: TrainConfig) -> None:
    """Refuse to train a model of several tasks: every transition would count as of the first.

    Models and agents of several tasks can be made, measured and loaded; what is missing is a task
    number beside each transition.

    Raises:
        ConfigError: the configuration has more than one task.
    """
    model = config.alg.world_model
    _require(
        model.num_tasks == 1,
        "alg.world_model.num_tasks",
        model.num_tasks,
        "1 to train: transitions carry no task number yet, all would count as of task 0 (set "
        "alg.world_model.num_tasks=1 alg.world_model.task_dim=0, and train one run for each task)",
    )


def check_layers(config: TrainConfig) -> None:
    """Refuse to begin with networks without hidden layers: they would be linear, without a word.

    Such agents can be made, counted and loaded, and their runs go on.

    Raises:
        ConfigError: a list of hidden widths is empty.
    """
    model = "alg.world_model"
    for key, units in {
        f"{model}.units": config.alg.world_model.units,
        f"{model}.encoder_units": config.alg.world_model.encoder_units,
        f"{model}.reward_units": config.alg.world_model.reward_units,
        "alg.actor.units": config.alg.actor.units,
        "alg.critic.units": config.alg.critic.units,
    }.items():
        _require(len(units) > 0, key, list(units), "a list of at least one positive width to train")


def hydra_schema() -> Any:
    """The configuration's typed keys and defaults, for Hydra to compose on.

    The environment's keys stay open here, since each brings its own; :func:`from_dict` sorts them.
    """
    from omegaconf import OmegaConf

    typed = OmegaConf.structured(TrainConfig)
    return OmegaConf.create({key: {} if key == "env" else typed._get_node(key) for key in typed})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain containers, for checkpoints and files."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A checked configuration from plain containers, as :func:`to_dict` gives them.

    Options of the environment may stand beside its other keys (as in the YAML files).

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = dict(values)
    sections = {
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.default_factory is not dataclasses.MISSING
    }
    for key in ("env", *sections):
        given = values.get(key, {})
        _require(given is None or isinstance(given, Mapping), key, given, "a mapping of its keys")
    env = dict(values.get("env") or {})
    known = {f.name for f in dataclasses.fields(EnvConfig)}
    options = env.get("options") or {}
    _require(isinstance(options, Mapping), "env.options", options, "a mapping of its keys")
    options = dict(options)
    options.update({k: v for k, v in env.items() if k not in known})
    values["env"] = {**{k: v for k, v in env.items() if k in known}, "options": options}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), values)
        config = OmegaConf.to_object(merged)
    except OverflowError as error:
        raise ConfigError(f"a number is too large for its key: {_readable(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    assert isinstance(config, TrainConfig)
    return config


def from_hydra(cfg: Any) -> TrainConfig:
    """A checked configuration from Hydra's; the only place that sees OmegaConf's containers.

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    assert isinstance(values, dict)
    values.pop("launch", None)  # where a sweep runs is no part of a run
    return from_dict({str(k): v for k, v in values.items()})


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is damaged; the message is the second half of a sentence.
        OSError: it cannot be read.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text("utf-8")
        aliases = "*" in text and any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text))
        values = yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # what a damaged number or date raises, YAML leaves to Python
        said = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"it is no YAML ({said[0]})") from error
    if aliases:  # of itself, perhaps
        raise ConfigError("it refers to parts of itself (*), which no configuration here does")
    return values


def compose(*overrides: str) -> TrainConfig:
    """The configuration that ``python -m pwm_fast.train`` runs with these overrides.

    Raises:
        ConfigError: a value cannot be used; the message names the key.
        HydraException: an override cannot be read, or names a file or key that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore

    check_choices(overrides)
    ConfigStore.instance().store(name="train_schema", node=hydra_schema())
    with initialize_config_module("pwm_fast.configs", version_base="1.3"):
        return from_hydra(hydra_compose("config", overrides=open_overrides(overrides)))


def _readable(error: Exception) -> str:
    """OmegaConf's message as ``key: what is wrong``, without its internals."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key else message
