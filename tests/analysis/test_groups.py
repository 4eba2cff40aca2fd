"""Grouping over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pwm_fast import config
from pwm_fast.analysis.groups import _letters, arrange
from pwm_fast.analysis.runs import Run, load
from tests.analysis.conftest import write_run


def make(top: Path, *specifications: dict[str, Any]) -> list[Run]:
    runs = [load(write_run(top / str(i), **s)) for i, s in enumerate(specifications)]
    assert all(isinstance(run, Run) for run in runs)
    return runs  # type: ignore[return-value]


def test_seeds_are_one_group(tmp_path: Path) -> None:
    """And so are runs that differ in what does not change the learning."""
    runs = make(
        tmp_path,
        {"seed": 2},
        {"seed": 0, "threads": 4, "device": "cpu", "run_dir": "elsewhere"},
        {"seed": 1, "checkpoint__every": 7, "eval__every": 3, "wandb__mode": "offline"},
        {"seed": 5, "env": {"name": "cartpole", "start": "hanging", "threads": 3}, "num_envs": 64},
    )
    environments, left_out = arrange(runs)
    assert left_out == []
    [environment] = environments
    [group] = environment.groups
    assert group.label == "pwm_tiny_flow"
    assert [run.seed for run in group.runs] == [0, 1, 2, 5]
    assert environment.differences() == {}


def test_names_say_what_an_algorithms_name_does_not(tmp_path: Path) -> None:
    """Of different algorithms, too: what both names stand for is not repeated."""
    runs = []
    for i, overrides in enumerate(
        [
            ["alg=pwm_tiny"],
            ["alg=pwm_tiny_flow", "alg.actor.lr=0.001", "alg.horizon=12"],
            ["alg=pwm_5M", "num_envs=32"],
            ["alg=pwm_tiny", "alg.name=someones_own", "alg.horizon=12"],
        ]
    ):
        path = write_run(tmp_path / str(i))
        values = config.to_dict(config.compose("env=cartpole", "num_envs=64", *overrides))
        (path / "config.yaml").write_text(OmegaConf.to_yaml(values))
        run = load(path)
        assert isinstance(run, Run)
        runs.append(run)
    [environment], _ = arrange(runs)
    assert [group.label for group in environment.groups] == [
        "pwm_tiny, num_envs=64",
        "pwm_tiny_flow, actor.lr=0.001, horizon=12, num_envs=64",
        "pwm_5M, num_envs=32",
        "someones_own, num_envs=64",
    ]


def test_configurations_are_told_apart(tmp_path: Path) -> None:
    runs = make(
        tmp_path,
        {"alg": "pwm_tiny"},
        {"alg": "pwm_tiny_flow"},
        {"alg": "pwm_tiny_flow", "alg__world_model__substeps": 4},
        {"alg": "pwm_tiny_flow", "alg__world_model__substeps": 8, "num_envs": 16},
        {"alg": "pwm_tiny_flow", "epochs": 40},
    )
    [environment], left_out = arrange(runs)
    assert [group.label for group in environment.groups] == [
        "pwm_tiny, world_model.substeps=2, num_envs=64",  # 1 is shipped
        "pwm_tiny_flow, world_model.substeps=2, num_envs=64",
        "pwm_tiny_flow, world_model.substeps=4, num_envs=64",
        "pwm_tiny_flow, world_model.substeps=8, num_envs=16",
    ]
    assert [item.path.name for item in left_out] == ["4"]
    differences = environment.differences()
    assert differences["alg.world_model.substeps"] == [2, 2, 4, 8]
    assert differences["alg.world_model.kind"] == ["mlp", "flow", "flow", "flow"]
    assert set(differences) == {
        "alg.name",
        "alg.world_model.kind",
        "alg.world_model.substeps",
        "num_envs",
    }


def test_labels_name_all_that_differs(tmp_path: Path) -> None:
    """However many keys that are; letters stand for labels that are long."""
    changes = {f"alg__{name}": 7 for name in ("horizon", "random_hold", "random_epochs")}
    runs = make(
        tmp_path,
        {},
        {**changes, "alg__steps_per_epoch": 3},
        {**changes, "alg__steps_per_epoch": 4},
    )
    groups = arrange(runs)[0][0].groups
    start = "pwm_tiny_flow, horizon=7, random_epochs=7, random_hold=7"
    assert groups[1].label == f"{start}, steps_per_epoch=3"
    assert groups[2].label == f"{start}, steps_per_epoch=4"
    assert [group.name for group in groups] == ["A", "B", "C"]


def test_letters_go_on_after_z() -> None:
    assert [_letters(i) for i in (0, 25, 26, 51, 52, 26 * 27)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "AAA",
    ]


def test_environments_are_apart(tmp_path: Path) -> None:
    runs = make(
        tmp_path,
        {},
        {"env": {"name": "cartpole", "start": "upright"}},
        {"env": {"name": "ant"}},
        {"env": {"name": "dmc", "domain": "cheetah", "task": "run", "max_episode_steps": 9}},
    )
    environments, _ = arrange(runs)
    assert [e.label for e in environments] == [
        "cartpole (start=hanging)",
        "cartpole (start=upright)",
        "ant",
        "dmc (domain=cheetah, task=run, max_episode_steps=9)",
    ]
    assert [e.slug for e in environments] == [
        "cartpole-hanging",
        "cartpole-upright",
        "ant",
        "dmc-cheetah-run-9",
    ]
    assert [e.named("cartpole") for e in environments] == [True, True, False, False]
    assert [e.named("cartpole-upright") for e in environments] == [False, True, False, False]
    assert [e.named("cart") for e in environments] == [False] * 4


def test_a_seed_counts_once(tmp_path: Path) -> None:
    """The run that got further stays."""
    runs = make(
        tmp_path,
        {"epochs": 10, "status": None},
        {"epochs": 30, "status": None},
        {"epochs": 20, "status": None},
        {"seed": 1},
    )
    [environment], left_out = arrange(runs)
    [group] = environment.groups
    assert [run.path.name for run in group.runs] == ["1", "3"]
    assert [item.path.name for item in left_out] == ["0", "2"]
    assert all(f"also in {tmp_path / '1'}, which got further" in x.reason for x in left_out)
