"""Several tasks side by side: each env is what it would be in an environment of its task alone."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast import seeding
from pwm_fast.envs import ManyTasks, VectorEnv, many_tasks, task_of
from pwm_fast.envs.protocol import SAME_STEP, Box, StateNotSupported
from pwm_fast.seeding import Purpose
from tests.envs.engines import continues_to_the_bit, flat, random_actions

SIZES = {"short": (3, 1, 4), "long": (5, 2, 7), "plain": (2, 2, 3)}  # O, A, time limit
NAMES = list(SIZES)


class Part:
    """A task of few lines: a random number by episode, to which actions are added.

    Args:
        name: in :data:`SIZES`.
        num_envs: n.
        seed: of the random numbers.
        extra: further answers of every step, such as ``goal``.
        terminates: the last step of an episode is a terminal one.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int,
        extra: dict[str, bool] | None = None,
        terminates: bool = False,
    ) -> None:
        self.obs_dim, self.action_dim, self.max_episode_steps = SIZES[name]
        self.num_envs, self.seed, self.extra = num_envs, seed, extra or {}
        self.can_terminate = terminates
        self.device = torch.device("cpu")
        self.single_observation_space = Box((self.obs_dim,))
        self.single_action_space = Box((self.action_dim,), -1.0, 1.0)
        self.metadata: dict[str, Any] = {"autoreset_mode": SAME_STEP}
        self.divergence: str | None = None
        self.closed = 0
        self.steps = torch.zeros(num_envs)
        self.value, self.total = torch.zeros(num_envs), torch.zeros(num_envs)
        self._draws = [torch.Generator() for _ in range(num_envs)]  # an env's own
        self.reset(seed=seed)

    def _obs(self) -> Tensor:
        rest = torch.full((self.num_envs, self.obs_dim - 2), 9.0)
        return torch.cat([self.value[:, None], self.steps[:, None] + 1.0, rest], 1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", torch.ones(self.num_envs, dtype=torch.bool))
        for i in mask.nonzero().flatten().tolist():
            if seed is not None:
                self._draws[i].manual_seed(seeding.stream(seed, Purpose.TASK, i) % 2**62)
            self.value[i] = 1.0 + torch.rand((), generator=self._draws[i])
        self.steps, self.total = (torch.where(mask, 0.0, x) for x in (self.steps, self.total))
        return self._obs(), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        assert action.shape == (self.num_envs, self.action_dim)
        reward = self.value
        self.value = self.value + action.sum(1)  # a new tensor: the reward is the old one
        self.steps, self.total = self.steps + 1.0, self.total + reward
        done, final_obs = self.steps >= self.max_episode_steps, self._obs()
        episode = {"return": self.total, "length": self.steps.long(), "mask": done}
        obs = self.reset(options={"reset_mask": done})[0] if bool(done.any()) else final_obs
        never = torch.zeros_like(done)
        ends = (done, never) if self.can_terminate else (never, done)
        more = {key: torch.full_like(done, value) for key, value in self.extra.items()}
        return obs, reward, *ends, {"final_obs": final_obs, "episode": episode, **more}

    def get_state(self) -> dict[str, Any]:
        own = (self.value, self.steps, self.total)
        return {
            "values": [x.clone() for x in own],
            "draws": [draw.get_state() for draw in self._draws],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.value, self.steps, self.total = (x.clone() for x in state["values"])
        for draw, saved in zip(self._draws, state["draws"], strict=True):
            draw.set_state(saved)

    def close(self) -> None:
        self.closed += 1


def many(num_envs: int = 7, seed: int = 3, parts: Any = Part, **options: Any) -> ManyTasks:
    """The tasks of :data:`SIZES`."""
    return ManyTasks(lambda k, n, s: parts(NAMES[k], n, s), NAMES, num_envs, seed=seed, **options)


def alone(seed: int, counts: list[int]) -> list[VectorEnv]:
    """The same tasks, each in an environment of its own."""
    own = zip(NAMES, counts, strict=True)
    return [Part(name, n, seeding.stream(seed, Purpose.TASK, k)) for k, (name, n) in enumerate(own)]


def assert_joined(step: Any, parts: list[VectorEnv], action: Tensor) -> None:
    """A step is those of the parts, interleaved; observations end in zeros."""
    count = len(parts)
    for k, part in enumerate(parts):
        width = part.single_observation_space.shape[0]
        expected = part.step(action[k::count, : part.single_action_space.shape[0]])
        for found, own in zip(flat(step), flat(expected), strict=True):
            assert found.dtype == own.dtype
            if own.dim() == 2:
                assert torch.equal(found[k::count, :width], own)
                assert not found[k::count, width:].any(), "filled up with zeros"
            else:
                assert torch.equal(found[k::count], own)


def test_each_env_is_that_of_its_task_alone() -> None:
    """Observations, rewards, ends at each task's own time, and the same start states."""
    env, parts = many(), alone(3, [3, 2, 2])
    assert isinstance(env, VectorEnv)
    assert (env.single_observation_space.shape, env.single_action_space.shape) == ((5,), (2,))
    assert (env.max_episode_steps, env.can_terminate) == (7, False)
    ends = torch.zeros(7, dtype=torch.int64)
    for action in random_actions(env, 22):
        step = env.step(action)
        assert_joined(step, parts, action)
        assert not step[2].any(), "none of these tasks terminates"
        ends += step[3]
        changed = (step[0] != step[4]["final_obs"]).any(1)
        assert torch.equal(changed, step[3]), "the next episode begins in the step"
    assert ends.tolist() == [5, 3, 7, 5, 3, 7, 5], "22 steps of limits of 4, 7 and 3"


def test_start_states_by_the_seed() -> None:
    first, again, other = many(seed=1), many(seed=1), many(seed=2)
    assert torch.equal(first.reset()[0], again.reset()[0])
    assert not torch.equal(first.reset(seed=5)[0], again.reset()[0])
    assert torch.equal(first.reset(seed=5)[0], other.reset(seed=5)[0])
    starts = first.reset(seed=5)[0][:, 0]
    assert len(set(starts.tolist())) == 7, "no two envs share theirs, of one task or of two"
    parts = alone(5, [3, 2, 2])
    for k, part in enumerate(parts):
        assert torch.equal(starts[k::3], part.reset(seed=part.seed)[0][:, 0])  # type: ignore[attr-defined]


def test_what_a_task_does_not_read_does_nothing() -> None:
    env, other = many(), many()
    for action in random_actions(env, 9):
        changed = action.clone()
        changed[0::3, 1] = 0.77  # "short" reads one component
        for a, b in zip(flat(env.step(action)), flat(other.step(changed)), strict=True):
            assert torch.equal(a, b)
    changed[1, 1] += 0.5  # "long" reads it
    assert not torch.equal(env.step(action)[0], other.step(changed)[0])


def test_resetting_some() -> None:
    env, other = many(), many()
    for action in random_actions(env, 2):
        before = env.step(action)[0]
        other.step(action)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[[1, 5]] = True  # of "long" and of "plain"
    obs, _ = env.reset(options={"reset_mask": mask})
    assert torch.equal(obs[~mask], before[~mask])
    assert (obs[mask, 0] != before[mask, 0]).all() and (obs[mask, 1] == 1.0).all()
    action = random_actions(env, 1, seed=4)[0]
    for a, b in zip(flat(env.step(action)), flat(other.step(action)), strict=True):
        assert torch.equal(a[~mask], b[~mask])
    with pytest.raises(ValueError, match=r"reset_mask must be a bool tensor \[7\]"):
        env.reset(options={"reset_mask": mask[:3]})


def test_saved_state_continues_to_the_bit(tmp_path: Any) -> None:
    env = many()
    continues_to_the_bit(env, many(seed=80), random_actions(env, 20), 9, tmp_path)
    two = ManyTasks(lambda k, n, s: Part(NAMES[k], n, s), NAMES[:2], 7)
    with pytest.raises(ValueError, match="the saved state is of 3 tasks, this environment has 2"):
        two.set_state(env.get_state())


def test_a_task_whose_state_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(part: Part) -> dict[str, Any]:
        raise StateNotSupported("not to the bit")

    monkeypatch.setattr(Part, "get_state", fails)
    with pytest.raises(StateNotSupported, match="not to the bit"):
        many().get_state()


def test_what_only_some_tasks_answer() -> None:
    """A goal, divergence and terminal states: of the others' envs they are False."""

    def make(k: int, n: int, seed: int) -> VectorEnv:
        extra = ({}, {"goal": True}, {"diverged": True})[k]
        return Part(NAMES[k], n, seed, extra, terminates=k == 2)

    env = ManyTasks(make, NAMES, 7)
    assert env.can_terminate
    for action in random_actions(env, 3):
        _, _, terminated, truncated, info = env.step(action)
        assert info["goal"].tolist() == [False, True, False, False, True, False, False]
        assert info["diverged"].tolist() == [False, False, True, False, False, True, False]
    assert terminated.tolist() == info["diverged"].tolist(), "after three steps of the third task"
    assert not truncated.any()
    assert not {"goal", "diverged"} & many().step(action)[4].keys()
    assert env.divergence is None
    env._parts[1].divergence = "a bad state"  # type: ignore[attr-defined]
    assert env.divergence == "a bad state"


def test_numbers_and_widths_of_a_model_that_knows_more() -> None:
    """Of the same tasks, a model of 9 with larger ones sees the same, and more zeros."""
    env, plain = many(numbers=[7, 0, 4], obs_dim=8, action_dim=3), many()
    assert env.tasks.numbers == (7, 0, 4) and plain.tasks.numbers == (0, 1, 2)
    assert env.tasks.names == ("short", "long", "plain")
    assert env.tasks.action_dims == (1, 2, 2)
    assert env.tasks.action_dims_by_number == {7: 1, 0: 2, 4: 2}
    found = task_of(env)
    assert found is not None and found.dtype == torch.int64
    assert found.tolist() == [7, 0, 4, 7, 0, 4, 7]
    assert env.tasks.action_mask.tolist() == [
        [1.0, *([float(k != 0)]), 0.0] for k in (0, 1, 2, 0, 1, 2, 0)
    ]
    for action in random_actions(env, 8):
        step, expected = env.step(action), plain.step(action[:, :2])
        for a, b in zip(flat(step), flat(expected), strict=True):
            if a.dim() == 2:
                assert a.shape == (7, 8) and not a[:, 5:].any()
                a = a[:, :5]
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"action must have shape \(7, 3\), got \(7, 2\)"):
        env.step(action[:, :2])


def test_one_task_alone() -> None:
    """As a model of several is used in one of them."""
    env = ManyTasks(
        lambda k, n, s: Part("short", n, s), ["short"], 2, numbers=[5], obs_dim=5, action_dim=2
    )
    assert env.tasks.of_env.tolist() == [5, 5]
    assert env.step(torch.zeros(2, 2))[0].shape == (2, 5)


def test_closing() -> None:
    made: list[Part] = []

    def make(k: int, n: int, seed: int) -> VectorEnv:
        if k == 2:
            raise ZeroDivisionError
        made.append(Part(NAMES[k], n, seed))
        return made[-1]

    with pytest.raises(ZeroDivisionError):
        ManyTasks(make, NAMES, 7)
    assert [part.closed for part in made] == [1, 1], "those that there were"
    with pytest.raises(ValueError, match=r"env\.obs_dim"):
        ManyTasks(make, NAMES[:2], 7, obs_dim=1)
    assert [part.closed for part in made] == [1, 1, 1, 1]
    with closing(many()) as env:
        parts: Any = env._parts
    assert [part.closed for part in parts] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 2}, "3 tasks need as many envs or episodes at least, one each, got 2"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"numbers": [0, 1]}, r"env\.numbers must be .* of 3 tasks, all different, got \[0, 1\]"),
        ({"numbers": [0, 1, 1]}, r"all different, got \[0, 1, 1\]"),
        ({"numbers": [0, 1, -1]}, r"a number of 0 or more .*, got \[0, 1, -1\]"),
        ({"numbers": [0, 1, 2.0]}, r"env\.numbers .* got \[0, 1, 2\.0\]"),
        ({"numbers": [0, 1, True]}, r"env\.numbers .* got \[0, 1, True\]"),
        ({"numbers": 3}, r"env\.numbers .* got 3"),
        ({"obs_dim": 4}, r"env\.obs_dim must be at least 5 \(long\), got 4"),
        ({"action_dim": 1}, r"env\.action_dim must be at least 2 \(long\), got 1"),
        ({"obs_dim": "wide"}, r"env\.obs_dim must be a whole number, at least 1, got 'wide'"),
        ({"action_dim": 2.5}, r"env\.action_dim must be a whole number, at least 1, got 2.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        many(**options)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("walker-walk", r"env\.tasks must be a list of names such as \[walker-walk\], got 'walker"),
        (None, r"env\.tasks must be a list of names .*, got None"),
        (3, r"env\.tasks must be a list of names .*, got 3"),
        (["walker-walk", 3], r"env\.tasks must be a list of names .*, got \['walker-walk', 3\]"),
        ([], r"env\.tasks must name at least one task, got none"),
        (["walker-walk", "walker-walk"], r"env\.tasks must all be different, got \['walker-"),
        (["walker"], r"env\.tasks must name domain and task as in walker-walk, got 'walker'"),
    ],
)
def test_wrong_tasks(tasks: Any, message: str) -> None:
    """Before dm_control is asked for."""
    with pytest.raises(ValueError, match=message):
        many_tasks.dm_control_tasks(4, tasks=tasks)


