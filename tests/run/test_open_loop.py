"""What a training run measures of its world model, against hand-computed values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.agent.view import ModelView
from pwm_fast.config import ConfigError
from pwm_fast.envs import Tasks
from pwm_fast.run import build, metrics, open_loop
from pwm_fast.run.open_loop import EPISODES, WINDOWS, Held
from tests.agent.agents import ACTION, OBS, make_agent
from tests.agent.no_sync import no_sync
from tests.run.conftest import rows, tiny_config, train_without_plots

H, B = 3, 6


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> PWM:
    """Its model is ``z' = z + a`` with the reward ``2 z_0``; :func:`drift` moves what is real."""

    def view_of(_: PWM, task: Tensor | None) -> ModelView:
        return ModelView(lambda o: o, lambda z, a: z + a, lambda z, a: 2 * z[..., 0], None)

    monkeypatch.setattr(open_loop, "view_of", view_of)
    return make_agent(horizon=H)


def drift(by: float, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of a system that also moves by a constant in each step."""
    torch.manual_seed(0)
    action = torch.randn(H + 1, batch, OBS, dtype=torch.float64)
    moves = torch.cat([torch.randn(1, batch, OBS).double(), action[:-1] + by])
    obs = moves.cumsum(0)
    return obs, action, 2 * obs[..., 0]


def test_a_perfect_model(agent: PWM) -> None:
    found = open_loop.open_loop(agent, *drift(0.0), torch.ones(B, dtype=torch.bool))
    assert found["eval_latent_error"] < 1e-12
    assert found["eval_reward_r2"] == pytest.approx(1.0)


def test_by_hand(agent: PWM) -> None:
    """Off by ``by`` in each latent and step; only windows that are whole count."""
    obs, action, reward = drift(0.25)
    whole = torch.tensor([True] * (B - 1) + [False])
    obs[:, -1], reward[:, -1] = torch.inf, torch.nan
    found = open_loop.open_loop(agent, obs, action, reward, whole)
    moved = (obs[1, :-1] - obs[0, :-1]).square().sum(-1).mean()
    assert found["eval_latent_error"] == pytest.approx((OBS * 0.25**2 / moved).sqrt().item())
    # The reward of step H is of the latent after H - 1 steps.
    spread = reward[H - 1, :-1].var(correction=0)
    wrong = (2 * (H - 1) * 0.25) ** 2
    assert found["eval_reward_r2"] == pytest.approx(1 - wrong / spread.item())


def test_a_model_without_actions_is_seen(agent: PWM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that nothing moves: an error of 1, and far less of the reward."""
    deaf = ModelView(lambda o: o, lambda z, a: z, lambda z, a: 2 * z[..., 0], None)
    monkeypatch.setattr(open_loop, "view_of", lambda *_: deaf)
    found = open_loop.open_loop(agent, *drift(0.0, 500), torch.ones(500, dtype=torch.bool))
    assert found["eval_latent_error"] == pytest.approx(1.0)
    assert found["eval_reward_r2"] < 0.5


def test_rewards_that_do_not_differ_have_no_r2(agent: PWM) -> None:
    obs, action, reward = drift(0.0)
    whole = torch.ones(B, dtype=torch.bool)
    found = open_loop.open_loop(agent, obs, action, torch.full_like(reward, 0.1), whole)
    assert found["eval_reward_r2"].isnan()
    none = open_loop.open_loop(agent, obs, action, reward, ~whole)
    assert none["eval_reward_r2"].isnan() and none["eval_latent_error"].isnan()


@pytest.mark.parametrize(
    ("envs", "steps", "tasks"), [(2, 11, 0), (20, 11, 0), (3, 400, 3), (20, 11, 3), (40, 11, 19)]
)
def test_windows_of_an_evaluation(
    envs: int, steps: int, tasks: int, agent: PWM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one env and consecutive steps, of the first episodes alone; no random number is drawn."""
    number = torch.arange(envs) % max(tasks, 1)
    names = tuple(map(str, range(tasks)))
    dims = (ACTION,) * tasks
    given = Tasks(names, tuple(range(tasks)), dims, number, torch.ones(envs, ACTION))
    held, lengths = Held(given if tasks else None), [steps - 4 - n % 2 for n in range(envs)]
    buffer = torch.zeros(envs, OBS)
    for t in range(steps):
        buffer[:, 0], buffer[:, 1] = torch.arange(envs), t
        running = torch.tensor([t < length for length in lengths])
        held.add(buffer, buffer[:, :ACTION] + 0.5, buffer[:, 1] * 10, running)
    seen = []
    monkeypatch.setattr(open_loop, "open_loop", lambda _, *parts: seen.append(parts) or {})
    state = torch.get_rng_state()
    held.metrics(agent)
    assert torch.equal(torch.get_rng_state(), state)
    ((obs, action, reward, whole, task),) = seen
    assert task is None if not tasks else torch.equal(task, obs[0, :, 0].long() % tasks)
    kept = min(envs, max(EPISODES, tasks))
    assert int(obs[0, :, 0].max()) == kept - 1
    assert obs.shape[0] == H + 1 and kept <= obs.shape[1] <= WINDOWS + kept
    assert (obs[1:, :, 1] == obs[:-1, :, 1] + 1).all() and (obs[..., 0] == obs[:1, :, 0]).all()
    assert torch.equal(action, obs[..., :ACTION] + 0.5) and torch.equal(reward, obs[..., 1] * 10)
    last = obs[-1]
    expected = last[:, 1] < torch.tensor(lengths)[last[:, 0].long()]
    assert torch.equal(whole, expected) and bool(whole.any()) and not bool(whole.all())


def test_an_evaluation_shorter_than_a_window(agent: PWM) -> None:
    held, flags = Held(), torch.ones(2, dtype=torch.bool)
    for _ in range(H):
        held.add(torch.zeros(2, OBS), torch.zeros(2, ACTION), torch.zeros(2), flags)
    assert held.metrics(agent) == {}


def test_nothing_waits_for_the_device() -> None:
    agent = make_agent(horizon=H)
    flags = torch.ones(2, dtype=torch.bool)
    steps = [torch.randn(2, OBS) for _ in range(8)]
    with no_sync() as mode:
        held = Held()
        for obs in steps:
            held.add(obs, obs[:, :ACTION], obs[:, 0], flags)
        found = held.metrics(agent)
    assert mode.operators > 50 and set(found) == {"eval_latent_error", "eval_reward_r2"}


def test_saturation() -> None:
    action = torch.tensor([[0.5, 0.981], [-1.0, 0.98]])
    assert metrics.saturation(action) == 0.5


# --- in a run -------------------------------------------------------------------------------------


def test_a_run_logs_them(finished: Path) -> None:
    """Random actions are 2 % saturated; the share of random steps falls as the policy's come."""
    logged = rows(finished)
    for row in logged:
        evaluated = "eval_reward" in row
        assert ("eval_latent_error" in row) == ("eval_reward_r2" in row) == evaluated
        assert not evaluated or row["eval_latent_error"] > 0
    assert [row["random_share"] for row in logged[1:]] == pytest.approx(
        [1.0, 1.0, 2 / 3, 2 / 4, 2 / 5, 2 / 6]
    )
    assert all(0.0 <= row["action_saturation"] <= 1.0 for row in logged[1:])


CHANGES = {"alg__replay_capacity": 4 * 20, "epochs": 12, "alg__steps_per_epoch": 6}


def test_random_data_stay_where_they_are_asked_to(tmp_path: Path) -> None:
    """Of 20 rows each env keeps 7: 6 random steps and the observation after them."""
    shares = {}
    for keep in (0.0, 0.35):
        train_without_plots(tiny_config(tmp_path / f"{keep}", alg__keep_random=keep, **CHANGES))
        shares[keep] = rows(tmp_path / f"{keep}")[-1]["random_share"]
    assert shares[0.0] == 0.0, "they left the replay"
    assert shares[0.35] >= 6 / 18


def test_resuming_without_the_replay_keeps_what_is_still_random() -> None:
    """After one of two random epochs one epoch's steps are left; after both none."""
    config = tiny_config(Path("x"), alg__keep_random=0.5, alg__steps_per_epoch=8)
    for epoch, done, kept in ((0, 0, 17), (1, 0, 9), (1, 3, 6), (1, 5, 0), (2, 0, 0), (5, 0, 0)):
        replay = build.Replay(400, 4, 5, 1, 4, keep=build.kept_rows(config))
        from pwm_fast.run.state import RunState

        state = cast(RunState, SimpleNamespace(config=config))
        content = {"epoch": epoch, "progress": {"done": {"steps": done} if done else {}}}
        replay.keep_at_most(RunState._random_left(state, content) + 1)
        assert replay._keep == kept, (epoch, done)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alg__keep_random": -0.1}, r"alg.keep_random must be in \[0, 1\), got -0.1"),
        ({"alg__keep_random": 1.0}, r"alg.keep_random must be in \[0, 1\), got 1.0"),
        ({"alg__keep_random": 0.02}, r"keeps 2 of the 100 rows .* needs 6: at least 0.06, or 0"),
        (
            {"alg__keep_random": 0.99, "alg__random_epochs": 50},
            r"leaves 1 of the 100 rows .* for newer transitions.* needs 6: at most 0.94",
        ),
        (
            {"alg__keep_random": 0.5, "alg__random_epochs": 1},
            r"alg.random_epochs=1 of alg.steps_per_epoch=4 steps are 4, .* needs 5",
        ),
    ],
)
def test_what_cannot_be_kept(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build.kept_rows(tiny_config(Path("x"), **changes))


def test_what_is_kept() -> None:
    """A share of the rows, or all random steps and the observation after them."""
    for share, epochs, rows_kept in ((0.0, 2, 0), (0.1, 10, 10), (0.5, 10, 41), (0.5, 99, 50)):
        config = tiny_config(Path("x"), alg__keep_random=share, alg__random_epochs=epochs)
        assert build.kept_rows(config) == rows_kept
