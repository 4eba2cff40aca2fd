"""Some of the tasks of a published checkpoint of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pwm_fast.data.task_names import MT30
from pwm_fast.published.networks import keep
from pwm_fast.published.reading import PublishedError
from pwm_fast.published.result import Published, State

SETS = (30, 80)  # sizes of TD-MPC2's; the first 30 tasks are the same in both


def task_numbers(found: Published, names: Sequence[str]) -> list[int]:
    """The numbers in a file of TD-MPC2's 30 or 80 tasks of those with dm_control's names.

    Args:
        found: the file.
        names: such as ``walker-walk`` or ``ball_in_cup-catch``.

    Raises:
        PublishedError: the file is of another number of tasks, or a name is of none of them.
    """
    how = "give their numbers in the file as tasks=[...]"
    if found.num_tasks not in SETS:
        raise PublishedError(
            f"{found.path} has {found.num_tasks} tasks, whose names it does not hold: {how}"
        )
    known = {name: i for i, name in enumerate(MT30)}
    plain = [n.replace("ball_in_cup", "cup").replace("_", "-") for n in names]
    unknown = [name for name, p in zip(names, plain, strict=True) if p not in known]
    if unknown:
        raise PublishedError(
            f"{', '.join(unknown)}: no task of the {found.num_tasks} in {found.path} is known by "
            f"this name; if there is one, {how}"
        )
    return [known[name] for name in plain]


def of_tasks(found: Published, numbers: Sequence[int], obs_dim: int, action_dim: int) -> Published:
    """The same model for some of its tasks, with the widths that these need.

    That is exact: narrower observations were padded with zeros, and so were narrower actions
    wherever these were masked. Optimisers are left out.

    Args:
        found: of several tasks.
        numbers: of the tasks in the file, in the order that they shall have.
        obs_dim: O of the widest of them, at most the file's.
        action_dim: A, likewise.

    Raises:
        PublishedError: a number or a width is out of range, or observations are normalised, so
            that padded ones were not fed as zeros.
    """
    model = found.alg.world_model
    if model.task_dim == 0 or not numbers or not all(0 <= n < found.num_tasks for n in numbers):
        raise PublishedError(
            f"tasks must be numbers from 0 to {found.num_tasks - 1}, those of {found.path}, got "
            f"{list(numbers)}" + ("" if model.task_dim else ": it has one task and no embedding")
        )
    if obs_dim > found.obs_dim or action_dim > found.action_dim:
        raise PublishedError(
            f"{found.path} is of {found.obs_dim} observations and {found.action_dim} actions at "
            f"most, the environment has {obs_dim} and {action_dim}"
        )
    chosen = None if found.action_dims is None else tuple(found.action_dims[n] for n in numbers)
    if chosen is not None and max(chosen) != action_dim:
        raise PublishedError(
            f"tasks {list(numbers)} of {found.path} have {', '.join(map(str, chosen))} actions, "
            f"the environment has {action_dim}"
        )
    if found.obs_rms is not None and obs_dim < found.obs_dim:
        raise PublishedError(
            f"{found.path} normalises observations, so that its padding is no zeros: it takes "
            f"{found.obs_dim} of them, the environment has {obs_dim}"
        )
    notes = [*found.notes, f"tasks {', '.join(map(str, numbers))} of {found.num_tasks} taken"]
    if (obs_dim, action_dim) != (found.obs_dim, found.action_dim):
        notes.append(
            f"columns of padding dropped: {found.obs_dim} observations became {obs_dim}, "
            f"{found.action_dim} actions {action_dim}"
        )
    if found.optimizers:
        notes.append("optimisers: left out, new ones begin")
    return replace(
        found,
        alg=replace(found.alg, world_model=replace(model, num_tasks=len(numbers))),
        obs_dim=obs_dim,
        action_dim=action_dim,
        action_dims=chosen,
        world_model=_world_model(found, numbers, obs_dim, action_dim),
        actor=_actor(found, action_dim),
        critic=_critic(found, action_dim),
        optimizers={},
        notes=notes,
    )


def _without(weight: Tensor, first: int, padded: int, left: int) -> Tensor:
    """A weight whose columns from ``first`` are ``padded`` in number, with ``left`` of them."""
    return keep(weight, [*range(first + left), *range(first + padded, weight.shape[-1])])


def _world_model(found: Published, numbers: Sequence[int], obs_dim: int, action_dim: int) -> State:
    model, state = found.alg.world_model, dict(found.world_model)
    before = model.latent_dim + model.task_dim  # in front of actions
    state["_task_emb.weight"] = keep(state["_task_emb.weight"], numbers, 0)
    first = "_encoder.0.weight"
    state[first] = _without(state[first], 0, found.obs_dim, obs_dim)
    for name, place in (
        ("_dynamics", before),
        ("_velocity", model.latent_dim),
        ("_reward", before),
    ):
        first = f"{name}.0.weight"
        if first in state:
            state[first] = _without(state[first], place, found.action_dim, action_dim)
    return state


def _actor(found: Published, action_dim: int) -> State:
    """The rows of actions that are left: of means, and after them of log standard deviations."""
    if found.alg.actor.kind == "flow" and action_dim < found.action_dim:
        raise PublishedError(
            f"the flow policy of {found.path} has {found.action_dim} actions, the environment has "
            f"{action_dim}: the others' noise moves these, so they cannot be left out; policy=new "
            "leaves out the policy"
        )
    outputs = (0, found.action_dim) if found.alg.actor.kind == "tdmpc2" else (0,)
    rows = [start + i for start in outputs for i in range(action_dim)]
    last = list(found.actor)[-2:]  # weight and bias of the last layer
    cut = (*last, "logstd")
    return {k: keep(v, rows, 0) if k in cut else v for k, v in found.actor.items()}


def _critic(found: Published, action_dim: int) -> State:
    if found.alg.critic.kind == "pwm":
        return found.critic
    model = found.alg.world_model
    first = _without(
        found.critic["params.0"], model.latent_dim + model.task_dim, found.action_dim, action_dim
    )
    return {**found.critic, "params.0": first}
