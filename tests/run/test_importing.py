"""Published checkpoints made into our own: they evaluate, are diagnosed, and go on training."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast import load_published
from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.config import ConfigError, PlanningConfig, compose
from pwm_fast.envs.protocol import Box, Tasks, tasks_of
from pwm_fast.models import QEnsemble
from pwm_fast.run import build, checkpoint
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint
from pwm_fast.run.importing import ImportConfig, import_checkpoint, look, training_arguments
from pwm_fast.run.start import train
from tests.published.codes import TDMPC2, PWMFile, pwm_file
from tests.run.conftest import Launcher, tiny_config

OBS, ACTION = 5, 1  # of the cart-pole
ENV = {"name": "cartpole", "max_episode_steps": 12, "num_envs": 4}
TWO_TASKS = {
    "name": "dmc_tasks",
    "tasks": ["cup-catch", "cartpole-swingup"],
    "num_envs": 2,
    "max_episode_steps": 6,
}
# A tiny run of a published agent: what concerns the environment and the length of the run.
SHORT = (
    "env.max_episode_steps=12",
    "env.num_envs=4",
    "epochs=3",
    "device=cpu",
    "threads=1",
    "eval.every=0",
    "eval.episodes=2",
    "eval.final_episodes=2",
    "esnr.every=0",
    "alg.horizon=4",
    "alg.steps_per_epoch=8",
    "alg.random_epochs=1",
    "alg.replay_capacity=400",
    "alg.model_learning.bootstrap_updates=2",
    "alg.model_learning.updates=1",
    "alg.model_learning.batch_size=8",
    "alg.actor.batch_size=8",
)


def cartpole_file(**changes: Any) -> PWMFile:
    return pwm_file(**{"obs": OBS, "action": ACTION, **changes})


def imported(source: Path, out: Path | None, **changes: Any) -> Path:
    given = {"checkpoint": str(source), "env": ENV, "out": out and str(out), **changes}
    config = ImportConfig(**given)
    return import_checkpoint(config, look(config))[0]


KINDS: dict[str, dict[str, Any]] = {
    "pwm": {"normalised": ("obs_rms", "rew_rms", "ret_rms")},
    "flow": {"bins": 21, "flow": True, "task_dim": 96, "package": "flow_mbpo_pwm"},
    "flow policy": {
        "bins": 21,
        "flow": True,
        "flow_policy": True,
        "task_dim": 96,
        "package": "flow_mbpo_pwm",
    },
    "baseline": {"bins": 21, "package": "flow_mbpo_pwm", "normalised": ("ret_rms",)},
}


@pytest.mark.parametrize("kind", ["pwm", "flow policy"])
def test_what_to_run_next_runs(
    kind: str, launcher: Launcher, tmp_path: Path, no_plots: None
) -> None:
    """The commands that an import prints, as a user pastes them."""
    source = cartpole_file(**KINDS[kind]).save(tmp_path / "best policy.pt")
    env = [f"env.{key}={value}" for key, value in ENV.items() if key != "name"]
    done = launcher.run(
        tmp_path, str(source), "env=cartpole", *env, "out=made", module="pwm_fast.import_checkpoint"
    )
    assert (done.status, done.err) == (0, "")
    lines = [shlex.split(line) for line in done.out.splitlines() if "python -m pwm_fast." in line]
    assert [line[2] for line in lines] == [
        "pwm_fast.evaluate",
        "pwm_fast.diagnose",
        "pwm_fast.train",
    ]
    short = {
        "pwm_fast.evaluate": ["episodes=2", "device=cpu"],
        "pwm_fast.diagnose": [
            *("episodes=2", "windows=4", "points=2", "probes=2", "horizon=3", "device=cpu"),
            *("esnr_samples=[2]", "esnr_batch=2"),
        ],
        "pwm_fast.train": [*SHORT, "run_dir=run"],
    }
    for _, _, module, *arguments in lines:
        outcome = launcher.run(tmp_path, *arguments, *short[module], module=module)
        assert outcome.status == 0, outcome.err
        if module == "pwm_fast.evaluate":
            family = "PWM" if kind == "pwm" else "Flow-MBPO-PWM"
            assert f"imported    for cartpole, of {family}: {source}" in outcome.out
    made = tmp_path / "made" / "checkpoints"
    result = json.loads((made / "imported.evaluation.json").read_text())
    assert result["imported"]["file"] == str(source) and len(result["returns"]) == 2
    assert (made / "imported.diagnosis" / "diagnosis.json").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    record = ("export", "out=data", f"checkpoint={made / 'imported.pt'}", "episodes=2")
    outcome = launcher.run(tmp_path, *record, "device=cpu", module="pwm_fast.data")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_agent_is_the_published_one(kind: str, tmp_path: Path) -> None:
    file = cartpole_file(**KINDS[kind])
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out")
    run, content = build.load_run(path)
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.restore_agent(path, run, content, env, torch.device("cpu"))
    obs = torch.randn(6, OBS)
    seen = obs
    if kind == "pwm":
        rms = file.rms["obs_rms"]
        seen = ((obs - rms.mean) / (rms.var + 1e-5).sqrt()).clip(-5.0, 5.0)
    with torch.no_grad():
        z = file.world.encode(seen)
        noise = (torch.zeros(6, ACTION), 2, "heun") if kind == "flow policy" else ()
        expected = file.actor(z, *noise).tanh()
        torch.testing.assert_close(agent.act(obs, deterministic=True), expected)
        torch.testing.assert_close(agent.critic.minimum(z), file.critic(z)[..., 0].amin(0))
        torch.testing.assert_close(
            agent.world_model.next(z, expected), file.world.next(z, expected)
        )
    assert content["imported"]["of"] == ("PWM" if kind == "pwm" else "Flow-MBPO-PWM")


def test_optimisers_go_on(tmp_path: Path, no_plots: None) -> None:
    """A resumed run has them, and their next step is that of torch's own Adam."""
    file = cartpole_file()
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out")
    run, content = build.load_run(path)
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.make_agent(run, env, torch.device("cpu"))
    agent.load_state_dict(content["agent"])
    for name, key, theirs in (
        ("wm", "world_model_opt", file.world),
        ("actor", "actor_opt", file.actor),
        ("critic", "critic_opt", file.critic),
    ):
        ours: GuardedAdam = agent.optimizers[name]
        part = {"wm": "world_model"}.get(name, name)
        named = dict(getattr(agent, part).named_parameters())
        names = {id(p): n for n, p in named.items()}
        grads = {n: 1e-3 * torch.randn_like(p) for n, p in named.items()}
        ours.set_lr(file.optimizers[key].param_groups[0]["lr"])
        ours.apply(torch.zeros(()), [grads[names[id(p)]].clone() for p in ours.params])
        for n, p in theirs.named_parameters():
            p.grad = grads[n]
        file.optimizers[key].step()
        for n, p in theirs.named_parameters():
            torch.testing.assert_close(named[n], p, rtol=1e-6, atol=1e-7)
    config = ImportConfig(checkpoint=str(tmp_path / "x.pt"), env=ENV, out=str(tmp_path / "new"))
    arguments = training_arguments(config, load_published(tmp_path / "x.pt"))
    resumed = compose(*arguments, *SHORT, f"resume={path}", f"run_dir={tmp_path / 'run'}")
    assert train(resumed)[0]["status"] == "finished"
    final = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    steps = [float(s["step"]) for s in final["agent"]["critic_opt"]["adam"]["state"].values()]
    assert min(steps) > 3.0, "the file's three steps, and those of the run"


