"""Runs of several tasks: training, resuming, evaluating, planning, exporting and diagnosing."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.analysis.diagnosed import diagnosed
from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.analysis.diagnosis_tables import tables
from pwm_fast.analysis.runs import Run, load
from pwm_fast.config import ConfigError, EnvConfig, PlanningConfig
from pwm_fast.data import describe
from pwm_fast.data.episodes import read_episode
from pwm_fast.envs import tasks_of
from pwm_fast.run import build, checkpoint, metrics, provenance
from pwm_fast.run.collection import MixedPolicy
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint, table
from pwm_fast.run.export import ExportConfig, export
from pwm_fast.run.start import train
from tests.envs.suites import dm_control_suite
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config
from tests.run.test_resume import assert_same, hook

dm_control_suite()

pytestmark = pytest.mark.usefixtures("no_plots")

NAMES = ["cartpole-swingup", "cup-catch", "pendulum-swingup"]  # O of 5, 8, 3; A of 1, 2, 1
WIDTHS = (8, 2)
EPISODES = {"eval.episodes": 3, "eval.final_episodes": 6}
TASKS: dict[str, Any] = {
    "env.tasks": NAMES,
    "alg.world_model.num_tasks": 3,
    "alg.world_model.task_dim": 8,
    "alg.normalize_obs": True,
    "num_envs": 6,
    **EPISODES,
}
ENV = {"name": "dmc_tasks", "tasks": NAMES, "max_episode_steps": 12}


@pytest.fixture(scope="module")
def done(starter: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three tasks; not to be written."""
    directory = tmp_path_factory.mktemp("tasks")
    outcome = starter.run(directory, *arguments(directory / "run"))
    assert outcome.status == 0, outcome.err
    return directory / "run"


def final(done: Path) -> Path:
    return done / "checkpoints" / "final.pt"


def arguments(run_dir: Path, *extra: str) -> list[str]:
    own = [f"{key}={value}".replace(" ", "").replace("'", "") for key, value in TASKS.items()]
    return tiny_arguments(run_dir, "env=dmc_tasks", *own, *extra)


# --- training -------------------------------------------------------------------------------------


def test_each_task_has_its_returns(done: Path) -> None:
    logged = rows(done)
    for row in logged:
        assert all((f"eval_reward/{name}" in row) == ("eval_reward" in row) for name in NAMES)
    assert sum("eval_reward" in row for row in logged) == 4
    for row in (row for row in logged if "eval_reward" in row):
        mean = sum(row[f"eval_reward/{name}"] for name in NAMES) / 3
        assert row["eval_reward"] == pytest.approx(mean), "one episode each"
    ended = [row for row in logged[1:] if row["train_reward"] is not None]
    assert [row["epoch"] for row in ended] == [3, 6], "episodes have 12 steps, epochs 4"
    for row in ended:
        own = [row[f"train_reward/{name}"] for name in NAMES]
        assert row["train_reward"] == pytest.approx(sum(own) / 3)
        assert len(set(own)) > 1
    summary = json.loads((done / "summary.json").read_text())["evaluation"]
    assert {name: len(of["returns"]) for name, of in summary["tasks"].items()} == dict.fromkeys(
        NAMES, 2
    )


@pytest.mark.parametrize("at", [45, 90])
def test_a_killed_run_goes_on_to_the_bit(
    at: int, done: Path, starter: Launcher, tmp_path: Path
) -> None:
    given = arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *given, hook=hook(at, signal.SIGKILL))
    assert outcome.status == -signal.SIGKILL, outcome
    assert len(rows(tmp_path / "run")) < 7
    outcome = starter.run(tmp_path, *given)
    assert outcome.status == 0, outcome.err
    assert_same(tmp_path / "run", done)


