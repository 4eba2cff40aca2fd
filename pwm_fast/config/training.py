"""A run's configuration: its environment, its agent, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pwm_fast.config.agent import SHARE, AlgConfig
from pwm_fast.config.checks import (
    MAX_THREADS,
    SIZE,
    Checked,
    at_least,
    checked,
    not_empty,
    not_negative,
    one_of,
    or_null,
    positive,
    positive_or_null,
    require,
    seed_range,
    thread_count,
)

EPISODE = 10**7  # steps


def steps(key: str, value: int) -> None:
    """A number of steps of an episode."""
    positive(SIZE)(key, value)
    require(value <= EPISODE, key, value, f"below 2^31, and at most {EPISODE}")


def device_name(key: str, value: str) -> None:
    """A device's name."""
    kind, _, index = value.partition(":")
    ok = value in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())
    require(ok, key, value, "auto, cpu, cuda or cuda:N")


@dataclass
class EvalConfig(Checked):
    """Evaluation on real episodes, with the deterministic policy.

    Attributes:
        every: epochs between evaluations; 0 evaluates at the start and the end alone.
        episodes: episodes an evaluation.
        final_episodes: episodes of the evaluation at the end.
        video_every: of the evaluations so many are between two of which an episode is filmed, into
            ``run_dir/videos``; the first and the one at the end are among them. 0 films none.
    """

    PREFIX: ClassVar[str] = "eval."

    every: int = checked(25, not_negative(SIZE))
    episodes: int = checked(12, positive(SIZE))
    final_episodes: int = checked(32, positive(SIZE))
    video_every: int = checked(0, not_negative(SIZE))


@dataclass
class CheckpointConfig(Checked):
    """Checkpoints in ``run_dir/checkpoints``.

    Attributes:
        every: epochs between ``latest`` checkpoints; 0 writes none but at the end or on a signal.
    """

    PREFIX: ClassVar[str] = "checkpoint."

    every: int = checked(50, not_negative(SIZE))


@dataclass
class EsnrConfig(Checked):
    """Signal-to-noise ratio of the actor's gradient.

    Attributes:
        every: epochs between measurements; 0 measures never.
        samples: M, gradient samples, each of ``alg.actor.batch_size`` / M imagined rollouts.
    """

    PREFIX: ClassVar[str] = "esnr."

    every: int = checked(10, not_negative(SIZE))
    samples: int = checked(8, at_least(2, SIZE))


@dataclass
class WandbConfig(Checked):
    """Logging to Weights & Biases, beside the run directory's own files.

    Attributes:
        mode: ``disabled``, ``offline`` (no login, no network) or ``online``.
        project: project name.
        entity: team or user; null is the login's.
        name: run name; null composes one of environment, algorithm and seed.
        gradients: log histograms of the gradients at evaluations.
    """

    PREFIX: ClassVar[str] = "wandb."

    mode: str = checked("disabled", one_of("disabled", "offline", "online"))
    project: str = "pwm_fast"
    entity: str | None = None
    name: str | None = None
    gradients: bool = False


@dataclass
class TensorboardConfig(Checked):
    """Event files for TensorBoard in ``run_dir/tensorboard``, beside the run's own files.

    Attributes:
        enabled: write them.
        gradients: write histograms of the gradients at evaluations.
    """

    PREFIX: ClassVar[str] = "tensorboard."

    enabled: bool = False
    gradients: bool = False


@dataclass
class DataConfig(Checked):
    """Offline data that the replay holds before the first epoch (``docs/data.md``).

    Attributes:
        path: a registered folder of episodes of any format there, or one such file; null for none.
        manifest: its manifest; null is ``manifest.json`` in the folder, or
            ``<file>.manifest.json`` beside the file.
        holdout: share of every task's episodes that ``python -m pwm_fast.pretrain`` does not learn
            from, to measure the model on, of about 256 at most; 0 for all other commands.
    """

    PREFIX: ClassVar[str] = "data."

    path: str | None = checked(None, not_empty("a path or null"))
    manifest: str | None = checked(None, not_empty("a path or null"))
    holdout: float = checked(0.0, SHARE)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.manifest is None or self.path is not None
        require(ok, "data.manifest", self.manifest, "null where data.path is null")


# Robots that there were before robots had variants. A configuration that was saved then says
# nothing of one: its runs were made on the physics that is OLDEST_VARIANT now.
OLDEST_ROBOTS = ("ant", "cartpole", "hopper")
OLDEST_VARIANT = "dflex"


OFFLINE = "offline"  # of a world model that is pretrained on data: nothing can act there


@dataclass
class EnvConfig(Checked):
    """The environment to act in.

    Attributes:
        name: of the robot or adapter.
        num_envs: default number of envs.
        max_episode_steps: time limit; null is the task's own.
        threads: physics threads of the native engine.
        engine: physics of the built-in robots: ``mujoco`` (native, CPU threads), ``mujoco_warp``
            (on the run's device, extra ``[gpu]``) or ``auto`` (``mujoco_warp`` where the device is
            a CUDA GPU and it can run there, else ``mujoco``; the run says which).
        options: what the task itself takes, such as ``start`` of the cart-pole. The ``variant`` of
            a robot of :data:`OLDEST_ROBOTS` is always among them, ``default`` unless it is given.
    """

    PREFIX: ClassVar[str] = "env."

    name: str
    num_envs: int = checked(64, positive(SIZE))
    max_episode_steps: int | None = checked(None, or_null(steps))
    threads: int = checked(1, positive(MAX_THREADS))
    engine: str = checked("auto", one_of("auto", "mujoco", "mujoco_warp"))
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in OLDEST_ROBOTS:  # else what is saved could not be told from what is older
            self.options = {**self.options, "variant": self.options.get("variant", "default")}


