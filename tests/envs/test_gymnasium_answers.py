"""Every kind of answer a Gymnasium env gives: kept buffers, divergence, spaces, and faults."""

import functools
import math
import multiprocessing
import re
import warnings

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")

from pwm_fast.envs import (  # noqa: E402
    EnvironmentFault,
    GymnasiumEnv,
    StateNotSupported,
    _divergence,
    _spaces,
    make,
)
from pwm_fast.replay import Replay  # noqa: E402
from tests.envs.engines import random_actions  # noqa: E402
from tests.envs.scripted import Script, Spoilt, Walk, parallel, sync  # noqa: E402

Box = gymnasium.spaces.Box
VECTORS = {
    "sync": sync,
    "sync without copies": functools.partial(sync, copy=False),
    "async": parallel,
    "async without copies": functools.partial(parallel, copy=False),
    "async without shared memory": functools.partial(parallel, shared_memory=False),
    "async in new processes": functools.partial(parallel, context="spawn"),
}


def adapted(*makers, vector=sync, **options):
    return GymnasiumEnv(vector(*makers), max_episode_steps=50, **options)


def script(*answers, **options):
    return functools.partial(Script, answers, **options)


def flat(step):
    *tensors, info = step
    return [*tensors, info["final_obs"], info["diverged"], *info["episode"].values()]


