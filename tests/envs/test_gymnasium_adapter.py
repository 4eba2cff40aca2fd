"""Gymnasium's environments behind the protocol."""

import warnings

import numpy as np
import pytest
import torch

from pwm_fast.envs import EnvironmentFault, GymnasiumEnv, StateNotSupported, VectorEnv, make
from pwm_fast.seeding import env_seeds
from tests.envs.engines import continues_to_the_bit, random_actions, same

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")

SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP


class Counter(gymnasium.Env):
    """Counts up by one a step; ends when told to, or gives NaN."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2, 2), np.float64)
    action_space = gymnasium.spaces.Box(
        np.array([-1.0, 2.0], np.float32), np.array([3.0, 6.0], np.float32)
    )

    def __init__(self, ends=3, nan_at=None):
        self.ends, self.nan_at = ends, nan_at

    def _obs(self):
        value = np.nan if self.count == self.nan_at else self.count
        return np.full((2, 2), value, dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        return self._obs(), float(action.sum()), self.count >= self.ends, False, {}


def counters(*kwargs, mode=SAME_STEP, **vector):
    return gymnasium.vector.SyncVectorEnv(
        [lambda k=k: Counter(**k) for k in kwargs], autoreset_mode=mode, **vector
    )


def test_protocol():
    env = make("gym", 3, id="Hopper-v5", seed=1)
    assert isinstance(env, VectorEnv)
    assert env.single_observation_space.shape == (11,)
    assert env.single_action_space.shape == (3,)
    assert env.max_episode_steps == 1000
    assert env.metadata["autoreset_mode"] == "SameStep"
    obs, _ = env.reset()
    assert obs.shape == (3, 11)
    obs, reward, terminated, truncated, info = env.step(random_actions(env, 1)[0])
    assert obs.dtype == reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert torch.equal(info["final_obs"], obs)
    env.close()


def test_matches_gymnasium_itself():
    env = make("gym", 2, id="Hopper-v5", seed=3, max_episode_steps=40)
    raws = [gymnasium.make("Hopper-v5", max_episode_steps=40) for _ in range(2)]
    starts = [w.reset(seed=s)[0] for w, s in zip(raws, env_seeds(3, 2), strict=True)]
    obs, _ = make("gym", 2, id="Hopper-v5", seed=3).reset(seed=3)
    np.testing.assert_array_equal(obs.numpy(), np.float32(starts))
    ended = 0
    for action in random_actions(env, 60):
        obs, reward, terminated, truncated, info = env.step(action)
        for i, raw in enumerate(raws):
            o, r, t, u, _ = raw.step(action[i].numpy())
            np.testing.assert_array_equal(info["final_obs"][i].numpy(), np.float32(o))
            assert reward[i].item() == np.float32(r)
            assert (terminated[i].item(), truncated[i].item()) == (t, u)
            if t or u:
                ended += 1
                o, _ = raw.reset()
            np.testing.assert_array_equal(obs[i].numpy(), np.float32(o))
    assert ended >= 2


def test_final_observations_are_dense_and_actions_are_stretched():
    env = GymnasiumEnv(counters({"ends": 3}, {"ends": 2}), max_episode_steps=10)
    assert env.single_observation_space.shape == (4,)
    unit = torch.tensor([[-1.0, 1.0], [0.5, 7.0]])  # [-1, 3] and [2, 6]: (-1, 6) and (2, 6)
    obs, reward, terminated, truncated, info = env.step(unit)
    assert reward.tolist() == [5.0, 8.0]
    assert obs.tolist() == info["final_obs"].tolist() == [[1.0] * 4, [1.0] * 4]
    obs, _, terminated, truncated, info = env.step(unit)
    assert terminated.tolist() == info["episode"]["mask"].tolist() == [False, True]
    assert not truncated.any()
    assert obs[:, 0].tolist() == [2.0, 0.0]
    assert info["final_obs"][:, 0].tolist() == [2.0, 2.0]
    assert info["episode"]["return"].tolist() == [10.0, 16.0]
    assert info["episode"]["length"].tolist() == [2, 2]
    obs, _, terminated, _, info = env.step(unit)
    assert obs[:, 0].tolist() == [0.0, 1.0]
    assert info["final_obs"][:, 0].tolist() == [3.0, 1.0]
    assert info["episode"]["length"].tolist() == [3, 1]


def test_partial_reset():
    env = GymnasiumEnv(counters({"ends": 9}, {"ends": 9}, {"ends": 9}), max_episode_steps=10)
    for _ in range(2):
        env.step(torch.zeros(3, 2))
    obs, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert obs[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert env.step(torch.zeros(3, 2))[4]["episode"]["length"].tolist() == [3, 1, 3]
    obs, _ = env.reset(options={"reset_mask": torch.zeros(3, dtype=torch.bool)})
    assert obs[:, 0].tolist() == [3.0, 1.0, 3.0]


def test_an_env_without_a_number_is_restarted():
    env = GymnasiumEnv(counters({"ends": 9}, {"ends": 9, "nan_at": 2}), max_episode_steps=10)
    env.step(torch.zeros(2, 2))
    with pytest.warns(RuntimeWarning, match="1 of 2 envs diverged"):
        obs, reward, terminated, _, info = env.step(torch.zeros(2, 2))
    assert terminated.tolist() == [False, True]
    assert reward.tolist() == [5.0, 0.0]
    assert info["final_obs"][:, 0].tolist() == [2.0, 1.0]
    assert obs[:, 0].tolist() == [2.0, 0.0]
    assert env.step(torch.zeros(2, 2))[0][:, 0].tolist() == [3.0, 1.0]


def test_seeds():
    first, second = (make("gym", 2, id="Hopper-v5", seed=s) for s in (5, 5))
    for action in random_actions(first, 80):
        assert same(first.step(action), second.step(action))
    assert torch.equal(first.reset(seed=1)[0], second.reset(seed=1)[0])
    assert not torch.equal(first.reset(seed=2)[0], second.reset(seed=1)[0])


@pytest.mark.parametrize("id", ["Ant-v5", "Hopper-v5", "InvertedDoublePendulum-v5", "Reacher-v5"])
def test_saved_state_continues_to_the_bit(id, tmp_path):
    env = make("gym", 3, id=id, seed=6, max_episode_steps=70)
    restored = make("gym", 3, id=id, seed=60, max_episode_steps=70)
    continues_to_the_bit(env, restored, random_actions(env, 90), 50, tmp_path)


def test_states_that_are_not_supported():
    with pytest.raises(StateNotSupported, match="Pendulum"):
        make("gym", 1, id="Pendulum-v1").get_state()
    wrapped = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.wrappers.NormalizeObservation(gymnasium.make("Hopper-v5"))],
        autoreset_mode=SAME_STEP,
    )
    with pytest.raises(StateNotSupported, match="NormalizeObservation"):
        GymnasiumEnv(wrapped, max_episode_steps=1000).get_state()
    state = make("gym", 2, id="Hopper-v5").get_state()
    with pytest.raises(ValueError, match="observations"):
        make("gym", 3, id="Hopper-v5").set_state(state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"id": "NoSuchRobot-v0"}, "NoSuchRobot-v0"),
        ({"id": "CartPole-v1"}, "action space must be a Box, got Discrete"),
        ({"id": "Taxi-v4"}, "observation space must be a Box, got Discrete"),
        ({"id": "Hopper-v5", "kwargs": {"nonsense": 1}}, "nonsense"),
        ({"id": "Hopper-v5", "nonsense": 1}, "nonsense"),
        ({"id": "Hopper-v5", "max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"id": "Hopper-v5", "num_envs": 0}, "num_envs must be at least 1"),
    ],
)
def test_make_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make("gym", **{"num_envs": 1, **options})


class Breaks(Counter):
    """Raises ``error`` in ``where``: its construction, its second reset or its second step."""

    def __init__(self, where, error):
        super().__init__(ends=9)
        self.where, self.error, self.calls = where, error, 0
        if where == "init":
            raise error

    def _count(self, where):
        self.calls += where == self.where
        if self.calls == 2:
            raise self.error

    def reset(self, **given):
        self._count("reset")
        return super().reset(**given)

    def step(self, action):
        self._count("step")
        return super().step(action)


ERRORS = [
    ZeroDivisionError("by\nzero"),
    OverflowError("valid bounds"),
    KeyError("k"),
    TypeError("t"),
]


@pytest.fixture
def breaks():
    gymnasium.register("pwm_fast/Breaks-v0", entry_point=Breaks, max_episode_steps=30)
    yield "pwm_fast/Breaks-v0"
    del gymnasium.registry["pwm_fast/Breaks-v0"]


@pytest.mark.parametrize("error", [*ERRORS, AssertionError("a"), RuntimeError("r"), OSError("o")])
def test_whatever_an_environment_raises_while_it_is_made(breaks, error):
    with pytest.raises((ValueError, EnvironmentFault)) as caught:
        GymnasiumEnv.from_id(breaks, 2, kwargs={"where": "init", "error": error})
    text = str(caught.value)
    assert text.startswith(f"Gymnasium cannot make env.id='{breaks}' with env.kwargs={{'where': ")
    assert f": {type(error).__name__}: {' '.join(str(error).split())}" in text
    assert "\n" not in text


@pytest.mark.parametrize("error", [*ERRORS, ValueError("v")])
@pytest.mark.parametrize(
    ("where", "when"), [("reset", "reset of episode 2"), ("step", "step 2 of")]
)
@pytest.mark.parametrize("vector", ["sync", "async"])
def test_whatever_an_environment_raises_later(error, where, when, vector):
    kind = gymnasium.vector.SyncVectorEnv if vector == "sync" else gymnasium.vector.AsyncVectorEnv
    makers = [lambda: Counter(ends=9), lambda: Breaks(where, error)]
    env = GymnasiumEnv(kind(makers, autoreset_mode=SAME_STEP), max_episode_steps=9)
    match = rf"^Breaks, env 1, {when}.*: {type(error).__name__}: "
    with pytest.raises(EnvironmentFault, match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's log of a process
        for _ in range(2):
            env.step(torch.zeros(2, 2))
        env.reset()
    env.close()


@pytest.mark.parametrize("error", [MemoryError(), OSError("gone"), EnvironmentFault("ours")])
def test_errors_that_say_enough_are_passed_on(error):
    envs = gymnasium.vector.SyncVectorEnv([lambda: Breaks("step", error)], autoreset_mode=SAME_STEP)
    env = GymnasiumEnv(envs, max_episode_steps=9)
    env.step(torch.zeros(1, 2))
    with pytest.raises(type(error)) as caught:
        env.step(torch.zeros(1, 2))
    assert caught.value is error


@pytest.mark.parametrize("kwargs", [5, "abc", ["a"], {1: 2}, True, 0, ""])
def test_arguments_that_are_no_mapping(kwargs):
    with pytest.raises(ValueError, match=r"^env\.kwargs must be a mapping .* got ") as caught:
        make("gym", 1, id="Pendulum-v1", kwargs=kwargs)
    assert str(caught.value).endswith(repr(kwargs))


@pytest.mark.parametrize("name", ["max_episode_steps", "disable_env_checker", "id"])
def test_arguments_that_are_said_elsewhere(name):
    with pytest.raises(ValueError, match=rf"^env\.kwargs\.{name} must not be given, got 5"):
        make("gym", 1, id="Pendulum-v1", kwargs={name: 5})


@pytest.mark.parametrize("value", [1.5, 2.0, None, "2", [2], {"a": 1}, True])
@pytest.mark.parametrize("name", ["num_envs", "max_episode_steps"])
@pytest.mark.parametrize("env", ["gym", "dmc", "cartpole"])
def test_numbers_that_are_not_whole(env, name, value):
    if name == "max_episode_steps" and value is None:
        return  # the environment's own
    own = {"gym": {"id": "Pendulum-v1"}, "dmc": {"domain": "cheetah", "task": "run"}}
    if env == "dmc":
        pytest.importorskip("dm_control", reason="needs pip install 'pwm-fast[dmc]'")
    with pytest.raises(ValueError, match=f"^{name} must be a whole number, at least 1, got "):
        make(env, **{"num_envs": 1, name: value, **own.get(env, {})})


@pytest.mark.parametrize("mode", ["NEXT_STEP", "DISABLED"])
def test_other_autoreset_modes_are_rejected(mode):
    envs = counters({"ends": 3}, mode=gymnasium.vector.AutoresetMode[mode])
    with pytest.raises(ValueError, match="autoreset mode must be SAME_STEP"):
        GymnasiumEnv(envs, max_episode_steps=10)


def test_vector_environments_that_are_rejected():
    envs = counters({"ends": 3})
    with pytest.raises(ValueError, match=r"set env\.max_episode_steps"):
        GymnasiumEnv(envs)
    envs.metadata = {}
    with pytest.raises(ValueError, match="autoreset mode must be SAME_STEP, got None"):
        GymnasiumEnv(envs, max_episode_steps=10)
    unbounded = counters({"ends": 3})
    unbounded.single_action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(ValueError, match="actions must be bounded"):
        GymnasiumEnv(unbounded, max_episode_steps=10)


def test_bad_actions():
    env = make("gym", 2, id="Hopper-v5")
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="non-finite"):
        env.step(torch.full((2, 3), float("nan")))
