"""No two seeds, envs or uses of a seed share a start state; the same seed has the same ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from pwm_fast.envs import GymnasiumEnv, VectorEnv, make
from pwm_fast.seeding import Purpose, stream

NUM_ENVS = 64
SEEDS = (0, 1, 2, 63, 64, 1_000_003, 2**31 - 1, 2**31, 2**32, 2**32 + 1)
USES = (Purpose.TRAINING, Purpose.EVALUATION, Purpose.FINAL_EVALUATION, Purpose.EVALUATE)


def built_in(name: str) -> Callable[..., VectorEnv]:
    def made(num_envs: int, seed: int = 0) -> VectorEnv:
        pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")
        return make(name, num_envs, seed=seed, engine="mujoco")

    return made


def warp(num_envs: int, seed: int = 0) -> VectorEnv:
    if importlib.util.find_spec("mujoco_warp") is None:
        pytest.skip("needs pip install 'pwm-fast[gpu]'")
    return make("cartpole", num_envs, seed=seed, engine="mujoco_warp")


def gym(num_envs: int, seed: int = 0) -> VectorEnv:
    pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    return make("gym", num_envs, id="Pendulum-v1", seed=seed)


def gym_async(num_envs: int, seed: int = 0) -> VectorEnv:
    gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    envs = gymnasium.vector.AsyncVectorEnv(
        [lambda: gymnasium.make("Pendulum-v1")] * num_envs,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    return GymnasiumEnv(envs, seed=seed, max_episode_steps=200)


def dmc(num_envs: int, seed: int = 0) -> VectorEnv:
    pytest.importorskip("dm_control", reason="needs pip install 'pwm-fast[dmc]'")
    return make("dmc", num_envs, domain="pendulum", task="swingup", seed=seed)


KINDS: dict[str, tuple[Callable[..., Any], int]] = {
    "cartpole": (built_in("cartpole"), NUM_ENVS),
    "hopper": (built_in("hopper"), NUM_ENVS),
    "warp": (warp, NUM_ENVS),
    "gym": (gym, NUM_ENVS),
    "gym, processes": (gym_async, 3),
    "dmc": (dmc, 12),
}


def distinct(starts: list[torch.Tensor]) -> None:
    rows = torch.cat(starts)
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[..., VectorEnv], int]]:
    yield KINDS[request.param]


def test_start_states_differ(kind: tuple[Callable[..., VectorEnv], int]) -> None:
    factory, num_envs = kind
    keys = [*SEEDS, *(stream(seed, use) for seed in SEEDS for use in USES)]
    with closing(factory(num_envs)) as env:
        starts = []
        for key in keys:
            starts.append(env.reset(seed=key)[0])
            starts.append(env.reset()[0])  # the next episodes
    distinct(starts)


def test_the_seed_decides(kind: tuple[Callable[..., VectorEnv], int]) -> None:
    factory, num_envs = kind
    with closing(factory(num_envs, seed=5)) as env, closing(factory(num_envs, seed=9)) as other:
        first = env.reset()[0]
        assert not torch.equal(first, other.reset()[0])
        again = env.reset(seed=2**32 + 5)[0], env.reset()[0]
        same = other.reset(seed=2**32 + 5)[0], other.reset()[0]
        assert all(torch.equal(a, b) for a, b in zip(again, same, strict=True))
    with closing(factory(num_envs, seed=5)) as env:
        assert torch.equal(first, env.reset()[0])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_what_is_no_seed(kind: tuple[Callable[..., VectorEnv], int], seed: int) -> None:
    factory, _ = kind
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^63\), got"):
        factory(1, seed=seed)


def test_more_envs_begin_with_the_same_ones() -> None:
    for factory in (gym, dmc):
        with closing(factory(3, seed=4)) as few, closing(factory(7, seed=4)) as more:
            assert torch.equal(few.reset(seed=8)[0], more.reset(seed=8)[0][:3])


def test_vector_environment_with_one_generator() -> None:
    """Gymnasium's own signature of ``VectorEnv.reset`` takes a single integer."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    np = pytest.importorskip("numpy")

    class Own(gymnasium.vector.VectorEnv):
        num_envs = 64
        single_observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

        def __init__(self) -> None:
            self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.np_random.uniform(-1, 1, (64, 2)).astype(np.float32), {}

    env = GymnasiumEnv(Own(), max_episode_steps=5)
    distinct([env.reset(seed=seed)[0] for seed in SEEDS])
    assert torch.equal(env.reset(seed=3)[0], env.reset(seed=3)[0])