# --- buffers that an env uses again --------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS)
def test_an_env_may_answer_with_the_same_arrays_again_and_again(vector):
    made = [
        adapted(
            *(
                functools.partial(Walk, length, truncates, reuse)
                for length, truncates in ((2, False), (3, True), (1, False))
            ),
            # Each new process imports everything: there the truth comes from this one.
            vector=VECTORS["sync" if "new" in vector and not reuse else vector],
            seed=5,
        )
        for reuse in (False, True)
    ]
    replays = [Replay(60, 3, 3, 2, 1) for _ in made]
    observed = [env.reset(seed=8)[0] for env in made]
    told, copies = [[], []], [[], []]
    for action in random_actions(made[0], 12):
        given = action.clone()
        for k, env in enumerate(made):
            obs, reward, terminated, truncated, info = step = env.step(action)
            replays[k].add(
                observed[k], action, reward, terminated, terminated | truncated, info["final_obs"]
            )
            observed[k] = obs
            told[k].append(flat(step))
            copies[k].append([x.clone() for x in flat(step)])
        assert torch.equal(action, given)
    for env in made:
        env.close()
    for expected, got, kept in zip(copies[0], told[1], copies[1], strict=True):
        for a, b, c in zip(expected, got, kept, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c), "what was handed out has changed since"
    for a, b in zip(*(replay.state_dict().values() for replay in replays), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_is_handed_out_is_the_callers():
    env, other = (adapted(functools.partial(Walk, 2, reuse=True), seed=1) for _ in range(2))
    for action in random_actions(env, 6):
        for tensor in flat(other.step(action)):
            tensor.zero_()
        other.reset(options={"reset_mask": torch.zeros(1, dtype=torch.bool)})[0].fill_(9.0)
        expected = env.step(action)
        assert torch.equal(other._obs, expected[0])
        assert torch.equal(other._steps, env._steps)


def test_an_env_behind_a_vector_wrapper():
    vector = gymnasium.wrappers.vector.RecordEpisodeStatistics(
        sync(functools.partial(Walk, 2, reuse=True))
    )
    env = GymnasiumEnv(vector, max_episode_steps=9, seed=3)
    env.step(torch.zeros(1, 2))
    obs, *_, info = env.step(torch.zeros(1, 2))
    assert not torch.equal(obs, info["final_obs"])


# --- divergence -----------------------------------------------------------------------------------


def spoilt(name="HalfCheetah-v5", at=2, velocity=1e11, wrap=None):
    env = Spoilt(gymnasium.make(name), at, velocity)
    return env if wrap is None else wrap(env)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Swimmer-v5"])
@pytest.mark.parametrize("velocity", [1e7, 1e11, -1e300, math.nan])
@pytest.mark.parametrize("at", [1, 3])
def test_a_state_that_mujoco_calls_bad(name, velocity, at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    env = adapted(*(functools.partial(spoilt, name, t, velocity) for t in (at, 99)), seed=1)
    before, _ = env.reset(seed=1)
    sequence = 0.1 * random_actions(env, at + 1)
    for action in sequence[: at - 1]:
        before, _, terminated, *_ = env.step(action)
        assert not terminated.any()
    why = r"MuJoCo gave mjWARN_BADQ|its time went back|a position or velocity is not finite"
    match = rf"{name}: 1 of 2 envs diverged \(env 0, step {at} of its episode: .*({why})"
    with pytest.warns(RuntimeWarning, match=match):
        obs, reward, terminated, truncated, info = env.step(sequence[at - 1])
    assert env.divergence is not None and f"step {at} of its episode: " in env.divergence
    assert terminated.tolist() == info["diverged"].tolist() == [True, False]
    assert not truncated.any()
    assert reward[0] == 0.0 != reward[1]
    assert torch.equal(info["final_obs"][0], before[0])
    assert obs.abs().max() < 100 and not torch.equal(obs[0], before[0])
    assert info["episode"]["length"].tolist() == [at, at]
    *_, info = env.step(sequence[at])
    assert not info["diverged"].any()
    assert info["episode"]["length"].tolist() == [1, at + 1]


@pytest.mark.parametrize(
    "wrap",
    [
        None,
        functools.partial(gymnasium.wrappers.ClipReward, max_reward=1.0),
        functools.partial(gymnasium.wrappers.TimeLimit, max_episode_steps=7),
        functools.partial(gymnasium.wrappers.FrameStackObservation, stack_size=3),
        gymnasium.wrappers.NormalizeObservation,
    ],
)
@pytest.mark.parametrize("vector", ["sync", "async"])
def test_divergence_is_seen_below_wrappers_and_in_other_processes(
    wrap, vector, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    makers = [functools.partial(spoilt, at=at, wrap=wrap) for at in (2, 99)]
    env = adapted(*makers, vector=VECTORS[vector], seed=2)
    before, *_ = env.step(torch.zeros(2, 6))
    with pytest.warns(RuntimeWarning, match="1 of 2 envs diverged"):
        _, reward, terminated, _, info = env.step(torch.zeros(2, 6))
    assert terminated.tolist() == info["diverged"].tolist() == [True, False]
    assert reward[0] == 0.0
    assert torch.equal(info["final_obs"][0], before[0])
    assert not env.step(torch.zeros(2, 6))[-1]["diverged"].any()
    env.close()


def test_no_reset_of_mujocos_own_passes_for_a_step(tmp_path, monkeypatch):
    """Gears a thousand times too strong: MuJoCo resets itself again and again."""
    monkeypatch.chdir(tmp_path)
    env = make("gym", 2, id="HalfCheetah-v5", seed=4)
    for one in env._envs.envs:
        one.unwrapped.model.actuator_gear[:] *= 1000.0
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for action in random_actions(env, 300):
            times = [one.unwrapped.data.time for one in env._envs.envs]
            _, reward, terminated, _, info = env.step(action)
            for i, one in enumerate(env._envs.envs):
                if one.unwrapped.data.time <= times[i]:
                    assert terminated[i], "time went back within an episode"
            seen += int(info["diverged"].sum())
            assert torch.equal(terminated, info["diverged"])
            assert reward[info["diverged"]].eq(0.0).all()
            assert info["final_obs"].abs().max() < 1e6
    assert seen > 3


def test_ordinary_warnings_of_mujoco_are_no_divergence():
    import mujoco

    env = make("gym", 1, id="HalfCheetah-v5")
    number = env._envs.envs[0].unwrapped.data.warning.number
    number[int(mujoco.mjtWarning.mjWARN_CONTACTFULL)] = 3
    number[int(mujoco.mjtWarning.mjWARN_BADQACC)] = 2  # of before
    assert not env.step(torch.zeros(1, 6))[-1]["diverged"].any()
    assert number.sum() == 5, "its own counts are left to the env"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e11, -3e38])
@pytest.mark.parametrize("what", ["obs", "reward"])
@pytest.mark.parametrize("ends", [{}, {"terminated": True}, {"truncated": True}])
def test_numbers_that_nothing_can_be_learned_from(value, what, ends):
    change = {what: np.array([1.0, value]) if what == "obs" else value}
    env = adapted(script({}, {**change, **ends}, {}), script({}, {}, {}))
    before, *_ = env.step(torch.zeros(2, 1))
    shown = f"{np.float32(value):g}".replace("+", r"\+")
    why = f"entry 1 is {shown} of the observation" if what == "obs" else f"the reward is {shown}"
    match = rf"Script: 1 of 2 envs diverged \(env 0, step 2 of its episode: {why}\)"
    with pytest.warns(RuntimeWarning, match=match):
        obs, reward, terminated, _, info = env.step(torch.zeros(2, 1))
    assert terminated.tolist() == info["diverged"].tolist() == [True, False]
    assert reward.tolist() == [0.0, 1.0]
    assert torch.equal(info["final_obs"], before)
    assert torch.isfinite(obs).all()
    assert info["episode"]["return"].tolist() == [1.0, 2.0]
    assert [one.unwrapped.resets for one in env._envs.envs] == [2, 1]


def test_actions_that_are_not_finite_are_refused():
    env = adapted(script(), script(), script())
    for value in (math.nan, math.inf):
        action = torch.zeros(3, 1)
        action[1:] = value
        with pytest.raises(ValueError, match=r"non-finite values, in envs 1, 2"):
            env.step(action)
    assert not env._envs.envs[0].unwrapped.taken


@pytest.mark.parametrize(
    ("values", "below"),
    [([], True), ([9e5] * 20, True), ([-1e6, 0], False), ([1e300, 1e300], False),
     ([math.nan, 0], False), ([0, -math.inf], False)],
)  # fmt: skip
def test_sizes_are_compared_without_a_word_of_numpys(values, below):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _divergence._below(np.array(values, dtype=np.float64), 1e6) == below


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", ["sync", "async", "async without shared memory"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_a_start_that_is_not_finite_names_its_source(vector, value):
    start = np.array([0.5, value])
    match = rf"Script, env 1, reset of episode {{}}: .* entry 1 is {re.escape(f'{value:g}')}"
    makers = [script(), script(starts=[start])]
    with pytest.raises(EnvironmentFault, match=match.format(1)):
        adapted(*makers, vector=VECTORS[vector])
    makers = [
        script({}, {}, {}, {}, {}, {}),
        script({}, {"terminated": True}, starts=[None, start]),
    ]
    env = adapted(*makers, vector=VECTORS[vector])
    env.step(torch.zeros(2, 1))
    with pytest.raises(EnvironmentFault, match=match.format(2)):
        env.step(torch.zeros(2, 1))
    env.close()


@pytest.mark.parametrize(
    "reward",
    [2, 2.0, np.float64(2), np.float32(2), np.int8(2), np.array(2.0), np.array([2.0]),
     np.array([[2]]), torch.tensor(2.0), torch.tensor([2.0]), [2.0]],
    ids=repr,
)  # fmt: skip
def test_rewards_that_are_one_number(reward):
    env = adapted(script({"reward": reward}, {}, {}), script({"reward": True}, {}, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.step(torch.zeros(2, 1))[1].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "flag",
    [1, np.bool_(True), np.array(True), np.array([True]), np.array([[1]]), torch.tensor([True])],
    ids=repr,
)
@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_flags_that_are_flags(name, flag):
    other = "truncated" if name == "terminated" else "terminated"
    env = adapted(script({name: flag, other: not flag}, {}), script())
    _, _, *flags, _ = env.step(torch.zeros(2, 1))
    assert flags[name == "truncated"].tolist() == [True, False]
    assert not flags[name != "truncated"].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"reward": np.ones(2)}, r"reward must be one number, got ndarray of shape \(2,\)"),
        ({"reward": np.ones(0)}, r"reward must be one number, got ndarray of shape \(0,\)"),
        ({"reward": None}, "reward must be one number, got None"),
        ({"reward": "3"}, "reward must be one number, got str '3'"),
        ({"reward": 1j}, "reward must be one number, got 1j"),
        ({"terminated": None}, "terminated must be True or False, got None"),
        ({"terminated": 0.5}, "terminated must be True or False, got 0.5"),
        ({"truncated": math.nan}, "truncated must be True or False, got nan"),
        ({"truncated": np.zeros(2, bool)}, "truncated must be True or False, got ndarray"),
        ({"info": None}, "info must be a dict, got None"),
        ({"info": [1]}, r"info must be a dict, got list of shape \(1,\)"),
        ({"obs": np.ones(3)}, r"must be numbers of shape \(2,\), got ndarray of shape \(3,\)"),
        ({"obs": np.ones((1, 2))}, r"numbers of shape \(2,\), got ndarray of shape \(1, 2\)"),
        ({"obs": None}, r"must be numbers of shape \(2,\), got None"),
        ({"obs": {"a": 1}}, r"must be numbers of shape \(2,\), got dict"),
        ({"obs": np.array(["a", "b"])}, "must be numbers"),
        ({"obs": [[1], [2, 3]]}, "must be numbers"),
        ({"raw": (np.ones(2), 1.0, True, {})}, "step must return .*got tuple"),
        ({"raw": None}, "step must return .*got None"),
    ],
)
@pytest.mark.parametrize("vector", ["sync", "async"])
def test_answers_that_cannot_be_used(change, match, vector):
    env = adapted(script(), script({}, change, {}), vector=VECTORS[vector])
    env.step(torch.zeros(2, 1))
    with pytest.raises(EnvironmentFault, match=f"^Script, env 1, step 2 of episode 1: .*{match}"):
        env.step(torch.zeros(2, 1))
    env.close()


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (np.ones(3), r"numbers of shape \(2,\), got ndarray of shape \(3,\)"),
        (None, "reset must return"),
    ],
)
def test_starts_that_cannot_be_used(start, match):
    class OldApi(Script):
        def reset(self, **options):
            return start if start is not None else super().reset(**options)[0]

    kind = functools.partial(Script, starts=[start]) if start is not None else OldApi
    with pytest.raises(EnvironmentFault, match=f"env 0, reset of episode 1: .*{match}"):
        adapted(kind)


