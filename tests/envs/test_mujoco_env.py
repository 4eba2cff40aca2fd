"""Both physics engines: autoreset, determinism, saved states, divergence, stability and errors."""

import math
import warnings

import numpy as np
import pytest
import torch

from pwm_fast.envs import TASKS, MujocoEnv, MujocoWarpEnv, VectorEnv, make
from tests.envs.engines import (
    ENGINES,
    continues_to_the_bit,
    flat,
    others_are_untouched,
    place,
    random_actions,
    same,
)

mujoco = pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

NAMES = sorted(TASKS)
ON_THE_GROUND = ("ant", "hopper")
on_both = pytest.mark.parametrize("engine", ENGINES)


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_protocol(name, engine):
    env = make(name, 3, engine=engine, seed=1)
    task = TASKS[name]()
    assert isinstance(env, VectorEnv)
    assert env.num_envs == 3
    assert env.single_observation_space.shape == (task.obs_dim,)
    assert env.single_action_space.shape == (task.action_dim,)
    assert (env.single_action_space.low, env.single_action_space.high) == (-1.0, 1.0)
    assert env.metadata["autoreset_mode"] == "SameStep"
    assert env.max_episode_steps == task.max_episode_steps
    assert env.can_terminate == task.can_terminate
    obs, info = env.reset(seed=2)
    assert obs.shape == (3, task.obs_dim)
    assert obs.dtype == torch.float32
    assert info == {}
    next_obs, reward, terminated, truncated, info = env.step(random_actions(env, 1)[0])
    assert next_obs.dtype == reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == info["episode"]["mask"].dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    torch.testing.assert_close(info["final_obs"], next_obs, rtol=0, atol=0)
    assert info["episode"]["length"].tolist() == [1, 1, 1]
    assert ("goal" in info) == (task.goal(obs) is not None)
    env.close()


def test_gymnasium_recognises_the_autoreset_mode():
    gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    env = make("cartpole", 1)
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP.value


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_reward_is_of_the_state_and_action_before_the_step(name, engine):
    env = make(name, 4, engine=engine, seed=3)
    obs, _ = env.reset()
    for action in random_actions(env, 5) * 1.5:  # clipped inside
        expected = env.task.reward(obs, action.clamp(-1.0, 1.0))
        obs, reward, *_ = env.step(action)
        torch.testing.assert_close(reward, expected, rtol=0, atol=0)


@on_both
def test_ant_observation_holds_the_last_action(engine):
    env = make("ant", 2, engine=engine, max_episode_steps=2)
    obs, _ = env.reset()
    assert not obs[:, 29:].any()
    action = random_actions(env, 1)[0] * 2
    obs, *_ = env.step(action)
    torch.testing.assert_close(obs[:, 29:], action.clamp(-1, 1), rtol=0, atol=0)
    obs, _, _, truncated, info = env.step(action)
    assert truncated.all()
    assert info["final_obs"][:, 29:].any()
    assert not obs[:, 29:].any()


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_time_limit(name, engine):
    """Final observations are the true next ones; new episodes start; counters start anew."""
    short, long = (
        make(name, 4, engine=engine, seed=5, max_episode_steps=5),
        make(name, 4, engine=engine, seed=5),
    )
    returns = torch.zeros(4)
    for i, action in enumerate(random_actions(short, 12)):
        obs, reward, terminated, truncated, info = short.step(action)
        returns += reward
        end = i % 5 == 4
        assert not terminated.any()
        assert truncated.all() if end else not truncated.any()
        assert info["episode"]["length"].tolist() == [i % 5 + 1] * 4
        torch.testing.assert_close(info["episode"]["return"], returns, rtol=0, atol=0)
        torch.testing.assert_close(info["episode"]["mask"], truncated, rtol=0, atol=0)
        if i < 5:
            torch.testing.assert_close(info["final_obs"], long.step(action)[0], rtol=0, atol=0)
        assert torch.equal(obs, info["final_obs"]) != end
        if end:
            returns.zero_()
    assert short._time.tolist() == pytest.approx([2 / 60] * 4, rel=1e-6)


