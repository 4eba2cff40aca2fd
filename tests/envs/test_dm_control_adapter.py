"""Tasks of the dm_control suite behind the protocol."""

import gc

import numpy as np
import pytest
import torch

from pwm_fast.envs import (
    EnvironmentFault,
    StateNotSupported,
    VectorEnv,
    dm_control_adapter,
    make,
)
from pwm_fast.seeding import words
from tests.envs.engines import (
    continues_to_the_bit,
    flat,
    others_are_untouched,
    random_actions,
)
from tests.envs.suites import dm_control_suite

suite = dm_control_suite()


def dmc(domain, task, num_envs=2, **options):
    return make("dmc", num_envs, domain=domain, task=task, **options)


@pytest.fixture
def bounded_lqr(monkeypatch):
    """The lqr tasks with limits of their actuators: a task that ends, with a model it draws."""
    load = suite.load

    def limited(*args, **kwargs):
        env = load(*args, **kwargs)
        env.physics.model.actuator_ctrllimited[:] = 1
        env.physics.model.actuator_ctrlrange[:] = (-1.0, 1.0)
        return env

    monkeypatch.setattr(suite, "load", limited)


def test_protocol():
    env = dmc("cheetah", "run", 3)
    assert isinstance(env, VectorEnv)
    assert env.single_observation_space.shape == (17,)
    assert env.single_action_space.shape == (6,)
    assert env.max_episode_steps == 500  # 1000 of the task's own steps, applied twice each
    assert not env.can_terminate
    obs, reward, terminated, truncated, info = env.step(random_actions(env, 1)[0])
    assert obs.dtype == reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert torch.equal(info["final_obs"], obs)
    assert dmc("cheetah", "run", action_repeat=3).max_episode_steps == 334
    env.close()


@pytest.mark.parametrize("repeat", [1, 2])
def test_matches_dm_control_itself(repeat):
    env = dmc("hopper", "hop", seed=4, action_repeat=repeat, max_episode_steps=15)
    randoms = [np.random.RandomState(words(4, i)) for i in range(2)]
    raws = [suite.load("hopper", "hop", task_kwargs={"random": random}) for random in randoms]
    for raw in raws:
        raw.reset()
    for t, action in enumerate(random_actions(env, 30)):
        obs, reward, terminated, truncated, info = env.step(action)
        for i, raw in enumerate(raws):
            total = 0.0
            for _ in range(repeat):
                step = raw.step(action[i].double().numpy())
                total += step.reward
            expected = np.float32(np.concatenate([np.ravel(x) for x in step.observation.values()]))
            np.testing.assert_array_equal(info["final_obs"][i].numpy(), expected)
            assert reward[i].item() == np.float32(total)
            if t % 15 == 14:
                step = raw.reset()
                expected = np.concatenate([np.ravel(x) for x in step.observation.values()])
            np.testing.assert_array_equal(obs[i].numpy(), np.float32(expected))
        assert not terminated.any()
        assert truncated.tolist() == [t % 15 == 14] * 2
        assert info["episode"]["length"].tolist() == [t % 15 + 1] * 2


def test_termination_without_time_limit(bounded_lqr):
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
    assert [raw.physics.data.ctrl[0] for raw in env._envs] == [-0.5, 0.25, 1.0]


def test_partial_reset_and_seeds():
    env, other = (dmc("reacher", "easy", 3, seed=7) for _ in range(2))
    for action in random_actions(env, 5):
        before, *_ = env.step(action)
        other.step(action)
    obs, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert torch.equal(obs[[0, 2]], before[[0, 2]])
    assert not torch.equal(obs[1], before[1])
    action = random_actions(env, 1, seed=1)[0]
    step, expected = env.step(action), other.step(action)
    others_are_untouched(step, expected)
    assert step[4]["episode"]["length"].tolist() == [6, 1, 6]
    assert torch.equal(env.reset(seed=3)[0], other.reset(seed=3)[0])
    assert not torch.equal(env.reset(seed=4)[0], other.reset(seed=3)[0])


def test_divergence_restarts_one_env():
    env, other = dmc("cheetah", "run", 3), dmc("cheetah", "run", 3)
    sequence = random_actions(env, 3)
    before, *_ = env.step(sequence[0])
    other.step(sequence[0])
    env._envs[1].physics.data.qvel[0] = 1e12
    with pytest.warns(RuntimeWarning, match="1 of 3 envs diverged"):
        step = env.step(sequence[1])
    expected = other.step(sequence[1])
    obs, reward, terminated, _, info = step
    assert terminated.tolist() == [False, True, False]
    assert torch.equal(info["final_obs"][1], before[1])
    assert reward[1] == 0.0
    assert torch.isfinite(obs).all()
    others_are_untouched(step, expected)
    assert torch.isfinite(env.step(sequence[2])[0]).all()


@pytest.mark.parametrize("velocity", [1e7, 1e11, float("nan")])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize(("domain", "task"), [("cheetah", "run"), ("cartpole", "swingup")])
def test_every_bad_state_is_divergence(domain, task, repeat, velocity):
    env = dmc(domain, task, action_repeat=repeat)
    before, *_ = env.step(random_actions(env, 1)[0])
    env._envs[0].physics.data.qvel[0] = velocity
    match = rf"{domain} {task}: 1 of 2 envs diverged \(env 0, step 2 of its episode: .*(WARN|1e)"
    with pytest.warns(RuntimeWarning, match=match):
        obs, reward, terminated, _, info = env.step(random_actions(env, 1)[0])
    assert terminated.tolist() == info["diverged"].tolist() == [True, False]
    assert reward[0] == 0.0
    assert torch.equal(info["final_obs"][0], before[0])
    assert obs.abs().max() < 100
    assert not env.step(random_actions(env, 1)[0])[-1]["diverged"].any()


