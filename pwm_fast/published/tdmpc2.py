"""Checkpoints of TD-MPC2, in the format of before and that of after its move to TensorDict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pwm_fast.published.networks import Parts
from pwm_fast.published.reading import PublishedError, model_of, numbers
from pwm_fast.published.result import PRESETS, Published, preset

PIXELS = "is an encoder of images (obs=rgb): observations here are vectors"
LOGSTD = (-10.0, 2.0)  # published bounds, which the older format does not store
ORDER = ("weight", "bias", "ln.weight", "ln.bias")  # of a layer in the older format
# Copies of the Q functions: planning takes the online ones, only learning takes the others.
COPIES = ("_detach_Qs", "_target_Qs")
# Beside the Q functions' parameters: what TensorDict stores to 0.11, and shapes since 0.14.
BESIDE = re.compile(r"_Qs\.(module\..*|.*__batch_size|.*__device)")


def discount(episode_steps: int) -> float:
    """TD-MPC2's discount a step for a task whose episodes have that many: 0.99 for 500.

    ``(T/5 - 1) / (T/5)``, not below 0.95 nor above 0.995 (arXiv 2310.16828, appendix).
    """
    fraction = episode_steps / 5.0
    return min(max((fraction - 1.0) / fraction, 0.95), 0.995)


def convert(path: Path, content: Mapping[str, Any]) -> Published:
    """Make the parts of a file ours; errors as of ``load_published``."""
    model = model_of(content)
    world, actor, critic = _sorted(path, model)
    encoder, transition = world.mlp("_encoder"), world.mlp("_dynamics")
    reward, policy = world.mlp("_reward"), actor.mlp("_pi")
    members, value = critic.ensemble()
    latent, action_dim = encoder.rows, policy.rows // 2
    task_dim, num_tasks = 0, 1
    action_dims = None
    if "_task_emb.weight" in world:
        num_tasks, task_dim = world.take("_task_emb.weight", -1, -1).shape
    if "_action_masks" in model:
        action_dims = _action_dims(world, model["_action_masks"], num_tasks, action_dim)
    for part in (world, actor, critic):
        part.done({"_encoder.rgb.": PIXELS})
    notes: list[str] = []
    pair = latent + task_dim + action_dim
    problems = {
        "_encoder": encoder.normed and encoder.columns > task_dim,
        "_dynamics": transition.normed and (transition.columns, transition.rows) == (pair, latent),
        "_reward": not reward.normed and reward.columns == pair,
        "_pi": not policy.normed
        and policy.columns == latent + task_dim
        and policy.rows == 2 * action_dim,
        "_Qs": not value.normed and (value.columns, value.rows) == (pair, reward.rows),
    }
    for name, fits in problems.items():
        if not fits:
            raise world.error(
                f"{name} does not fit a latent of {latent}, {action_dim} actions, a task embedding "
                f"of {task_dim} and {reward.rows} bins"
            )
    if reward.rows == 1:
        raise world.error(
            "_reward has one output, and the file does not say whether it is in symlog space "
            "(num_bins=1) or not (num_bins=0); bins are needed"
        )
    low, high = _bounds(path, model, notes)
    if any(str(key).startswith("_termination.") for key in model):
        notes.append(
            "_termination: left out. It judges the next latent, ours a latent and its action, and "
            "neither can be made of the other. The policy does without it; plans and imagination "
            "do not see episodes end until a termination head has learned here"
        )
    notes.append(
        f"_Qs: the {members} online Q functions, which its planner takes; copies and targets are "
        "left out"
    )
    notes.append(
        "the reward's and the Q functions' bins are taken to span -10 to 10, as published: the "
        "file does not say"
    )
    notes.append("no optimiser, replay or scale of Q values is in such a file: they begin anew")
    if num_tasks > 1 and action_dims is None:
        notes.append("no action masks are in a file of this older format: the environment has them")
    base = preset(PRESETS["tdmpc2"])
    task_input = True if task_dim else None
    alg = replace(
        base,
        name="tdmpc2",
        world_model=replace(
            base.world_model,
            latent_dim=latent,
            units=transition.units,
            encoder_units=encoder.units,
            reward_units=reward.units,
            num_bins=reward.rows,
            task_dim=task_dim,
            num_tasks=num_tasks,
        ),
        # What TD-MPC2 learns with, as far as there is such a key.
        model_learning=replace(
            base.model_learning, betas=[0.9, 0.999], encoder_lr_scale=0.3, batch_size=256
        ),
        actor=replace(
            base.actor,
            kind="tdmpc2",
            units=policy.units,
            min_logstd=low,
            max_logstd=high,
            task_input=task_input,
        ),
        critic=replace(
            base.critic, kind="tdmpc2", units=value.units, members=members, task_input=task_input
        ),
    )
    return Published(
        path,
        "tdmpc2",
        alg,
        encoder.columns - task_dim,
        action_dim,
        action_dims,
        world.taken,
        actor.taken,
        critic.taken,
        notes=notes,
    )


def _sorted(path: Path, model: Mapping[str, Any]) -> tuple[Parts, Parts, Parts]:
    """World model, policy and Q functions, under our names."""
    world: dict[str, Any] = {}
    actor: dict[str, Any] = {}
    critic: dict[str, Any] = {}
    for key, value in model.items():
        name = str(key)
        if name.startswith(("_termination.", *COPIES)) or name in (
            "log_std_min",
            "log_std_dif",
            "_action_masks",
        ):
            continue
        if name.startswith("_Qs."):
            if BESIDE.fullmatch(name):
                continue
            layer = re.fullmatch(r"_Qs\.params\.(\d+)\.(.+)", name)
            if layer is not None and layer[2] in ORDER:
                name = f"params.{4 * int(layer[1]) + ORDER.index(layer[2])}"
            critic[name.removeprefix("_Qs.")] = value
        elif name.startswith("_pi."):
            actor[name] = value
        else:
            world[name.replace("_encoder.state.", "_encoder.")] = value
    if any(name.startswith("_encoder.rgb.") for name in world):
        raise PublishedError(f"{path} cannot be converted: _encoder.rgb.* {PIXELS}")
    return (
        Parts(path, "world model", world),
        Parts(path, "policy", actor),
        Parts(path, "Q functions", critic),
    )


def _action_dims(world: Parts, masks: Any, num_tasks: int, action_dim: int) -> tuple[int, ...]:
    """A of each task."""
    fits = isinstance(masks, Tensor) and masks.shape == (num_tasks, action_dim)
    found = tuple(int(n) for n in masks.sum(-1)) if fits else ()
    rows = [[1.0] * n + [0.0] * (action_dim - n) for n in found]
    if not fits or masks.tolist() != rows or 0 in found:
        raise world.error(
            f"_action_masks are not {num_tasks} rows of ones and then zeros, {action_dim} in all"
        )
    return found


def _bounds(path: Path, model: Mapping[str, Any], notes: list[str]) -> tuple[float, float]:
    """Least and largest log standard deviation of the policy."""
    if "log_std_min" not in model:
        notes.append(
            f"the policy's log standard deviations are taken to lie between {LOGSTD[0]:g} and "
            f"{LOGSTD[1]:g}, as published: a file of this older format does not say"
        )
        return LOGSTD
    low, width = (numbers(model.get(key)) for key in ("log_std_min", "log_std_dif"))
    if low is None or width is None or low.numel() != 1 or width.numel() != 1 or float(width) <= 0:
        raise PublishedError(f"{path} cannot be converted: log_std_min or log_std_dif is no number")
    return float(low), float(low + width)
