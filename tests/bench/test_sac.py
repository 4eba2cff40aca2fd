"""The outside anchor: what it says without its library, and robots as the library's own kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench import sac
from pwm_fast import envs
from pwm_fast.run.acting import PolicyNotFinite
from pwm_fast.run.evaluation import evaluate

mujoco = pytest.importorskip("mujoco")


@contextmanager
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for the two modules that the adapter takes its bases from."""

    class VecEnv:
        def __init__(self, num_envs: int, observation_space: Any, action_space: Any) -> None:
            self.num_envs = num_envs
            self.spaces = observation_space, action_space

    class Box:
        def __init__(self, low: float, high: float, shape: Any, dtype: Any) -> None:
            self.shape = shape

    parents = (sac.LIBRARY, f"{sac.LIBRARY}.common")
    modules = {name: ModuleType(name) for name in (*parents, f"{parents[1]}.vec_env", "gymnasium")}
    modules[f"{parents[1]}.vec_env"].VecEnv = VecEnv  # type: ignore[attr-defined]
    modules["gymnasium"].spaces = ModuleType("spaces")  # type: ignore[attr-defined]
    modules["gymnasium"].spaces.Box = Box
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def test_robots_as_the_librarys_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are the environment's; an episode's end says what it was, and the observation then."""
    ours, other = (envs.make("hopper", 3, seed=1, max_episode_steps=4) for _ in range(2))
    with library(monkeypatch):
        robots = sac.vector_env(ours)
    assert [space.shape for space in robots.spaces] == [(11,), (3,)]
    np.testing.assert_array_equal(robots.reset(), other.reset()[0].numpy())
    for t in range(1, 6):
        action = np.full((3, 3), 0.1 * t, np.float32)
        robots.step_async(action)
        obs, reward, done, infos = robots.step_wait()
        expected = other.step(torch.from_numpy(action))
        np.testing.assert_array_equal(obs, expected[0].numpy())
        np.testing.assert_array_equal(reward, expected[1].numpy())
        assert done.tolist() == [t == 4] * 3
        if t != 4:
            assert infos == [{}] * 3
            continue
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] is True
            final = expected[4]["final_obs"][i].numpy()
            np.testing.assert_array_equal(info["terminal_observation"], final)
    robots.close()
    other.close()


def test_a_model_acts_in_evaluations() -> None:
    class Model:
        def predict(self, obs: np.ndarray, *, deterministic: bool) -> tuple[np.ndarray, None]:
            assert obs.shape == (2, 11) and deterministic
            return np.full((2, 3), value, np.float32), None

    env = envs.make("hopper", 2, max_episode_steps=3)
    value = 0.5
    assert evaluate(cast(Any, sac._Learner(Model(), {})), env, 0).lengths.tolist() == [3, 3]
    value = np.nan
    with pytest.raises(PolicyNotFinite):
        evaluate(cast(Any, sac._Learner(Model(), {})), env, 0)
    env.close()


def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise sac.PackageNotFoundError(name)

    monkeypatch.setattr(sac, "version", missing)
    assert sac.main(["hopper"]) == 2
    assert capsys.readouterr().err == (
        "error: stable-baselines3 is missing: pip install stable-baselines3\n"
    )
    with pytest.raises(SystemExit):
        sac.main(["hopper", "--updates", "0"])
    assert "--updates: must be a positive number, got 0" in capsys.readouterr().err