@on_both
@pytest.mark.parametrize(
    ("name", "low"),
    [("hopper", {"qpos_1": -0.7}), ("ant", {"qpos_2": 0.26, "qpos_3": 0.0, "qpos_4": 1.0})],
)
def test_termination_restarts_one_env(name, low, engine):
    env, other = make(name, 3, engine=engine, seed=6), make(name, 3, engine=engine, seed=6)
    place(env, 1, **low)
    action = random_actions(env, 1)[0]
    step, expected = env.step(action), other.step(action)
    obs, _, terminated, truncated, info = step
    assert terminated.tolist() == info["episode"]["mask"].tolist() == [False, True, False]
    assert not truncated.any()
    height = info["final_obs"][1, 0]
    assert height < env.task.termination_height
    assert obs[1, 0] > env.task.termination_height + 0.2
    others_are_untouched(step, expected)
    assert env.step(action)[4]["episode"]["length"].tolist() == [2, 1, 2]


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_partial_reset_leaves_other_envs_alone(name, engine):
    env, other = make(name, 3, engine=engine, seed=7), make(name, 3, engine=engine, seed=7)
    steps = 20 if engine == "mujoco" else 5
    for action in random_actions(env, steps):
        before, *_ = env.step(action)
        other.step(action)
    obs, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert torch.equal(obs[[0, 2]], before[[0, 2]])
    assert not torch.equal(obs[1], before[1])
    action = random_actions(env, 1, seed=1)[0]
    others_are_untouched(env.step(action), other.step(action))
    assert env.step(action)[4]["episode"]["length"].tolist() == [steps + 2, 2, steps + 2]


@on_both
def test_empty_reset_changes_nothing(engine):
    env, other = make("hopper", 2, engine=engine), make("hopper", 2, engine=engine)
    env.reset(options={"reset_mask": torch.zeros(2, dtype=torch.bool)})
    action = random_actions(env, 1)[0]
    assert same(env.step(action), other.step(action))


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_equal_for_equal_seeds_at_any_thread_count(name, engine):
    native = engine == "mujoco"
    first = make(name, 6, engine=engine, seed=8)
    second = make(name, 6, engine=engine, seed=8, threads=2 if native else 1)
    other = make(name, 6, engine=engine, seed=9)
    assert torch.equal(first.reset()[0], second.reset()[0])
    differs = False
    for action in random_actions(first, 150 if native else 12):
        a, b, c = first.step(action), second.step(action), other.step(action)
        assert same(a, b)
        differs |= not torch.equal(a[0], c[0])
    assert differs
    assert torch.equal(first.reset(seed=4)[0], second.reset(seed=4)[0])
    assert torch.equal(first.reset(seed=4)[0], make(name, 6, engine=engine).reset(seed=4)[0])


def touching(env):
    """Number of contacts in all envs."""
    if isinstance(env, MujocoWarpEnv):
        return int(env._data.nacon.numpy()[0])
    count = 0
    for i in range(env.num_envs):
        data = env._batch.get_data(i)
        mujoco.mujoco.mj_forward(env._batch.model, data)
        count += data.ncon
    return count


@on_both
@pytest.mark.parametrize("name", NAMES)
def test_saved_state_continues_to_the_bit(name, engine, tmp_path):
    half = 50 if engine == "mujoco" else 20
    options = {"engine": engine, "max_episode_steps": half + 5}
    env = make(name, 8, seed=10, **options)
    actions = random_actions(env, 2 * half)
    for action in actions[:half]:
        env.step(action)
    if name in ON_THE_GROUND:
        assert touching(env)
    restored = make(name, 8, seed=99, **options, threads=2 if engine == "mujoco" else 1)
    expected = continues_to_the_bit(env, restored, actions[half:], 0, tmp_path)
    assert any(step[3].any() for step in expected)  # a time limit, so random starts too


@on_both
def test_saved_state_is_a_copy(engine):
    env = make("hopper", 2, engine=engine)
    state = env.get_state()
    actions = random_actions(env, 5)
    expected = [env.step(action) for action in actions]
    env.set_state(state)
    assert all(same(env.step(a), step) for a, step in zip(actions, expected, strict=True))
    env.set_state(state)
    assert all(same(env.step(a), step) for a, step in zip(actions, expected, strict=True))


