"""An outside anchor: SAC of Stable-Baselines3 on a robot of ours, at so many steps and seconds.

pip install stable-baselines3                                  # no dependency of pwm_fast
python -m bench.sac hopper --steps 200000           # to runs/study/hopper/sac/seed_0.json, where
                                                    # `python -m bench.study collect` finds it
python -m bench.sac ant --steps 5000000 --seed 1 --threads 2

The environments are the trainer's own, and the policy is evaluated on the episodes that
``python -m pwm_fast.evaluate`` takes, so returns can be compared. ``seconds`` are those of learning
and acting, without the evaluations.

Exit status: 0 trained, 2 one line says what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from bench import anchors
from pwm_fast import config as configuration
from pwm_fast import envs, seeding
from pwm_fast.envs import VectorEnv
from pwm_fast.seeding import Purpose

PACKAGE = "stable-baselines3"
NAME = "sac"  # of its folder beside those of a study's arms, and of what is stored of it
LIBRARY = "stable_baselines3"
# The library's defaults but for what many envs side by side ask for.
SETTINGS = {"batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "learning_starts": 10_000}


def label(run: dict[str, Any]) -> str:
    """What tables call a stored run."""
    return f"SAC (Stable-Baselines3 {run['versions'][PACKAGE]})"


def vector_env(env: VectorEnv) -> Any:
    """``env`` as the library's own kind of vector environment."""
    spaces = importlib.import_module("gymnasium").spaces
    base = importlib.import_module(f"{LIBRARY}.common.vec_env").VecEnv

    class Robots(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            width = env.single_observation_space.shape
            actions = env.single_action_space.shape
            super().__init__(
                env.num_envs,
                spaces.Box(-np.inf, np.inf, width, np.float32),
                spaces.Box(-1.0, 1.0, actions, np.float32),
            )
            self._action = torch.zeros(env.num_envs, *actions)

        def reset(self) -> Any:
            return env.reset()[0].numpy().copy()

        def step_async(self, actions: Any) -> None:
            self._action = torch.from_numpy(np.asarray(actions, np.float32))

        def step_wait(self) -> Any:
            obs, reward, terminated, truncated, info = env.step(self._action)
            done = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in range(env.num_envs)]
            for i in done.nonzero().flatten().tolist():
                infos[i] = {
                    "terminal_observation": info["final_obs"][i].numpy().copy(),
                    "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                }
            return obs.numpy().copy(), reward.numpy().copy(), done.numpy().copy(), infos

        def close(self) -> None:
            env.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(env, attr_name, None)] * env.num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            setattr(env, attr_name, value)

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kw: Any) -> Any:
            return [getattr(env, method_name)(*args, **kw)] * env.num_envs

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * env.num_envs

    return Robots()


class _Learner:
    """The library's model as what is followed."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self._model = model
        self.settings = settings

    @property
    def env_steps(self) -> int:
        steps: int = self._model.num_timesteps
        return steps

    def learn(self, steps: int) -> None:
        self._model.learn(steps, reset_num_timesteps=False, log_interval=None)

    def act(
        self, obs: torch.Tensor, *, task: torch.Tensor | None = None, deterministic: bool = False
    ) -> torch.Tensor:
        action, _ = self._model.predict(obs.numpy(), deterministic=deterministic)
        return torch.from_numpy(action)

    def why_not_finite(self, obs: torch.Tensor, task: torch.Tensor | None = None) -> str | None:
        return None


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, as :func:`bench.anchors.follow` does.

    Raises:
        ImportError: physics is missing.
    """
    library = importlib.import_module(LIBRARY)
    num_envs = options.envs or configuration.compose(f"env={options.env}").env_count
    own = seeding.stream(options.seed, Purpose.TRAINING)
    with closing(envs.make(options.env, num_envs, seed=own)) as training:
        model = library.SAC(
            "MlpPolicy",
            vector_env(training),
            seed=options.seed,
            buffer_size=min(options.steps, 1_000_000),
            train_freq=(1, "step"),
            gradient_steps=options.updates,
            device="cpu",
            **SETTINGS,
        )
        settings = {"num_envs": num_envs, "updates_per_step_of_all_envs": options.updates}
        return anchors.follow(_Learner(model, settings | SETTINGS), options, [PACKAGE], NAME)


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0, or 2 for what a user can mend."""
    parser = anchors.parser("python -m bench.sac", __doc__)
    parser.add_argument("--envs", type=anchors.positive, help="the robot's own number by default")
    parser.add_argument(
        "--updates", type=anchors.positive, default=8, help="after each step of all envs"
    )
    options = parser.parse_args(argv)
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        print(f"error: {PACKAGE} is missing: pip install {PACKAGE}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    try:
        train(options)
    except ImportError as error:  # no physics
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
