"""No window in the replay goes from an observation to one that does not follow it.

Runs in environments whose observations say which episode and step they are of are killed and
stopped again and again, at random places, and every window that their replay could give is looked
at.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast import envs
from pwm_fast.agent import PWM
from pwm_fast.envs import GymnasiumEnv, MujocoEnv, StateNotSupported
from pwm_fast.replay import Replay
from pwm_fast.run import checkpoint
from pwm_fast.run.start import train
from tests.run.conftest import rows, tiny_config

numbered = pytest.importorskip("tests.run.numbered", reason="needs pip install 'pwm-fast[gym]'")

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")

HORIZON = 4
Check = Callable[[torch.Tensor], torch.Tensor]  # bool [...] for windows [..., H+1, O]


def in_processes(num_envs: int, *, seed: int = 0, **options: Any) -> GymnasiumEnv:
    made = partial(gymnasium.make, numbered.ID, disable_env_checker=True)
    vector = gymnasium.vector.AsyncVectorEnv(
        [made] * num_envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
    )
    return GymnasiumEnv(vector, seed=seed, max_episode_steps=20)


def numbers_follow(windows: torch.Tensor) -> torch.Tensor:
    before, after = windows[..., :-1, :], windows[..., 1:, :]
    return (after - before == torch.tensor([0.0, 0.0, 1.0])).all(-1).all(-1)


def cart_moves_on(windows: torch.Tensor) -> torch.Tensor:
    """The cart's place changes by what its velocities before and after allow, at 60 Hz."""
    x, v = windows[..., 0], windows[..., 1]
    speed = torch.maximum(v[..., 1:].abs(), v[..., :-1].abs())
    return ((x[..., 1:] - x[..., :-1]).abs() <= 1.5 * speed / 60 + 1e-4).all(-1)


def pendulum_turns_on(windows: torch.Tensor) -> torch.Tensor:
    """Of Pendulum-v1 (cosine, sine, velocity; 20 Hz): the angle changes by the new velocity."""
    angle = torch.atan2(windows[..., 1], windows[..., 0])
    turned = angle[..., 1:] - angle[..., :-1] - 0.05 * windows[..., 1:, 2]
    return (torch.remainder(turned + torch.pi, 2 * torch.pi) - torch.pi).abs().le(1e-3).all(-1)


def every_window(replay: Replay) -> torch.Tensor:
    """Observations ``[windows, H+1, O]`` of all that :meth:`Replay.sample` draws from."""
    env, end = replay._window_ends().nonzero(as_tuple=True)
    rows = (end[:, None] + torch.arange(1 - replay.horizon, 2)) % replay.rows
    return replay._data[env[:, None], rows, : replay.obs_dim]


def look_at(run_dir: Path, follows: Check) -> int:
    """Check the replay of the latest checkpoint; return how many windows it has."""
    state = checkpoint.load(run_dir / "checkpoints" / "latest.pt")["replay"]
    num_envs, ring, obs, action, horizon = state["shape"]
    replay = Replay(num_envs * ring, num_envs, obs, action, horizon)
    replay.load_state_dict(state)
    good = follows(every_window(replay))
    assert good.all(), f"{int((~good).sum())} of {len(good)} windows join two episodes"
    return len(good)


