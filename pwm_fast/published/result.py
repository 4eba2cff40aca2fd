"""What is made of a published checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pwm_fast import config as configuration
from pwm_fast import optional
from pwm_fast.config import AlgConfig
from pwm_fast.published.reading import FAMILIES

State = dict[str, Tensor]

NEEDS_TRAIN = "load_published needs more packages: pip install 'pwm-fast[train]'"


@dataclass
class Published:
    """A published checkpoint in this package's terms.

    ``make_world_model(obs_dim, action_dim, alg.world_model)`` takes :attr:`world_model`, and so on;
    ``python -m pwm_fast.import_checkpoint`` makes a checkpoint of all of it.

    Attributes:
        path: the file.
        family: of :data:`pwm_fast.published.FAMILIES`.
        alg: networks, and the settings of updates that the published configuration has.
        obs_dim: O; padded to the widest task's in a file of several.
        action_dim: A, likewise.
        action_dims: A of each task; None for one task, and where the file does not say.
        world_model: its state dict.
        actor: the policy's.
        critic: the value functions'.
        obs_rms: the running statistics' of observations; None where the file has none.
        rew_rms: of rewards.
        ret_rms: of imagined returns.
        optimizers: Adam's ``step``, ``exp_avg`` and ``exp_avg_sq`` by parameter's name, for
            ``world_model``, ``actor`` and ``critic``, as far as the file has them.
        notes: what was converted, dropped, assumed or left out, a sentence each.
    """

    path: Path
    family: str
    alg: AlgConfig
    obs_dim: int
    action_dim: int
    action_dims: tuple[int, ...] | None
    world_model: State
    actor: State
    critic: State
    obs_rms: State | None = None
    rew_rms: State | None = None
    ret_rms: State | None = None
    optimizers: dict[str, dict[str, State]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name of the code that wrote it."""
        return FAMILIES[self.family]

    @property
    def num_tasks(self) -> int:
        """Tasks that it knows."""
        return self.alg.world_model.num_tasks

    @property
    def preset(self) -> str:
        """Name of the shipped configuration that :attr:`alg` departs from."""
        return PRESETS[self.family]

    def describe(self) -> str:
        """A few lines for people."""
        model, alg = self.alg.world_model, self.alg
        transition = f"{model.kind} {model.units}"
        if model.kind == "flow":
            transition += f", {model.head} head, {model.integrator} K={model.substeps}"
        tasks = f"{model.num_tasks}, embeddings of {model.task_dim}" if model.task_dim else "1"
        policy = f"kind {alg.actor.kind}, {alg.actor.units}"
        if alg.actor.kind == "flow":
            policy += f", {alg.actor.integrator} K={alg.actor.substeps}"
        of = {"pwm": "state values", "tdmpc2": "Q functions"}[alg.critic.kind]
        lines = {
            "file": f"{self.path}, a checkpoint of {self.title}",
            "observations": f"{self.obs_dim}, actions {self.action_dim}, tasks {tasks}",
            "latent": f"{model.latent_dim}, encoder {model.encoder_units}",
            "dynamics": transition,
            "reward": f"{model.reward_units}, "
            + ("scalar" if model.num_bins == 1 else f"{model.num_bins} bins"),
            "policy": policy,
            "critics": f"{alg.critic.members} {of}, {alg.critic.units}",
        }
        text = [f"{name:13} {value}" for name, value in lines.items()]
        return "\n".join([*text, *(f"- {note}" for note in self.notes)])


#: Shipped configurations that the families' settings depart from.
PRESETS = {"pwm": "pwm", "flow_mbpo_pwm": "pwm", "tdmpc2": "pwm_5M"}


def preset(name: str) -> AlgConfig:
    """The agent of ``configs/alg/<name>.yaml``, of a file that builds on no other.

    Raises:
        ImportError: the packages that read configurations are missing.
    """
    path = Path(__file__).parents[1] / "configs" / "alg" / f"{name}.yaml"
    try:
        values: Any = configuration.read_yaml(path)
        return configuration.structured(AlgConfig, values, "alg.")
    except ImportError as error:
        raise ImportError(optional.reason(error, "omegaconf", NEEDS_TRAIN)) from error