def test_one_task_of_many(tmp_path: Path, no_plots: None) -> None:
    """Taken out of a file of several, with narrower observations and actions."""
    file = pwm_file(
        obs=OBS + 2, action=ACTION + 2, bins=21, tasks=4, task_dim=6, normalised=("ret_rms",)
    )
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out", tasks=[2])
    run, content = build.load_run(path)
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.restore_agent(path, run, content, env, torch.device("cpu"))
    obs = torch.randn(6, OBS)
    with torch.no_grad():
        z = file.world.encode(torch.nn.functional.pad(obs, (0, 2)), 2)
        torch.testing.assert_close(
            agent.act(obs, deterministic=True), file.actor(z).tanh()[:, :ACTION]
        )
    config = ImportConfig(checkpoint=str(tmp_path / "x.pt"), env=ENV, out="new", tasks=[2])
    whole = look(config)
    assert whole.num_tasks == 4 and run.alg.world_model.num_tasks == 1


@pytest.mark.parametrize("policy", ["file", "new"])
def test_training_in_the_world_model_of_tdmpc2(policy: str, tmp_path: Path, no_plots: None) -> None:
    """Its own policy or a new one, with new critics."""
    theirs = TDMPC2(obs=OBS, action=ACTION)
    source = theirs.save(tmp_path / "walker.pt")
    config = ImportConfig(
        str(source), env=ENV, out=str(tmp_path / "out"), policy=policy, critics="new"
    )
    path, found = import_checkpoint(config, look(config))
    run, content = build.load_run(path)
    kind = "pwm" if policy == "new" else "tdmpc2"
    assert (run.alg.actor.kind, run.alg.critic.kind) == (kind, "pwm")
    assert run.alg.gamma == 0.95, "of episodes of 12 steps"
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.restore_agent(path, run, content, env, torch.device("cpu"))
    obs, action = torch.randn(6, OBS), torch.rand(6, ACTION)
    with torch.no_grad():
        z = agent.world_model.encode(obs)
        torch.testing.assert_close(z, theirs.encode(obs))
        torch.testing.assert_close(agent.world_model.next(z, action), theirs.next(z, action))
        torch.testing.assert_close(agent.world_model.reward(z, action), theirs.reward(z, action))
        own = torch.allclose(agent.act(obs, deterministic=True), theirs.pi(z)[0].tanh())
        assert own == (policy == "file")
    arguments = training_arguments(config, found)
    trained = compose(*arguments, *SHORT, f"init={path}", f"run_dir={tmp_path / 'run'}")
    assert train(trained)[0]["status"] == "finished"


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_tdmpc2(old: bool, tmp_path: Path) -> None:
    """Its policy acts, its planner plans with its Q functions, and diagnose measures it."""
    theirs = TDMPC2(obs=OBS, action=ACTION)
    path = imported(theirs.save(tmp_path / "x.pt", old=old), tmp_path / "out")
    run, content = build.load_run(path)
    with closing(build.make_env(run, 3, 0)) as env:
        agent = build.restore_agent(path, run, content, env, torch.device("cpu"))
    obs = torch.randn(6, OBS)
    with torch.no_grad():
        z = theirs.encode(obs)
        a = theirs.pi(z)[0].tanh()
        torch.testing.assert_close(agent.act(obs, deterministic=True), a)
        assert isinstance(agent.critic, QEnsemble)
        torch.testing.assert_close(agent.critic(z, a), theirs.q_logits(z, a))
    planning = PlanningConfig(
        kind="mppi", horizon=2, iterations=1, samples=8, elites=2, policy_trajectories=2
    )
    evaluated = EvaluateConfig(str(path), episodes=2, device="cpu", planning=planning)
    assert len(evaluate_checkpoint(evaluated)["returns"]) == 2
    measured = DiagnoseConfig(
        str(path), episodes=2, windows=4, points=2, probes=2, horizon=2, esnr_samples=[2]
    )
    assert diagnose(measured)["checkpoints"][0]["epoch"] == 0


