"""Making a checkpoint of a published one: ``python -m pwm_fast.import_checkpoint``."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pwm_fast import config as configuration
from pwm_fast import published, seeding
from pwm_fast.agent import PWM
from pwm_fast.agent.state import OPTIMIZER_KEYS
from pwm_fast.config import MISSING, Checked, ConfigError, TrainConfig
from pwm_fast.config.checks import checked, one_of, positive
from pwm_fast.envs import Tasks, VectorEnv, tasks_of
from pwm_fast.published import Published
from pwm_fast.published.tasks import SETS
from pwm_fast.run import build, checkpoint, provenance, seal
from pwm_fast.run.export import new_folder
from pwm_fast.run.progress import EpochProgress

NAME = "imported.pt"
NEVER = -10.0  # a termination logit: once in 20,000 steps


@dataclass
class ImportConfig(Checked):
    """One import.

    Attributes:
        checkpoint: file of PWM, Flow-MBPO-PWM or TD-MPC2.
        env: the environment that it is for; empty only reads the file.
        out: folder to make, new or empty; with ``env``.
        tasks: of a file of several tasks, the numbers there of the environment's tasks; null takes
            those of their names, where the file has TD-MPC2's 30 or 80, else all.
        policy: ``file``, or ``new`` for a new one with PWM's networks.
        critics: likewise. Q functions of TD-MPC2 are not trained here, new critics are.
        substeps: K of a flow.
        integrator: ``heun`` or ``euler``, of a flow.
        policy_substeps: K of a flow policy.
        policy_integrator: ``heun`` or ``euler``, of a flow policy.
    """

    checkpoint: str = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    out: str | None = None
    tasks: list[int] | None = None
    policy: str = checked("file", one_of("file", "new"))
    critics: str = checked("file", one_of("file", "new"))
    substeps: int = checked(2, positive(1024))
    integrator: str = checked("heun", one_of("heun", "euler"))
    policy_substeps: int = checked(2, positive(1024))
    policy_integrator: str = checked("heun", one_of("heun", "euler"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.env) != (self.out is not None):
            missing = "out=DIR" if self.env else "env=NAME"
            given = "env" if self.env else "out"
            raise ConfigError(
                f"{missing} is needed beside {given}=: a checkpoint is for an environment. Without "
                "both of them the command only says what the file holds"
            )


def look(config: ImportConfig) -> Published:
    """Read the file, and write nothing.

    Raises:
        ConfigError: it cannot be converted, or a key has no such value.
    """
    path = checkpoint.named(config.checkpoint)
    return published.load_published(
        path,
        substeps=config.substeps,
        integrator=config.integrator,
        policy_substeps=config.policy_substeps,
        policy_integrator=config.policy_integrator,
    )


def import_checkpoint(config: ImportConfig, found: Published) -> tuple[Path, Published]:
    """Write a checkpoint that all commands read.

    Args:
        config: with ``env`` and ``out``.
        found: what :func:`look` gave.

    Returns:
        The checkpoint's path, and what it was made of.

    Raises:
        ConfigError: the file does not fit the environment; nothing was written.
        CheckpointError: it cannot be written.
        OSError: likewise; it names the file.
    """
    out = new_folder(str(config.out))
    # Only an environment says what it needs; it can be made before the agent is known.
    plain = configuration.from_dict({"env": config.env})
    seed = seeding.stream(plain.seed, seeding.Purpose.TRAINING)
    with closing(build.make_env(plain, plain.env_count, seed)) as env:
        found = _fitted(config, found, env)
        alg = dataclasses.asdict(found.alg)
        run = configuration.from_dict({"env": config.env, "alg": alg, "run_dir": str(out)})
        build.seed_everything(run.seed)
        agent = build.make_agent(run, env, torch.device("cpu"))
        _take_up(config, found, agent)
    path = out / "checkpoints" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, _content(run, found, agent))
    return path, found


def training_arguments(config: ImportConfig, found: Published) -> list[str]:
    """Arguments of ``pwm_fast.train`` for the same environment and networks.

    Args:
        config: of the import.
        found: what :func:`import_checkpoint` gave.
    """
    name = str(config.env["name"])
    shipped = Path(__file__).parents[1] / "configs" / "env" / f"{name}.yaml"
    agents = ({"alg": dataclasses.asdict(a)} for a in (published.preset(found.preset), found.alg))
    return [
        f"env={name}",
        *_overrides({"env": configuration.read_yaml(shipped)}, {"env": config.env}),
        f"alg={found.preset}",
        *_overrides(*agents),
    ]


def _overrides(shipped: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Overrides for all keys of ``own`` that have other values; names aside."""
    before, now = provenance.flat(shipped), provenance.flat(own)
    return [
        f"{key}={_written(value)}"
        for key, value in now.items()
        if key not in ("env.name", "alg.name") and before.get(key) != value
    ]