@pytest.mark.parametrize("task", ["lqr_2_1", "lqr_6_2"])
@pytest.mark.parametrize("options", [{}, {"max_episode_steps": 9}])
def test_unlimited_actuators_are_refused(task, options, monkeypatch):
    closed = []
    close = dm_control_adapter.DMControlEnv.close
    monkeypatch.setattr(
        dm_control_adapter.DMControlEnv, "close", lambda env: (closed.append(1), close(env))
    )
    match = (
        rf"lqr {task}: entry 0 of the action \(.*actuator.*\) has the bounds \[-1e\+10, 1e\+10\]"
    )
    with pytest.raises(ValueError, match=match):
        dmc("lqr", task, **options)
    assert closed


@pytest.mark.parametrize(
    ("low", "high", "match"),
    [
        (0.3, 0.3, "the lower must be below the upper"),
        (float("nan"), 1.0, "must be numbers"),
        (0.0, 1e9, "must be bounded"),
        (-float("inf"), 1.0, "must be bounded"),
    ],
)
def test_bounds_that_are_none(low, high, match, monkeypatch):
    load = suite.load

    def changed(*args, **kwargs):
        env = load(*args, **kwargs)
        env.physics.model.actuator_ctrlrange[2] = (low, high)
        return env

    monkeypatch.setattr(suite, "load", changed)
    with pytest.raises(ValueError, match=f"cheetah run: entry 2 of the action .*'.*: .*{match}"):
        dmc("cheetah", "run")


@pytest.mark.parametrize("reward", [np.array([2.0]), np.array(2.0), 2, np.float32(2.0)])
def test_rewards_that_are_one_number(reward, monkeypatch):
    env = dmc("cheetah", "run", 1)
    monkeypatch.setattr(env._envs[0].task, "get_reward", lambda physics: reward)
    assert env.step(torch.zeros(1, 6))[1].tolist() == [4.0]


def test_faults_name_their_env(monkeypatch):
    env = dmc("cheetah", "run")
    monkeypatch.setattr(env._envs[1].task, "get_reward", lambda physics: np.ones(2))
    with pytest.raises(EnvironmentFault, match=r"cheetah run, env 1, step 1 .* reward must be"):
        env.step(torch.zeros(2, 6))
    observe = env._envs[1].task.get_observation

    def spoilt(physics):
        return {name: value * np.nan for name, value in observe(physics).items()}

    monkeypatch.setattr(env._envs[1].task, "get_observation", spoilt)
    with pytest.raises(EnvironmentFault, match=r"env 1, reset of episode 2: .*entry 0 is nan"):
        env.reset()


@pytest.mark.parametrize("error", [ZeroDivisionError("z"), TypeError("t"), AttributeError("a")])
def test_whatever_a_task_raises_names_its_env(error, monkeypatch):
    def fails(*_, **__):
        raise error

    env = dmc("cheetah", "run")
    name = type(error).__name__
    monkeypatch.setattr(env._envs[1].task, "get_reward", fails)
    with pytest.raises(EnvironmentFault, match=rf"^cheetah run, env 1, step 1 .*: {name}: "):
        env.step(torch.zeros(2, 6))
    monkeypatch.setattr(env._envs[1].task, "initialize_episode", fails)
    with pytest.raises(EnvironmentFault, match=rf"env 1, reset of episode 2: {name}: "):
        env.reset()
    from dm_control import suite

    if name != "AttributeError":  # that of another MuJoCo has a message of its own
        monkeypatch.setattr(suite, "load", fails)
        with pytest.raises(EnvironmentFault, match=rf"^dm_control cannot make cheetah run: {name}"):
            dmc("cheetah", "run")


def test_a_task_that_needs_a_display_says_so(monkeypatch, capfd):
    """Whose renderer cannot be made: MuJoCo's own error, and no second one from its end."""
    import mujoco

    def fails(*_, **__):
        raise mujoco.FatalError("no OpenGL")

    monkeypatch.setattr(mujoco, "MjrContext", fails)
    with pytest.raises(EnvironmentFault, match=r"^quadruped escape, env 0, reset of episode 1: "):
        dmc("quadruped", "escape")
    gc.collect()
    assert "Exception ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [1.5, 2.0, None, "2", [2], {"a": 1}, True])
def test_repeats_that_are_not_whole(value):
    with pytest.raises(ValueError, match=r"^action_repeat must be a whole number, at least 1"):
        dmc("cheetah", "run", action_repeat=value)


def test_an_observation_that_is_used_again(monkeypatch):
    """A task may hand out one array for all time steps."""
    env, other = (dmc("cheetah", "run", 1, max_episode_steps=3, seed=2) for _ in range(2))
    task = other._envs[0].task
    observe, kept = task.get_observation, {}

    def again(physics):
        for name, value in observe(physics).items():
            kept.setdefault(name, np.empty_like(value))[...] = value
        return kept

    monkeypatch.setattr(task, "get_observation", again)
    pairs = [(flat(env.step(a)), flat(other.step(a))) for a in random_actions(env, 7)]
    for expected, got in pairs:
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("domain", "task"),
    [("cheetah", "run"), ("cartpole", "swingup"), ("reacher", "easy"), ("walker", "walk")],
)
def test_saved_state_continues_to_the_bit(domain, task, tmp_path):
    """Also where the task moves its target within the model (reacher) and with RK4 (cartpole)."""
    env = dmc(domain, task, seed=6, max_episode_steps=30)
    restored = dmc(domain, task, seed=60, max_episode_steps=30)
    continues_to_the_bit(env, restored, random_actions(env, 60), 20, tmp_path)


def test_states_that_are_not_supported(bounded_lqr):
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
