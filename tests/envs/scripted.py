"""Gymnasium envs of few lines, for what adapters do with every kind of answer."""

import gymnasium
import numpy as np

SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP


class Walk(gymnasium.Env):
    """A random walk of three numbers; ends after ``length`` steps, or truncates.

    Args:
        length: of an episode.
        truncates: whether it ends by truncation.
        reuse: answer with, and read actions into, one and the same arrays.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, length=4, truncates=False, reuse=False):
        self.length, self.truncates, self.reuse = length, truncates, reuse
        self._obs = np.zeros(3, np.float32)
        self._reward = np.zeros((), np.float64)

    def _answer(self):
        return self._obs if self.reuse else self._obs.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert options is None, f"options are None where there are none, got {options}"
        self.t = 0
        self._obs[:] = self.np_random.normal(size=3)
        return self._answer(), {}

    def step(self, action):
        self.t += 1
        self._obs += self.np_random.normal(size=3) + np.sum(action)
        self._reward[...] = self._obs[0]
        if self.reuse:
            action[...] = 7.0
        over = self.t >= self.length
        return (
            self._answer(),
            self._reward if self.reuse else float(self._reward),
            over and not self.truncates,
            over and self.truncates,
            {},
        )


class Script(gymnasium.Env):
    """Answers what a test says: ``start`` after resets, ``answers[t]`` in step t, then ends.

    Args:
        answers: dicts of what to change of an ordinary answer, step by step.
        starts: observations of the resets, the last one for all further ones.
        obs: observation space.
        act: action space.
    """

    def __init__(self, answers=(), starts=(None,), obs=None, act=None):
        self.observation_space = obs or gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = act or gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.answers, self.starts = list(answers), list(starts)
        self.resets, self.taken, self.closed = 0, [], 0

    def _ordinary(self):
        space = self.observation_space
        return np.ones(space.shape, space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start = self.starts[min(self.resets, len(self.starts) - 1)]
        self.resets += 1
        self.t = 0
        return (self._ordinary() if start is None else start), {}

    def step(self, action):
        self.taken.append(np.array(action))
        change = self.answers[self.t] if self.t < len(self.answers) else {}
        self.t += 1
        if "raw" in change:
            return change["raw"]
        answer = {
            "obs": self._ordinary(),
            "reward": 1.0,
            "terminated": False,
            "truncated": self.t >= max(len(self.answers), 3),
            "info": {},
            **change,
        }
        return tuple(answer.values())

    def close(self):
        self.closed += 1


class Spoilt(gymnasium.Wrapper):
    """Sets a velocity of a MuJoCo env before step ``at`` of the first episode."""

    def __init__(self, env, at, velocity):
        super().__init__(env)
        self.at, self.velocity, self.t = at, velocity, 0

    def step(self, action):
        self.t += 1
        if self.t == self.at:
            self.unwrapped.data.qvel[0] = self.velocity
        return self.env.step(action)


def sync(*makers, **options):
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=SAME_STEP, **options)


def parallel(*makers, **options):
    return gymnasium.vector.AsyncVectorEnv(makers, autoreset_mode=SAME_STEP, **options)