def test_tdmpc2_in_tasks_of_dm_control(tmp_path: Path) -> None:
    """Two of a file's 30, each of which reads its own part of the action."""
    pytest.importorskip("dm_control")
    dims = [6] * 30
    dims[12], dims[10] = 2, 1
    theirs = TDMPC2(obs=24, action=6, action_dims=dims, task_dim=6)
    path = imported(theirs.save(tmp_path / "x.pt"), tmp_path / "out", env=TWO_TASKS)
    run, content = build.load_run(path)
    assert run.alg.gamma == 0.95
    with closing(build.make_env(run, 4, 0)) as made:
        agent = build.restore_agent(path, run, content, made, torch.device("cpu"))
        obs, _ = made.reset(seed=3)
        tasks = tasks_of(made)
        assert tasks is not None
        action = agent.act(obs, task=tasks.of_env, deterministic=True)
    with torch.no_grad():
        for row, number in enumerate([12, 10, 12, 10]):
            padded = torch.nn.functional.pad(obs[row : row + 1], (0, 24 - obs.shape[1]))
            expected = theirs.pi(theirs.encode(padded, number), number)[0].tanh()[0, :2]
            torch.testing.assert_close(action[row], expected)
    result = evaluate_checkpoint(EvaluateConfig(str(path), episodes=2, device="cpu"))
    assert set(result["tasks"]) == {"cup-catch", "cartpole-swingup"}