def test_an_observation_outside_of_its_space_is_said_once():
    box = Box(np.array([-1.0, 0.0]), np.array([1.0, 5.0]), dtype=np.float64)
    start = np.array([0.0, 5.000001])  # rounding
    far = {"obs": np.array([0.0, 7.0])}
    env = adapted(*(script({}, c, far, starts=[start], obs=box) for c in ({}, far)))
    with pytest.warns(RuntimeWarning, match=r"env 1: entry 1 of the obs\w* is 7, .* \[0, 5\]"):
        for _ in range(2):
            obs, *_ = env.step(torch.zeros(2, 1))
    assert obs[1, 1] == 7.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.step(torch.zeros(2, 1))


# --- spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        Box(0, 255, (64, 64, 3), np.uint8),
        Box(0, 255, (84, 84), np.uint8),
        Box(0, 255, (4, 10), np.uint8),
        Box(0, 1, (3, 64, 64), np.float32),
        Box(0, 1, (4, 84, 84, 1), np.float32),
        Box(0, 1, (10, 10, 4), bool),
        Box(0, 1, (28, 28), np.float64),
        Box(-1, 1, (4, 2000), np.float32),
    ],
    ids=repr,
)
def test_images_are_refused(space):
    with pytest.raises(ValueError, match=r"Script: the observation space \(.*is one of images"):
        adapted(script(obs=space))