@on_both
def test_state_of_another_environment(engine):
    state = make("ant", 2, engine=engine).get_state()
    with pytest.raises(ValueError, match="2 envs"):
        make("ant", 3, engine=engine).set_state(state)
    with pytest.raises(ValueError, match="numbers"):
        make("hopper", 2, engine=engine).set_state(state)
    with pytest.raises(ValueError, match="of the physics engine other, this environment runs"):
        make("ant", 2, engine=engine).set_state({**state, "engine": "other"})


@on_both
def test_outputs_are_the_callers(engine):
    env, other = make("ant", 2, engine=engine), make("ant", 2, engine=engine)
    for action in random_actions(env, 4):
        step, expected = env.step(action), other.step(action)
        assert same(step, expected)
        for tensor in flat(step):
            tensor.zero_()


@on_both
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e7])
@pytest.mark.parametrize("name", NAMES)
def test_divergence(name, value, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    env, other = make(name, 3, engine=engine, seed=11), make(name, 3, engine=engine, seed=11)
    before = env.reset()[0]
    other.reset()
    place(env, 1, qpos_0=value)
    actions = random_actions(env, 3)
    # mujoco-warp gives no warnings.
    why = r"a position or velocity is not finite, or not below 1e\+06|MuJoCo gave mjWARN_BADQPOS"
    with pytest.warns(RuntimeWarning, match=rf"diverged in 1 of 3 envs \(.*({why})"):
        step = env.step(actions[0])
    expected = other.step(actions[0])
    obs, reward, terminated, truncated, info = step
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    assert torch.equal(info["final_obs"][1], before[1])
    assert torch.isfinite(obs).all()
    assert torch.isfinite(reward).all()
    assert info["diverged"].tolist() == [False, True, False]
    others_are_untouched(step, expected)
    place(env, 0, qvel_0=math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.step(actions[1])[2].tolist() == [True, False, False]  # warned once already
        obs, _, terminated, _, info = env.step(actions[2])
    assert not terminated.any()
    assert not info["diverged"].any()
    assert torch.isfinite(obs).all()


@pytest.mark.parametrize("flag", ["", 'autoreset="disable" '])
def test_mujoco_does_not_reset_an_env_unseen(flag, tmp_path, monkeypatch):
    """Whatever the model of a task says of it; with a mass whose acceleration alone is bad."""
    monkeypatch.chdir(tmp_path)

    class Careless(TASKS["cartpole"]):
        def mjcf(self):
            text = super().mjcf()
            assert 'autoreset="disable" ' in text
            return text.replace('autoreset="disable" ', flag)

    env = MujocoEnv(Careless(), 2, seed=1)
    env._time[0] = 5.0
    place(env, 0, qvel_0=1e12)
    with pytest.warns(RuntimeWarning, match="diverged in 1 of 2 envs"):
        _, _, terminated, _, info = env.step(torch.zeros(2, 1))
    assert terminated.tolist() == info["diverged"].tolist() == [True, False]
    assert env._batch.warning[0, :, 1].sum() > 1, "a reset within the step would leave one"
    counts = env._batch.warning.copy()
    monkeypatch.setattr(env, "_bad_states", lambda: env._bad + np.array([0, 1]))
    *_, info = env.step(torch.zeros(2, 1))  # warned of, with coordinates that are small
    assert info["diverged"].tolist() == [False, True]
    assert (env._batch.warning == counts).all()


def test_an_error_of_the_physics_ends_that_env(monkeypatch):
    env = make("ant", 3, seed=12)
    step = env._batch.step

    def fail(**kwargs):
        step(**kwargs)
        raise mujoco.SimulationError(torch.tensor([2]).numpy(), "stack overflow")

    monkeypatch.setattr(env._batch, "step", fail)
    with pytest.warns(RuntimeWarning, match="1 of 3"):
        _, _, terminated, *_ = env.step(random_actions(env, 1)[0])
    assert terminated.tolist() == [False, False, True]


@pytest.mark.parametrize("bang_bang", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_stable_under_random_full_range_actions(name, bang_bang):
    env = make(name, 12, seed=13)
    actions = random_actions(env, 1000)
    if bang_bang:  # full torque, held for a tenth of a second
        actions = actions[::6].repeat_interleave(6, 0)[:1000].sign()
    fastest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for action in actions:
            obs, reward, _, _, info = env.step(action)
            assert torch.isfinite(obs).all()
            assert torch.isfinite(info["final_obs"]).all()
            assert torch.isfinite(reward).all()
            fastest = max(fastest, float(env._qvel.abs().max()))
    assert fastest < 60.0
    assert not env._batch.warning.any()


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        (
            "walker",
            {},
            "env.name must be one of ant, anymal, cartpole, dmc, dmc_tasks, gym, hopper, humanoid, "
            "offline, torch, got 'walker'",
        ),
        ("cartpole", {"start": "sideways"}, "env.start must be one of hanging, upright"),
        ("cartpole", {"start": ["hanging"]}, r"env.start must be one of .*, got \['hanging'\]"),
        (
            "cartpole",
            {"start": {"a": 1}},
            r"env.start must be one of .*, got \{'a': 1\}",
        ),
        ("cartpole", {"stat": "upright"}, "stat"),
        ("ant", {"start": "upright"}, "start"),
        ("ant", {"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ("ant", {"num_envs": -3}, "num_envs"),
        ("ant", {"threads": 0}, "threads must be at least 1, got 0"),
        ("ant", {"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ("gym", {}, "id"),
        ("dmc", {"domain": "cheetah"}, "task"),
        ("dmc_tasks", {}, "tasks"),
        ("torch", {}, "factory"),
        ("gym", {"id": "Hopper-v5", "threads": 2}, "env.threads must be 1"),
        ("gym", {"id": "Hopper-v5", "engine": "mujoco"}, "env.engine must be auto for env 'gym'"),
        ("ant", {"engine": "bullet"}, "env.engine must be one of auto, mujoco, mujoco_warp"),
    ],
)
def test_make_errors(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make(name, **{"num_envs": 2, **kwargs})


@pytest.mark.parametrize("module", ["mujoco.batch", "gymnasium", "dm_control"])
def test_missing_libraries_name_their_extra(module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    name, extra, options = {
        "mujoco.batch": ("ant", "train", {}),
        "gymnasium": ("gym", "gym", {"id": "Hopper-v5"}),
        "dm_control": ("dmc", "dmc", {"domain": "cheetah", "task": "run"}),
    }[module]
    with pytest.raises(ImportError, match=rf"pwm-fast\[{extra}\]"):
        make(name, 2, **options)
    if module == "dm_control":
        with pytest.raises(ImportError, match=rf"pwm-fast\[{extra}\]"):
            make("dmc_tasks", 2, tasks=["cheetah-run"])


@on_both
@pytest.mark.parametrize(
    ("action", "match"),
    [
        (torch.zeros(2, 3), r"action must have shape \(2, 8\), got \(2, 3\)"),
        (torch.zeros(8), "action must have shape"),
        (torch.full((2, 8), math.nan), "non-finite"),
        (torch.full((2, 8), math.inf), "non-finite"),
    ],
)
def test_bad_actions_change_nothing(action, match, engine):
    env, other = make("ant", 2, engine=engine), make("ant", 2, engine=engine)
    with pytest.raises(ValueError, match=match):
        env.step(action)
    good = random_actions(env, 1)[0]
    assert same(env.step(good), other.step(good))


@on_both
@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(2, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)]
)
def test_bad_reset_masks(mask, engine):
    with pytest.raises(ValueError, match="reset_mask must be a bool tensor"):
        make("cartpole", 3, engine=engine).reset(options={"reset_mask": mask})


def test_cartpole_starts():
    hanging, upright = make("cartpole", 64, start="hanging"), make("cartpole", 64, start="upright")
    assert (hanging.reset()[0][:, 3] <= 1e-6).all()
    assert (upright.reset()[0][:, 3] >= -1e-6).all()


@on_both
def test_a_task_of_ones_own(engine):
    class Short(TASKS["cartpole"]):
        max_episode_steps = 3

    env = MujocoEnv(Short(), 2) if engine == "mujoco" else MujocoWarpEnv(Short(), 2, device="cpu")
    action = torch.zeros(2, 1)
    assert [bool(env.step(action)[3].all()) for _ in range(4)] == [False, False, True, False]