def test_a_task_that_terminates(tmp_path: Path) -> None:
    """The model has a new head, which says that no episode ends."""
    env = {"name": "hopper", "max_episode_steps": 12, "num_envs": 2}
    with closing(build.make_env(compose("env=hopper"), 1, 0)) as made:
        obs, action = build.dims(made)
    file = pwm_file(obs=obs, action=action)
    given = {"checkpoint": str(file.save(tmp_path / "x.pt")), "env": env}
    config = ImportConfig(**given, out=str(tmp_path / "out"))  # type: ignore[arg-type]
    path, found = import_checkpoint(config, look(config))
    assert any("says never" in note for note in found.notes)
    run, content = build.load_run(path)
    with closing(build.make_env(run, 1, 0)) as made:
        agent = build.restore_agent(path, run, content, made, torch.device("cpu"))
    logit = agent.world_model.termination(torch.rand(5, 16), torch.rand(5, action))
    assert logit is not None and bool((logit == -10.0).all())


def test_q_functions_are_not_trained(launcher: Launcher, tmp_path: Path) -> None:
    source = TDMPC2(obs=OBS, action=ACTION).save(tmp_path / "x.pt")
    done = launcher.run(
        tmp_path, str(source), "env=cartpole", "out=made", module="pwm_fast.import_checkpoint"
    )
    assert done.status == 0 and "to train it, import it with critics=new" in done.out
    assert "pwm_fast.train" not in done.out
    path = tmp_path / "made" / "checkpoints" / "imported.pt"
    changes = {"resume": str(path), "run_dir": str(tmp_path / "run"), "epochs": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"alg\.critic\.kind must be pwm to train"):
        train(dataclasses.replace(build.load_run(path)[0], **changes))
    assert not (tmp_path / "run").exists()


def test_without_an_environment_nothing_is_written(launcher: Launcher, tmp_path: Path) -> None:
    source = cartpole_file().save(tmp_path / "x.pt")
    before = {path.name for path in tmp_path.iterdir()}
    outcome = launcher.run(tmp_path / "cwd", str(source), module="pwm_fast.import_checkpoint")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"file          {source}, a checkpoint of PWM" in outcome.out
    assert "observations  5, actions 1, tasks 1" in outcome.out
    assert "nothing was written: env=NAME" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {*before, "cwd"}


def test_numbers_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose tasks have the file's numbers and widths takes all of it."""
    monkeypatch.setattr(build, "make_env", lambda *_: ManyTasks((1, 12)))
    statistics = ("obs_rms", "ret_rms")
    file = pwm_file(obs=5, action=3, bins=21, tasks=30, task_dim=6, normalised=statistics)
    content = checkpoint.load(imported(file.save(tmp_path / "x.pt"), tmp_path / "out"))
    table = content["agent"]["world_model"]["_task_emb.weight"]
    assert file.world._task_emb is not None
    assert torch.equal(table, file.world._task_emb.weight)
    means = content["agent"]["obs_rms"]["mean"]
    assert torch.equal(means, file.rms["obs_rms"].mean.double().expand(30, 5)), "the same for all"
    few = pwm_file(obs=5, action=3, bins=21, tasks=4, task_dim=6, normalised=("ret_rms",))
    with pytest.raises(ConfigError, match=r"is of 4 tasks, those of env=cartpole have the numbers"):
        imported(few.save(tmp_path / "y.pt"), tmp_path / "new")


