"""``evaluate planning=mppi``: a planner acts in place of the policy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent import PWM, Planner
from pwm_fast.config import ConfigError, PlanningConfig
from pwm_fast.envs import VectorEnv
from pwm_fast.run import checkpoint
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.evaluation import EvaluateConfig, evaluate, evaluate_checkpoint, table
from tests.run.conftest import finish
from tests.run.test_evaluation import Scripted

SMALL = {"iterations": 2, "samples": 16, "elites": 4, "policy_trajectories": 2}


def mppi(**changes: Any) -> PlanningConfig:
    return PlanningConfig("mppi", **{**SMALL, **changes})


@pytest.fixture(scope="module", params=["mlp", "flow"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the baseline's dynamics, and one with a flow."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    finish(directory, alg__world_model__kind=request.param)
    return directory / "checkpoints" / "final.pt"


def test_a_planner_acts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(planning: PlanningConfig | None = None, seed: int = 0) -> dict[str, Any]:
        config = EvaluateConfig(str(path), episodes=3, seed=seed, device="cpu", threads=1)
        if planning is not None:
            config = dataclasses.replace(config, planning=planning)
        return evaluate_checkpoint(config)

    by_policy = evaluated()
    assert by_policy["planning"] is None
    assert "3 episodes, deterministic policy, seed 0" in table(by_policy)
    assert evaluated(PlanningConfig()) == by_policy

    planned = evaluated(mppi())
    assert planned["planning"] == {
        "kind": "mppi",
        "horizon": 3,
        **SMALL,
        "min_std": 0.05,
        "max_std": 2.0,
        "temperature": 0.5,
    }
    assert planned["lengths"] == [12, 12, 12]
    said = "3 episodes, planner mppi (horizon 3, 2 iterations, 16 samples), seed 0"
    assert said in table(planned)
    assert planned["returns"] != by_policy["returns"]
    assert evaluated(mppi()) == planned != evaluated(mppi(horizon=1))
    monkeypatch.setattr(PWM, "act", None)  # the policy is not asked
    assert evaluated(mppi()) == planned


class Watched:
    """Plans nothing, and notes which episodes it is told to begin."""

    def __init__(self) -> None:
        self.firsts: list[list[bool]] = []

    def act(self, obs: Tensor, first: Tensor) -> Tensor:
        self.firsts.append(first.tolist())
        return torch.zeros(obs.shape[0], 1)


def test_plans_begin_with_episodes() -> None:
    """Env 0 has episodes of 2 steps, env 1 one of 5."""
    planner = Watched()
    env = cast(VectorEnv, Scripted([2, 5]))
    result = evaluate(cast(PWM, None), env, 7, planner=cast(Planner, planner))
    assert result.returns.tolist() == [3, 15]
    zero, one = zip(*planner.firsts, strict=True)
    assert zero == (True, False, True, False, True)
    assert one == (True, False, False, False, False)


def test_without_a_world_model(path: Path, tmp_path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["agent"]["world_model"]
    checkpoint.save(tmp_path / "a.pt", content)
    config = EvaluateConfig(str(tmp_path / "a.pt"), device="cpu", planning=mppi())
    with pytest.raises(CheckpointError, match=r"a\.pt .*: world_model is missing"):
        evaluate_checkpoint(config)


def test_the_parameters_are_those_of_the_operation() -> None:
    assert PlanningConfig("mppi").parameters() == vars(ops.MPPI())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cem"}, "planning.kind must be one of none, mppi, got 'cem'"),
        ({"horizon": 0}, "planning.horizon must be positive, got 0"),
        ({"elites": 17}, "planning.elites must be at most planning.samples=16, got 17"),
        (
            {"policy_trajectories": 20},
            "planning.policy_trajectories must be at most planning.samples=16, got 20",
        ),
        ({"min_std": 3.0}, "planning.max_std must be at least planning.min_std=3.0, got 2.0"),
        ({"temperature": float("nan")}, "planning.temperature must be 0 or more, got nan"),
        (
            {"kind": "none"},
            "planning.iterations must be left at 6 without a planner such as planning=mppi, got 2",
        ),
    ],
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PlanningConfig(**{"kind": "mppi", **SMALL, **changes})
