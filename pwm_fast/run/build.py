"""The parts of a run, made as its configuration says."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pwm_fast import config as configuration
from pwm_fast import memory, parallel, seeding
from pwm_fast.agent import PWM
from pwm_fast.backends import select
from pwm_fast.config import AlgConfig, ConfigError, EnvConfig, TrainConfig
from pwm_fast.envs import TASKS, Engine, OfflineEnv, VectorEnv, choose, make, tasks_of
from pwm_fast.parallel import ALONE, Ranks
from pwm_fast.replay import Replay
from pwm_fast.run import checkpoint, checkpoint_content
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.seeding import Purpose


def select_device(name: str) -> torch.device:
    """The device that ``device=`` names.

    Raises:
        ConfigError: it is none, or CUDA was asked for and torch sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"cuda:0 to cuda:{count - 1}, " if count else ""
            raise ConfigError(
                f"device={name}, but torch {torch.__version__} sees {count} CUDA devices; "
                f"use {have}device=cpu or device=auto"
            )
    return device


def device_of_rank(name: str, ranks: Ranks) -> torch.device:
    """The device that ``device=`` names, of several processes each a GPU of its own.

    Raises:
        ConfigError: as of :func:`select_device`, or there are too few GPUs.
    """
    device = select_device(name)
    if ranks.size == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ConfigError(
            f"device={name} cannot be shared by the {ranks.size} processes of a run: use "
            "device=cuda or device=auto, which is one GPU for each"
        )
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise ConfigError(
            f"torchrun started {parallel.local_size()} processes on this machine, of which torch "
            f"sees {count} CUDA devices: give --nproc-per-node={count}, or device=cpu"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)  # NCCL's, too
    return device