def test_tasks_of_dm_control(tmp_path: Path) -> None:
    """A policy of PWM's in two of a file's 30 tasks: what acts there is the published one."""
    pytest.importorskip("dm_control")
    file = pwm_file(obs=24, action=6, bins=21, tasks=30, task_dim=6, normalised=("ret_rms",))
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out", env=TWO_TASKS)
    run, content = build.load_run(path)
    with closing(build.make_env(run, 4, 0)) as made:
        agent = build.restore_agent(path, run, content, made, torch.device("cpu"))
        obs, _ = made.reset(seed=3)
        tasks = tasks_of(made)
        assert tasks is not None
        action = agent.act(obs, task=tasks.of_env, deterministic=True)
    width = obs.shape[1]
    with torch.no_grad():
        for row, number in enumerate([12, 10, 12, 10]):
            padded = torch.nn.functional.pad(obs[row : row + 1], (0, 24 - width))
            expected = file.actor(file.world.encode(padded, number)).tanh()[0, :2]
            kept = tasks.action_mask[row].bool()
            torch.testing.assert_close(action[row][kept], expected[kept])
    result = evaluate_checkpoint(EvaluateConfig(checkpoint=str(path), episodes=2, device="cpu"))
    assert len(result["returns"]) == 2 and result["imported"]["of"] == "PWM"


def test_wrong_command_lines(launcher: Launcher, tmp_path: Path) -> None:
    source = cartpole_file().save(tmp_path / "x.pt")
    for arguments, said in (
        ([], "checkpoint=PATH is needed: a file of PWM, Flow-MBPO-PWM or TD-MPC2"),
        (["no.pt"], "there is no checkpoint file no.pt"),
        ([str(source), "out=made"], "env=NAME is needed beside out="),
        ([str(source), "env=hopper", "out=made"], "is of 5 observations and 1 actions, env=hopper"),
    ):
        outcome = launcher.run(tmp_path / "cwd", *arguments, module="pwm_fast.import_checkpoint")
        assert (outcome.status, outcome.out) == (2, ""), outcome.out
        assert len(outcome.err.splitlines()) == 1 and said in outcome.err, outcome.err
        assert not (tmp_path / "cwd" / "made").exists()


@pytest.mark.parametrize(
    ("file", "given", "said"),
    [
        ("one", {"env": {}}, "env=NAME is needed beside out="),
        ("one", {"out": None}, "out=DIR is needed beside env="),
        ("one", {"out": "full"}, "full must be a new or an empty folder"),
        ("one", {"critics": "none"}, "critics must be one of file, new, got 'none'"),
        ("one", {"policy": "none"}, "policy must be one of file, new, got 'none'"),
        ("one", {"substeps": 0}, "substeps must be positive, got 0"),
        ("one", {"tasks": [0]}, "it has one task and no embedding"),
        ("several", {}, "give its number in the file as tasks=[N]"),
        ("several", {"tasks": [4]}, "tasks must be numbers from 0 to 3"),
        ("several", {"tasks": [0, 1]}, "tasks=[0, 1] are 2, env=cartpole has 1 of them"),
        ("several", {"checkpoint": "."}, "checkpoint must be a file"),
    ],
)
def test_wrong_input(
    file: str,
    given: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cartpole_file().save(Path("one.pt"))
    cartpole_file(bins=21, tasks=4, task_dim=6).save(Path("several.pt"))
    Path("full").mkdir()
    Path("full", "a").touch()
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(said)):
        imported(Path(f"{file}.pt"), **{"out": Path("made"), **given})
    assert not Path("made").exists()


