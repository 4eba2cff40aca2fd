"""R2 of open-loop rewards, of a model and of baselines, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pwm_fast.agent.view import ModelView
from pwm_fast.analysis.prediction import cut_windows
from pwm_fast.analysis.rewards import (
    RIDGE,
    model_r2,
    open_loop_rewards,
    r2_over_episodes,
    reward_report,
    ridge,
)
from pwm_fast.replay import Episode
from tests.analysis.closed_forms import normal

WIDTH, A, H = 4, 2, 5


class Linear:
    """``s' = M s + N a`` with the reward ``w s + v a`` of the state before the step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        rotation = torch.linalg.qr(normal(WIDTH, WIDTH))[0]
        self.m, self.n, self.w, self.v = 0.9 * rotation, normal(WIDTH, A), normal(WIDTH), normal(A)

    def step(self, s: Tensor, a: Tensor) -> Tensor:
        return s @ self.m.T + a @ self.n.T

    def reward(self, s: Tensor, a: Tensor) -> Tensor:
        return s @ self.w + a @ self.v

    def episodes(self, count: int, length: int) -> list[Episode]:
        found = []
        for _ in range(count):
            action = 2 * torch.rand(length, A, dtype=torch.float64) - 1
            obs = [normal(WIDTH)]
            for a in action:
                obs.append(self.step(obs[-1], a))
            obs = torch.stack(obs)
            ends = torch.zeros(length, dtype=torch.bool)
            found.append(Episode(obs, action, self.reward(obs[:-1], action), ends))
        return found

    def view(self, *, knows_actions: bool = True) -> ModelView:
        known = 1.0 if knows_actions else 0.0
        return ModelView(
            lambda obs: obs,
            lambda z, a: self.step(z, known * a),
            lambda z, a: self.reward(z, known * a),
            None,
        )


@pytest.fixture(scope="module")
def system() -> Linear:
    return Linear()


@pytest.fixture(scope="module")
def episodes(system: Linear) -> list[Episode]:
    torch.manual_seed(1)
    return system.episodes(10, 60)


def starts_of(episodes: list[Episode]) -> list[tuple[int, int]]:
    return [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.action))]


