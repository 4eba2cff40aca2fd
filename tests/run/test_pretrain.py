"""A world model from data alone, and policies that are learned in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.data import register
from pwm_fast.data.offline import Place
from pwm_fast.parallel import ALONE
from pwm_fast.replay import Episode
from pwm_fast.run import checkpoint, pretraining
from pwm_fast.run.charts import plot_run
from pwm_fast.run.export import ExportConfig, export
from pwm_fast.run.inherit import inherited
from pwm_fast.run.interrupt import Interrupted
from pwm_fast.run.pretraining import Pretrainer, prepared, pretrain
from pwm_fast.run.start import train
from pwm_fast.run.state import RunState
from pwm_fast.run.warm_start import warm_start
from tests.envs.suites import dm_control_suite
from tests.run.conftest import TINY, Launcher, rows, tiny_config

pytestmark = pytest.mark.usefixtures("no_plots")
NAMES = ("near-by", "far-off", "walker-walk")
OBS, ACTION = 5, 2
DIRS = ("whole", "stopped")


def write_data(folder: Path, tasks: tuple[int, ...] = (0, 2), names: bool = True) -> Path:
    """Six episodes of each task, in TD-MPC2's format: the second half of them is noisier."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    task = torch.tensor(tasks).repeat_interleave(6)
    obs = torch.zeros(len(task), 13, OBS)
    action = torch.rand(len(task), 13, ACTION, generator=generator) * 2 - 1
    obs[:, 0] = torch.randn(len(task), OBS, generator=generator)
    for t in range(12):
        obs[:, t + 1] = 0.9 * obs[:, t] + 0.1 * (1 + task[:, None]) * action[:, t + 1, :1]
    reward = obs[..., 0] * (1.0 - task[:, None])
    torch.save(
        {"obs": obs, "action": action, "reward": reward, "task": task[:, None].expand(-1, 13)},
        folder / "chunk_0.pt",
    )
    if names:
        (folder / "tasks.json").write_text(json.dumps(NAMES))
    register(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def tiny(run_dir: Path, data: Path | None, **changes: Any) -> TrainConfig:
    """A pretraining of a fraction of a second."""
    own = {"num_envs": None, "env.max_episode_steps": None, "data.holdout": 0.25, **changes}
    if data is not None:
        own["data.path"] = str(data)
    return tiny_config(run_dir, env="offline", **own)


def test_a_world_model_alone(data: Path, tmp_path: Path) -> None:
    """It learns; policy, critics and replay are as they were, and what it is says the file."""
    summary, status = pretrain(tiny(tmp_path / "run", data, epochs=40))
    assert status == 0 and summary["status"] == "finished"
    assert summary["updates"] == 80 and summary["env_steps"] == 0
    logged = rows(tmp_path / "run")
    assert [row["updates"] for row in logged] == list(range(2, 82, 2))
    measured = [row for row in logged if "holdout_wm_loss" in row]
    assert [row["epoch"] for row in measured] == list(range(2, 41, 2))
    assert measured[-1]["holdout_wm_loss"] < 0.8 * measured[0]["holdout_wm_loss"]
    assert measured[-1]["holdout_latent_error"] > 0.0
    assert summary["holdout"] == {k: v for k, v in measured[-1].items() if "holdout" in k}

    content = checkpoint.load(tmp_path / "run" / "checkpoints" / "final.pt")
    model = content["config"]["alg"]["world_model"]
    assert (model["num_tasks"], model["task_dim"]) == (3, pretraining.TASK_DIM)
    options = content["config"]["env"]["options"]
    assert options["tasks"] == ["near-by", "walker-walk"] and options["numbers"] == [0, 2]
    assert content["replay"] is None
    first = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.previous.pt")
    for part in ("actor", "critic"):
        for name, value in content["agent"][part].items():
            assert torch.equal(value, first["agent"][part][name]), "no policy is trained"


def test_its_figures(data: Path, tmp_path: Path) -> None:
    """Along updates; of a policy there is nothing to draw."""
    pytest.importorskip("matplotlib")
    pretrain(tiny(tmp_path / "run", data))
    drawn = {path.stem for path in plot_run(tmp_path / "run")}
    assert drawn == {"held_out", "world_model_losses", "gradient_norms", "speed", "summary"}


def test_what_is_held_out_is_not_learned_from(data: Path, tmp_path: Path) -> None:
    """A quarter of 12 episodes; without them the replay has the others."""
    seen: dict[str, Any] = {}

    class Looking(Pretrainer):
        def _begin(self) -> None:
            super()._begin()
            seen["held"] = self.state.held_out
            seen["replay"] = len(self.state.replay)
            seen["windows"] = self._windows

    train(prepared(tiny(tmp_path / "run", data, epochs=1)), Looking)
    assert [e.task for e in seen["held"]] == [0, 2, 2] and seen["replay"] == 9 * 12
    held = {tuple(row.tolist()) for e in seen["held"] for row in e.obs}
    assert {tuple(row.tolist()) for row in seen["windows"].obs.flatten(0, 1)} <= held


@pytest.mark.parametrize("order", ["sorted", "in turn"])
@pytest.mark.parametrize(
    ("episodes", "share", "held"), [(10, 0.1, 3), (10, 0.7, 21), (200, 0.6, 256), (1, 0.02, 0)]
)
def test_every_task_s_share_is_held_out(order: str, episodes: int, share: float, held: int) -> None:
    """Of three tasks, in whatever order the data have them; 256 in all are enough."""
    tasks = torch.tensor([0, 2, 5])
    found = tasks.repeat(episodes) if order == "in turn" else tasks.repeat_interleave(episodes)
    blank = torch.zeros(1, 1)

    class Fitted(list[Episode]):
        places: ClassVar[dict[int, Place]] = {n: Place(n, 1) for n in (0, 2, 5)}

    own = Fitted(Episode(blank, blank, blank[0], blank[0].bool(), int(n)) for n in found)
    state: Any = SimpleNamespace(
        ranks=ALONE,
        config=SimpleNamespace(data=configuration.DataConfig("data", holdout=share)),
        _nothing_ends=True,
    )
    data: Any = SimpleNamespace(episodes=own)
    learned = list(RunState._episodes(state, data, seen=True))
    counts = Counter(e.task for e in state.held_out)
    assert len(state.held_out) == held and len(learned) == 3 * episodes - held
    assert max(counts.values(), default=0) - min(counts.get(n, 0) for n in (0, 2, 5)) <= 1


def test_an_interrupted_run_goes_on_to_the_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch; the data are read anew."""
    whole = tiny(tmp_path / "whole", data)
    pretrain(whole)
    stopped = tiny(tmp_path / "stopped", data)
    original, calls = Pretrainer._measured, 0

    def stop(self: Pretrainer, epoch: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted
        return original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "_measured", stop)
        assert pretrain(stopped)[0]["status"] == "interrupted"
    assert pretrain(stopped)[0]["status"] == "finished"
    logged = [[{**row, "updates_per_second": 0.0} for row in rows(tmp_path / d)] for d in DIRS]
    assert logged[0] == logged[1]
    ours, theirs = (
        checkpoint.load(Path(c.run_dir) / "checkpoints" / "final.pt")["agent"]["world_model"]
        for c in (stopped, whole)
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": None, "data.holdout": 0.0}, "data.path=DIR is needed"),
        ({"env.name": "cartpole"}, "env must be left alone to pretrain"),
        ({"alg.horizon": 16}, "alg.horizon=16 is longer than an episode (12 steps)"),
        ({"alg.world_model.num_tasks": 2, "alg.world_model.task_dim": 4}, "are 0 to 1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", data)
    values = configuration.to_dict(config)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        pretrain(configuration.from_dict(values))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ends_have_to_be_learned(tmp_path: Path) -> None:
    """Data with terminal states want a model that has a head for them, and get one."""
    out = tmp_path / "hopper"
    export(ExportConfig(out=str(out), env={"name": "hopper"}, episodes=4))
    config = tiny(tmp_path / "run", out, **{"alg.horizon": 2, "data.holdout": 0.0})
    with pytest.raises(ConfigError, match=r"episode 0 ends in a terminal state.*can_terminate"):
        pretrain(config)
    assert not (tmp_path / "run").exists(), "it was refused before anything was written"
    env = configuration.EnvConfig("offline", options={"can_terminate": True})
    config.env, config.run_dir = env, str(tmp_path / "other")
    assert "termination" in pretrain(config)[0]["parameters"]


def test_train_holds_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.holdout=0.1 is for python -m pwm_fast.pretrain"):
        train(tiny_config(tmp_path / "run", data__path="somewhere", data__holdout=0.1))


def test_it_cannot_be_evaluated(data: Path, tmp_path: Path, launcher: Launcher) -> None:
    pretrain(tiny(tmp_path / "run", data, epochs=1))
    path = tmp_path / "run" / "checkpoints" / "final.pt"
    outcome = launcher.run(tmp_path, f"checkpoint={path}", module="pwm_fast.evaluate")
    assert outcome.status == 2
    assert "python -m pwm_fast.train init=PATH task=NAME learns a policy" in outcome.err


# What a run takes over of the checkpoint that it begins with


@pytest.fixture
def pretrained(data: Path, tmp_path: Path) -> Path:
    pretrain(tiny(tmp_path / "model", data, epochs=2))
    return tmp_path / "model" / "checkpoints" / "final.pt"


def composed(*overrides: str) -> TrainConfig:
    return inherited(configuration.compose(*overrides), overrides)


def test_the_agent_is_the_checkpoints(pretrained: Path) -> None:
    """But for what the command line says, and with a directory of its own."""
    found = composed(f"init={pretrained}", "task=walker-walk", "alg.actor.lr=0.01", "seed=3")
    assert found.alg.world_model.units == TINY["alg.world_model.units"]
    assert found.alg.world_model.num_tasks == 3 and found.alg.actor.lr == 0.01
    assert found.alg.actor.task_input is False and found.alg.critic.task_input is False
    assert found.env.name == "dmc_tasks"
    options = {"tasks": ["walker-walk"], "numbers": [2], "obs_dim": OBS, "action_dim": ACTION}
    assert {k: found.env.options[k] for k in options} == options
    assert found.run_dir == "runs/walker-walk/pwm/seed_3"


def test_what_is_named_is_the_users(pretrained: Path) -> None:
    found = composed(
        f"init={pretrained}",
        "task=near-by",
        "alg.actor.task_input=true",
        "env.num_envs=5",
        "+env.action_repeat=4",
        "run_dir=here",
    )
    assert found.alg.actor.task_input is True and found.alg.critic.task_input is False
    assert found.env.num_envs == 5 and found.env.options["action_repeat"] == 4
    assert found.run_dir == "here"
    whole = composed(f"init={pretrained}", "alg=pwm_tiny", "env=hopper")
    assert whole.alg == configuration.compose("alg=pwm_tiny").alg
    assert whole.env.name == "hopper"


def test_an_environment_of_several_of_its_tasks(pretrained: Path) -> None:
    """They have the numbers and the widths that the model has, unless others are given."""
    own = (f"init={pretrained}", "env=dmc_tasks")
    found = composed(*own, "env.tasks=[walker-walk,near-by]").env.options
    expected = {"numbers": [2, 0], "obs_dim": OBS, "action_dim": ACTION}
    assert {k: found[k] for k in expected} == expected
    found = composed(*own, "env.tasks=[cheetah-run]", "env.numbers=[1]").env.options
    assert found["numbers"] == [1] and found["obs_dim"] is None
    with pytest.raises(
        ConfigError, match=r"env.tasks must be of near-by, walker-walk.*cheetah-run"
    ):
        composed(*own, "env.tasks=[walker-walk,cheetah-run]")
    with pytest.raises(ConfigError, match=r"task=near-by makes the environment.*env=hopper"):
        composed(f"init={pretrained}", "task=near-by", "env=hopper")


def test_a_task_under_another_number_is_refused(pretrained: Path) -> None:
    """By whatever way the configuration came to it: its embedding would be another task's."""
    config = composed(f"init={pretrained}", "task=walker-walk")
    config.env.options["numbers"] = [0]
    with pytest.raises(ConfigError, match=r"walker-walk is number 2 there and 0 here"):
        warm_start(SimpleNamespace(load_state_dict=lambda *_, **__: None), config)  # type: ignore[arg-type]


def test_tasks_that_there_are_not(pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of near-by, walker-walk, got 'far-off'"):
        composed(f"init={pretrained}", "task=far-off")
    with pytest.raises(ConfigError, match=r"task=near-by .* give init=PATH"):
        composed("task=near-by")


def test_without_a_task_the_environment_is_the_checkpoints(tmp_path: Path) -> None:
    """Of a run that acted; with what the command line says."""
    train(tiny_config(tmp_path / "run", epochs=0, env="hopper", alg__horizon=2))
    path = tmp_path / "run" / "checkpoints" / "final.pt"
    found = composed(f"init={path}", "env.num_envs=3")
    assert found.env.name == "hopper" and found.env.num_envs == 3
    assert found.env.max_episode_steps == 12 and found.alg.horizon == 2
    assert found.run_dir == "runs/hopper/pwm/seed_0"
    assert composed(f"init={path}", "env=ant").env.name == "ant"


def test_a_file_that_is_gone_is_missed() -> None:
    """The defaults, with which the run would begin another one, are not what it had."""
    with pytest.raises(ConfigError, match=r"init=gone.pt: there is no such file"):
        composed("init=gone.pt")
    given = ("init=gone.pt", "alg=pwm_tiny", "run_dir=here")
    assert composed(*given) == configuration.compose(*given)


def test_without_init_nothing_is_taken_over() -> None:
    assert composed("env=hopper", "seed=2") == configuration.compose("env=hopper", "seed=2")


def test_a_sweep_over_tasks(pretrained: Path, launcher: Launcher, tmp_path: Path) -> None:
    """Each run in a directory of its own, and a task that is none stops it before it starts."""
    outcome = launcher.run(tmp_path, "-m", f"init={pretrained}", "task=near-by,there-not")
    assert outcome.status == 2
    assert "run 1 (task=there-not): init=" in outcome.err
    assert "nothing was started" in outcome.err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("updates", [0, 2])
def test_a_policy_in_the_model_of_one_task(updates: int, tmp_path: Path) -> None:
    """Of the built-in cart-pole: frozen, or learning on; the policy is a new one, and learns."""
    out = tmp_path / "data"
    export(ExportConfig(out=str(out), env={"name": "cartpole", "max_episode_steps": 12}))
    pretrain(tiny(tmp_path / "model", out, **{"alg.normalize_obs": True}))
    given = tmp_path / "model" / "checkpoints" / "final.pt"
    before = checkpoint.load(given)["agent"]
    changes = {"alg.normalize_obs": True, "alg.model_learning.updates": updates}
    config = tiny_config(tmp_path / "run", init=str(given), **changes)
    summary = train(config)[0]
    assert summary["status"] == "finished" and summary["env_steps"] == 96
    after = checkpoint.load(tmp_path / "run" / "checkpoints" / "final.pt")["agent"]
    for part in ("world_model", "obs_rms"):
        same = [torch.equal(after[part][k], v) for k, v in before[part].items()]
        assert all(same) == (updates == 0), part
    assert not torch.equal(after["actor"]["logstd"], before["actor"]["logstd"])


SUITE = ("cartpole-swingup", "reacher-easy", "pendulum-swingup")


@pytest.mark.slow
@pytest.mark.parametrize(("alg", "kind"), [("pwm_5M", "mlp"), ("pwm_5M_flow", "flow")])
def test_three_tasks_together_and_each_of_them_alone(
    alg: str, kind: str, tmp_path: Path, launcher: Launcher
) -> None:
    """By the commands: an agent's data of three tasks, a model, policies, their evaluation."""
    dm_control_suite()
    steps = "env.max_episode_steps=30"
    tiny = [f"{k}={v}".replace(" ", "") for k, v in TINY.items() if not k.startswith("env.")]
    small = [x for x in tiny if x.startswith(("alg.", "threads")) and "replay" not in x]
    brief = (steps, "num_envs=3", "eval.episodes=3", "eval.final_episodes=3", "esnr.every=0")

    def run(module: str, *arguments: str) -> str:
        outcome = launcher.run(tmp_path, *arguments, module=f"pwm_fast.{module}")
        assert outcome.status == 0, outcome.err
        return outcome.out

    tasks = ("env=dmc_tasks", f"env.tasks=[{','.join(SUITE)}]")
    model = ("alg.world_model.num_tasks=3", "alg.world_model.task_dim=4")
    run("train", f"alg={alg}", *tasks, *tiny, *brief, *model, "run_dir=agent")
    agent = "checkpoint=agent/checkpoints/final.pt"
    run("data", "export", "out=data", agent, "episodes=9", "random_share=0.34")
    run("pretrain", "data.path=data", f"alg={alg}", "run_dir=model", "epochs=2", *small)
    frozen = ("alg.model_learning.updates=0", "data.path=data", "init=model/checkpoints/final.pt")
    run("train", "-m", *frozen, *brief, "epochs=2", f"task={','.join(SUITE)}")
    logs = [path.read_text("utf-8") for path in (tmp_path / "runs" / "multirun").rglob("*.log")]
    assert ["left out: 6 episodes of tasks" in log for log in logs] == [True] * len(SUITE)
    learned = checkpoint.load(tmp_path / "model" / "checkpoints" / "final.pt")
    assert learned["config"]["alg"]["world_model"]["kind"] == kind
    for task in SUITE:
        folder = tmp_path / "runs" / task / alg / "seed_0"
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        path = folder / "checkpoints" / "final.pt"
        same = checkpoint.load(path)["agent"]["world_model"]
        assert all(torch.equal(same[k], v) for k, v in learned["agent"]["world_model"].items())
        assert "return" in run("evaluate", f"checkpoint={path}", "episodes=2")
