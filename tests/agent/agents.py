"""Small agents with random parameters, and data for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.agent.graphs import Recorder
from pwm_fast.config import (
    ActorConfig,
    AlgConfig,
    CriticConfig,
    ModelLearningConfig,
    WorldModelConfig,
)
from pwm_fast.models import GaussianActor
from pwm_fast.parallel import ALONE, Ranks
from pwm_fast.replay import Windows
from tests.models.builders import randomize_

OBS, ACTION = 5, 2
OBSERVATIONS = {"encoder": "identity", "normalize_obs": True}

# Every kind of agent that takes another path through the code.
AGENTS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "flow": {"kind": "flow"},
    "teacher": {"kind": "flow", "flow_start": "teacher", "target_grad": False},
    "another integrator": {"kind": "flow", "model_learning_integrator": "euler"},
    "straight to the encoder": {"kind": "flow", "start_grad": "encoder"},
    "measured noise": {"kind": "flow", "flow_start": "teacher", "start_noise": "auto"},
    "pieces": {"kind": "flow", "rollout_steps": 1},
    "pieces, multi-task": {"kind": "flow", "rollout_steps": 1, "task_dim": 3, "num_tasks": 2},
    "some flow times": {"kind": "flow", "integrator": "euler", "substeps": 1, "flow_share": 0.4},
    "residual": {"kind": "residual"},
    "shortcut": {"kind": "shortcut", "substeps": 1},
    "shortcut of pieces": {"kind": "shortcut", "substeps": 1, "rollout_steps": 1},
    "meanflow": {"kind": "shortcut", "substeps": 1, "consistency": "meanflow"},
    "terminating": {"kind": "flow", "can_terminate": True},
    "multi-task": {"kind": "flow", "task_dim": 3, "num_tasks": 2, "can_terminate": True},
    "scalar reward": {"kind": "mlp", "num_bins": 1, "normalize_rewards": True},
    "entropy": {"kind": "flow", "actor_entropy_coef": 0.3},
    "observations": {"kind": "flow", **OBSERVATIONS},
    "observations of pieces": {"kind": "residual", "rollout_steps": 1, **OBSERVATIONS},
    "observations, terminating": {"kind": "mlp", "can_terminate": True, **OBSERVATIONS},
    "observations, multi-task": {"kind": "flow", "task_dim": 3, "num_tasks": 2, **OBSERVATIONS},
    "observations, measured noise": {
        "kind": "flow",
        "flow_start": "teacher",
        "start_noise": "auto",
        **OBSERVATIONS,
    },
    "masked": {"kind": "flow", "task_dim": 3, "num_tasks": 2, "action_dims": {0: 1, 1: 2}},
    "masked alike": {"kind": "flow", "action_dims": {0: 1}},
    "state's deviation": {"kind": "flow", "actor_kind": "tdmpc2", "actor_entropy_coef": 0.1},
    "flow policy": {"kind": "flow", "actor_kind": "flow", "detach": False},
    "gated policy": {"kind": "mlp", "actor_kind": "flow", "form": "gated", "actor_substeps": 2},
    "MeanFlow policy, masked": {
        "kind": "flow",
        "actor_kind": "flow",
        "form": "meanflow",
        "actor_substeps": 1,
        "task_dim": 3,
        "num_tasks": 2,
        "action_dims": {0: 1, 1: 2},
    },
    "all normalised": {"kind": "flow", "normalize_obs": True, "detach": False},
    "as published": {
        "kind": "mlp",
        "num_bins": 1,
        "normalize_obs": True,
        "obs_clip": 5.0,
        "normalize_rewards": True,
        "centre_rewards": True,
        "reward_clip": 5.0,
        "mean_reward_loss": True,
        "value_delay": 1,
        "init": "torch",
        "shuffle": False,
        "model_learning_betas": [0.9, 0.999],
    },
}


def alg_config(**changes: Any) -> AlgConfig:
    """A small configuration; keys of any section may be changed by their own name."""
    sections: dict[str, Any] = {
        "world_model": WorldModelConfig(
            latent_dim=16, units=[14], encoder_units=[12], reward_units=[10], num_bins=11
        ),
        "model_learning": ModelLearningConfig(batch_size=6),
        "actor": ActorConfig(units=[12, 10], batch_size=6),
        "critic": CriticConfig(units=[11, 9], passes=2, minibatches=2),
    }
    for name, section in sections.items():
        fields = {f.name for f in dataclasses.fields(section)}
        prefix = f"{name}_"  # actor_lr, critic_lr: names that several sections have
        own = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
        own |= {k: v for k, v in changes.items() if k in fields and k not in SHARED}
        if name == "world_model" and "kind" in changes:
            own["kind"] = changes["kind"]
        sections[name] = dataclasses.replace(section, **own)
    fields = {f.name for f in dataclasses.fields(AlgConfig)} - set(sections)
    return AlgConfig(
        **sections, **{"horizon": 3, **{k: v for k, v in changes.items() if k in fields}}
    )


SHARED = {"kind", "task_input", "units", "updates", "batch_size", "lr", "betas", "grad_norm"}


def make_agent(
    seed: int = 0,
    *,
    can_terminate: bool = False,
    double: bool = False,
    device: str = "cpu",
    recorder: Recorder | None = None,
    graphs: bool | None = None,
    precision: str = "auto",
    action_dims: dict[int, int] | None = None,
    ranks: Ranks = ALONE,
    **changes: Any,
) -> PWM:
    """An agent whose every parameter is random: fresh heads are zero and would hide errors."""
    torch.manual_seed(seed)
    agent = PWM(
        OBS,
        ACTION,
        alg_config(**changes),
        can_terminate=can_terminate,
        device=device,
        graphs=graphs,
        precision=precision,
        recorder=recorder,
        action_dims=action_dims,
        ranks=ranks,
    )
    for module in (agent.world_model, agent.actor, agent.critic):
        randomize_(module)
        if double:
            module.double()
    if isinstance(agent.actor, GaussianActor):
        with torch.no_grad():
            agent.actor.logstd.fill_(-1.0)
    return agent


def make_windows(
    batch: int = 6, horizon: int = 3, seed: int = 0, device: str = "cpu", **kwargs: Any
) -> Windows:
    """Random windows; some of them end in a terminal state."""
    g = torch.Generator().manual_seed(seed)
    terminated = torch.zeros(horizon, batch)
    terminated[-1] = (torch.rand(batch, generator=g) < 0.5).float()
    parts = (
        torch.randn(horizon + 1, batch, OBS, generator=g),
        torch.rand(horizon, batch, ACTION, generator=g) * 2 - 1,
        3.0 * torch.randn(horizon, batch, generator=g),
        terminated,
    )
    return Windows(*(p.to(device, **kwargs) for p in parts), make_task(batch, device))


def make_task(batch: int = 6, device: str = "cpu") -> Tensor:
    """Numbers of two tasks, which agents of one do not look at."""
    return torch.arange(batch, device=device) % 2


def make_obs(batch: int = 6, seed: int = 0, device: str = "cpu", **kwargs: Any) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, OBS, generator=g).to(device, **kwargs)


def snapshot(agent: PWM, *names: str) -> dict[str, Tensor]:
    """Copies of parameters, Adam's moments and its step counts, of these networks."""
    modules = {"wm": agent.world_model, "actor": agent.actor, "critic": agent.critic}
    result = {}
    for name in names or tuple(modules):
        adam = agent.optimizers[name].adam
        for key, p in modules[name].named_parameters():
            result[f"{name}.{key}"] = p.detach().clone()
            for field, value in adam.state.get(p, {}).items():
                result[f"{name}.{key}.{field}"] = value.clone()
    return result


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ, or that only one of them has."""
    return sorted(
        k
        for k in before.keys() | after.keys()
        if k not in before or k not in after or not torch.equal(before[k], after[k])
    )
