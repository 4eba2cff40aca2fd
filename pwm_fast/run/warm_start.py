"""Starting a new run with the networks of another: ``init=PATH``."""

from __future__ import annotations

from typing import Any

from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import build, provenance, seal
from pwm_fast.run.inherit import learned_policy
from pwm_fast.run.rundir import which_environment

# What networks' numbers mean: where shapes fit, with another value they still would be wrong.
MEANING = (
    "alg.normalize_obs",
    "alg.normalize_rewards",
    "alg.world_model.vmin",
    "alg.world_model.vmax",
)
# What else says which networks fit, for messages.
SHAPES = (
    "alg.world_model",
    "alg.actor.kind",
    "alg.actor.form",
    "alg.actor.order",
    "alg.actor.task_input",
    "alg.actor.units",
    "alg.critic.kind",
    "alg.critic.task_input",
    "alg.critic.units",
    "alg.critic.members",
)


def warm_start(agent: PWM, config: TrainConfig) -> dict[str, Any]:
    """Give an agent the networks and running statistics of ``config.init``, and nothing else of it.

    Its optimisers, learning rates, replay, epochs and random numbers are those of a new run, so the
    number of envs does not matter.

    Args:
        agent: of the new run.
        config: of the new run; its ``init`` names a checkpoint.

    Returns:
        What the run's record keeps: the file, its SHA-256 (None if it was not sealed), its epoch
        and its configuration's hash.

    Raises:
        ConfigError: the checkpoint is of other networks; the message names both runs.
        CheckpointError: it cannot be read.
    """
    path = files.user_path(str(config.init))
    if not path.is_file():
        raise ConfigError(f"init={config.init}: there is no such file")
    run, content = build.load_run(path)
    then, now = configuration.to_dict(run), configuration.to_dict(config)
    changed = provenance.changes(then, now)
    different = [
        f"{key} was {both['was']!r}, is {both['is']!r}"
        for key, both in changed.items()
        if provenance.within(key, (*MEANING, *SHAPES))
    ]
    problem = ""
    theirs, ours = (build.task_numbers(c.env) for c in (run, config))
    for name, number in ours.items():
        if theirs.get(name, number) != number:
            problem = f"the task {name} is number {theirs[name]} there and {number} here"
    if any(key in MEANING for key in changed):
        problem = "its numbers mean something else"
    try:
        agent.load_state_dict(
            content["agent"], optimizers=False, policy=learned_policy(content["config"])
        )
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"init={config.init} does not fit: it is of {which_environment(then)} "
            f"alg.name={run.alg.name}, this run has {which_environment(now)} "
            f"alg.name={config.alg.name}; {'; '.join([*different, problem])}"
        )
    return {
        "checkpoint": str(config.init),
        "sha256": seal.verify(path),
        "epoch": content["epoch"],
        "config_sha256": provenance.config_sha256(then),
    }
