"""What an action changes later: closed forms, and the simulator's own course."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pwm_fast.agent.view import ModelView
from pwm_fast.analysis.sensitivity import Course, action_sensitivity, imagined
from pwm_fast.analysis.simulator import Recording, simulated, why_not
from pwm_fast.envs import StateNotSupported, make
from pwm_fast.run.collection import first_episodes
from tests.analysis.closed_forms import normal

D, A, T, P = 4, 3, 6, 5
VALID = torch.ones(T, P, dtype=torch.bool)


def linear(m: Tensor, n: Tensor, w: Tensor) -> ModelView:
    """``z' = M z + N a`` with the reward ``w z``."""
    return ModelView(lambda o: o, lambda z, a: z @ m.T + a @ n.T, lambda z, a: z @ w, None)


@pytest.fixture
def parts() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return normal(D, D), normal(D, A), normal(D), normal(P, D), 2 * torch.rand(T, P, A).double() - 1


def test_the_derivatives_are_those_of_a_linear_system(parts: tuple[Tensor, ...]) -> None:
    """``d r_n / d a_0 = w M^(n-1) N``, whatever the step; a true model agrees wholly."""
    m, n, w, obs, action = parts
    runs = imagined(linear(m, n, w), obs)
    found = action_sensitivity(runs, runs, action, VALID, (1, 4), 0.05)
    assert found["after"] == [1, 4] and found["points"] == [P, P]
    for i, steps in enumerate((1, 4)):
        jacobian = torch.linalg.matrix_power(m, steps - 1) @ n
        norm = torch.linalg.norm(w @ jacobian).item()
        assert found["reward_norm_real"][i] == pytest.approx(norm)
        assert found["latent_norm_real"][i] == pytest.approx(torch.linalg.norm(jacobian).item())
    for name in ("reward", "latent"):
        assert found[f"{name}_cosine"] == pytest.approx([1.0, 1.0])
        assert found[f"{name}_ratio"] == pytest.approx([1.0, 1.0])


def test_wrong_models(parts: tuple[Tensor, ...]) -> None:
    """Actions ignored, turned round, twice as strong: cosine and ratio say which."""
    m, n, w, obs, action = parts
    real = imagined(linear(m, n, w), obs)
    for factor, cosine, ratio in ((0.0, 0.0, 0.0), (-1.0, -1.0, 1.0), (2.0, 1.0, 2.0)):
        model = imagined(linear(m, factor * n, w), obs)
        found = action_sensitivity(real, model, action, VALID, (1, 4), 0.1)
        for name in ("reward", "latent"):
            assert found[f"{name}_cosine"] == pytest.approx([cosine] * 2)
            assert found[f"{name}_cosine_p20"] == pytest.approx([cosine] * 2)
            assert found[f"{name}_ratio"] == pytest.approx([ratio] * 2)


def test_nothing_is_asked_beyond_the_bounds_of_actions() -> None:
    """A simulator that clips would show half of the derivative at a saturated action."""
    seen = []

    def clipping(action: Tensor) -> Course:
        seen.append(action[0])
        course = imagined(view, obs)(action.clamp(-1.0, 1.0))
        return course

    view = linear(torch.eye(D).double(), torch.ones(D, A).double(), torch.ones(D).double())
    obs = torch.zeros(P, D, dtype=torch.float64)
    action = torch.ones(T, P, A, dtype=torch.float64)
    found = action_sensitivity(clipping, imagined(view, obs), action, VALID, (1,), 0.05)
    assert seen[0].abs().max() <= 1.0
    assert found["reward_ratio"] == pytest.approx([1.0])


def test_ended_episodes_and_standing_rewards_do_not_count(parts: tuple[Tensor, ...]) -> None:
    m, n, w, obs, action = parts
    model = imagined(linear(m, n, w), obs)

    def real(given: Tensor) -> Course:
        course = model(given)
        alive = course.alive.clone()
        alive[3:, 7] = False  # one of the changed actions of start 2 ends its episode
        return Course(torch.zeros_like(course.reward), course.latent, alive)

    valid = VALID.clone()
    valid[1:, 0] = False
    found = action_sensitivity(real, model, action, valid, (1, 4, T), 0.05)
    assert found["after"] == [1, 4], "there is no action after T steps"
    assert found["points"] == [P - 1, P - 2]
    assert all(map(math.isnan, found["reward_cosine"])), "no action changes the reward"
    assert found["latent_cosine"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("name", ["cartpole", "hopper"])
def test_the_simulator_goes_on_as_it_did(name: str) -> None:
    """From a kept state with the episode's own actions: its rewards and observations."""
    env = make(name, 3, seed=1, max_episode_steps=40)
    assert why_not(env) is None
    torch.manual_seed(0)
    drawn = 2 * torch.rand(40, 3, env.single_action_space.shape[0]) - 1
    steps = iter(drawn)
    record = Recording(env, lambda obs: next(steps))
    episodes = first_episodes(env, record, 5)
    starts = [(0, 3), (1, 10), (2, 0), (1, 2)]
    states = [record.states(e, len(episodes[e].action)) for e, _ in starts]
    physics = torch.stack([s[t] for s, (_, t) in zip(states, starts, strict=True)])  # type: ignore[index]
    obs = torch.stack([episodes[e].obs[t] for e, t in starts])
    action = torch.stack([episodes[e].action[t : t + 4] for e, t in starts], dim=1)
    twice = make(name, 2 * len(starts), seed=9, max_episode_steps=40)
    runs = simulated(twice, physics, obs, lambda now: now)
    for _ in range(2):  # it starts anew from the same states
        course = runs(action.repeat(1, 2, 1))
        assert bool(course.alive.all())
        for row, (e, t) in enumerate([*starts, *starts]):
            assert torch.equal(course.reward[:, row], episodes[e].reward[t : t + 4])
            assert torch.equal(course.latent[:, row], episodes[e].obs[t : t + 4])


def test_what_cannot_be_set_is_said() -> None:
    class Env:
        def __init__(self, state: dict | None) -> None:
            self.state = state

        def get_state(self) -> dict:
            if self.state is None:
                raise StateNotSupported("the wrapper hides it")
            return self.state

    assert "the wrapper hides it" in str(why_not(Env(None)))  # type: ignore[arg-type]
    assert "mujoco_warp" in str(why_not(Env({"engine": "mujoco_warp"})))  # type: ignore[arg-type]
    assert "built-in robots" in str(why_not(Env({"physics": 1})))  # type: ignore[arg-type]
