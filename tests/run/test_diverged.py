"""Episodes that diverged are told apart everywhere, and a policy that is not finite ends a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pwm_fast import cli
from pwm_fast.agent import PWM
from pwm_fast.analysis import measures, runs
from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.config import TrainConfig
from pwm_fast.envs import EnvironmentFault, MujocoEnv
from pwm_fast.run import charts, checkpoint, evaluation, trainer
from pwm_fast.run.acting import PolicyNotFinite
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.evaluation import EvaluateConfig, Evaluation, evaluate_checkpoint
from pwm_fast.run.export import ExportConfig, export
from pwm_fast.run.start import print_summary, train
from pwm_fast.run.supply import NothingToLearn
from pwm_fast.run.trainer import TrainingDiverged
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")

ID = "pwm_fast/Fragile-v0"


class Fragile(gymnasium.Env):
    """Ends after 8 steps with a reward of 1 each, unless it breaks before.

    Args:
        breaks: step from which on it answers with ``value``; 0 for never.
        where: ``"reward"``, or the entry of the observation that is ``value``.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    fault: BaseException | None = None
    fault_at: int = 0
    calls: int = 0

    def __init__(self, breaks: int = 0, where: str | int = "reward", value: str = "nan") -> None:
        self.breaks, self.where, self.value = breaks, where, float(value)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        Fragile.calls += 1
        if Fragile.fault is not None and Fragile.calls == Fragile.fault_at:
            raise Fragile.fault
        self.t += 1
        obs, reward = self.np_random.normal(size=3).astype(np.float32), 1.0
        if 0 < self.breaks <= self.t:
            if self.where == "reward":
                reward = self.value
            else:
                obs[int(self.where)] = self.value
        return obs, reward, False, self.t >= 8, {}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Fragile.calls, Fragile.fault, Fragile.fault_at = 0, None, 0
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])
    gymnasium.register(ID, entry_point=Fragile, max_episode_steps=8)
    yield
    del gymnasium.registry[ID]