class Killed(BaseException):
    """What the process would have done next it never does."""


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bool], None]]:
    """Kill or stop the process when it has drawn so many batches or observed so many steps."""
    left, kill = 0, False

    def counted(original: Callable[..., Any], *args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if kill:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    for name in ("observe", "update_world_model", "update_policy"):
        original = getattr(PWM, name)
        monkeypatch.setattr(PWM, name, lambda *args, original=original: counted(original, *args))

    def arm(after: int, by_kill: bool) -> None:
        nonlocal left, kill
        left, kill = after, by_kill

    yield arm


def no_state(self: Any) -> None:
    raise StateNotSupported("a simulator of another kind")


KINDS: dict[str, tuple[dict[str, Any], Check]] = {
    "gym": ({"env.id": numbered.ID}, numbers_follow),
    "gym, processes": ({"env.id": numbered.ID, "num_envs": 2}, numbers_follow),
    "gym, Pendulum": ({"env.id": "Pendulum-v1"}, pendulum_turns_on),
    "cartpole": ({"env.name": "cartpole"}, cart_moves_on),
    "cartpole, not saved": ({"env.name": "cartpole"}, cart_moves_on),
    "dmc": (  # which compiles its model anew for every env, also of evaluations
        {
            "env.name": "dmc",
            "env.domain": "cartpole",
            "env.task": "swingup",
            "num_envs": 2,
        },
        lambda windows: (windows[..., 1:, 0] - windows[..., :-1, 0]).abs().le(0.1).all(-1),
    ),
}


# How a ring grows does not depend on who steps the env: it wraps with each, and grows with some.
RUNS = [
    *(pytest.param(kind, 48, id=f"{kind}-wrapping") for kind in KINDS),
    *(
        pytest.param(
            kind,
            400,
            id=f"{kind}-growing",
            marks=() if kind in ("gym", "cartpole") else pytest.mark.repeats,
        )
        for kind in KINDS
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capacity"), RUNS)
def test_no_window_joins_two_episodes(
    kind: str,
    capacity: int,
    tmp_path: Path,
    disturb: Callable[[int, bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "dmc":
        pytest.importorskip("dm_control", reason="needs pip install 'pwm-fast[dmc]'")
    if kind == "gym, processes":
        monkeypatch.setitem(envs.ADAPTERS, "gym", in_processes)
    if kind == "cartpole, not saved":
        monkeypatch.setattr(MujocoEnv, "get_state", no_state)
    monkeypatch.setattr("pwm_fast.run.trainer.plot_run", lambda *_: [])
    own, follows = KINDS[kind]
    changes: dict[str, Any] = {
        "env.name": "gym",
        "env.max_episode_steps": None if kind == "gym, processes" else 20,
        "epochs": 10,
        "checkpoint.every": 3,
        "eval.every": 5,
        "eval.episodes": 1,
        "eval.final_episodes": 1,
        "esnr.every": 0,
        "alg.replay_capacity": capacity,
        "alg.horizon": HORIZON,
        **own,
    }
    draw = random.Random(f"{kind} {capacity}")
    ends = seen = 0
    while True:
        numbered.Numbered.process += 1
        disturb(draw.randrange(1, 16), draw.random() < 0.4)
        config = tiny_config(tmp_path / "run", **changes)
        try:
            summary, _ = train(config)
        except Killed:
            ends += 1
        else:
            ends += summary["status"] == "interrupted"
            seen += look_at(tmp_path / "run", follows)
            if summary["status"] == "finished":
                break
        assert ends < 100
    assert ends >= 5 and seen > 20
    logged = rows(tmp_path / "run")
    assert [row["epoch"] for row in logged] == list(range(11))
    if follows is numbers_follow:
        whole = [row["train_reward"] for row in logged if row.get("train_reward") is not None]
        assert whole and set(whole) == {2.0}, "no part of an episode counts as a whole one"


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("rows_each", [6, 7, 40])
def test_ended_episodes_in_the_ring(rows_each: int, steps: int) -> None:
    """Whatever the rings hold, and some envs between two episodes."""
    replay = Replay(3 * rows_each, 3, 3, 1, HORIZON)

    def add(process: int, t: torch.Tensor, done: torch.Tensor) -> None:
        obs = torch.stack([torch.full((3,), float(process)), torch.arange(3.0), t], dim=-1)
        zero = torch.zeros(3)
        final = obs + torch.tensor([0.0, 0.0, 1.0])
        replay.add(obs, zero[:, None], zero, torch.zeros(3, dtype=torch.bool), done, final)

    def windows() -> set[tuple[float, ...]]:
        found = every_window(replay)
        assert numbers_follow(found).all()
        return {tuple(w.flatten().tolist()) for w in found}

    for t in range(steps):
        done = torch.tensor([False, t == steps - 1, False])
        add(0, torch.full((3,), float(t)), done)
    held, transitions = windows(), len(replay)
    replay.end_episodes()
    assert windows() >= held and len(replay) == transitions, "nothing that was held is lost"
    replay.end_episodes()  # nothing is open: nothing changes
    state = replay.state_dict()
    other = Replay(3 * rows_each, 3, 3, 1, HORIZON)
    other.load_state_dict(state)
    assert replay.ended().tolist() == (
        [1, 1, 1] if 0 < steps < rows_each else replay.ended().tolist()
    )
    for t in range(9):
        add(1, torch.full((3,), float(t)), torch.zeros(3, dtype=torch.bool))
        windows()
        if replay.num_windows():
            drawn = replay.sample(64).obs.transpose(0, 1)
            assert numbers_follow(drawn).all()


def test_new_episodes_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumes from different places do not repeat the run's first episodes, nor each other's."""
    monkeypatch.setattr("pwm_fast.run.trainer.plot_run", lambda *_: [])
    starts = []
    for epochs in range(1, 5):
        config = tiny_config(
            tmp_path / "run", **{"env.name": "gym", "env.id": "Pendulum-v1", "epochs": epochs}
        )
        train(config)
        state = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["replay"]
        first = state["run"] == 1
        starts.append(state["data"][first][:, :3])
    begun = starts[-1]
    assert len(begun) == 4 * 4
    assert len(torch.unique(begun, dim=0)) == len(begun)