@pytest.mark.parametrize(
    "space",
    [
        Box(-np.inf, np.inf, (), np.float32),
        Box(0, 255, (128,), np.uint8),  # Atari's memory
        Box(-9, 9, (3,), np.int64),
        Box(0, 1, (5,), bool),
        Box(-1, 1, (5000,), np.float32),
        Box(-1, 1, (8, 376), np.float64),  # a stack of vectors
        Box(-1, 1, (2, 2), np.float16),
    ],
    ids=repr,
)
def test_vectors_and_stacks_of_them_are_taken(space):
    env = adapted(script(obs=space))
    assert env.single_observation_space.shape == (math.prod(space.shape),)
    obs, *_ = env.step(torch.zeros(1, 1))
    assert obs.dtype == torch.float32 and bool((obs == 1).all())


@pytest.mark.parametrize(
    ("value", "fits"),
    [([1, 2], True), ([1.0, 2.0], True), ([1.5, 2], False), ([1, 300], False), ([-1, 2], False),
     ([math.nan, 0], False)],
)  # fmt: skip
def test_observations_of_integers(value, fits):
    makers = [script({"obs": np.array(value)}, {}, obs=Box(0, 255, (2,), np.uint8))]
    env = adapted(*makers)
    if fits:
        assert env.step(torch.zeros(1, 1))[0].tolist() == [value]
        return
    with pytest.raises(EnvironmentFault, match=r"step 1 .*none of the space's uint8, got ndarray"):
        env.step(torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.int16, np.uint8, np.uint32])
