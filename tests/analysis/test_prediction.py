"""Prediction errors against closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pwm_fast.agent.view import ModelView, view_of
from pwm_fast.analysis.prediction import HeldOut, draw_windows, prediction_errors
from pwm_fast.replay import Episode
from tests.agent.agents import ACTION, AGENTS, OBS, make_agent, make_task
from tests.analysis.closed_forms import A, D, normal, whole_windows

H, B = 5, 7


Function = Callable[[Tensor, Tensor], Tensor]


def view(
    step: Function = lambda z, a: z,
    reward: Function = lambda z, a: z[..., 0],
    termination: Function | None = None,
) -> ModelView:
    return ModelView(lambda obs: obs, step, reward, termination)


def windows(obs: Tensor | None = None, reward: Tensor | None = None) -> HeldOut:
    return whole_windows(
        normal(H + 1, B, D) if obs is None else obs,
        normal(H, B, A),
        normal(H, B) if reward is None else reward,
    )


def test_a_perfect_model_has_no_error() -> None:
    """The true map, of latents and actions, gives 0 at every step."""
    m, n = 0.5 * normal(D, D), normal(D, A)
    action, obs = normal(H, B, A), [normal(B, D)]
    for a in action:
        obs.append(obs[-1] @ m.T + a @ n.T)
    stacked = torch.stack(obs)
    data = whole_windows(stacked, action, stacked[:-1, :, 0] * 2 + action[..., 1])
    errors = prediction_errors(
        view(lambda z, a: z @ m.T + a @ n.T, lambda z, a: 2 * z[..., 0] + a[..., 1]), data
    )
    for name in ("latent_rms", "latent_p80", "reward_rmse", "reward_mae", "return_rmse"):
        assert errors[name].abs().max() < 1e-12, name
    assert errors["displacement"].min() > 0.1 and errors["windows"].tolist() == [B] * H
    assert "termination_bce" not in errors


def test_standing_still_is_as_wrong_as_the_displacement() -> None:
    errors = prediction_errors(view(), windows())
    assert torch.allclose(errors["latent_per_displacement"], torch.ones(H, dtype=torch.float64))
    assert torch.allclose(errors["latent_rms"], errors["displacement"])


def test_a_window_s_own_ratio() -> None:
    """Displacements 1, 2, 0 and 10 with an error of 1, 1, 1 and 5: ratios 1, 1/2, none, 1/2."""
    obs = torch.zeros(2, 4, D, dtype=torch.float64)
    obs[1, :, 0] = torch.tensor([1.0, 2.0, 0.0, 10.0])
    wrong = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)

    def step(z: Tensor, a: Tensor) -> Tensor:
        return obs[1] + wrong[:, None] * torch.eye(D, dtype=torch.float64)[1]

    data = whole_windows(obs, normal(1, 4, A), normal(1, 4))
    errors = prediction_errors(view(step), data)
    assert errors["latent_per_displacement_p50"].tolist() == [0.5]
    assert errors["latent_per_displacement_p80"].tolist() == pytest.approx([0.8])
    assert errors["latent_per_displacement"].item() == pytest.approx((28 / 105) ** 0.5)


def test_the_mean_is_as_wrong_as_the_spread() -> None:
    data = windows()
    steps = iter(data.obs[1:].mean(1))
    errors = prediction_errors(view(lambda z, a: next(steps).expand(B, D)), data)
    assert torch.allclose(errors["latent_per_spread"], torch.ones(H, dtype=torch.float64))


def test_an_error_that_grows_by_a_constant() -> None:
    """Latents that stand still, a model that adds e each step: the error is h |e|."""
    e = normal(D)
    data = windows(obs=normal(B, D).expand(H + 1, B, D))
    errors = prediction_errors(view(lambda z, a: z + e), data)
    h = torch.arange(1, H + 1, dtype=torch.float64)
    for name in ("latent_rms", "latent_p20", "latent_p50", "latent_p80"):
        assert torch.allclose(errors[name], h * torch.linalg.norm(e)), name
    assert errors["latent_per_displacement"].isnan().all(), "nothing moved: no ratio"


def test_rewards() -> None:
    """Off by c: RMSE and MAE are c, the summed error h c, in units of the real rewards' spread."""
    data = windows()
    c = 0.7
    errors = prediction_errors(
        view(reward=lambda z, a: data.reward + c * torch.tensor([1.0] * H)[:, None]), data
    )
    h = torch.arange(1, H + 1, dtype=torch.float64)
    assert torch.allclose(errors["reward_rmse"], torch.full((H,), c, dtype=torch.float64))
    assert torch.allclose(errors["reward_mae"], errors["reward_rmse"])
    assert torch.allclose(errors["return_rmse"], h * c)
    spread = data.reward.std(1, correction=0)
    assert torch.allclose(errors["reward_per_spread"], c / spread)


def test_a_reward_is_of_the_latent_before_the_step() -> None:
    data = windows()
    errors = prediction_errors(view(lambda z, a: z * 0.0), data)
    first = (data.obs[0, :, 0] - data.reward[0]).square().mean().sqrt()
    later = data.reward[1:].square().mean(1).sqrt()
    assert torch.allclose(errors["reward_rmse"], torch.cat([first[None], later]))


