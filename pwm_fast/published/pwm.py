"""Checkpoints of PWM, and of Flow-MBPO-PWM, whose format is PWM's with a few more keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.published.networks import Parts, keep
from pwm_fast.published.reading import PublishedError, Statistics, numbers
from pwm_fast.published.result import PRESETS, Published, State, preset

# What Flow-MBPO-PWM's flow policies keep the log deviation of their noise above.
FLOW_MIN_LOGSTD = -10.0
# Which Adam of theirs has which of our settings, and the networks that it learns, in its order.
OPTIMIZERS = {"world_model": "model_learning", "actor": "actor", "critic": "critic"}
MOMENTS = ("exp_avg", "exp_avg_sq")
LEARNED = ("_encoder.", "_dynamics.", "_velocity.", "_reward.")

Columns = dict[str, list[int]]


class FlowSteps(NamedTuple):
    """How flows are integrated, which no file holds.

    Attributes:
        substeps: K of the dynamics.
        integrator: ``heun`` or ``euler``.
        policy_substeps: K of a flow policy.
        policy_integrator: ``heun`` or ``euler``.
    """

    substeps: int = 2
    integrator: str = "heun"
    policy_substeps: int = 2
    policy_integrator: str = "heun"


class _World(NamedTuple):
    """A converted world model.

    Attributes:
        state: its state dict.
        columns: columns that first weights keep, in our order, where that is not all as they are.
        values: of :class:`pwm_fast.config.WorldModelConfig`.
        obs_dim: O.
        notes: what was done.
    """

    state: State
    columns: Columns
    values: dict[str, Any]
    obs_dim: int
    notes: list[str]


def convert(path: Path, content: Mapping[str, Any], family: str, *, steps: FlowSteps) -> Published:
    """Make the parts of a file ours; arguments and errors as of ``load_published``."""
    actor = Parts(path, "actor", content["actor"])
    flows = any(str(key).startswith("velocity_net.") for key in content["actor"])
    action_dim = len(actor.take("init_logstd" if flows else "logstd", -1))
    policy = actor.act_norm("velocity_net" if flows else "mu_net")
    actor.done()
    critic = Parts(path, "critic", content["critic"])
    members, value = critic.ensemble()
    critic.done()
    world = _world_model(path, content["world_model"], action_dim)
    notes = world.notes
    latent = world.values["latent_dim"]
    for part, net, rows, more in (
        (actor, policy, action_dim, action_dim + 1 if flows else 0),
        (critic, value, 1, 0),
    ):
        if (net.columns, net.rows) != (latent + more, rows) or net.normed:
            beside = f" and {action_dim} actions and a flow time" if more else ""
            raise part.error(
                f"it takes {net.columns} numbers and gives {net.rows}, in place of the latent's "
                f"{latent}{beside} and {rows}"
            )
    several = world.values["task_dim"] > 0
    if several:
        notes.append(
            "the policy and the critics see no task: they learned one of the tasks, and the file "
            "does not say which. That code leaves padded actions to the policy, this one masks them"
        )
    base = preset(PRESETS[family])
    statistics = {
        key: _statistics(path, key, content.get(key), shape, notes)
        for key, shape in (("obs_rms", (world.obs_dim,)), ("rew_rms", ()), ("ret_rms", ()))
    }
    returns = statistics["ret_rms"]
    if returns is not None:  # theirs are of the loss, which is minus the return
        returns["mean"].neg_()
    bins = world.values["num_bins"]
    if bins > 1:
        notes.append(
            "reward bins: that code trains them by subtracting the scalar reward from all of them. "
            "What it has trained so does not decode to rewards; bins that TD-MPC2 trained do"
        )
    if bins > 1 and statistics["rew_rms"] is not None:
        statistics["rew_rms"] = None
        notes.append("rew_rms: left out, for rewards of bins are not normalised here")
    if world.values["kind"] == "flow":
        world.values.update(substeps=steps.substeps, integrator=steps.integrator)
        notes.append(
            f"the file does not say how its flow is integrated: {steps.integrator}, "
            f"K={steps.substeps} as given; published are heun with K=2 and 4, and euler with K=8"
        )
    own: dict[str, Any] = {"units": policy.units, "task_input": False if several else None}
    moved: Columns = {}
    if flows:
        moved["velocity_net.0.weight"] = [
            *range(latent, latent + action_dim),
            *range(latent),
            latent + action_dim,
        ]
        own |= {
            "kind": "flow",
            "order": "act_norm",
            "substeps": steps.policy_substeps,
            "integrator": steps.policy_integrator,
            "min_logstd": FLOW_MIN_LOGSTD,
        }
        notes.append(
            "a flow policy (ActorFlowODE), its columns reordered from [z, x, tau] to [x, z, tau]. "
            f"The file does not say how it is integrated: {steps.policy_integrator}, "
            f"K={steps.policy_substeps} as given; published is heun with K=2. Nor does it say "
            "whether it was an ActorFlowODEStochastic: actions without noise are the same"
        )
    alg = replace(
        base,
        name=family,
        world_model=replace(base.world_model, **world.values),
        actor=replace(base.actor, **own),
        critic=replace(
            base.critic,
            units=value.units,
            members=members,
            task_input=False if several else None,
        ),
        normalize_obs=statistics["obs_rms"] is not None,
        normalize_rewards=statistics["rew_rms"] is not None,
        normalize_returns=statistics["ret_rms"] is not None,
        symlog_rewards=bins > 1,
    )
    found = Published(
        path,
        family,
        alg,
        world.obs_dim,
        action_dim,
        None,
        world.state,
        _ordered(actor.taken, moved),
        critic.taken,
        statistics["obs_rms"],
        statistics["rew_rms"],
        statistics["ret_rms"],
        notes=notes,
    )
    _take_optimizers(found, content, {**world.columns, **moved})
    return found


def _world_model(path: Path, state: Mapping[str, Any], action_dim: int) -> _World:
    parts = Parts(path, "world_model", state)
    encoder = parts.mlp("_encoder")
    flow = "_dynamics.0.weight" not in parts and "_velocity.0.weight" in parts
    name = "_velocity" if flow else "_dynamics"
    transition, reward = parts.mlp(name), parts.mlp("_reward")
    latent, tau = encoder.rows, int(flow)
    extra = transition.columns - latent - action_dim - tau  # task embedding, or zeros in its place
    task_dim, num_tasks = 0, 1
    if "_task_emb.weight" in parts:
        num_tasks, task_dim = parts.take("_task_emb.weight", -1, -1).shape
    parts.done()
    zero_fed = flow and not task_dim and extra > 0  # the baseline's code cannot run such a model
    fits = zero_fed or extra == task_dim
    if not fits or reward.columns != latent + action_dim + extra or encoder.columns <= extra:
        raise parts.error(
            f"{encoder.columns}, {transition.columns} and {reward.columns} columns of _encoder, "
            f"{name} and _reward are no sums of observations, a latent of {latent}, {action_dim} "
            f"actions{', a flow time' if flow else ''} and a task embedding of {task_dim}"
        )
    for part, net in (("_encoder", encoder), (name, transition)):
        if net.rows != latent or not (net.normed or (flow and net is transition)):
            raise parts.error(f"{part} does not end in a SimNorm layer of the latent's {latent}")
    if reward.normed:
        raise parts.error("_reward does not end in a Linear layer")
    notes: list[str] = []
    obs_dim = encoder.columns - extra
    columns: Columns = {}
    if zero_fed:
        for part, width in (("_encoder", obs_dim), (name, None), ("_reward", latent + action_dim)):
            columns[f"{part}.0.weight"] = list(range(width or transition.columns - extra))
        notes.append(
            f"{extra} columns of _encoder, {name} and _reward: dropped, for this single-task model "
            "was fed zeros there"
        )
    elif flow and task_dim:  # theirs is [z, a, task]
        order = [*range(latent), *range(latent + action_dim, reward.columns)]
        columns["_reward.0.weight"] = [*order, *range(latent, latent + action_dim)]
        notes.append("_reward: columns reordered from [z, a, task] to [z, task, a]")
    if flow and transition.normed:
        notes.append(
            "the velocity ends in SimNorm (alg.world_model.head=simnorm): it cannot represent a "
            "step of the latent, and such a model has learned no dynamics (docs/simnorm_head.md)"
        )
    values = {
        "kind": "flow" if flow else "mlp",
        "latent_dim": latent,
        "units": transition.units,
        "encoder_units": encoder.units,
        "reward_units": reward.units,
        "num_bins": reward.rows,
        "task_dim": task_dim,
        "num_tasks": num_tasks,
        "head": "simnorm" if flow and transition.normed else "linear",
    }
    return _World(_ordered(parts.taken, columns), columns, values, obs_dim, notes)


def _ordered(state: State, columns: Columns) -> State:
    return {name: _reordered(value, columns.get(name)) for name, value in state.items()}


def _reordered(value: Tensor, columns: list[int] | None) -> Tensor:
    """A weight, or something of its shape, with these columns; step counts have none."""
    return value if columns is None or value.dim() == 0 else keep(value, columns)


def _statistics(
    path: Path, key: str, found: Any, shape: tuple[int, ...], notes: list[str]
) -> State | None:
    """Running statistics as buffers of :class:`pwm_fast.agent.normalizers.RunningMeanStd`."""
    if found is None:
        return None
    values = vars(found) if isinstance(found, Statistics) else {}
    state = {name: numbers(values.get(name)) for name in ("mean", "var", "count")}
    result: State = {}
    for name, value in state.items():
        want = () if name == "count" else shape
        if value is None or value.numel() != torch.Size(want).numel():
            said = "missing" if value is None else f"{list(value.shape)}"
            raise PublishedError(
                f"{path}: {key} cannot be converted: its {name} is {said} instead of "
                f"{list(want)} finite numbers"
            )
        result[name] = value.reshape(want)
    sign = ", the mean with its sign changed" if key == "ret_rms" else ""
    notes.append(f"{key}: running statistics of {float(result['count']):,.0f} taken{sign}")
    return result


def _take_optimizers(found: Published, content: Mapping[str, Any], columns: Columns) -> None:
    """Add Adam's moments where they mean the same here; else a note that says why not."""
    alg, rates = found.alg, []
    states = {"world_model": found.world_model, "actor": found.actor, "critic": found.critic}
    for part, section in OPTIMIZERS.items():
        names = [name for name in states[part] if part != "world_model" or name.startswith(LEARNED)]
        optimizer: Any = content.get(f"{part}_opt")
        moments = _moments(optimizer, {k: content[part][k].shape for k in names})
        if isinstance(moments, str):
            found.notes.append(f"{part}_opt: left out, {moments}; a new one begins")
            continue
        found.optimizers[part] = {
            name: {k: _reordered(v, columns.get(name)) for k, v in each.items()}
            for name, each in moments.items()
        }
        group = optimizer["param_groups"][0]
        settings = replace(getattr(alg, section), betas=[float(b) for b in group["betas"]])
        alg = replace(alg, **{section: settings})
        rates.append(f"{part} {float(group['lr']):.3g}")
    found.alg = alg
    if rates:
        found.notes.append(
            f"Adam's moments taken; its learning rates stood at {', '.join(rates)}, here they "
            "begin anew (alg.*.lr)"
        )


