"""MuJoCo's state is watched wherever a Gymnasium env keeps it."""

import collections
import functools
import math
import time
import types

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
mujoco = pytest.importorskip("mujoco", reason="needs pip install 'pwm-fast[train]'")

from pwm_fast.envs import EnvironmentFault, GymnasiumEnv, _physics_search  # noqa: E402
from tests.envs.scripted import parallel, sync  # noqa: E402
from tests.envs.suites import dm_control_suite  # noqa: E402

XML = """
<mujoco><worldbody><body><joint name="hinge" type="hinge" axis="0 1 0"/>
<geom type="capsule" size=".05" fromto="0 0 0 0 0 .5"/></body></worldbody>
<actuator><motor joint="hinge"/></actuator></mujoco>
"""


class Slots:
    __slots__ = ("never_set", "state")


class Holder:
    def __init__(self, **parts):
        vars(self).update(parts)


class Loop:
    def __init__(self, data):
        self.me, self.state = self, Holder(up=self, data=data)


def closure(data):
    return lambda: data


def slots(data):
    made = Slots()
    made.state = data
    return made


# How an env keeps its data, by the name of the attribute.
PLACES = {
    "_data": lambda data: data,
    "mj_data": lambda data: data,
    "sim": lambda data: Holder(data=data),
    "physics": lambda data: Holder(data=Holder(ptr=data)),
    "robot": lambda data: Holder(arm=Holder(sim=Holder(state=data))),
    "states": lambda data: [None, data],
    "pairs": lambda data: ((None, data),),
    "named": lambda data: {"model": None, "data": data},
    "queue": lambda data: collections.deque([data]),
    "get": closure,
    "nested": lambda data: Holder(get=closure([data])),
    "partial": lambda data: functools.partial(print, data),
    "keywords": lambda data: functools.partial(print, file=data),
    "bound": lambda data: types.MethodType(print, Holder(data=data)),
    "slots": slots,
    "loop": Loop,
    "many": lambda data: [*({"x": i} for i in range(40)), data],
}