@dataclass
class TrainConfig(Checked):
    """One training run; ``python -m pwm_fast.train --cfg job`` prints it resolved.

    Attributes:
        env: the environment.
        alg: the agent.
        seed: of every random number; runs of other seeds share no start state.
        epochs: epochs of ``alg.steps_per_epoch`` steps in each env.
        num_envs: number of envs; null is ``env.num_envs``.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of matrix products: ``auto`` (``fast`` on a GPU, ``exact`` on a CPU), ``exact``,
            ``tf32``, ``bf16`` or ``fast`` (fp16). A run whose ``fast`` updates were skipped as
            non-finite goes on in ``bf16``.
        graphs: replay updates from CUDA graphs: ``auto`` (on a GPU), ``true`` or ``false``.
        parallel: several processes in one run, each with its part of the envs, the replay and every
            batch (docs/clusters.md). ``auto``: those that torchrun started together. ``data``:
            likewise, and one process alone is refused; the runs of a sweep take all places of
            their ``launch``, one after the other.
        threads: torch's CPU threads; null is SLURM_CPUS_PER_TASK or OMP_NUM_THREADS where they are
            set, else as many of the machine's cores as the agent's GEMMs have work for (one for
            a small agent on a CPU).
        deterministic: the same metrics to the bit whenever the run is repeated on one machine with
            as many threads; an operation that cannot give that raises.
        record_host: write the machine's host name into the run's ``provenance.json``.
        run_dir: where everything of the run is written.
        resume: ``auto`` continues a run found in ``run_dir``, a path continues that checkpoint,
            null refuses a ``run_dir`` that holds a run.
        init: a checkpoint whose networks and running statistics a new run starts with, whatever
            its number of envs; null starts with random weights. A run that goes on has its own.
            Without ``alg=`` and ``env=`` on the command line the run has the checkpoint's, too
            (:mod:`pwm_fast.run.inherit`).
        task: of the tasks of ``init``'s model the one to train for; null takes the environment that
            ``env`` says.
        data: offline data.
        checkpoint: checkpoints.
        eval: evaluation.
        esnr: gradient signal-to-noise ratio.
        wandb: Weights & Biases.
        tensorboard: TensorBoard.
    """

    env: EnvConfig
    alg: AlgConfig = field(default_factory=AlgConfig)
    seed: int = checked(0, seed_range)
    epochs: int = checked(1000, not_negative(SIZE))
    num_envs: int | None = checked(None, positive_or_null(SIZE))
    device: str = checked("auto", device_name)
    precision: str = checked("auto", one_of("auto", "exact", "tf32", "bf16", "fast"))
    graphs: str = checked("auto", one_of("auto", "true", "false"))
    parallel: str = checked("auto", one_of("auto", "data"))
    threads: int | None = checked(None, thread_count)
    deterministic: bool = False
    record_host: bool = False
    run_dir: str = checked("runs/default", not_empty("a path"))
    resume: str | None = "auto"
    init: str | None = checked(None, not_empty("a path or null"))
    task: str | None = checked(None, not_empty("the name of a task, or null"))
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    esnr: EsnrConfig = field(default_factory=EsnrConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)

    def __post_init__(self) -> None:
        self.graphs = self.graphs.lower()  # a YAML true arrives as "True"
        super().__post_init__()
        require(
            not (self.graphs == "true" and self.device == "cpu"),
            "graphs",
            self.graphs,
            "auto or false where device is cpu",
        )
        named = self.resume not in (None, "auto")
        require(
            not (named and self.init is not None),
            "init",
            self.init,
            f"null where resume names a checkpoint ({self.resume}), which has weights of its own",
        )
        samples, batch = self.esnr.samples, self.alg.actor.batch_size
        ok = not self.esnr.every or samples <= batch
        require(ok, "esnr.samples", samples, f"at most alg.actor.batch_size ({batch})")

    @property
    def env_count(self) -> int:
        """Number of envs of the run."""
        return self.num_envs or self.env.num_envs


def check_trainable(config: TrainConfig, *, begins: bool = True) -> None:
    """Refuse what can be made, counted and loaded, but not trained.

    Args:
        config: of the run.
        begins: whether it starts anew. Networks without hidden layers would be linear, without a
            word; runs that have them go on.

    Raises:
        ConfigError: a list of hidden widths is empty, or the critics are Q functions.
    """
    require(
        config.alg.critic.kind == "pwm",
        "alg.critic.kind",
        config.alg.critic.kind,
        "pwm to train: Q functions are there to evaluate and plan with",
    )
    if not begins:
        return
    model, networks = "alg.world_model", config.alg.world_model
    widths = {
        f"{model}.units": networks.units,
        f"{model}.encoder_units": networks.encoder_units,
        f"{model}.reward_units": networks.reward_units,
        "alg.actor.units": config.alg.actor.units,
        "alg.critic.units": config.alg.critic.units,
    }
    if not networks.encodes:
        del widths[f"{model}.encoder_units"]
    for key, units in widths.items():
        require(len(units) > 0, key, list(units), "a list of at least one positive width to train")