def _moments(optimizer: Any, shapes: Mapping[str, torch.Size]) -> dict[str, State] | str:
    """The state of a ``torch.optim.Adam`` by parameter's name, or why there is none.

    Args:
        optimizer: its state dict.
        shapes: of the parameters by name, in its order.
    """
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if not (isinstance(groups, list) and groups and isinstance(state, Mapping)):
        return "it is no state of Adam"
    if not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
        return "its groups are damaged"
    if [i for group in groups for i in group["params"]] != list(range(len(shapes))):
        return f"it is not of these {len(shapes)} parameters"
    plain = {"eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    for group in groups:
        for key, value in {**plain, "betas": groups[0].get("betas")}.items():
            if group.get(key, value) != value:
                return f"its {key} is {group.get(key)}, here it is {value}"
    betas, rate = groups[0].get("betas"), numbers(groups[0].get("lr"))
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and rate is not None):
        return "its groups lack betas or lr"
    found: dict[str, State] = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if index not in state:
            continue
        each = state[index]
        moments = [each.get(key) if isinstance(each, Mapping) else None for key in MOMENTS]
        step = numbers(each.get("step")) if isinstance(each, Mapping) else None
        if step is None or not all(isinstance(m, Tensor) and m.shape == shape for m in moments):
            return f"its moments of {name} are missing or of another shape"
        found[name] = {
            "step": step.float().reshape(()),
            **{key: m for key, m in zip(MOMENTS, moments, strict=True) if isinstance(m, Tensor)},
        }
    return found