def report(view: ModelView, episodes: list[Episode], seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return reward_report(view, episodes, starts_of(episodes), H, generator)


def test_a_perfect_model_and_the_regression_that_can_be_it(
    system: Linear, episodes: list[Episode]
) -> None:
    """The rewards are linear in o_0 and the actions; without the actions they are not."""
    found = report(system.view(), episodes)
    assert found["model"] == pytest.approx([1.0] * H, abs=1e-9)
    assert found["model_low"] == pytest.approx([1.0] * H, abs=1e-9)
    assert min(found["linear_obs_actions"]) > 0.999
    assert found["advantage"] == pytest.approx([0.0] * H, abs=1e-3)
    assert max(found["linear_obs"][1:]) < 0.6 < found["linear_obs"][0]
    assert max(found["persistence"]) < 0.6
    assert found["windows"] == [10 * (59 - h) for h in range(H)], "without the first of each"
    assert found["episodes"] == 10 and found["fitted"] == 5 * 60


def test_a_model_that_ignores_actions_is_seen(system: Linear, episodes: list[Episode]) -> None:
    """As good as the regression on o_0 at best, and far below the one that has the actions."""
    found = report(system.view(knows_actions=False), episodes)
    for h in range(H):
        assert found["model"][h] == pytest.approx(found["linear_obs"][h], abs=0.05)
        assert found["advantage_high"][h] < 0.0


def test_regressions_never_see_the_episode_that_they_are_judged_on() -> None:
    """Each episode has a level of its own, which o_0 names: only its own steps could tell it."""
    torch.manual_seed(2)
    count = 8
    episodes = []
    for e in range(count):
        obs = torch.nn.functional.one_hot(torch.full((31,), e), count).double()
        reward = torch.full((30,), 10.0 * (-1) ** e, dtype=torch.float64)
        action = torch.zeros(30, 1, dtype=torch.float64)
        episodes.append(Episode(obs, action, reward, torch.zeros(30, dtype=torch.bool)))
    view = ModelView(lambda obs: obs, lambda z, a: z, lambda z, a: z[..., 0], None)
    found = report(view, episodes)
    assert max(found["linear_obs"]) < 0.1, "fitted on the same episodes it would be 1"
    assert found["persistence"] == pytest.approx([1.0] * H)


def test_persistence_is_the_reward_before_the_window() -> None:
    """Rewards 1, 2, 3, ... of two episodes: h steps later it is h too small."""
    reward = torch.arange(1.0, 21.0, dtype=torch.float64)
    flags = torch.zeros(20, dtype=torch.bool)
    episode = Episode(torch.zeros(21, 1), torch.zeros(20, 1), reward, flags)
    view = ModelView(lambda obs: obs, lambda z, a: z, lambda z, a: z[..., 0], None)
    found = report(view, [episode, episode])
    for h in range(1, H + 1):
        values = reward[h:]
        expected = 1.0 - h**2 / values.var(correction=0).item()
        assert found["persistence"][h - 1] == pytest.approx(expected)


def test_r2_by_hand() -> None:
    """Four windows of rewards 0, 2, 4, 6: variance 5; errors of 1 and of the mean."""
    real = torch.tensor([[0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0, 99.0]])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    predicted = {"off": real + 1.0, "mean": torch.tensor([[3.0], [2.0]]).expand(2, 4)}
    predicted["off"][1, 3] = torch.inf
    found = r2_over_episodes(predicted, real, valid, torch.tensor([5, 5, 7, 7]))
    assert found["windows"] == [4.0, 3.0]
    assert found["off"] == pytest.approx([1 - 1 / 5, 1 - 1 / (8 / 3)])
    assert found["mean"] == pytest.approx([0.0, 0.0])


def test_equal_rewards_have_no_r2() -> None:
    real = torch.full((1, 6), 0.1)
    found = r2_over_episodes({"x": real}, real, real > 0, torch.arange(6))
    assert math.isnan(found["x"][0]) and math.isnan(found["x_low"][0])  # type: ignore[index]


def test_the_interval_is_over_episodes() -> None:
    """Against drawing the episodes by hand; copies of a window within one narrow nothing."""
    torch.manual_seed(3)
    real, error = normal(1, 60), 0.5 * normal(1, 60)
    predicted, place = real + error, torch.arange(60) // 3
    arguments = {"x": predicted}, real, torch.ones(1, 60, dtype=torch.bool), place
    found = r2_over_episodes(*arguments, resamples=4000)
    drawn = np.random.default_rng(7).integers(20, size=(4000, 20, 1)) * 3 + np.arange(3)
    rows = torch.from_numpy(drawn.reshape(4000, 60))
    scores = 1 - error[0, rows].square().mean(1) / real[0, rows].var(1, correction=0)
    low, high = np.percentile(scores, [2.5, 97.5])
    assert found["x_low"][0] == pytest.approx(low, abs=0.02)  # type: ignore[index]
    assert found["x_high"][0] == pytest.approx(high, abs=0.02)  # type: ignore[index]
    twice = [torch.cat([part, part], -1) for part in (predicted, *arguments[1:])]
    again = r2_over_episodes({"x": twice[0]}, *twice[1:], resamples=4000)
    assert again["x_low"] == pytest.approx(found["x_low"])
    one = r2_over_episodes({"x": predicted}, real, arguments[2], torch.zeros(60).long())
    assert math.isnan(one["x_low"][0])  # type: ignore[index]


def test_one_episode_leaves_nothing_to_fit(system: Linear, episodes: list[Episode]) -> None:
    found = report(system.view(), episodes[:1])
    assert found["model"] == pytest.approx([1.0] * H) and found["fitted"] == 0
    assert all(map(math.isnan, found["linear_obs"])) and all(map(math.isnan, found["advantage"]))


def test_episodes_of_one_step_have_no_window(system: Linear) -> None:
    found = report(system.view(), system.episodes(3, 1))
    assert found["windows"] == [0.0] * H and all(map(math.isnan, found["model"]))


def test_the_model_alone(system: Linear, episodes: list[Episode]) -> None:
    view = system.view(knows_actions=False)
    assert model_r2(view, episodes, starts_of(episodes), H) == report(view, episodes)["model"]


def test_rewards_are_of_the_latent_before_the_step(system: Linear, episodes: list[Episode]) -> None:
    windows = cut_windows(episodes, [(0, 3), (2, 7)], H)
    assert torch.allclose(open_loop_rewards(system.view(), windows), windows.reward)


def test_ridge() -> None:
    """One standardised feature: the slope shrinks by 1 / (1 + RIDGE); a constant one is nothing."""
    x = torch.tensor([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    found = ridge(x, y, torch.tensor([[3.0, 9.0]], dtype=torch.float64))
    assert found.item() == pytest.approx(5.0 + 2.0 / (1.0 + RIDGE))
