"""Tasks of the dm_control suite behind the protocol."""

import warnings

import numpy as np
import pytest
import torch

from pwm_fast.envs import StateNotSupported, VectorEnv, make
from pwm_fast.seeding import words

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a machine without a display
    suite = pytest.importorskip("dm_control.suite", reason="needs pip install 'pwm-fast[dmc]'")
try:
    suite.load("cartpole", "swingup")
except AttributeError:
    pytest.skip(
        "this dm-control does not work with this MuJoCo: needs pip install 'pwm-fast[dmc]'",
        allow_module_level=True,
    )


def dmc(domain, task, num_envs=2, **options):
    return make("dmc", num_envs, domain=domain, task=task, **options)


def actions(env, steps, seed=0):
    shape = (steps, env.num_envs, *env.single_action_space.shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(step):
    *tensors, info = step
    return [*tensors, info["final_obs"], *info["episode"].values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_protocol():
    env = dmc("cheetah", "run", 3)
    assert isinstance(env, VectorEnv)
    assert env.single_observation_space.shape == (17,)
    assert env.single_action_space.shape == (6,)
    assert env.max_episode_steps == 500  # 1000 of the task's own steps, applied twice each
    assert not env.can_terminate
    obs, reward, terminated, truncated, info = env.step(actions(env, 1)[0])
    assert obs.dtype == reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert torch.equal(info["final_obs"], obs)
    assert dmc("cheetah", "run", action_repeat=3).max_episode_steps == 334
    env.close()


@pytest.mark.parametrize("repeat", [1, 2])
def test_matches_dm_control_itself(repeat):
    env = dmc("hopper", "hop", seed=4, action_repeat=repeat, max_episode_steps=15)
    randoms = [np.random.RandomState(words(4, i)) for i in range(2)]
    worlds = [suite.load("hopper", "hop", task_kwargs={"random": random}) for random in randoms]
    for world in worlds:
        world.reset()
    for t, action in enumerate(actions(env, 30)):
        obs, reward, terminated, truncated, info = env.step(action)
        for i, world in enumerate(worlds):
            total = 0.0
            for _ in range(repeat):
                step = world.step(action[i].double().numpy())
                total += step.reward
            expected = np.float32(np.concatenate([np.ravel(x) for x in step.observation.values()]))
            np.testing.assert_array_equal(info["final_obs"][i].numpy(), expected)
            assert reward[i].item() == np.float32(total)
            if t % 15 == 14:
                step = world.reset()
                expected = np.concatenate([np.ravel(x) for x in step.observation.values()])
            np.testing.assert_array_equal(obs[i].numpy(), np.float32(expected))
        assert not terminated.any()
        assert truncated.tolist() == [t % 15 == 14] * 2
        assert info["episode"]["length"].tolist() == [t % 15 + 1] * 2


def test_termination_without_time_limit():
    env = dmc("lqr", "lqr_2_1", max_episode_steps=4)
    assert env.can_terminate
    with pytest.raises(ValueError, match="no time limit"):
        dmc("lqr", "lqr_2_1")
    # The task ends where the state is small.
    env._envs[1].physics.data.qpos[:] = 0.0
    env._envs[1].physics.data.qvel[:] = 0.0
    env._envs[1].physics.forward()
    _, _, terminated, truncated, info = env.step(torch.zeros(2, 1))
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    assert info["final_obs"][1].abs().max() < 1e-6


def test_actions_are_stretched():
    env = dmc("pendulum", "swingup", 3, action_repeat=1)
    env._low, env._high = np.array([-0.5]), np.array([1.0])
    env.step(torch.tensor([[-1.0], [0.0], [9.0]]))
    assert [world.physics.data.ctrl[0] for world in env._envs] == [-0.5, 0.25, 1.0]


def test_partial_reset_and_seeds():
    env, other = (dmc("reacher", "easy", 3, seed=7) for _ in range(2))
    for action in actions(env, 5):
        before, *_ = env.step(action)
        other.step(action)
    obs, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert torch.equal(obs[[0, 2]], before[[0, 2]])
    assert not torch.equal(obs[1], before[1])
    action = actions(env, 1, seed=1)[0]
    step, expected = env.step(action), other.step(action)
    for a, b in zip(flat(step), flat(expected), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert step[4]["episode"]["length"].tolist() == [6, 1, 6]
    assert torch.equal(env.reset(seed=3)[0], other.reset(seed=3)[0])
    assert not torch.equal(env.reset(seed=4)[0], other.reset(seed=3)[0])


def test_divergence_restarts_one_world():
    env, other = dmc("cheetah", "run", 3), dmc("cheetah", "run", 3)
    sequence = actions(env, 3)
    before, *_ = env.step(sequence[0])
    other.step(sequence[0])
    env._envs[1].physics.data.qvel[0] = 1e12
    with pytest.warns(RuntimeWarning, match="1 of 3 worlds diverged"):
        step = env.step(sequence[1])
    expected = other.step(sequence[1])
    obs, reward, terminated, _, info = step
    assert terminated.tolist() == [False, True, False]
    assert torch.equal(info["final_obs"][1], before[1])
    assert reward[1] == 0.0
    assert torch.isfinite(obs).all()
    for a, b in zip(flat(step), flat(expected), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.isfinite(env.step(sequence[2])[0]).all()


@pytest.mark.parametrize(
    ("domain", "task"),
    [("cheetah", "run"), ("cartpole", "swingup"), ("reacher", "easy"), ("walker", "walk")],
)
def test_saved_state_continues_to_the_bit(domain, task, tmp_path):
    """Also where the task moves its target within the model (reacher) and with RK4 (cartpole)."""
    env = dmc(domain, task, seed=6, max_episode_steps=30)
    sequence = actions(env, 60)
    for action in sequence[:20]:
        env.step(action)
    torch.save(env.get_state(), tmp_path / "state.pt")
    expected = [env.step(action) for action in sequence[20:]]
    restored = dmc(domain, task, seed=60, max_episode_steps=30)
    for action in sequence[:3]:
        restored.step(action)
    restored.set_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for action, step in zip(sequence[20:], expected, strict=True):
        assert same(restored.step(action), step)


def test_states_that_are_not_supported():
    state = dmc("lqr", "lqr_2_1", seed=1, max_episode_steps=9).get_state()
    dmc("lqr", "lqr_2_1", seed=1, max_episode_steps=9).set_state(state)
    with pytest.raises(StateNotSupported, match="seed"):
        dmc("lqr", "lqr_2_1", seed=2, max_episode_steps=9).set_state(state)
    with pytest.raises(ValueError, match="observations"):
        dmc("cheetah", "run").set_state(state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"domain": "giraffe", "task": "run"}, r"env\.domain is one of"),
        ({"domain": "cheetah", "task": "fly"}, r"env\.task is one of \['run'\]"),
        ({"action_repeat": 0}, "action_repeat must be at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_make_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make("dmc", **{"num_envs": 1, "domain": "cheetah", "task": "run", **options})
