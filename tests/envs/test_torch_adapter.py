"""Batched torch environments behind the protocol."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.envs import (
    ActionNotFinite,
    EnvironmentFault,
    StateNotSupported,
    TorchVectorEnv,
    VectorEnv,
    make,
)
from pwm_fast.seeding import env_seeds
from tests.envs.torch_envs import Carts, DirectCarts, Space, Wrapper

N = 4
KINDS: dict[str, Any] = {
    "mjlab": lambda **k: Carts(N, group="actor", auto_reset=False, **k),
    "Isaac Lab": lambda **k: Carts(N, compute_final_obs=True, **k),
    "Isaac Lab, direct": lambda **k: DirectCarts(N, compute_final_obs=True, **k),
    "wrapped": lambda **k: Wrapper(Carts(N, group="actor", auto_reset=False, **k)),
    "a tensor": lambda **k: Carts(N, group=None, compute_final_obs=True, **k),
}


def pushes(steps: int, seed: int = 0) -> torch.Tensor:
    """Actions that drive the first half of the envs out of bounds, and the others not."""
    drawn = torch.rand(steps, N, 1, generator=torch.Generator().manual_seed(seed)) * 4.0 - 1.0
    return drawn * torch.tensor([1.0, 1.0, 0.1, 0.1]).view(N, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_protocol(kind: str) -> None:
    envs = KINDS[kind]()
    env = TorchVectorEnv(envs, seed=1)
    assert isinstance(env, VectorEnv)
    assert env.num_envs == N and env.max_episode_steps == 20 and env.device == torch.device("cpu")
    assert env.single_observation_space.shape == (3,)
    assert env.single_action_space.shape == (1,)
    assert env.metadata["autoreset_mode"] == "SameStep"
    obs, reward, terminated, truncated, info = env.step(torch.zeros(N, 1))
    assert obs.dtype == reward.dtype == torch.float32 and obs.shape == (N, 3)
    assert terminated.dtype == truncated.dtype == torch.bool
    assert torch.equal(info["final_obs"], obs) and not info["diverged"].any()
    with pytest.raises(StateNotSupported, match="Carts cannot be saved"):
        env.get_state()
    with pytest.raises(StateNotSupported, match="Carts cannot be restored"):
        env.set_state({})
    env.close()
    env.close()
    assert envs.unwrapped.closed == 1


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_end_and_begin_within_a_step(kind: str) -> None:
    """Against the physics written out: what was observed last, and where an episode starts."""
    env = TorchVectorEnv(KINDS[kind](), seed=2)
    obs, _ = env.reset(seed=3)
    length, total = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    kinds_of_end = torch.zeros(2, dtype=torch.int64)
    for action in pushes(70):
        before, kept = obs.clone(), obs
        obs, reward, terminated, truncated, info = env.step(action)
        assert torch.equal(before, kept), "an answer is the caller's"
        v = 0.9 * (before[:, 1] + 0.3 * action[:, 0].clamp(-1, 1))
        x = before[:, 0] + 0.3 * v
        expected = torch.stack([x, v, before[:, 2] + 1], 1)
        torch.testing.assert_close(info["final_obs"], expected)
        torch.testing.assert_close(reward, 1 - x.square() / 4)
        length, total = length + 1, total + reward
        assert torch.equal(terminated, x.abs() > 2) and torch.equal(truncated, length >= 20)
        done = terminated | truncated
        kinds_of_end += torch.stack([terminated.sum(), truncated.sum()])
        assert torch.equal(info["episode"]["mask"], done)
        assert torch.equal(info["episode"]["length"], length)
        torch.testing.assert_close(info["episode"]["return"], total)
        assert torch.equal(obs[~done], info["final_obs"][~done])
        assert (obs[done][:, 1:] == 0).all() and (obs[done][:, 0].abs() < 0.6).all()
        length[done], total[done] = 0, 0.0
    assert (kinds_of_end >= 2).all()


def test_the_previous_observation_stands_in() -> None:
    env = TorchVectorEnv(DirectCarts(N, length=3), final_obs="previous")
    obs = env.reset(seed=3)[0]
    for t in range(1, 7):
        before = obs
        obs, _, _, truncated, info = env.step(torch.zeros(N, 1))
        assert bool(truncated.all()) == (t % 3 == 0)
        assert torch.equal(info["final_obs"], before if t % 3 == 0 else obs)


def test_an_end_by_time_may_be_terminal() -> None:
    env = TorchVectorEnv(Carts(N, length=2, auto_reset=False, is_finite_horizon=True))
    flags = [torch.stack(env.step(torch.zeros(N, 1))[2:4]).tolist() for _ in range(2)]
    assert flags == [[[False] * N] * 2, [[True] * N] * 2]


@pytest.mark.parametrize(
    ("low", "high", "bound", "taken"),
    [
        (-torch.inf, torch.inf, 1.0, [-1.0, 0.5, 1.0, 0.0]),
        (-torch.inf, torch.inf, 3.0, [-3.0, 1.5, 3.0, 0.0]),
        (-2.0, 6.0, 3.0, [-2.0, 4.0, 6.0, 2.0]),
        (np.array([-2.0], np.float32), np.array([6.0]), 1.0, [-2.0, 4.0, 6.0, 2.0]),
        ((-2.0,), (6.0,), 1.0, [-2.0, 4.0, 6.0, 2.0]),
    ],
)
def test_actions_are_stretched(low: Any, high: Any, bound: float, taken: list[float]) -> None:
    envs = Carts(N, auto_reset=False, low=low, high=high)
    env = TorchVectorEnv(envs, action_bound=bound)
    env.step(torch.tensor([[-1.0], [0.5], [7.0], [0.0]]))
    assert envs.taken[0].flatten().tolist() == taken
    assert (env.single_action_space.low, env.single_action_space.high) == (-1.0, 1.0)


def run(env: TorchVectorEnv, steps: int = 45, between: Any = lambda: None) -> torch.Tensor:
    seen = []
    for action in pushes(steps):
        between()
        seen.append(env.step(action)[0])
    return torch.stack(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_are_its_own(kind: str) -> None:
    """Neither side's depend on the other's, though both are of the global generators."""
    first = TorchVectorEnv(KINDS[kind](), seed=5)
    expected = run(first)
    assert first._base.seeds[0] == env_seeds(5, 1)[0]

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed_all() -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)

    seed_all()
    plain = [draw() for _ in range(45)]
    seed_all()
    drawn: list[list[float]] = []
    found = run(TorchVectorEnv(KINDS[kind](), seed=5), between=lambda: drawn.append(draw()))
    assert torch.equal(found, expected) and drawn == plain
    assert not torch.equal(run(TorchVectorEnv(KINDS[kind](), seed=6)), expected)
    starts = [first.reset(seed=s)[0] for s in (7, 8, 7)]
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


def test_partial_reset() -> None:
    env = TorchVectorEnv(KINDS["mjlab"]())
    before = env.step(torch.ones(N, 1))[0]
    obs, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False, False])})
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(obs[kept], before[kept]) and obs[1, 2] == 0
    assert env.step(torch.zeros(N, 1))[4]["episode"]["length"].tolist() == [2, 1, 2, 2]
    assert torch.equal(env.reset(options={"reset_mask": torch.zeros(N).bool()})[0], env._obs)
    direct = TorchVectorEnv(KINDS["Isaac Lab, direct"]())
    with pytest.raises(ValueError, match="cannot restart 1 of 4 envs: its reset takes no env_ids"):
        direct.reset(options={"reset_mask": torch.tensor([True, False, False, False])})
    assert (direct.reset(options={"reset_mask": torch.ones(N).bool()})[0][:, 2] == 0).all()


class Spoilt(Carts):
    """Env 1 has ``value`` in its velocity, or as its reward, in step 2; it may end by that."""

    value, of_reward, ends = torch.nan, False, False

    def step(self, action: torch.Tensor) -> tuple[Any, ...]:
        spoil = int(self.episode_length_buf[1]) == 1
        if spoil and not self.of_reward:
            self.state[1, 1] = self.value
        obs, reward, terminated, truncated, extras = super().step(action)
        if spoil and self.of_reward:
            reward[1] = self.value
        if spoil and self.ends:
            terminated[1] = True
            if getattr(self.cfg, "auto_reset", True):
                self.extras["final_obs"] = self._answer(fresh=True)
                self._reset_idx(torch.tensor([1]))
                obs = self._answer()
            else:
                self.pending[1] = True
        return obs, reward, terminated, truncated, extras


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("of_reward", [False, True])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e12])
@pytest.mark.parametrize("cfg", [{"auto_reset": False}, {"compute_final_obs": True}])
def test_diverged_envs(cfg: dict[str, bool], value: float, of_reward: bool, ends: bool) -> None:
    envs = Spoilt(N, **cfg)
    envs.value, envs.of_reward, envs.ends = value, of_reward, ends
    env = TorchVectorEnv(envs)
    before = env.step(torch.ones(N, 1))[0]
    with pytest.warns(RuntimeWarning, match="Spoilt: 1 of 4 envs diverged .*env 1, step 2"):
        obs, reward, terminated, truncated, info = env.step(torch.ones(N, 1))
    assert terminated.tolist() == info["diverged"].tolist() == [False, True, False, False]
    assert not truncated.any() and reward[1] == 0.0
    assert torch.equal(info["final_obs"][1], before[1])
    assert obs[1, 2] == 0 and obs.isfinite().all() and (obs[[0, 2, 3], 2] == 2).all()
    assert env.divergence is not None and env.divergence.startswith("env 1, step 2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for _ in range(3):
            assert env.step(torch.ones(N, 1))[0].isfinite().all()


def test_a_diverged_env_that_cannot_be_restarted() -> None:
    envs = Spoilt(N, compute_final_obs=True)
    env = TorchVectorEnv(envs)
    env._can_restart = False  # as where its reset takes no env_ids
    env.step(torch.ones(N, 1))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(EnvironmentFault, match=r"the reward is nan.* cannot be restarted alone"),
    ):
        env.step(torch.ones(N, 1))


def test_actions_that_are_wrong() -> None:
    env = TorchVectorEnv(KINDS["mjlab"]())
    with pytest.raises(ValueError, match=r"action must have shape \(4, 1\), got \(4, 2\)"):
        env.step(torch.zeros(N, 2))
    with pytest.raises(ActionNotFinite, match="in env 2"):
        env.step(torch.tensor([[0.0], [0.0], [torch.nan], [0.0]]))
    assert not env._base.taken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:4], "must return (obs, reward, terminated, truncated, extras), got a tuple"),
        (lambda a: None, "got a NoneType"),
        (lambda a: ({}, *a[1:]), "observations have no group 'policy', got []"),
        (lambda a: (a[0]["policy"], *a[1:]), "have no group 'policy', got Tensor of shape (4, 3)"),
        (lambda a: ({"policy": {"x": 1}}, *a[1:]), "are a dict of terms ['x']; the environment"),
        (
            lambda a: ({"policy": a[0]["policy"][:2]}, *a[1:]),
            "observations must be numbers [4, 3], got a tensor (2, 3) of torch.float32",
        ),
        (lambda a: ({"policy": a[0]["policy"] > 0}, *a[1:]), "got a tensor (4, 3) of torch.bool"),
        (lambda a: ({"policy": [1.0]}, *a[1:]), "observations must be numbers [4, 3], got list"),
        (
            lambda a: ({"policy": a[0]["policy"].to("meta")}, *a[1:]),
            "observations must be on cpu, as at the start, got meta",
        ),
        (
            lambda a: (a[0], a[1][:, None], *a[2:]),
            "reward must be numbers [4], got a tensor (4, 1) of torch.float32",
        ),
        (lambda a: (a[0], a[1] > 0, *a[2:]), "reward must be numbers [4], got a tensor (4,) of to"),
        (lambda a: (*a[:2], a[2].long(), *a[3:]), "terminated must be bool [4], got a tensor (4,)"),
        (lambda a: (*a[:3], a[3].to("meta"), a[4]), "truncated must be on cpu, as at the start"),
        (lambda a: (*a[:2], ~a[2], *a[3:4], {}), "an episode ended, but extras has no 'final_obs'"),
    ],
)
def test_answers_that_are_wrong(change: Any, message: str) -> None:
    class Wrong(Carts):
        def step(self, action: torch.Tensor) -> Any:
            return change(super().step(action))

    env = TorchVectorEnv(Wrong(N, compute_final_obs=True))
    with pytest.raises(EnvironmentFault, match=re.escape(message)) as found:
        env.step(torch.zeros(N, 1))
    assert str(found.value).startswith("Wrong, step") and "\n" not in str(found.value)


def test_an_environment_that_raises() -> None:
    class Raising(Carts):
        def step(self, action: torch.Tensor) -> Any:
            raise RuntimeError("contact buffers\noverflowed")

    env = TorchVectorEnv(Raising(N, auto_reset=False))
    state = torch.get_rng_state()
    message = "Raising, step: RuntimeError: contact buffers overflowed"
    with pytest.raises(EnvironmentFault, match=message):
        env.step(torch.zeros(N, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_start_that_is_not_finite() -> None:
    class Bad(Carts):
        def _reset_idx(self, ids: torch.Tensor) -> None:
            super()._reset_idx(ids)
            self.state[2, 1] = torch.nan

    with pytest.raises(
        EnvironmentFault, match=r"Bad, env 2: an episode must start .* entry 1 is n"
    ):
        TorchVectorEnv(Bad(N, auto_reset=False))


def test_one_environment_is_not_used_twice() -> None:
    envs = KINDS["mjlab"]()
    first = TorchVectorEnv(envs)
    with pytest.raises(ValueError, match="in use already: training and evaluation need one each"):
        TorchVectorEnv(Wrapper(envs))
    first.close()
    TorchVectorEnv(envs)


class NoSeed(Wrapper):
    def reset(self) -> Any:  # type: ignore[override]
        return self.env.reset()


AUTO = {"auto_reset": False}


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (lambda: object(), {}, "object has no num_envs and no single_action_space and"),
        (lambda: NoSeed(Carts(N, **AUTO)), {}, "NoSeed has no reset(seed=...): it must be a bat"),
        (lambda: Carts(N), {}, "make it with cfg.auto_reset=False (mjlab) or cfg.compute_final_o"),
        (lambda: Carts(N), {"final_obs": "last"}, "final_obs must be one of auto, reset, extras,"),
        (lambda: Carts(N), {"final_obs": "reset"}, "does not fit Carts, whose cfg.auto_reset is n"),
        (lambda: Carts(N, **AUTO), {"final_obs": "extras"}, "whose cfg.auto_reset is False"),
        (lambda: DirectCarts(N, **AUTO), {}, "does not restart envs by itself, and its reset tak"),
        (lambda: Carts(N, length=0, **AUTO), {}, "max_episode_steps must be at least 1, got 0"),
        (lambda: Carts(N, length=None, **AUTO), {}, "has no max_episode_length: give max_episode"),
        (
            lambda: Carts(N, **AUTO),
            {"max_episode_steps": 12},
            "max_episode_steps=12 is not the limit of Carts, which ends episodes after 20 steps",
        ),
        (
            lambda: Carts(N, group="proprio", **AUTO),
            {},
            "give obs_group, which of the groups of observations ['critic', 'proprio']",
        ),
        (lambda: Carts(N, **AUTO), {"action_bound": 0.0}, "action_bound must be above 0"),
        (lambda: Carts(N, low=-1.0, **AUTO), {}, "entry 0 of the action has the bounds [-1, inf]"),
    ],
)
def test_environments_that_are_refused(made: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TorchVectorEnv(made(), **options)


@pytest.mark.parametrize("space", [Space(shape=(2, 2), low=-1.0, high=1.0), Space(n=3), None])
def test_action_spaces_that_are_refused(space: Any) -> None:
    envs = Carts(N, **AUTO)
    envs.single_action_space = space
    with pytest.raises(ValueError, match="the action space must be a Box of vectors"):
        TorchVectorEnv(envs)


def test_a_group_by_name_and_a_limit_from_outside() -> None:
    env = TorchVectorEnv(Carts(N, group="proprio", **AUTO), obs_group="critic")
    assert env.single_observation_space.shape == (7,)
    with pytest.raises(EnvironmentFault, match="no group 'x', got \\['critic', 'proprio'\\]"):
        TorchVectorEnv(Carts(N, group="proprio", **AUTO), obs_group="x")
    unlimited = Carts(N, length=9, **AUTO)
    del unlimited.max_episode_length
    unlimited.step = lambda action: None  # type: ignore[assignment]
    assert TorchVectorEnv(unlimited, max_episode_steps=9).max_episode_steps == 9


# --- made by a function that a configuration names ------------------------------------------------

FACTORY = "tests.envs.torch_envs:make"


def test_made_by_name() -> None:
    state = torch.get_rng_state()
    env = make("torch", 3, seed=4, factory=FACTORY, kwargs={"length": 7}, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(env, TorchVectorEnv)
    assert env.num_envs == 3 and env.max_episode_steps == 7
    assert torch.equal(env.reset(seed=4)[0], make("torch", 3, factory=FACTORY).reset(seed=4)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "missing a required argument: 'factory'"),
        ({"factory": None}, "env.factory must be module:function, got None"),
        ({"factory": "tests.envs.torch_envs"}, "env.factory must be module:function, got 'tests"),
        ({"factory": "tests.envs.torch_envs:nothing"}, "torch_envs has no function nothing"),
        ({"factory": "tests.envs.torch_envs:Carts"}, "torch_envs has no function Carts"),
        (
            {"factory": "tests.envs.torch_envs:anything"},
            "must take num_envs, seed, device, lacks ['num_envs', 'seed', 'device']",
        ),
        ({"factory": FACTORY, "kwargs": {"seed": 1}}, "must be the factory's own arguments, got"),
        ({"factory": FACTORY, "kwargs": 5}, "must be the factory's own arguments, got 5"),
        (
            {"factory": "tests.envs.torch_envs:failing", "kwargs": {"x": 1}},
            "got an unexpected keyword argument 'x', got env.kwargs={'x': 1}",
        ),
        ({"factory": "tests.envs.torch_envs:wrong_number"}, "made 4 envs, asked for 3"),
        ({"factory": FACTORY, "max_episode_steps": 5}, "which ends episodes after 20 steps"),
        ({"factory": FACTORY, "threads": 2}, "env.threads must be 1 for env 'torch'"),
        ({"factory": FACTORY, "action_bounds": 2}, "action_bounds"),
    ],
)
def test_factories_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make("torch", 3, **options)


def test_factories_that_cannot_be_had() -> None:
    with pytest.raises(ImportError, match=r"env\.factory=nowhere:make: ModuleNotFoundError"):
        make("torch", 3, factory="nowhere:make")
    with pytest.raises(EnvironmentFault, match="failing failed: RuntimeError: no simulator here"):
        make("torch", 3, factory="tests.envs.torch_envs:failing")