@pytest.mark.parametrize(("low", "high"), [(-2, 2), (0, 1), (0, 9), (3, 5), (-7, -1)])
def test_each_whole_number_gets_an_equal_share(dtype, low, high):
    if low < 0 and np.dtype(dtype).kind == "u":
        pytest.skip("unsigned")
    env = adapted(script({}, *[{}] * 2000, act=Box(low, high, (1,), dtype)))
    shares = 400 // (high - low + 1)
    unit = torch.linspace(-1.0, 1.0, shares * (high - low + 1) + 1)
    for u in unit:
        env.step(u.view(1, 1))
    taken = env._envs.envs[0].unwrapped.taken
    assert all(a.dtype == dtype and low <= a[0] <= high for a in taken)
    values, counts = np.unique(np.concatenate(taken), return_counts=True)
    assert values.tolist() == list(range(low, high + 1))
    assert counts.max() - counts.min() <= 2
    assert taken[0][0] == low and taken[-1][0] == high
    assert np.all(np.diff(np.concatenate(taken).astype(int)) >= 0)


def test_float_actions_stay_within_their_bounds():
    low, high = np.array([-0.1, 1 / 3, -7e5]), np.array([0.7, 0.4, 3.0])
    for dtype in (np.float32, np.float64, np.float16):
        if dtype == np.float16:
            low, high = low[:2], high[:2]
        box = Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        env = adapted(script({}, {}, {}, {}, act=box))
        for u in (-1.0, 1.0, 0.0):
            env.step(torch.full((1, len(low)), u))
        first, last, middle = env._envs.envs[0].unwrapped.taken
        assert all(box.contains(a) for a in (first, last, middle))
        assert np.array_equal(first, box.low) and np.array_equal(last, box.high)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-np.inf, np.inf, np.float32),
        (-1e10, 1e10, np.float32),
        (-1e10, 1e10, np.float64),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max, np.float32),
        (0.0, np.inf, np.float32),
        (-np.inf, 0.0, np.float64),
        (0.0, 1e8, np.float32),
        (np.iinfo(np.int32).min, np.iinfo(np.int32).max, np.int32),
        (0, np.iinfo(np.uint64).max, np.uint64),
    ],
)
def test_actions_without_bounds(low, high, dtype):
    box = (
        Box(np.array([-1, low], dtype), np.array([1, high], dtype), dtype=dtype)
        if (low < 0)
        else Box(low, high, (2,), dtype)
    )
    match = r"Script: entry [01] of the action has the bounds .* the actions must be bounded"
    with pytest.raises(ValueError, match=match):
        adapted(script(act=box))