def test_termination() -> None:
    logits = normal(H, B)
    data = windows()
    flags = torch.rand(H, B) < 0.4
    flags[0], flags[1] = False, True
    data = data._replace(terminated=flags)
    errors = prediction_errors(view(termination=lambda z, a: logits), data)
    p, y = torch.sigmoid(logits), flags.double()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean(1)
    assert torch.allclose(errors["termination_bce"], bce)
    assert torch.allclose(errors["termination_brier"], (p - y).square().mean(1))
    assert errors["terminated"].tolist() == flags.sum(1).tolist()
    assert errors["p_terminated"][0].isnan() and errors["p_going_on"][1].isnan()
    assert torch.allclose(errors["p_terminated"][2], p[2][flags[2]].mean())
    assert torch.allclose(errors["p_going_on"][2], p[2][~flags[2]].mean())


def test_what_is_behind_an_episode_s_end_does_not_count() -> None:
    """Predictions there are infinite or NaN; the figures are those of the windows that go on."""
    data = windows()
    valid = torch.ones(H, B, dtype=torch.bool)
    valid[2:, 0] = False
    valid[4:] = False
    data = data._replace(valid=valid)
    lengths = valid.sum(0)

    def step(z: Tensor, a: Tensor) -> Tensor:
        step.h += 1  # type: ignore[attr-defined]
        return torch.where((step.h > lengths)[:, None], torch.inf, z + 1.0)  # type: ignore[attr-defined]

    step.h = 0  # type: ignore[attr-defined]
    logits = torch.where(valid, 0.0, torch.nan).double()
    errors = prediction_errors(view(step, termination=lambda z, a: logits), data)
    assert errors["windows"].tolist() == [B, B, B - 1, B - 1, 0]
    for name, values in errors.items():
        if name not in ("p_terminated", "windows", "terminated"):
            assert values[:4].isfinite().all(), name
            assert values[4].isnan(), name
    rest = data.obs[3, 1:] - data.obs[0, 1:]
    assert errors["displacement"][2] == pytest.approx(rest.square().sum(-1).mean().sqrt().item())
    spread = data.obs[3, 1:].var(0, correction=0).sum().sqrt().item()
    assert errors["spread"][2] == pytest.approx(spread)
    assert errors["termination_bce"][0] == pytest.approx(math.log(2.0))


# Windows


def episodes() -> list[Episode]:
    """Observations say ``[episode, step]``; episode 0 terminates."""
    made = []
    for e, length in enumerate((1, 4, 9)):
        t = torch.arange(length + 1.0)
        obs = torch.stack([torch.full_like(t, e), t], dim=-1)
        terminated = torch.zeros(length, dtype=torch.bool)
        terminated[-1] = e == 0
        made.append(Episode(obs, t[:-1, None] + 1, 10 * e + t[:-1], terminated))
    return made


def test_every_step_starts_one_window() -> None:
    data = draw_windows(episodes(), 3, 1000)
    assert data.obs.shape == (4, 14, 2) and data.action.shape == (3, 14, 1)
    starts = sorted(map(tuple, data.obs[0].int().tolist()))
    assert starts == [(e, t) for e, n in enumerate((1, 4, 9)) for t in range(n)]
    for b in range(14):
        e, t = data.obs[0, b].int().tolist()
        left = (1, 4, 9)[e] - t
        assert data.valid[:, b].tolist() == [h < left for h in range(3)]
        for h in range(min(left, 3)):
            assert data.obs[h + 1, b].tolist() == [e, t + h + 1]
            assert data.action[h, b] == t + h + 1
            assert data.reward[h, b] == 10 * e + t + h
        assert data.terminated[:, b].sum() == (e == 0)
        assert not data.reward[left:, b].any() and not data.action[left:, b].any()


def test_fewer_windows_are_distinct_and_reproducible() -> None:
    draws = [draw_windows(episodes(), 2, 9, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0].obs, draws[1].obs)
    assert not torch.equal(draws[0].obs, draws[2].obs)
    assert len({tuple(row) for row in draws[0].obs[0].tolist()}) == 9


# Agents


@pytest.mark.parametrize("name", AGENTS)
def test_agents(name: str) -> None:
    """Baseline and flow, of one task and of rows of two: as their own methods say."""
    agent = make_agent(double=True, **AGENTS[name])
    agent.observe(torch.randn(50, OBS) * 3 + 1, 5 * torch.randn(50), make_task(50))
    data = whole_windows(
        normal(H + 1, B, OBS), 2 * torch.rand(H, B, ACTION).double() - 1, normal(H, B)
    )
    errors = prediction_errors(view_of(agent, make_task(B)), data)
    task = agent.task_numbers((B,), make_task(B))
    z = agent.encode(data.obs[0], task)
    reward = agent.world_model.decode_reward(agent.world_model.reward(z, data.action[0], task))
    if agent.config.normalize_rewards:
        reward = reward * agent.reward_rms.scale()
        reward = reward + (agent.reward_rms.mean if agent.config.centre_rewards else 0.0)
    following = agent.world_model.next(z, data.action[0], task)
    real = agent.encode(data.obs[1], task)
    rms = (following - real).square().sum(-1).mean().sqrt()
    assert errors["latent_rms"][0] == pytest.approx(rms.item(), rel=1e-9)
    rmse = (reward - data.reward[0]).square().mean().sqrt()
    assert errors["reward_rmse"][0] == pytest.approx(rmse.item(), rel=1e-9)
    assert ("termination_bce" in errors) == bool(AGENTS[name].get("can_terminate"))