def part_of(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The configuration that one of several processes makes its part of a run with.

    Raises:
        ConfigError: their number does not divide it.
    """
    if ranks.size == 1:
        return config
    alg, counts = config.alg, {}
    for key, value in (
        ("num_envs", config.env_count),
        ("alg.model_learning.batch_size", alg.model_learning.batch_size),
        ("alg.actor.batch_size", alg.actor.batch_size),
    ):
        if value % ranks.size:
            raise ConfigError(f"{key} must be a multiple of {ranks.size} processes, got {value}")
        counts[key] = value // ranks.size
    tasks = len(task_numbers(config.env))
    if counts["num_envs"] < tasks:
        raise ConfigError(
            f"num_envs must be at least {tasks * ranks.size}, an env of each of {tasks} tasks in "
            f"each of {ranks.size} processes, got {config.env_count}"
        )
    learning = replace(alg.model_learning, batch_size=counts["alg.model_learning.batch_size"])
    own = replace(
        alg,
        replay_capacity=alg.replay_capacity // config.env_count * counts["num_envs"],
        model_learning=learning,
        actor=replace(alg.actor, batch_size=counts["alg.actor.batch_size"]),
    )
    # ESNR is measured on whole batches by each, and has no part in what is made of this.
    esnr = replace(config.esnr, every=0)
    return replace(config, num_envs=counts["num_envs"], alg=own, esnr=esnr)


THREAD_SHARE = 8_000_000  # multiply-adds of a product that are worth another thread
ROWS_SHARE = 64  # rows of a row program that are


def set_threads(
    threads: int | None, alg: AlgConfig | None = None, device: torch.device | None = None
) -> None:
    """Set torch's CPU threads.

    Args:
        threads: their number; None is what Slurm allots, else OMP_NUM_THREADS, else as many of
            torch's own choice as the agent's GEMMs have work for: the layers of a small one are
            too short to be shared. None is at most :data:`config.MAX_THREADS`.
        alg: the agent; None is not to look at that.
        device: the agent's; only one on the CPU is looked at.

    Raises:
        ConfigError: what Slurm allots is no number.
    """
    if device is not None and device.type != "cpu":
        alg = None
    if threads is None:
        threads = configuration.allotted_threads()
        if threads is not None:  # to all of a run's processes on this machine
            threads = max(1, threads // parallel.local_size())
    if threads is None and alg is not None and not os.environ.get("OMP_NUM_THREADS"):
        most = min(torch.get_num_threads(), configuration.MAX_THREADS)
        threads = min(most, useful_threads(alg))
    if threads is None and torch.get_num_threads() > configuration.MAX_THREADS:
        threads = configuration.MAX_THREADS  # of OMP_NUM_THREADS
    if threads is not None:
        torch.set_num_threads(threads)


def useful_threads(alg: AlgConfig) -> int:
    """How many CPU threads the largest product within a rollout, or its rows, have work for."""
    model = alg.world_model
    ends = [model.latent_dim] if model.encodes else []  # observations are narrow
    widths = [*ends, *model.units, *ends]
    rows = max(alg.model_learning.batch_size, alg.actor.batch_size)
    work = rows * max((n * k for n, k in itertools.pairwise(widths)), default=0)
    return max(work // THREAD_SHARE, rows // ROWS_SHARE, 1)


def seed_everything(seed: int, purpose: Purpose = Purpose.AGENT, *numbers: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, each with a stream of its own."""
    python, numpy, torchs = (seeding.stream(seed, purpose, *numbers, i) for i in range(3))
    random.seed(python)
    np.random.seed(seeding.words(numpy))
    torch.manual_seed(torchs)


CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")  # the settings that cuBLAS documents as reproducible


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, torch computes the same bits every time, or raises where an operation cannot.

    For one machine, one installation and one number of threads. Sets torch's deterministic
    algorithms, cuDNN's flags and, before cuBLAS makes its first workspace, CUBLAS_WORKSPACE_CONFIG;
    puts all of them back at the end.

    Args:
        enabled: False changes nothing.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG has a value under which cuBLAS is not reproducible.
    """
    if not enabled:
        yield
        return
    name = "CUBLAS_WORKSPACE_CONFIG"
    given = os.environ.get(name)
    if given is not None and given not in CUBLAS_DETERMINISTIC:
        raise ConfigError(
            f"deterministic=true needs {name} to be unset or one of "
            f"{', '.join(CUBLAS_DETERMINISTIC)}, got {given!r}"
        )
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    os.environ.setdefault(name, CUBLAS_DETERMINISTIC[0])
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    # Setting the number, even to what it is, keeps MKL from taking fewer threads at times.
    torch.set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2:]
        if given is None:
            os.environ.pop(name, None)


CPU = torch.device("cpu")


def physics(config: TrainConfig, device: torch.device) -> Engine | None:
    """The engine of a run's robots for an agent on ``device``; None where another library steps.

    Raises:
        ConfigError: it cannot run here.
    """
    if config.env.name not in TASKS:
        return None
    with _usable("the engine does"):
        return choose(config.env.engine, device)


def make_env(
    config: TrainConfig, num_envs: int, seed: int, device: torch.device = CPU
) -> VectorEnv:
    """The environment of a run, with ``num_envs`` envs.

    Args:
        config: of the run.
        num_envs: N.
        seed: of the start states.
        device: the agent's; an environment that can is there too.

    Raises:
        ConfigError: it cannot be made.
    """
    with _usable(f"{num_envs} envs of env={config.env.name} do", memory.ENVS):
        return make(
            config.env.name,
            num_envs,
            seed=seed,
            max_episode_steps=config.env.max_episode_steps,
            threads=config.env.threads,
            engine=config.env.engine,
            device=device,
            **config.env.options,
        )


def task_numbers(env: EnvConfig) -> dict[str, int]:
    """The numbers, by their names, of the tasks that a configuration picks; empty where it is one.

    Such an environment takes them as ``tasks``, and ``numbers``, ``obs_dim`` and ``action_dim``
    beside them, as ``dmc_tasks`` does.
    """
    names = env.options.get("tasks") or []
    return dict(zip(names, env.options.get("numbers") or range(len(names)), strict=False))


def of_task(env: EnvConfig, task: str, obs_dim: int, action_dim: int) -> EnvConfig:
    """One task of several, as the envs of that task that a model of all of them knows.

    Args:
        env: of several tasks, or of one that ``task`` names.
        task: one of :func:`task_numbers`.
        obs_dim: O of the model, to which observations are filled up.
        action_dim: A of the model, of which the task reads the first components.

    Returns:
        The configuration with that task alone, under the number that it has in ``env``.

    Raises:
        ConfigError: there is no such task; the message names those that there are.
    """
    numbers = task_numbers(env)
    if not numbers:
        raise ConfigError(
            f"task={task} is for environments of several tasks, env={env.name} has one"
        )
    if task not in numbers:
        raise ConfigError(f"task must be one of {', '.join(numbers)}, got {task!r}")
    widths = {"obs_dim": obs_dim, "action_dim": action_dim}
    own = {"tasks": [task], "numbers": [numbers[task]], **widths}
    return replace(env, options={**env.options, **own})


def check_evaluations(config: TrainConfig, env: VectorEnv, ranks: Ranks = ALONE) -> None:
    """Refuse evaluations with fewer episodes than the environment has tasks, on each rank.

    Raises:
        ConfigError: naming the key to raise.
    """
    tasks = None if isinstance(env, OfflineEnv) else tasks_of(env)  # where nothing acts
    each = 1 if tasks is None else len(tasks.names)
    count = each * ranks.size
    by = "" if ranks.size == 1 else f" in each of {ranks.size} processes"
    for key in ("episodes", "final_episodes"):
        given = getattr(config.eval, key)
        if given < count:
            raise ConfigError(
                f"eval.{key} must be at least {count}, an episode for each of the environment's "
                f"tasks{by}, got {given}"
            )


def dims(env: VectorEnv) -> tuple[int, int]:
    """Widths O of observations and A of actions."""
    return env.single_observation_space.shape[0], env.single_action_space.shape[0]


def make_agent(
    config: TrainConfig, env: VectorEnv, device: torch.device, ranks: Ranks = ALONE
) -> PWM:
    """The agent of a run, for the observations and actions of ``env``.

    Raises:
        ConfigError: it cannot be made.
    """
    if config.graphs == "true" and device.type != "cuda":
        raise ConfigError(f"graphs=true needs a GPU, device={config.device} is {device} here")
    if config.graphs == "true" and ranks.size > 1:
        raise ConfigError(f"graphs=true is for one process, this run has {ranks.size}")
    reason = why_not_precision(config.precision, device)
    if reason is not None:
        raise ConfigError(
            f"precision={config.precision} cannot run on device={device}: {reason}; give "
            "precision=auto, which is exact on a CPU and fast on a GPU"
        )
    check_tasks(config.alg, env)
    tasks, action_dims = tasks_of(env), None
    if tasks is not None:
        action_dims = tasks.action_dims_by_number
        if len(set(tasks.action_dims)) == 1:
            # The model's other tasks do not come up, and with one mask a rollout is one operator.
            numbers = range(config.alg.world_model.num_tasks)
            action_dims = dict.fromkeys(numbers, tasks.action_dims[0])
    with _usable(f"alg={config.alg.name} does", "the latent_dim and units of its networks"):
        return PWM(
            *dims(env),
            config.alg,
            can_terminate=env.can_terminate,
            device=device,
            graphs=None if config.graphs == "auto" else config.graphs == "true",
            precision=config.precision,
            action_dims=action_dims,
            ranks=ranks,
        )


def check_tasks(alg: AlgConfig, env: VectorEnv) -> None:
    """Refuse an agent that cannot tell the tasks of its environment apart, or is not told.

    Raises:
        ConfigError: naming the keys to set.
    """
    model, tasks = alg.world_model, tasks_of(env)
    count = 1 if tasks is None else len(tasks.names)
    if tasks is None and model.num_tasks > 1:
        raise ConfigError(
            f"alg.world_model.num_tasks={model.num_tasks} wants an environment that says which "
            "task each env is of, such as env=dmc_tasks; another wants alg.world_model.num_tasks=1"
        )
    if tasks is not None and count > 1 and not model.task_dim:
        raise ConfigError(
            f"an environment of {count} tasks wants a model that can tell them apart: give "
            f"alg.world_model.num_tasks={count} and the width of their embeddings, such as "
            "alg.world_model.task_dim=32"
        )
    if tasks is not None and max(tasks.numbers) >= model.num_tasks:
        raise ConfigError(
            f"the environment's tasks have the numbers {list(tasks.numbers)}, "
            f"alg.world_model.num_tasks={model.num_tasks} are 0 to {model.num_tasks - 1}"
        )
    if alg.discounts is not None and len(alg.discounts) != model.num_tasks:
        raise ConfigError(
            f"alg.discounts must be one for each of alg.world_model.num_tasks={model.num_tasks} "
            f"tasks, got {len(alg.discounts)}"
        )


def why_not_precision(precision: str, device: torch.device) -> str | None:
    """Why no backend computes an agent's GEMMs in ``precision`` on ``device``, or None."""
    sample = torch.empty(1, device=device)
    with select.precision(precision):
        try:
            select.select("mlp", None, select.Call([sample]))
        except select.BackendError as error:
            return str(error)
    return None


def load_run(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a checkpoint's run, and the checkpoint's content.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another version.
    """
    content = checkpoint.load(path)
    checkpoint_content.check(path, content)
    try:
        return configuration.from_saved(content["config"]), content
    except ConfigError as error:
        raise CheckpointError(f"{path} is of another version of pwm_fast: {error}") from error


def dims_of(content: Mapping[str, Any]) -> tuple[int, int]:
    """Widths O of observations and A of actions of a checkpoint that :func:`load_run` read."""
    return content["obs"].shape[-1], content["held_action"].shape[-1]


def restore_agent(
    path: Path, config: TrainConfig, content: dict[str, Any], env: VectorEnv, device: torch.device
) -> PWM:
    """The agent of a checkpoint that :func:`load_run` read, without its optimisers' states.

    Where the run's precision cannot be had here (``fast`` of a GPU's run on a CPU), it is ``auto``.

    Raises:
        ConfigError: it cannot be made.
        CheckpointError: the content does not fit its own configuration.
    """
    asked = content.get("precision") or config.precision
    precision = asked if why_not_precision(asked, device) is None else "auto"
    graphs = config.graphs if device.type == "cuda" else "auto"
    agent = make_agent(replace(config, precision=precision, graphs=graphs), env, device)
    try:
        agent.load_state_dict(content["agent"], optimizers=False)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {error}") from error
    return agent


def make_replay(config: TrainConfig, env: VectorEnv, device: torch.device) -> Replay:
    """The replay of a run.

    Raises:
        ConfigError: it cannot be made, or would never hold a window.
    """
    if env.max_episode_steps < config.alg.horizon:
        raise ConfigError(
            f"alg.horizon={config.alg.horizon} is longer than an episode "
            f"({env.max_episode_steps} steps): there would be nothing to learn from"
        )
    capacity = config.alg.replay_capacity
    if isinstance(env, OfflineEnv):  # all of the data, whatever the capacity of later runs
        capacity = max(env.rows, config.alg.horizon + 2)
    obs_dim, action_dim = dims(env)
    width = obs_dim + action_dim + 2
    several = config.alg.world_model.num_tasks > 1
    with _usable(f"alg.replay_capacity={capacity} does", "alg.replay_capacity"):
        # A row, the length of its run, a flag, and two running sums to draw from.
        memory.require(
            capacity * (4 * width + 4 + 1 + 16 + 4 * several),
            f"alg.replay_capacity={capacity} transitions of {width} numbers",
            "alg.replay_capacity",
            device,
        )
        return Replay(
            capacity,
            config.env_count,
            obs_dim,
            action_dim,
            config.alg.horizon,
            device,
            keep=kept_rows(config),
            num_tasks=config.alg.world_model.num_tasks,
        )


def kept_rows(config: TrainConfig) -> int:
    """Rows of each env's replay that random transitions keep, as ``alg.keep_random`` asks.

    No more than the random epochs fill: their steps, and the observation after the last one.

    Raises:
        ConfigError: they hold no window, or the rows beside them hold none.
    """
    alg = config.alg
    if alg.keep_random == 0.0:
        return 0
    rows, needed = alg.replay_capacity // config.env_count, alg.horizon + 2
    random = alg.random_epochs * alg.steps_per_epoch
    share = f"alg.keep_random={alg.keep_random}"
    of = f"of the {rows} rows of each env (alg.replay_capacity={alg.replay_capacity})"
    if random + 1 < needed:
        raise ConfigError(
            f"{share} needs random actions to keep: alg.random_epochs={alg.random_epochs} of "
            f"alg.steps_per_epoch={alg.steps_per_epoch} steps are {random}, a window of "
            f"alg.horizon={alg.horizon} needs {needed - 1}"
        )
    wanted = int(alg.keep_random * rows)
    if wanted < needed:
        raise ConfigError(
            f"{share} keeps {wanted} {of}, a window of alg.horizon={alg.horizon} needs {needed}: "
            f"at least {needed / rows:.3g}, or 0"
        )
    kept = min(wanted, random + 1)
    if rows - kept < needed:
        raise ConfigError(
            f"{share} leaves {rows - kept} {of} for newer transitions, a window of "
            f"alg.horizon={alg.horizon} needs {needed}: at most {(rows - needed) / rows:.3g}"
        )
    return kept


def require_memory(config: TrainConfig, env: VectorEnv, device: torch.device) -> None:
    """Look at what a run's updates and evaluations take at least, before any work.

    Raises:
        OutOfMemory: the device has less.
    """
    alg = config.alg
    obs_dim, action_dim = dims(env)
    latent = alg.world_model.latent_width(obs_dim)
    learning = alg.model_learning.batch_size, alg.horizon, obs_dim + action_dim + 2 + latent
    imagining = alg.actor.batch_size, alg.imagined_steps, action_dim + latent
    for key, (batch, horizon, numbers) in (
        ("alg.model_learning.batch_size", learning),
        ("alg.actor.batch_size", imagining),
    ):
        memory.require(
            4 * batch * (horizon + 1) * numbers,
            f"{key}={batch} rollouts of {horizon} steps",
            f"{key}, the horizon or alg.world_model.latent_dim"
            if alg.world_model.encodes
            else f"{key} or the horizon",
            device,
        )
    for key, episodes in (
        ("eval.episodes", config.eval.episodes),
        ("eval.final_episodes", config.eval.final_episodes),
    ):
        memory.require(
            episodes * 4 * (4 * obs_dim + action_dim + 8),
            f"{key}={episodes} envs",
            key,
            env.device,
        )


@contextmanager
def _usable(what: str, lower: str = "") -> Iterator[None]:
    """Turn what a part says of its arguments into ConfigError.

    Args:
        what: would not fit into the memory; ends in "do" or "does".
        lower: what to make smaller then.
    """
    try:
        yield
    except memory.OutOfMemory:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if memory.is_out_of_memory(error):
            hint = f": lower {lower}" if lower else ""
            raise ConfigError(f"{what} not fit into the memory{hint}") from error
        raise