class Pendulum(gymnasium.Env):
    """Keeps its data in ``place``; its velocity is spoilt before step ``at`` of an episode.

    Args:
        place: one of PLACES, or ``module`` for one that nobody can find.
        at: the step.
        velocity: its value then.
        when: ``init``, ``reset`` (anew in each) or ``step`` (the first one): when data is made.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, place="_data", at=99, velocity=1e11, when="init"):
        self._place, self._at, self._velocity, self._when = place, at, velocity, when
        self._model = mujoco.MjModel.from_xml_string(XML)
        if when == "init":
            self._make()

    def _make(self):
        data = mujoco.MjData(self._model)
        STATES[id(self)] = data
        if self._place in PLACES:
            setattr(self, self._place, PLACES[self._place](data))

    @property
    def forbidden(self):
        raise AssertionError("a property was called")

    def _obs(self):
        data = STATES[id(self)]
        return np.array([data.qpos[0], data.qvel[0]])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        if self._when == "reset" or id(self) not in STATES:
            if self._when != "step":
                self._make()
            else:
                return np.zeros(2), {}
        mujoco.mj_resetData(self._model, STATES[id(self)])
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        if id(self) not in STATES:
            self._make()
        data = STATES[id(self)]
        if self.t == self._at:
            data.qvel[0] = self._velocity
        data.ctrl[:] = action
        mujoco.mj_step(self._model, data)
        return self._obs(), 1.0, False, False, {}

    def close(self):
        STATES.pop(id(self), None)


STATES = {}  # what a module holds is not looked at


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT


def diverged(*makers, vector=sync, steps=3):
    env = GymnasiumEnv(vector(*makers), max_episode_steps=50)
    seen = []
    for _ in range(steps):
        seen.append(env.step(torch.zeros(env.num_envs, 1))[-1]["diverged"].tolist())
    env.close()
    return seen


@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("velocity", [1e11, math.nan])
@pytest.mark.parametrize("when", ["init", "reset", "step"])
def test_a_state_is_watched_wherever_it_is_kept(place, velocity, when):
    makers = [functools.partial(Pendulum, place, at, velocity, when) for at in (2, 99)]
    assert diverged(*makers) == [[False, False], [True, False], [False, False]]


@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
@pytest.mark.parametrize("place", ["_data", "sim", "get"])
def test_below_wrappers_and_in_other_processes(place):
    def wrapped():
        env = gymnasium.wrappers.ClipReward(Pendulum(place, 2), max_reward=0.5)
        for _ in range(8):  # further away than attributes are looked at
            env = gymnasium.wrappers.TimeLimit(env, 40)
        return env

    expected = [[False, False], [True, True], [False, False]]
    assert diverged(wrapped, functools.partial(Pendulum, place, 2), vector=sync) == expected
    assert diverged(wrapped, functools.partial(Pendulum, place, 2), vector=parallel) == expected


class Wrapped(gymnasium.Wrapper):
    """Keeps the data that its env hides."""

    def __init__(self, env):
        super().__init__(env)
        self.states = (STATES[id(env)],)


@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
def test_a_wrapper_may_keep_it():
    hidden = functools.partial(Pendulum, "module", 2)
    assert diverged(hidden, lambda: Wrapped(hidden())) == [
        [False, False],
        [False, True],
        [False] * 2,
    ]


class Planner(gymnasium.Wrapper):
    """Thinks ahead in a copy, whose time goes back in every step."""

    def __init__(self, env):
        super().__init__(env)
        self.copy = mujoco.MjData(env._model)

    def step(self, action):
        mujoco.mj_resetData(self.env._model, self.copy)
        for _ in range(3):
            mujoco.mj_step(self.env._model, self.copy)
        return self.env.step(action)


@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
@pytest.mark.parametrize("place", ["_data", "data"])
def test_time_may_go_back_in_a_copy(place, monkeypatch):
    monkeypatch.setitem(PLACES, "data", lambda data: data)
    makers = [lambda at=at: Planner(Pendulum(place, at)) for at in (2, 99)]
    assert diverged(*makers) == [[False, False], [True, False], [False, False]]


class Careless(Planner):
    """Finds out in its copy what happens beyond the end."""

    def step(self, action):
        self.copy.qvel[:] = 1e11
        mujoco.mj_step(self.env._model, self.copy)
        return self.env.step(action)


@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
def test_a_copy_may_break_where_the_state_is_known(monkeypatch):
    monkeypatch.setitem(PLACES, "data", lambda data: data)
    makers = [lambda at=at: Careless(Pendulum("data", at)) for at in (2, 99)]
    assert diverged(*makers) == [[False, False], [True, False], [False, False]]


def test_the_search_is_bounded():
    """Of cycles, of long lists and of deep ones; the nearest is found first all the same."""
    data = mujoco.MjData(mujoco.MjModel.from_xml_string(XML))
    ring = [Holder() for _ in range(5000)]
    for one, other in zip(ring, ring[1:] + ring[:1], strict=True):
        one.next, one.all = other, ring
    tree = Holder(left=ring, rows=[[[i, str(i)] for i in range(100)] for _ in range(100)])
    start = time.perf_counter()
    assert _physics_search.find(Holder(a=tree, b=Holder(data=data))) == [data]
    assert _physics_search.find(tree) == []
    assert time.perf_counter() - start < 0.5
    deep = functools.reduce(lambda inner, _: Holder(x=inner), range(50), data)
    assert _physics_search.find(deep) == []


def test_the_search_calls_nothing():
    class Touchy:
        def __getattr__(self, name):
            raise AssertionError(name)

        def __iter__(self):
            raise AssertionError("iterated")

        def __eq__(self, other):
            raise AssertionError("compared")

        __hash__ = None

        @property
        def ptr(self):
            raise AssertionError("a property was called")

    data = mujoco.MjData(mujoco.MjModel.from_xml_string(XML))
    touchy = Touchy()
    vars(touchy)["hidden"] = data
    found = _physics_search.find(Holder(a=touchy, b=[touchy, {1: data}]))
    assert len(found) == 1 and found[0] is data


# --- dm_control within Gymnasium ------------------------------------------------------------------


class Suite(gymnasium.Env):
    """A task of dm_control; its velocity is spoilt before step ``at`` of an episode."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (5,), np.float64)

    def __init__(self, at, velocity, raises=False, at_reset=99):
        from dm_control import suite
        from dm_control.rl import control

        self._env = suite.load("cartpole", "swingup", task_kwargs={"random": 1})
        self._at, self._velocity = at, velocity
        self._error = control.PhysicsError("bad") if raises else None
        self._resets, self._at_reset = 0, at_reset

    def _obs(self, step):
        return np.concatenate([np.ravel(part) for part in step.observation.values()])

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self._resets += 1
        if self._resets == self._at_reset:
            raise self._error
        return self._obs(self._env.reset()), {}

    def step(self, action):
        self.t += 1
        if self.t == self._at:
            if self._error is not None:
                raise self._error
            self._env.physics.data.qvel[0] = self._velocity
        step = self._env.step(action)
        return self._obs(step), float(step.reward), False, False, {}


@pytest.fixture
def dm_control():
    return dm_control_suite()


@pytest.mark.usefixtures("dm_control")
@pytest.mark.filterwarnings("ignore:.*envs diverged:RuntimeWarning")
@pytest.mark.parametrize(
    ("velocity", "raises"),
    [(1e7, False), (1e11, False), (math.nan, False), (0.0, True)],  # who raises sets no velocity
)
@pytest.mark.parametrize("vector", [sync, parallel])
def test_a_task_of_dm_control(velocity, raises, vector):
    """Its state is found, and its own error is divergence."""
    makers = [functools.partial(Suite, at, velocity, raises) for at in (2, 99)]
    expected = [[False, False], [True, False], [False, False]]
    assert diverged(*makers, vector=vector) == expected


@pytest.mark.usefixtures("dm_control")
def test_a_physics_error_in_a_reset_is_a_fault():
    makers = [functools.partial(Suite, 99, 0.0, True, at_reset=2)]
    env = GymnasiumEnv(sync(*makers), max_episode_steps=50)
    with pytest.raises(EnvironmentFault, match="reset of episode 2: PhysicsError: bad"):
        env.reset()
