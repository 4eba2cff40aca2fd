"""Small models, and a second implementation of their networks written from the formulas alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pwm_fast import config as configuration
from pwm_fast.config import TrainConfig, WorldModelConfig
from pwm_fast.models import LatentModel, make_world_model

CONFIGS = Path(configuration.__file__).parent.parent / "configs"
OBS, ACTION = 5, 3


def compose(*overrides: str) -> TrainConfig:
    """The configuration that ``python -m pwm_fast.train`` would run with these overrides."""
    return configuration.from_hydra(compose_raw(*overrides))


def compose_raw(*overrides: str) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="train_schema", node=configuration.hydra_schema())
    with initialize_config_dir(config_dir=str(CONFIGS.resolve()), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def small(**changes: Any) -> WorldModelConfig:
    """A world model's configuration with a different width everywhere."""
    base = WorldModelConfig(
        kind="flow",
        latent_dim=16,
        units=[14, 12],
        encoder_units=[11],
        reward_units=[10, 9],
        num_bins=21,
    )
    return dataclasses.replace(base, **changes)


def small_model(can_terminate: bool = False, **changes: Any) -> LatentModel:
    """A float64 world model with random parameters of order 1."""
    model = make_world_model(OBS, ACTION, small(**changes), can_terminate).double()
    randomize_(model)
    return model


@torch.no_grad()
def randomize_(module: nn.Module, scale: float = 1.0) -> None:
    """Give every parameter values of order ``scale``: zero heads would hide errors."""
    norms = {id(m.weight) for m in module.modules() if isinstance(m, nn.LayerNorm)}
    for name, p in module.named_parameters():
        if id(p) in norms:
            p.copy_(1.0 + 0.3 * scale * torch.randn_like(p))
        elif name.startswith("_task_emb"):
            p.copy_(torch.nn.functional.normalize(torch.randn_like(p), dim=-1) * 0.7)
        elif p.dim() > 1:
            p.copy_(scale * torch.randn_like(p) / p.shape[-1] ** 0.5)
        else:
            p.copy_(0.3 * scale * torch.randn_like(p))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def simplex(*shape: int) -> Tensor:
    """Latents: groups of 8 that are positive and sum to 1."""
    x = torch.rand(*shape, dtype=torch.float64) + 0.05
    groups = x.reshape(*shape[:-1], shape[-1] // 8, 8)
    return (groups / groups.sum(-1, keepdim=True)).reshape(shape)


def same(ours: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(ours, expected, **{"rtol": 1e-10, "atol": 1e-12, **kwargs})


# A second implementation, from the formulas: no function of pwm_fast is used below.


def slow_mlp(params: dict[str, Tensor], name: str, x: Tensor, last: str) -> Tensor:
    """Linear, LayerNorm, Mish per layer; the last layer is ``"linear"`` or ``"simnorm"``."""
    depth = 1 + max(int(k.split(".")[1]) for k in params if k.startswith(f"{name}."))
    for i in range(depth):
        x = x @ params[f"{name}.{i}.weight"].T + params[f"{name}.{i}.bias"]
        final = i == depth - 1
        if final and last == "linear":
            return x
        centred = x - x.mean(-1, keepdim=True)
        x = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * params[f"{name}.{i}.ln.weight"] + params[f"{name}.{i}.ln.bias"]
        if final:
            e = x.exp().reshape(*x.shape[:-1], x.shape[-1] // 8, 8)
            return (e / e.sum(-1, keepdim=True)).reshape(x.shape)
        x = x * torch.tanh(torch.log(1.0 + torch.exp(x)))
    raise AssertionError(name)


class SlowModel:
    """Encoder, transition and heads of a world model, from its parameters by name."""

    def __init__(self, model: LatentModel, task: int | None = None) -> None:
        self.params = dict(model.named_parameters())
        self.config = model.config
        self.task = task

    def _join(self, *parts: Tensor | None) -> Tensor:
        return torch.cat([p for p in parts if p is not None], dim=-1)

    def _emb(self, rows: int) -> Tensor | None:
        if self.task is None:
            return None
        return self.params["_task_emb.weight"][self.task].expand(rows, -1)

    def encode(self, obs: Tensor) -> Tensor:
        x = self._join(obs, self._emb(len(obs)))
        return slow_mlp(self.params, "_encoder", x, "simnorm")

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        return slow_mlp(self.params, "_reward", self._join(z, self._emb(len(z)), a), "linear")

    def termination(self, z: Tensor, a: Tensor) -> Tensor:
        x = self._join(z, self._emb(len(z)), a)
        return slow_mlp(self.params, "_termination", x, "linear")[:, 0]

    def velocity(self, z: Tensor, a: Tensor, tau: Tensor | float) -> Tensor:
        if not isinstance(tau, Tensor):
            tau = torch.full((len(z),), tau, dtype=z.dtype)
        x = self._join(z, a, tau[:, None], self._emb(len(z)))
        return slow_mlp(self.params, "_velocity", x, self.config.head)

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        if self.config.kind == "mlp":
            x = self._join(z, self._emb(len(z)), a)
            return slow_mlp(self.params, "_dynamics", x, "simnorm")
        if self.config.kind == "residual":
            x = self._join(z, self._emb(len(z)), a)
            return z + slow_mlp(self.params, "_dynamics", x, "linear")
        dt = 1.0 / self.config.substeps
        for k in range(self.config.substeps):
            t = k * dt
            k1 = self.velocity(z, a, t)
            if self.config.integrator == "euler":
                z = z + dt * k1
            else:
                k2 = self.velocity(z + dt * k1, a, t + dt)
                z = z + dt / 2 * (k1 + k2)
        return z


def column_map(weight: Tensor, call: Callable[[int], Tensor], inputs: int) -> Tensor:
    """Which column of a first layer each input reaches, ``[inputs, columns]`` bool.

    ``call(k)`` evaluates the head where input k, in the documented order, is 1 and all others 0.
    """
    reached = torch.zeros(inputs, weight.shape[1], dtype=torch.bool)
    for k in range(inputs):
        before = call(k)
        for j in range(weight.shape[1]):
            column = weight[:, j].clone()
            # A change that is no multiple of ones, which LayerNorm would take out again.
            weight[:, j] += torch.linspace(-1.0, 2.0, len(column), dtype=weight.dtype)
            reached[k, j] = not torch.equal(call(k), before)
            weight[:, j] = column
    return reached