def test_the_networks_see_which_task_it_is(done: Path) -> None:
    """And each task has statistics of its own, in which what it lacks is constant."""
    run, content = build.load_run(final(done))
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.restore_agent(final(done), run, content, env, torch.device("cpu"))
        obs, tasks = env.reset()[0], tasks_of(env)
    assert tasks is not None and agent.action_mask is not None
    assert agent.action_mask.tolist() == [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    assert agent.obs_rms.mean.shape == (3, 8) and bool((agent.obs_rms.count > 0).all())
    for number, width in enumerate((5, 8, 3)):
        assert not agent.obs_rms.mean[number, width:].any()
        assert agent.obs_rms.var[number, :width].min() > 0.0
    of_each = [agent.act(obs, task=torch.full((3,), k), deterministic=True)[:, 0] for k in range(3)]
    assert not torch.equal(of_each[0], of_each[1])


@pytest.mark.parametrize(
    ("env", "changes", "message"),
    [
        ("cartpole", {"num_tasks": 3, "task_dim": 16}, r"num_tasks=3 wants an environment that"),
        ("dmc_tasks", {}, r"of 3 tasks wants a model .*num_tasks=3 .* such as .*task_dim=32"),
        ("dmc_tasks", {"num_tasks": 3}, r"alg.world_model.num_tasks must be 1 .* task_dim"),
        (
            "dmc_tasks",
            {"num_tasks": 2, "task_dim": 8},
            r"have the numbers \[0, 1, 2\], alg.world_model.num_tasks=2 are 0 to 1",
        ),
    ],
)
def test_models_that_do_not_fit_the_tasks(
    env: str, changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    given = {f"alg.world_model.{key}": value for key, value in changes.items()}
    given.update({"env.tasks": NAMES, "num_envs": 3} if env == "dmc_tasks" else {})
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", env, **{**EPISODES, **given}))
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit_are_refused_by_the_commands(
    launcher: Launcher, tmp_path: Path
) -> None:
    keys = ("alg.world_model.num_tasks=3", "alg.world_model.task_dim=16")
    outcome = launcher.run(tmp_path, *tiny_arguments(tmp_path / "run", *keys))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "wants an environment that says which task each env is of" in outcome.err
    assert not (tmp_path / "run").exists()
    outcome = launcher.run(tmp_path, *keys, "alg=pwm_5M_flow", module="pwm_fast.parity")
    assert "num_tasks" not in outcome.err, "models of several tasks can be counted"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.episodes": 2}, r"eval\.episodes must be at least 3, an episode for each .* got 2"),
        ({"eval.final_episodes": 1}, r"eval\.final_episodes must be at least 3, .* got 1"),
        ({"num_envs": 2}, "3 tasks need as many envs or episodes at least, one each, got 2"),
        ({"env.tasks": ["cup-catch", "cup-spin", "cup-x"]}, r"cup-spin of env\.tasks: dm_control"),
        ({"alg.discounts": [0.9]}, r"alg.discounts must be one for each of .*num_tasks=3"),
    ],
)
def test_what_cannot_be_used_is_said_first(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", "dmc_tasks", **{**TASKS, **changes}))
    assert not (tmp_path / "run").exists()


# --- evaluating -----------------------------------------------------------------------------------


def test_evaluate(done: Path) -> None:
    found = evaluate_checkpoint(EvaluateConfig(str(final(done)), episodes=7, device="cpu"))
    assert {name: own["episodes"] for name, own in found["tasks"].items()} == dict(
        zip(NAMES, (3, 2, 2), strict=True)
    )
    for k, own in enumerate(found["tasks"].values()):
        assert own["returns"] == found["returns"][k::3]
        assert own["reward_mean"] == pytest.approx(sum(own["returns"]) / len(own["returns"]))
    lines = table(found).splitlines()[4:]
    assert [line.split()[0] for line in lines] == ["mean", "return", "episode", *NAMES]
    assert len({len(line) for line in lines}) == 1, "names of any length leave the columns aligned"


def test_evaluate_prints_and_stores_it(done: Path, launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(
        tmp_path,
        f"checkpoint={final(done)}",
        "episodes=3",
        "json=out.json",
        module="pwm_fast.evaluate",
    )
    assert outcome.status == 0, outcome.err
    assert all(name in outcome.out for name in NAMES)
    assert set(json.loads((tmp_path / "out.json").read_text())["tasks"]) == set(NAMES)
    short = (f"checkpoint={final(done)}", "episodes=2", "json=x.json")
    outcome = launcher.run(tmp_path, *short, module="pwm_fast.evaluate")
    assert outcome.status == 2 and "3 tasks need as many envs or episodes" in outcome.err


def test_a_planner_acts(done: Path) -> None:
    planning = PlanningConfig(
        "mppi", horizon=2, iterations=2, samples=12, elites=4, policy_trajectories=2
    )
    config = EvaluateConfig(str(final(done)), episodes=6, device="cpu", planning=planning)
    found = evaluate_checkpoint(config)
    assert found == evaluate_checkpoint(config)
    by_policy = evaluate_checkpoint(EvaluateConfig(str(final(done)), episodes=6, device="cpu"))
    assert found["tasks"].keys() == by_policy["tasks"].keys()
    assert found["returns"] != by_policy["returns"]


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve episodes, half of them of random actions."""
    out = tmp_path_factory.mktemp("data") / "set"
    export(ExportConfig(str(out), str(final(done)), episodes=12, random_share=0.5, device="cpu"))
    return out


def test_exported_episodes_say_their_task(exported: Path) -> None:
    found = describe(exported)
    assert found.names == tuple(NAMES) and (found.obs_dim, found.action_dim) == WIDTHS
    assert {number: part.episodes for number, part in found.tasks.items()} == {0: 4, 1: 4, 2: 4}
    for i, path in enumerate(sorted(exported.glob("*.npz"))):
        episode = read_episode(path, *WIDTHS)
        assert episode.task == i % 3
        width, reads = ((5, 1), (8, 2), (3, 1))[episode.task]
        assert not episode.obs[:, width:].any() and not episode.action[:, reads:].any()
        assert episode.obs[:, :width].any(0).all() and episode.action[:, :reads].any(0).all()


def test_random_episodes_are_of_all_tasks(done: Path) -> None:
    """Of eight envs of two tasks every second one would be random: all of one task."""
    config = tiny_config(done, "dmc_tasks", **{**TASKS, "env.tasks": NAMES[:2]})
    with closing(build.make_env(config, 8, 0)) as env:
        tasks = tasks_of(env)
        assert tasks is not None
        agent: Any = object()
        act = MixedPolicy(agent, 8, 2, policy="stochastic", random_share=0.5, tasks=tasks)
    for number in (0, 1):
        assert int(act.random[tasks.of_env == number].sum()) == 2


def test_training_on_exported_episodes(exported: Path, tmp_path: Path) -> None:
    """By their names: in an environment of two of the tasks, in another order."""
    two = {"env.tasks": [NAMES[2], NAMES[1]], "alg.world_model.num_tasks": 2, "eval.episodes": 2}
    config = tiny_config(
        tmp_path / "run", "dmc_tasks", **{**TASKS, **two, "data.path": str(exported), "epochs": 1}
    )
    summary, status = train(config)
    assert (summary["status"], status) == ("finished", 0)
    (recorded,) = provenance.read(tmp_path / "run" / "provenance.json")
    assert recorded["data"]["episodes"] == 8
    content = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    counts = content["agent"]["obs_rms"]["count"]
    assert counts.tolist() == [4 * 12 + 3 * 4] * 2, "of the data, and of the run's own steps"


def test_random_episodes_without_a_checkpoint(tmp_path: Path) -> None:
    export(ExportConfig(str(tmp_path / "data"), env=dict(ENV), episodes=3, device="cpu"))
    assert json.loads((tmp_path / "data" / "tasks.json").read_text()) == NAMES
    numbered = {**ENV, "tasks": NAMES[:2], "numbers": [4, 2]}
    export(ExportConfig(str(tmp_path / "own"), env=numbered, episodes=2, device="cpu"))
    found = describe(tmp_path / "own")
    assert sorted(found.tasks) == [2, 4]
    assert found.names == ("task 0", "task 1", NAMES[1], "task 3", NAMES[0])


# --- one of the tasks -----------------------------------------------------------------------------


def test_one_of_the_tasks(done: Path) -> None:
    """Alone it is what it is beside the others: the model sees the same."""
    run, content = build.load_run(final(done))
    assert list(build.task_numbers(run.env)) == NAMES and build.dims_of(content) == WIDTHS
    one = build.of_task(run.env, "pendulum-swingup", 8, 2)
    assert one.options == {
        "tasks": ["pendulum-swingup"],
        "numbers": [2],
        "obs_dim": 8,
        "action_dim": 2,
        "action_repeat": 2,
    }
    assert (one.name, one.max_episode_steps) == ("dmc_tasks", 12)
    assert run.env.options["tasks"] == NAMES, "the whole one is as it was"
    assert build.of_task(one, "pendulum-swingup", 8, 2) == one
    numbered = EnvConfig("dmc_tasks", options={"tasks": NAMES, "numbers": [7, 3, 5]})
    assert build.of_task(numbered, "cup-catch", 8, 2).options["numbers"] == [3]


def test_training_in_one_of_the_tasks(done: Path, tmp_path: Path) -> None:
    """In a world model of all of them: the others' rows of its table stay as they are."""
    run, content = build.load_run(final(done))
    config = replace(
        run,
        env=build.of_task(run.env, "cup-catch", *build.dims_of(content)),
        init=str(final(done)),
        run_dir=str(tmp_path / "run"),
    )
    summary, status = train(config)
    assert (summary["status"], status) == ("finished", 0)
    assert "tasks" in summary["evaluation"] and not summary["evaluation"]["tasks"]
    before, after = (
        checkpoint.load(final(d))["agent"]["world_model"] for d in (done, tmp_path / "run")
    )
    changed = (before["_task_emb.weight"] != after["_task_emb.weight"]).any(1)
    assert changed.tolist() == [False, True, False]
    assert not any("/cup-catch" in key for row in rows(tmp_path / "run") for key in row)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            EnvConfig("dmc_tasks", options={"tasks": NAMES}),
            "task must be one of cartpole-swingup, cup-catch, pendulum-swingup, got 'walker-walk'",
        ),
        (EnvConfig("cartpole"), "task=walker-walk is for environments of several tasks, env=cart"),
    ],
)
def test_no_such_task(env: EnvConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.of_task(env, "walker-walk", 24, 6)


QUICK: dict[str, Any] = {
    "episodes": 3,
    "points": 4,
    "probes": 2,
    "esnr_samples": [2],
    "threads": 1,
    "device": "cpu",
}


def test_diagnose_one_of_the_tasks(done: Path) -> None:
    found = {}
    for name in (NAMES[0], NAMES[1]):
        result = metrics.finite(diagnose(DiagnoseConfig(str(final(done)), task=name, **QUICK)))
        (found[name],) = result["checkpoints"]
        assert found[name]["task"] == name and f"dmc_tasks {name}, 3 held-out" in tables(result)
    for of, width in zip(found.values(), (5, 8), strict=True):
        assert (of["episodes"], of["steps"]) == (3, 36)
        assert all(v > 0 for v in of["prediction"]["latent_rms"])
        known = [r2 is not None for r2 in of["latents"]["obs_r2"]]
        assert known[width:] == [False] * (8 - width), "what only fills up does not vary"
        assert "built-in robots alone" in of["sensitivity"]["unavailable"]
    first, second = found.values()
    assert first["return_mean"] != second["return_mean"]
    assert first["jacobian"]["norm_a"] != second["jacobian"]["norm_a"]


def test_components_that_a_task_does_not_read_do_not_count(done: Path) -> None:
    """The Jacobian by the action is that of the one component: no weight of the other is in it."""
    other = done / "checkpoints" / "changed.pt"
    content = checkpoint.load(final(done))
    first = content["agent"]["world_model"]["_velocity.0.weight"]
    first[:, 16 + 1] += 5.0 * torch.randn(len(first))  # inputs: z, both components, tau, the task
    checkpoint.save(other, content)
    found = {}
    try:
        for path in (final(done), other):
            for name in NAMES[:2]:
                (own,) = diagnose(DiagnoseConfig(str(path), task=name, **QUICK))["checkpoints"]
                found[path, name] = own["jacobian"]
    finally:
        other.unlink()
    assert found[other, NAMES[0]] == found[final(done), NAMES[0]]
    assert found[other, NAMES[1]]["norm_a"] != found[final(done), NAMES[1]]["norm_a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "final.pt is of several tasks: give task=NAME, one of cartpole-swingup, cup-catch, p"),
        ({"task": "walker-walk"}, "task must be one of cartpole-swingup, .*, got 'walker-walk'"),
        ({"task": ""}, "task must be a task's name or null, got ''"),
    ],
)
def test_a_diagnosis_is_of_one_task(changes: dict[str, str], message: str, done: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        diagnose(DiagnoseConfig(str(final(done)), **QUICK, **changes))


def test_a_task_of_a_model_of_one(finished: Path) -> None:
    with pytest.raises(ConfigError, match="task=run is for environments of several tasks, env=car"):
        diagnose(DiagnoseConfig(str(final(finished)), task="run", **QUICK))


def test_the_command_keeps_a_folder_for_each_task(done: Path, launcher: Launcher) -> None:
    given = (f"checkpoint={final(done)}", "task=cup-catch")
    quick = (f"{k}={v}".replace(" ", "") for k, v in QUICK.items())
    outcome = launcher.run(done.parent, *given, *quick, module="pwm_fast.diagnose")
    assert (outcome.status, outcome.err) == (0, "")
    assert (done / "checkpoints" / "final.cup-catch.diagnosis" / "rewards.png").exists()
    run = load(done)
    assert isinstance(run, Run)
    assert [d.checkpoint for d in diagnosed(run)] == ["final.pt (cup-catch)"]
