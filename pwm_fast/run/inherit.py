"""What a run that begins with a checkpoint's networks takes over of its configuration.

``init=PATH`` without ``alg=``: the checkpoint's ``alg``, and without ``env=`` its environment, or
with ``task=NAME`` that of the one of its model's tasks. What the command line says besides, stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.config import OFFLINE, AlgConfig, ConfigError, EnvConfig, TrainConfig
from pwm_fast.run import build, checkpoint
from pwm_fast.run.provenance import flat

RUN_DIR = "runs/{place}/{alg}/seed_{seed}"  # as in configs/config.yaml


def inherited(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """The configuration with what ``init`` brings.

    Args:
        config: as composed.
        overrides: of the command line, such as ``alg.actor.lr=1e-3``: what they name is the user's.

    Raises:
        ConfigError: there is no such task, ``task`` has nothing to be one of, or the file that is
            to say what ``alg`` is is not there.
    """
    if config.init is None:
        if config.task is not None:
            raise ConfigError(
                f"task={config.task} is one of the tasks of a checkpoint's model: give init=PATH"
            )
        return config
    given = {text.partition("=")[0].lstrip("+~") for text in overrides} | _chosen(overrides)
    path = files.user_path(config.init)
    if "alg" not in given and not path.is_file():
        raise ConfigError(
            f"init={config.init}: there is no such file, which says what alg is; a run that began "
            "with it goes on with alg=, env= and run_dir= as they were"
        )
    content = checkpoint.glance(path)
    if not content:
        return config  # who reads it says what is wrong
    run = configuration.from_saved(content["config"])
    found = config
    if "alg" not in given:
        found = replace(found, alg=_alg(run, found, given))
    if "env" in given:
        if found.task is not None:
            raise ConfigError(
                f"task={found.task} makes the environment itself: leave out either it or "
                f"env={found.env.name}"
            )
        found = replace(found, env=_numbered(run, content, found))
    elif found.task is not None or run.env.name != OFFLINE:
        env = run.env if found.task is None else _env_of_task(run, content, found)
        found = replace(found, env=_with_given(env, found.env, given))
    if "run_dir" not in given:
        place = found.task or found.env.name
        own = RUN_DIR.format(place=place, alg=found.alg.full_name, seed=found.seed)
        found = replace(found, run_dir=own)
    return found


def learned_policy(saved: Mapping[str, Any]) -> bool:
    """Whether the policy in a checkpoint of that configuration has learned anything."""
    return bool(saved["env"]["name"] != OFFLINE)


def _chosen(overrides: Sequence[str]) -> set[str]:
    """Keys that a file of ``configs/actor`` sets, as ``actor=flow`` on the command line chooses."""
    folder = Path(str(resources.files("pwm_fast.configs"))) / "actor"
    names = [text.partition("=")[2] for text in overrides if text.startswith("actor=")]
    files = [folder / f"{name}.yaml" for name in names]
    shipped = [file for file in files if file.is_file()]  # of the user's own all keys are taken
    own = {"alg.actor"} if len(shipped) < len(files) else set()
    return own | {f"alg.actor.{key}" for file in shipped for key in configuration.read_yaml(file)}


def _alg(run: TrainConfig, config: TrainConfig, given: set[str]) -> AlgConfig:
    """The checkpoint's agent, with what the command line says of it."""
    values = configuration.to_dict(run)["alg"]
    if config.task is not None and run.env.name == OFFLINE:
        # The policy of one task need not see which it is, and rollouts then are one operation.
        values["actor"]["task_input"] = values["critic"]["task_input"] = False
    for key, value in flat({"alg": configuration.to_dict(config)["alg"]}).items():
        if any(key == g or key.startswith(f"{g}.") for g in given):
            *parents, last = key.split(".")[1:]
            section = values
            for parent in parents:
                section = section[parent]
            section[last] = value
    return configuration.structured(AlgConfig, values, "alg.")


def _env_of_task(run: TrainConfig, content: Mapping[str, Any], config: TrainConfig) -> EnvConfig:
    """The environment of one of the tasks of the checkpoint's model."""
    env = run.env
    if env.name == OFFLINE:  # its tasks are known by their names alone
        file = Path(str(resources.files("pwm_fast.configs"))) / "env" / "dmc_tasks.yaml"
        shipped = configuration.from_dict({"env": configuration.read_yaml(file)}).env
        own = {k: env.options.get(k) for k in ("tasks", "numbers")}
        env = replace(shipped, options={**shipped.options, **own})
    try:
        return build.of_task(env, str(config.task), *build.dims_of(content))
    except ConfigError as error:
        raise ConfigError(f"init={config.init}: {error}") from error


def _numbered(run: TrainConfig, content: Mapping[str, Any], config: TrainConfig) -> EnvConfig:
    """The environment of the command line; its tasks have the numbers that the model knows."""
    env, numbers = config.env, build.task_numbers(run.env)
    names = env.options.get("tasks") or []
    if not (numbers and names) or env.options.get("numbers") is not None:
        return env
    if not numbers.keys() >= set(names):
        raise ConfigError(
            f"env.tasks must be of {', '.join(numbers)}, which the model of init={config.init} "
            f"knows, or env.numbers say as which of them it takes others, got {list(names)}"
        )
    widths = zip(("obs_dim", "action_dim"), build.dims_of(content), strict=True)
    own: dict[str, Any] = {k: env.options.get(k) or width for k, width in widths}
    own["numbers"] = [numbers[name] for name in names]
    return replace(env, options={**env.options, **own})


def _with_given(env: EnvConfig, composed: EnvConfig, given: set[str]) -> EnvConfig:
    """An environment with what the command line says of one."""
    fields = {k: getattr(composed, k) for k in vars(env) if f"env.{k}" in given}
    options = {k: v for k, v in composed.options.items() if f"env.{k}" in given}
    return replace(env, **{**fields, "options": {**env.options, **options}})
