"""``init=PATH``: a new run starts with the networks of a checkpoint, and nothing else of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.config import ConfigError
from pwm_fast.run import build, checkpoint, seal
from pwm_fast.run.evaluation import evaluate
from pwm_fast.run.start import train
from pwm_fast.seeding import Purpose, stream
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config, train_without_plots

STATISTICS = {"alg__normalize_obs": True}


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run in 8 envs, with running statistics; not to be written."""
    directory = tmp_path_factory.mktemp("source") / "run"
    config = tiny_config(directory, num_envs=8, alg__replay_capacity=800, **STATISTICS)
    train_without_plots(config)
    return directory / "checkpoints" / "final.pt"


def saved_evaluation(path: Path, seed: int, episodes: int) -> float:
    """Mean return of a checkpoint's policy."""
    config, content = build.load_run(path)
    env = build.make_env(config, episodes, seed)
    agent = build.restore_agent(path, config, content, env, torch.device("cpu"))
    return evaluate(agent, env, seed).returns.mean().item()


@pytest.mark.parametrize("num_envs", [1, 4, 8])
def test_first_evaluation_is_the_checkpoints(source: Path, tmp_path: Path, num_envs: int) -> None:
    config = tiny_config(tmp_path / "run", num_envs=num_envs, init=str(source), **STATISTICS)
    assert train(config)[0]["status"] == "finished"
    logged = rows(tmp_path / "run")
    assert [row["epoch"] for row in logged] == list(range(7)), "its epochs begin anew"
    assert logged[0]["env_steps"] == 0 and logged[1]["replay_size"] == 4 * num_envs
    seed = stream(config.seed, Purpose.EVALUATION)
    assert logged[0]["reward"] == saved_evaluation(source, seed, config.eval.episodes)


def test_takes_networks_and_statistics_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tiny_config(tmp_path / "run", init=str(source), epochs=0, **STATISTICS))
    given = checkpoint.load(source)
    taken = checkpoint.load(tmp_path / "run" / "checkpoints" / "final.pt")
    for module in ("world_model", "actor", "critic", "obs_rms", "rew_rms", "ret_rms"):
        for name, value in given["agent"][module].items():
            assert torch.equal(taken["agent"][module][name], value), name
    assert given["agent"]["obs_rms"]["count"] > 0
    for name in ("world_model_opt", "actor_opt", "critic_opt"):
        assert taken["agent"][name]["adam"]["state"] == {}
    assert (taken["epoch"], taken["bootstrapped"], taken["precision"]) == (0, False, None)
    assert f"starting with the networks of {source}" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())["history"][0]
    assert record["init"]["checkpoint"] == str(source) and record["init"]["epoch"] == 6
    assert record["init"]["sha256"] == seal.verify(source) is not None
    assert record["continues"] is None


def test_goes_on_with_its_own_weights(source: Path, tmp_path: Path) -> None:
    """Also where the checkpoint that it began with is gone."""
    init = tmp_path / "weights.pt"
    init.write_bytes(source.read_bytes())
    config = tiny_config(tmp_path / "run", init=str(init), **STATISTICS)
    train(config)
    init.unlink()
    train(tiny_config(tmp_path / "run", init=str(init), epochs=8, **STATISTICS))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(9))
    with pytest.raises(ConfigError, match=r"init was '.*weights\.pt', is None"):
        train(tiny_config(tmp_path / "run", epochs=9, **STATISTICS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"alg__actor__units": [8]},
            "alg.actor.units was [16], is [8]; the saved agent is of another architecture",
        ),
        ({"env": "hopper", "env__max_episode_steps": 30}, "env.name=hopper"),
        ({"alg__world_model__kind": "mlp"}, "alg.world_model.kind was 'flow', is 'mlp'"),
        ({"alg__critic__members": 2}, "alg.critic.members was 3, is 2"),
        ({"alg__actor__kind": "tdmpc2"}, "alg.actor.kind was 'pwm', is 'tdmpc2'; the saved agent"),
        ({"alg__normalize_obs": False}, "alg.normalize_obs was True, is False; its numbers mean"),
        ({"alg__world_model__vmax": 5.0}, "alg.world_model.vmax was 10.0, is 5.0; its numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_networks_are_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        train(tiny_config(tmp_path / "run", init=str(source), **{**STATISTICS, **changes}))
    message = str(caught.value)
    assert message.startswith(f"init={source} does not fit: it is of env.name=cartpole alg.name=")
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_wrong_input(source: Path, launcher: Launcher, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(source.read_bytes()[:-9])
    for arguments, message in (
        ([f"init={source}", f"resume={source}"], "init must be null where resume names a checkp"),
        (["init=no.pt"], "init=no.pt: there is no such file"),
        ([f"init={tmp_path}"], f"init={tmp_path}: there is no such file"),
        (["init="], "init must be a path or null, got ''"),
        ([f"init={damaged}"], "damaged.pt is no readable checkpoint"),
    ):
        outcome = launcher.run(tmp_path / "cwd", *tiny_arguments(Path("run"), *arguments))
        assert (outcome.status, outcome.out) == (2, "")
        assert len(outcome.err.splitlines()) == 1 and message in outcome.err, outcome.err
        assert not (tmp_path / "cwd" / "run").exists()
