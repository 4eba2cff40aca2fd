"""Dynamics that the package does not know: one class for the operations and one for the model.

A residual MLP without a fused path. In the package both would be one file
``pwm_fast/models/own_residual_dynamics.py``, and a file in ``configs/alg`` would name the kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pwm_fast import config as configuration
from pwm_fast import diagnose, models, ops
from pwm_fast.analysis.accounting import Spaces, count_flops
from pwm_fast.analysis.fairness import compare_parameters
from pwm_fast.models import world_model
from pwm_fast.ops import extend
from pwm_fast.run import checkpoint
from tests.models.builders import small_model
from tests.run.conftest import rows, tiny_config, train_without_plots

H, B, A = 4, 5, 3


class Residual(NamedTuple):
    """``z' = z + f(z, a, task)``."""

    net: Sequence[ops.Layer]

    @property
    def learns_from_starts(self) -> bool:
        return False

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        extend.check_net(self.net, extend.input_width(z, action, task), z)

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: extend.RunNet
    ) -> Tensor:
        x = z.to(dtype)
        return z + run((x, a) if task is None else (x, a, task), self.net, "norm_act")

    def error(self, steps: extend.Transitions) -> Tensor:
        assert steps.following is not None
        return extend.squared_error(steps.following, steps.target, steps.dtype)

    def fused(self) -> str:
        return "residual dynamics have no fused form"


class ResidualModel(models.LatentModel):
    """A world model around it."""

    def _build_transition(self, pair_dim: int) -> None:
        self._dynamics = models.mlp(pair_dim, self.config.units, self.latent_dim)

    def _transition(self) -> models.MLP:
        return self._dynamics

    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> Residual:
        return Residual(layers)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    models.register("own_residual")(ResidualModel)
    yield
    del world_model._KINDS["own_residual"]
    configuration.WORLD_MODELS.remove("own_residual")


def test_rollouts_are_steps() -> None:
    for changes in ({}, {"task_dim": 3, "num_tasks": 2}):
        model = small_model(kind="own_residual", **changes)
        task = torch.tensor([0, 1, 1, 0, 1]) if changes else None
        z = torch.softmax(torch.randn(B, 16, dtype=torch.float64), -1)
        action = torch.randn(H, B, A, dtype=torch.float64)
        expected = [z]
        for a in action:
            expected.append(model.next(expected[-1], a, task))
        torch.testing.assert_close(model.rollout(z, action, task), torch.stack(expected))


def test_the_operations_take_it() -> None:
    model = small_model(kind="own_residual").float()
    z = torch.softmax(torch.randn(B, 16), -1)
    policy = ops.Policy([ops.Layer(torch.randn(A, 16))], torch.ones(A))
    found = ops.imagine(z, policy, model.dynamics(), model.heads(), noise=torch.randn(H, B, A))
    assert found.z.shape == (H + 1, B, 16) and found.reward.shape == (H, B)
    again = ops.latent_rollout(z, found.action, model.dynamics())
    torch.testing.assert_close(again, found.z)
    with pytest.raises(RuntimeError, match="residual dynamics have no fused form"):
        ops.latent_rollout(z, found.action, model.dynamics(), backend="torch")
    with pytest.raises(ValueError, match=r"dynamics\.net"):
        ops.latent_rollout(z, found.action[..., 1:], model.dynamics())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("residual")
    train_without_plots(tiny_config(directory / "run", alg__world_model__kind="own_residual"))
    return directory / "run"


def test_it_trains_and_is_evaluated(run_dir: Path) -> None:
    saved = checkpoint.load(run_dir / "checkpoints" / "final.pt")
    assert any(name.startswith("_dynamics.") for name in saved["agent"]["world_model"])
    losses = [row["dynamics_loss"] for row in rows(run_dir) if "dynamics_loss" in row]
    assert losses and all(0.0 < loss < 1.0 for loss in losses)
    assert "eval_reward" in rows(run_dir)[-1]


def test_it_is_diagnosed(run_dir: Path, tmp_path: Path) -> None:
    config = diagnose.DiagnoseConfig(
        checkpoint=str(run_dir / "checkpoints" / "final.pt"),
        out=str(tmp_path / "out"),
        episodes=2,
        windows=4,
    )
    (found,) = diagnose.diagnose(config)["checkpoints"]
    assert found["kind"] == "own_residual"


def test_it_is_counted() -> None:
    config = configuration.compose("alg=pwm_tiny")
    model = dataclasses.replace(config.alg.world_model, kind="own_residual")
    ours = dataclasses.replace(config, alg=dataclasses.replace(config.alg, world_model=model))
    spaces = Spaces(5, 1, False)
    parity = compare_parameters(ours, config, spaces)
    assert parity.counts["dynamics"] > 0
    assert count_flops(ours.alg, spaces, 4).learning_per_step > 0