def config(run_dir: Path, kwargs: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    own = {"env.name": "gym", "env.id": ID, "env.kwargs": kwargs or {}}
    return tiny_config(run_dir, **{**own, "env.max_episode_steps": 8, "esnr.every": 0, **changes})


def summary_of(run_dir: Path) -> Any:
    return json.loads((run_dir / "summary.json").read_text())


# --- evaluations ----------------------------------------------------------------------------------

BROKEN = "ignore:.*envs diverged:RuntimeWarning"


@pytest.mark.filterwarnings(BROKEN)
@pytest.mark.parametrize("where", ["reward", 2])
def test_evaluations_tell(where: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In every place that tells of one: rows, terminal, summary, table and JSON."""
    run_dir = tmp_path / "run"
    summary, _ = train(config(run_dir, {"breaks": 6, "where": where}, eval__episodes=3))
    assert [r["eval_diverged"] for r in rows(run_dir) if "eval_reward" in r] == [3] * 4
    assert summary["evaluation"]["diverged"] == summary_of(run_dir)["evaluation"]["diverged"] == 2
    assert summary["best"]["diverged"] == 3
    out = capsys.readouterr().out
    assert "  diverged 3  " in out
    assert "diverged: 2 of 2 episodes (their returns stop there)" in out
    path = str(run_dir / "checkpoints" / "best.pt")
    result = evaluate_checkpoint(EvaluateConfig(path, episodes=4, device="cpu"))
    assert (result["diverged"], result["lengths"]) == (4, [6] * 4)
    assert result["returns"] == [5.0] * 4
    assert "diverged: 4 of 4 episodes (their returns stop there)" in evaluation.table(result)
    loaded = runs.load(run_dir)
    assert isinstance(loaded, runs.Run)
    assert "2 episodes of its final evaluation diverged" in loaded.notes


def test_nothing_is_said_of_sound_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary, _ = train(config(tmp_path / "run"))
    assert summary["evaluation"]["diverged"] == summary["best"]["diverged"] == 0
    assert {r["eval_diverged"] for r in rows(tmp_path / "run") if "eval_reward" in r} == {0}
    path = str(tmp_path / "run" / "checkpoints" / "best.pt")
    result = evaluate_checkpoint(EvaluateConfig(path, episodes=2, device="cpu"))
    assert "diverged" not in capsys.readouterr().out + evaluation.table(result)
    del summary["evaluation"]["diverged"]  # of an older version
    print_summary(summary)


def results(*values: tuple[float, int]) -> Iterator[Evaluation]:
    """Evaluations of 4 episodes by their reward and how many diverged."""
    for reward, diverged in values:
        lost = torch.arange(4) < diverged
        yield Evaluation(torch.full((4,), reward), torch.full((4,), 8), None, lost)


# epochs 0, 2, 4 and 6 are evaluated, then the run as a whole
ORDERS = {
    "diverged ones with more": ([(1.0, 0), (90.0, 1), (3.0, 0), (99.0, 4)], 4),
    "fewer, then the reward": ([(50.0, 4), (9.0, 2), (5.0, 1), (7.0, 1)], 6),
    "all as many": ([(5.0, 4), (9.0, 4), (7.0, 4), (8.0, 4)], 2),
    "a reward that is not finite": ([(math.nan, 0), (9.0, 1), (-7.0, 0), (math.inf, 0)], 4),
}


@pytest.mark.parametrize("name", ORDERS)
def test_what_is_best(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, best = ORDERS[name]
    told = results(*values, (0.0, 0))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: next(told))
    summary, _ = train(config(tmp_path / "run"))
    assert summary["best"]["epoch"] == best
    assert summary["best"]["diverged"] == values[best // 2][1]
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert (saved["epoch"], saved["best"]) == (best, summary["best"])
    run = runs.load(tmp_path / "run")
    assert isinstance(run, runs.Run)
    assert measures._best_return(run) == summary["best"]["reward"], "compare"

    class Axes:
        def plot(self, x: float, y: float, *_: Any, **__: Any) -> None:
            assert y == summary["best"]["reward"]

    charts._draw_best(Axes(), "eval_reward", run.rows)


@pytest.mark.parametrize("diverged", [0, 2])
def test_a_run_of_an_older_version_goes_on(
    diverged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    told = results((1.0, 0), (5.0, 0), (0.0, 0), (9.0, diverged), (0.0, 0))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: next(told))
    train(config(run_dir, epochs=2))
    for path in (run_dir / "checkpoints").glob("*.pt"):
        content = checkpoint.load(path)
        del content["best"]["diverged"], content["ended"]
        checkpoint.save(path, content)
    summary, _ = train(config(run_dir, epochs=4))
    assert summary["best"]["epoch"] == (2 if diverged else 4)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("best", "diverged", -1), ("best", "diverged", 0.5), ("ended", "episodes", "x")],
)
def test_a_damaged_count_is_refused(part: str, key: str, value: Any, tmp_path: Path) -> None:
    train(config(tmp_path / "run", epochs=2))
    path = tmp_path / "run" / "checkpoints" / "latest.pt"
    content = checkpoint.load(path)
    content[part][key] = value
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match=f"{part} must be"):
        train(config(tmp_path / "run", epochs=4))


# --- policies that are not finite -----------------------------------------------------------------

KEYS = {
    "alg.actor.lr=1e38": r"the actions of 2 of 2 envs are not finite.* in actor\.mu_net",
    "alg.model_learning.lr=1e20": r"the latents of 2 of 2 envs are not finite.* world_model\.",
    "alg.actor.input_gain=3e38": r"all parameters are \(up to \S+ in actor\.mu_net\.0\.weight",
}


@pytest.mark.parametrize("env", ["cartpole", "gym"])
@pytest.mark.parametrize("key", KEYS)
def test_a_policy_that_breaks_in_training(key: str, env: str, tmp_path: Path) -> None:
    name, value = key.split("=")
    make: Any = config if env == "gym" else tiny_config
    for run_dir, changes in (("evaluated", {}), ("collecting", {"eval.every": 0})):
        if run_dir == "collecting" and "gain" in key:
            continue  # seen by the first evaluation
        path = tmp_path / run_dir
        with pytest.raises(TrainingDiverged, match="the policy cannot act: ") as caught:
            train(make(path, **{name: float(value), **changes}))
        assert str(caught.value).endswith(f"the state is in {path / 'checkpoints' / 'latest.pt'}")
        if run_dir == "evaluated":
            assert caught.match(KEYS[key])
        assert checkpoint.load(path / "checkpoints" / "latest.pt")["replay"] is not None
        assert summary_of(path)["status"] == "diverged"
        with pytest.raises(cli.USER_ERRORS):  # the same command, again in one line
            train(make(path, **{name: float(value), **changes}))


def test_a_policy_that_breaks_by_the_command(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(tmp_path, *tiny_arguments(tmp_path / "run", "alg.actor.lr=1e38"))
    assert outcome.status == 2
    assert outcome.err.startswith("error: the policy cannot act: ")
    assert outcome.err.count("\n") == 1


@pytest.fixture
def overflowing(tmp_path: Path) -> str:
    """A checkpoint with finite parameters whose products are not."""
    train(config(tmp_path / "run", epochs=2))
    path = tmp_path / "run" / "checkpoints" / "final.pt"
    content = checkpoint.load(path)
    for value in content["agent"]["actor"].values():
        value.fill_(3e38)
    checkpoint.save(path, content)
    return str(path)


COMMANDS: dict[str, Any] = {
    "evaluate": lambda path, _: evaluate_checkpoint(EvaluateConfig(path, 2, device="cpu")),
    "diagnose": lambda path, _: diagnose(DiagnoseConfig(path, episodes=2, device="cpu")),
    "export": lambda path, out: export(ExportConfig(str(out), path, episodes=2, device="cpu")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_the_checkpoint(name: str, overflowing: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        COMMANDS[name](overflowing, tmp_path / "out")
    assert str(caught.value).startswith(f"{overflowing} cannot be used: the policy cannot act: ")
    assert "\n" not in str(caught.value)


class Blind:
    """Envs of one step that end as diverged where an action is not finite, as on a GPU."""

    num_envs, max_episode_steps, device = 3, 5, torch.device("cpu")

    def reset(self, *, seed: int) -> Any:
        return torch.zeros(3, 1), {}

    def step(self, action: Tensor) -> Any:
        over = torch.ones(3, dtype=torch.bool)
        info = {"diverged": ~torch.isfinite(action).all(-1)}
        return torch.zeros(3, 1), torch.ones(3), over, ~over, info


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_evaluation_where_the_environment_does_not_look(value: float) -> None:
    class Agent:
        def __init__(self, value: float) -> None:
            self.value = value

        def act(self, obs: Tensor, *, task: None, deterministic: bool) -> Tensor:
            return torch.tensor([[0.0], [self.value], [0.0]])

        def why_not_finite(self, obs: Tensor, task: None) -> str:
            return "actor.x has 1 NaN"

    env: Any = Blind()
    bad: Any = Agent(value)
    with pytest.raises(PolicyNotFinite, match=r"cannot act: actor\.x has 1 NaN"):
        evaluation.evaluate(bad, env, 0)
    good: Any = Agent(0.5)
    assert evaluation.evaluate(good, env, 0).diverged.tolist() == [False] * 3


def test_training_where_the_environment_does_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MujocoEnv.step

    def blind(env: MujocoEnv, action: Tensor) -> Any:
        bad = ~torch.isfinite(action).all(-1)
        *answer, info = step(env, torch.nan_to_num(action))
        return *answer, {**info, "diverged": info["diverged"] | bad}

    monkeypatch.setattr(MujocoEnv, "step", blind)
    changes: dict[str, Any] = {"alg.actor.lr": 1e38, "eval.every": 0}
    with pytest.raises(TrainingDiverged, match=r"the policy cannot act: .* in epoch 3; the state"):
        train(tiny_config(tmp_path / "run", **changes))
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["epoch"] == 3


def test_random_envs_do_not_need_the_policy(overflowing: str, tmp_path: Path) -> None:
    options: Any = {"policy": "random", "episodes": 2, "device": "cpu"}
    assert export(ExportConfig(str(tmp_path / "out"), overflowing, **options))[1] == 16


def test_looking_draws_no_random_numbers(overflowing: str) -> None:
    """So a run is the same whether an env diverged or not."""
    from pwm_fast.run import build

    run, content = build.load_run(Path(overflowing))
    env = build.make_env(run, 2, 0)
    agent: PWM = build.restore_agent(Path(overflowing), run, content, env, torch.device("cpu"))
    before = torch.get_rng_state()
    assert agent.why_not_finite(torch.zeros(2, 3)) is not None
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    assert agent.why_not_finite(torch.zeros(2, 3)) is None


# --- reasons --------------------------------------------------------------------------------------

REASONS = {
    ("reward", "nan"): "the reward is nan",
    ("reward", "-inf"): "the reward is -inf",
    ("reward", "3e12"): r"the reward is 3e\+12",
    (1, "nan"): "entry 1 is nan of the observation",
    (2, "inf"): "entry 2 is inf of the observation",
}


@pytest.mark.filterwarnings(BROKEN)
@pytest.mark.parametrize(("where", "value"), REASONS)
@pytest.mark.parametrize("num_envs", [2, 5])
def test_only_diverged_episodes(where: Any, value: str, num_envs: int, tmp_path: Path) -> None:
    kwargs = {"breaks": 3, "where": where, "value": value}
    with pytest.raises(NothingToLearn) as caught:
        train(config(tmp_path / "run", kwargs, num_envs=num_envs, epochs=5))
    # 20 steps, of which every third ends an episode.
    assert caught.match(f"all {6 * num_envs} episodes ended as diverged")
    assert caught.match(f"env 0, step 3 of its episode: {REASONS[where, value]}")
    assert "set alg.horizon" not in str(caught.value)
    again = config(tmp_path / "run", kwargs, num_envs=num_envs, epochs=5)
    with pytest.raises(NothingToLearn, match=f"all {6 * num_envs} episodes ended as diverged"):
        train(again)  # of a checkpoint, without knowing why


@pytest.mark.filterwarnings(BROKEN)
def test_some_diverged_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Fragile.step

    def short(env: Fragile, action: Any) -> Any:
        obs, reward, _, truncated, info = step(env, action)
        return obs, reward, env.t == 2, truncated, info

    monkeypatch.setattr(Fragile, "step", short)
    made = Fragile.__init__

    def every_other(env: Fragile, **kwargs: Any) -> None:
        made(env, **kwargs)
        every_other.count += 1  # type: ignore[attr-defined]
        env.breaks = every_other.count % 2  # type: ignore[attr-defined]

    every_other.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Fragile, "__init__", every_other)
    with pytest.raises(NothingToLearn) as caught:
        train(config(tmp_path / "run", num_envs=4, epochs=2))
    # Two envs diverge in each of 8 steps, two end in every second one.
    assert caught.match("the longest of 24 episodes had 2; set alg.horizon=2 or less")
    assert caught.match("16 episodes ended as diverged .*: the reward is nan")


# --- environments that raise ----------------------------------------------------------------------


FAULTS = [RuntimeError("lost the simulator"), EnvironmentFault("x"), KeyError("y")]
# 2 x 8 steps of the first evaluation, then 4 x 4 an epoch; epoch 2 is evaluated.
PLACES = [(5, 0), (16 + 1, 0), (16 + 16 + 7, 1), (16 + 32 + 5, 1)]


@pytest.mark.parametrize(
    ("fault", "at", "epoch"),
    [  # each in an evaluation and in a step
        pytest.param(FAULTS[fault], *PLACES[place], id=f"{type(FAULTS[fault]).__name__}-{place}")
        for fault, place in ((0, 0), (0, 2), (1, 3), (1, 1), (2, 3), (2, 2))
    ],
)
def test_an_environment_that_raises(
    fault: BaseException, at: int, epoch: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Fragile.fault, Fragile.fault_at = fault, at
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"alg.random_epochs": 1, "alg.horizon": 2, "checkpoint.every": 0}
    with pytest.raises(EnvironmentFault) as caught:
        train(config(run_dir, **changes))
    assert fault is (caught.value if type(fault) is EnvironmentFault else caught.value.__cause__)
    assert f"an environment failed in epoch {epoch + 1}: the state " in capsys.readouterr().out
    saved = checkpoint.load(run_dir / "checkpoints" / "latest.pt")
    assert saved["epoch"] == epoch
    assert saved["env"] is None
    Fragile.fault = None
    summary, status = train(config(run_dir, **changes))
    assert (status, summary["status"], summary["epochs"]) == (0, "finished", 6)


@pytest.mark.parametrize("evaluating", [False, True])
def test_only_a_torn_step_loses_the_envs(
    evaluating: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault within an evaluation leaves a run that goes on as if there had been none."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(whole))
    step, calls = MujocoEnv.step, 0

    def failing(env: MujocoEnv, action: Tensor) -> Any:
        nonlocal calls
        calls += env.num_envs == (2 if evaluating else 4)
        if calls == (12 + 5 if evaluating else 4 + 2):
            raise RuntimeError("gone")
        return step(env, action)

    with monkeypatch.context() as patch:
        patch.setattr(MujocoEnv, "step", failing)
        with pytest.raises(RuntimeError, match="gone"):
            train(tiny_config(parts))
    saved = checkpoint.load(parts / "checkpoints" / "latest.pt")
    assert (saved["epoch"], saved["env"] is None) == (1, not evaluating)
    assert train(tiny_config(parts))[1] == 0
    if evaluating:
        assert rows(parts) == rows(whole)


def test_a_fault_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What the environment raised is told all the same."""
    Fragile.fault, Fragile.fault_at = RuntimeError("lost"), 40

    save = trainer.Trainer.save

    def full(run: trainer.Trainer, name: str) -> None:
        if name == "latest":
            raise CheckpointError("no space left")
        save(run, name)

    monkeypatch.setattr(trainer.Trainer, "save", full)
    with pytest.raises(EnvironmentFault, match="lost") as caught:
        train(config(tmp_path / "run", **{"checkpoint.every": 0}))
    assert caught.value.__cause__ is Fragile.fault
    assert "and no checkpoint could be written: no space left" in capsys.readouterr().out