def test_names_of_tdmpc2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks by dm_control's names, where that program's table has them."""
    made: list[tuple[str, str]] = []
    counts: list[int] = []

    def make(domain: str, task: str, num_envs: int, **options: Any) -> VectorEnv:
        made.append((domain, task))
        counts.append(num_envs)
        assert options["action_repeat"] == 3 and options["max_episode_steps"] == 9
        return Part("plain", num_envs, options["seed"])

    monkeypatch.setattr(many_tasks, "DMControlEnv", make)
    names = ("walker-walk", "cup-catch", "pointmass-easy", "finger-turn-easy", "cheetah-run")
    more = ("cartpole-swingup-sparse", "ball_in_cup-catch", "humanoid_CMU-run")
    env = many_tasks.dm_control_tasks(
        17, tasks=[*names, *more], action_repeat=3, max_episode_steps=9
    )
    assert made == [
        ("walker", "walk"),
        ("ball_in_cup", "catch"),
        ("point_mass", "easy"),
        ("finger", "turn_easy"),
        ("cheetah", "run"),
        ("cartpole", "swingup_sparse"),
        ("ball_in_cup", "catch"),
        ("humanoid_CMU", "run"),
    ]
    assert counts == [3, *[2] * 7]
    assert env.tasks.names == (*names, *more), "as they were given"