def _written(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _fitted(config: ImportConfig, found: Published, env: VectorEnv) -> Published:
    """What of a file is for an environment's tasks, with its own policy or one to train.

    Raises:
        ConfigError: there is none, or it has other widths.
    """
    name, tasks = config.env.get("name"), tasks_of(env)
    obs_dim, action_dim = build.dims(env)
    new = published.preset("pwm")
    if config.policy == "new":
        notes = [*found.notes, "the policy is new, of PWM's widths"]
        found = replace(found, alg=replace(found.alg, actor=new.actor), actor={}, notes=notes)
    numbers = _numbers(config, found, tasks)
    if numbers is not None:
        found = published.of_tasks(found, numbers, obs_dim, action_dim)
    if tasks is not None and max(tasks.numbers) >= found.num_tasks:
        raise ConfigError(
            f"{found.path} is of {found.num_tasks} tasks, those of env={name} have the numbers "
            f"{list(tasks.numbers)}"
        )
    if tasks is not None and found.action_dims is not None:
        own = tuple(found.action_dims[n] for n in tasks.numbers)
        if own != tasks.action_dims:
            raise ConfigError(
                f"the tasks of {found.path} have {own} actions, those of env={name} have "
                f"{tasks.action_dims}: give tasks=[...], their numbers in the file"
            )
    if (found.obs_dim, found.action_dim) != (obs_dim, action_dim):
        raise ConfigError(
            f"{found.path} is of {found.obs_dim} observations and {found.action_dim} actions, "
            f"env={name} has {obs_dim} and {action_dim}"
        )
    alg = found.alg
    if found.family == "tdmpc2":  # published: by the episode's length
        alg = replace(alg, gamma=published.discount(env.max_episode_steps))
    notes = list(found.notes)
    if config.critics == "new":
        alg = replace(alg, critic=new.critic)
        notes.append("the critics are new, of PWM's widths")
    return replace(found, alg=alg, notes=notes)


def _numbers(config: ImportConfig, found: Published, tasks: Tasks | None) -> list[int] | None:
    """The tasks of a file that an environment has; None takes the file as it is."""
    name, count = config.env.get("name"), 1 if tasks is None else len(tasks.names)
    if config.tasks is not None:
        if len(config.tasks) != count:
            raise ConfigError(
                f"tasks={config.tasks} are {len(config.tasks)}, env={name} has {count} of them"
            )
        return config.tasks
    if found.alg.world_model.task_dim == 0:
        return None
    if tasks is None and name == "dmc":
        return published.task_numbers(found, [f"{config.env['domain']}-{config.env['task']}"])
    if tasks is None:
        raise ConfigError(
            f"{found.path} is of {found.num_tasks} tasks, and env={name} is of one: give its "
            "number in the file as tasks=[N]"
        )
    whole = tasks.numbers != tuple(range(count))  # env.numbers are those in the file
    if whole or (count == found.num_tasks and found.num_tasks not in SETS):
        return None
    return published.task_numbers(found, tasks.names)


def _take_up(config: ImportConfig, found: Published, agent: PWM) -> None:
    """Give an agent what the file has; the rest of it stays new.

    Raises:
        ConfigError: it does not fit.
    """
    state = agent.state_dict()
    kept = {k: v for k, v in state["world_model"].items() if k.startswith("_termination.")}
    if kept:
        kept[list(kept)[-1]].fill_(NEVER)  # the last layer's bias; its weights are zeros
        found.notes.append(
            "this environment can terminate, which the file's model does not know: a new "
            "termination head says never until it has learned"
        )
    state["world_model"] = {**kept, **found.world_model}
    new = {"actor": config.policy == "new", "critic": config.critics == "new"}
    for part, parameters in (("actor", found.actor), ("critic", found.critic)):
        if not new[part]:
            state[part] = parameters
    for key in ("obs_rms", "rew_rms", "ret_rms"):
        own = getattr(found, key)
        if own is not None and not (
            any(new.values()) and key == "ret_rms"
        ):  # the same for every task
            state[key] = {k: v.expand_as(state[key][k]) for k, v in own.items()}
    for name, key in OPTIMIZER_KEYS.items():
        part = key.removesuffix("_opt")
        moments = found.optimizers.get(part)
        if moments is None or new.get(part):
            continue
        module = getattr(agent, part)
        names = {id(p): n for n, p in module.named_parameters()}
        groups = agent.optimizers[name].adam.param_groups
        order = [names[id(p)] for group in groups for p in group["params"]]
        state[key]["adam"]["state"] = {i: moments[n] for i, n in enumerate(order) if n in moments}
    try:
        agent.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"{found.path} cannot be taken up: {error}") from error


def _content(run: TrainConfig, found: Published, agent: PWM) -> dict[str, Any]:
    """What the checkpoint holds: a run of no epochs, without a replay."""
    digest = hashlib.sha256()
    with found.path.open("rb") as file:
        while data := file.read(seal.CHUNK):
            digest.update(data)
    return {
        "config": configuration.to_dict(run),
        "epoch": 0,
        "bootstrapped": False,
        "wall_time": 0.0,
        "best": {},
        "latest_eval": {},
        "progress": EpochProgress().state_dict(),
        "agent": agent.state_dict(),
        "obs": torch.zeros(run.env_count, found.obs_dim),
        "held_action": torch.zeros(run.env_count, found.action_dim),
        "env": None,
        "rng": checkpoint.rng_state(),
        "replay": None,
        "data": None,
        "ended": {"episodes": 0, "diverged": 0},
        "precision": None,
        "seeding": seeding.VERSION,
        "imported": {"file": str(found.path), "sha256": digest.hexdigest(), "of": found.title},
    }