@pytest.mark.parametrize(
    ("low", "high", "match"),
    [
        (0.5, 0.5, r"entry 1 .*\[0.5, 0.5\]: the lower must be below the upper"),
        (1.0, -1.0, r"entry 1 .*\[1, -1\]: the lower must be below the upper"),
        (math.nan, 1.0, r"entry 1 .*\[nan, 1\]: they must be numbers"),
        (-1.0, math.nan, r"entry 1 .*they must be numbers"),
    ],
)
def test_bounds_that_are_none(low, high, match):
    """Gymnasium itself takes the first alone."""
    with pytest.raises(ValueError, match=f"Script: {match}"):
        _spaces.check_actions("Script", np.array([-1.0, low]), np.array([1.0, high]))
    if low == high:
        box = Box(np.float32([-1.0, low]), np.float32([1.0, high]))
        with pytest.raises(ValueError, match=f"Script: {match}"):
            adapted(script(act=box))


def test_the_actuator_is_named():
    def unlimited():
        env = gymnasium.make("Hopper-v5").unwrapped
        env.action_space = Box(np.float32([-1, -1e10, -1]), np.float32([1, 1e10, 1]))
        return env

    with pytest.raises(ValueError, match=r"Hopper-v5: entry 1 of the action \(\w.*'leg_joint'\)"):
        adapted(unlimited)


@pytest.mark.parametrize(
    "spaces",
    [
        {"act": gymnasium.spaces.Discrete(3)},
        {"act": gymnasium.spaces.MultiDiscrete([3, 2])},
        {"act": gymnasium.spaces.MultiBinary(4)},
        {"obs": gymnasium.spaces.MultiBinary(4)},
        {"obs": gymnasium.spaces.Dict(a=Box(0, 1, (2,)))},
        {"obs": gymnasium.spaces.Tuple([Box(0, 1, (2,))])},
        {"obs": Box(0, 1, (0,))},
        {"act": Box(0, 1, (0,))},
        {"act": Box(0, 1, (2, 0))},
    ],
    ids=repr,
)
def test_spaces_that_are_refused(spaces):
    with pytest.raises(ValueError, match=r"Script: the .* (must be a Box|has no entries)"):
        adapted(script(**spaces))


# --- options, closing -----------------------------------------------------------------------------


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_options_are_none_where_there_are_none(vector):
    """``Walk`` asserts it."""
    env = adapted(Walk, Walk, vector=VECTORS[vector])
    env.reset(seed=3)
    env.reset(options={})
    env.reset(options={"reset_mask": torch.tensor([True, False])})
    for action in random_actions(env, 9):
        env.step(action)
    env.close()


def test_envs_are_closed_once_also_where_one_cannot_be_made():
    made = []

    def maker(fails):
        def make_one():
            if len(made) == fails:
                raise RuntimeError("no more")
            made.append(Script())
            return made[-1]

        return make_one

    gymnasium.register("pwm_fast/Counted-v0", entry_point=lambda: maker(2)(), max_episode_steps=5)
    try:
        env = make("gym", 2, id="pwm_fast/Counted-v0")
        env.close()
        env.close()
        assert [one.closed for one in made] == [1, 1]
        made.clear()
        with pytest.raises(RuntimeError, match="no more"):
            make("gym", 3, id="pwm_fast/Counted-v0")
        assert [one.closed for one in made] == [1, 1]
        made.clear()
        with pytest.raises(ValueError, match="max_episode_steps"):
            GymnasiumEnv.from_id("pwm_fast/Counted-v0", 2, max_episode_steps=0)
        assert not made
    finally:
        del gymnasium.registry["pwm_fast/Counted-v0"]


@pytest.mark.parametrize("moment", ["ready", "within a step", "after an error", "killed"])
def test_no_process_is_left(moment):
    before = set(multiprocessing.active_children())
    env = adapted(script(), script({}, {"reward": None}, {}), vector=parallel)
    env.step(torch.zeros(2, 1))
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    if moment == "within a step":
        env._envs.step_async(np.zeros((2, 1), np.float32))
    if moment == "after an error":
        with pytest.raises(EnvironmentFault):
            env.step(torch.zeros(2, 1))
    if moment == "killed":
        victim = workers.pop()
        victim.kill()
        victim.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env.close()
        env.close()
    assert set(multiprocessing.active_children()) <= before


def test_envs_in_other_processes_cannot_be_saved():
    env = adapted(script(), vector=parallel)
    with pytest.raises(StateNotSupported, match="AsyncVectorEnv"):
        env.get_state()
    env.close()