class OneTask:
    """What an import asks of an environment."""

    single_observation_space, single_action_space = Box((5,)), Box((3,))
    max_episode_steps = 500
    can_terminate = False

    def close(self) -> None:
        pass


class ManyTasks(OneTask):
    def __init__(self, numbers: tuple[int, ...] = (0, 1)) -> None:
        self.tasks = Tasks(
            ("walker-walk", "cup-catch"), numbers, (3, 2), torch.tensor(numbers), torch.ones(2, 3)
        )


def test_a_task_of_dm_control_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "make_env", lambda *_: OneTask())
    file = pwm_file(obs=24, action=4, bins=21, tasks=80, task_dim=6, normalised=("ret_rms",))
    dmc = {"name": "dmc", "domain": "cheetah", "task": "run"}
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out", env=dmc)
    table = checkpoint.load(path)["agent"]["world_model"]["_task_emb.weight"]
    assert file.world._task_emb is not None
    assert torch.equal(table, file.world._task_emb.weight[3:4])


def test_an_environment_of_several_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks are found in a file of 30 by their names, in its order."""
    monkeypatch.setattr(build, "make_env", lambda *_: ManyTasks())
    file = pwm_file(obs=7, action=4, bins=21, tasks=30, task_dim=6, normalised=("ret_rms",))
    path = imported(file.save(tmp_path / "x.pt"), tmp_path / "out")
    run, content = build.load_run(path)
    assert (run.alg.world_model.num_tasks, run.alg.actor.task_input) == (2, False)
    table = content["agent"]["world_model"]["_task_emb.weight"]
    assert file.world._task_emb is not None
    assert torch.equal(table, file.world._task_emb.weight[[1, 12]])
    theirs = TDMPC2(obs=7, action=4, action_dims=[3, 4] * 15, task_dim=6)
    whole = theirs.save(tmp_path / "y.pt")
    with pytest.raises(ConfigError, match=r"tasks \[1, 12\] of .* have 4, 3 actions"):
        imported(whole, tmp_path / "new")
    single = pwm_file(obs=5, action=3).save(tmp_path / "z.pt")
    with pytest.raises(ConfigError, match="is of 1 tasks, those of env=cartpole have the num"):
        imported(single, tmp_path / "new")
    as_many = pwm_file(obs=5, action=3, bins=21, tasks=2, task_dim=6, normalised=("ret_rms",))
    kept = checkpoint.load(imported(as_many.save(tmp_path / "w.pt"), tmp_path / "kept"))
    assert as_many.world._task_emb is not None
    assert torch.equal(
        kept["agent"]["world_model"]["_task_emb.weight"], as_many.world._task_emb.weight
    )


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_other_commands_say_what_reads_such_a_file(
    old: bool, launcher: Launcher, tmp_path: Path, no_plots: None
) -> None:
    for title, source in (
        ("PWM", cartpole_file().save(tmp_path / "pwm.pt")),
        ("TD-MPC2", TDMPC2().save(tmp_path / "tdmpc2.pt", old=old)),
    ):
        said = (
            f"{source} is a checkpoint of {title}, not of pwm_fast: python -m "
            f"pwm_fast.import_checkpoint {source} env=NAME out=DIR makes one of it"
        )
        with pytest.raises(CheckpointError, match=re.escape(said)):
            checkpoint.load(source)
        with pytest.raises((CheckpointError, ConfigError), match=re.escape(said)):
            train(tiny_config(tmp_path / "run", init=str(source)))
        outcome = launcher.run(tmp_path, f"checkpoint={source}", module="pwm_fast.evaluate")
        assert (outcome.status, outcome.err) == (2, f"error: {said}\n")


def test_a_file_of_none_is_said_as_before(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a pwm_fast checkpoint: it holds the keys we"):
        checkpoint.load(tmp_path / "x.pt")
