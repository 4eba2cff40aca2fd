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
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench import environment
from pwm_fast import config as configuration
from pwm_fast import envs, seeding
from pwm_fast.envs import VectorEnv
from pwm_fast.files import write_text
from pwm_fast.run.evaluation import evaluate
from pwm_fast.seeding import Purpose

PACKAGE = "stable-baselines3"
NAME = "sac"  # of its folder beside those of a study's arms, and of what is stored of it
LIBRARY = "stable_baselines3"
# The library's defaults but for what many envs side by side ask for.
SETTINGS = {"batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "learning_starts": 10_000}
EPISODES = 12


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


class _Acting:
    """A trained model as what :func:`evaluate` calls."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def act(
        self, obs: torch.Tensor, *, task: torch.Tensor | None, deterministic: bool
    ) -> torch.Tensor:
        action, _ = self._model.predict(obs.numpy(), deterministic=deterministic)
        return torch.from_numpy(action)

    def why_not_finite(self, obs: torch.Tensor, task: torch.Tensor | None) -> str | None:
        return None


def train(
    name: str, steps: int, seed: int, num_envs: int, updates: int, every: int, out: Path
) -> dict[str, Any]:
    """Train, evaluate every so many steps, and keep the curve in ``out`` as it grows."""
    library = importlib.import_module(LIBRARY)
    own = seeding.stream(seed, Purpose.TRAINING)
    judged = seeding.stream(0, Purpose.EVALUATE)
    curve: dict[str, list[float]] = {"env_steps": [], "seconds": [], "eval_reward": []}
    result = {
        "env": name,
        "seed": seed,
        "steps": steps,
        "every": every,
        "num_envs": num_envs,
        "updates_per_step_of_all_envs": updates,
        **SETTINGS,
        "versions": {PACKAGE: version(PACKAGE), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "machine": environment.machine(torch.device("cpu")),
        "commit": environment.commit(),
        "curve": curve,
    }
    with (
        closing(envs.make(name, num_envs, seed=own)) as training,
        closing(envs.make(name, EPISODES, seed=judged)) as judging,
    ):
        model = library.SAC(
            "MlpPolicy",
            vector_env(training),
            seed=seed,
            buffer_size=min(steps, 1_000_000),
            train_freq=(1, "step"),
            gradient_steps=updates,
            device="cpu",
            **SETTINGS,
        )
        spent = 0.0
        while True:
            found = evaluate(cast(Any, _Acting(model)), judging, judged)
            curve["env_steps"].append(model.num_timesteps)
            curve["seconds"].append(round(spent, 1))
            curve["eval_reward"].append(found.returns.mean().item())
            result["returns"] = found.returns.tolist()
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps(result, indent=1) + "\n")
            print(
                f"env_steps {model.num_timesteps}  reward {curve['eval_reward'][-1]:.1f}  "
                f"{spent:.0f} s",
                flush=True,
            )
            if model.num_timesteps >= steps:
                return result
            started = time.perf_counter()
            left = min(every, steps - model.num_timesteps)
            model.learn(left, reset_num_timesteps=False, log_interval=None)
            spent += time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0, or 2 for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.sac", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("env", choices=sorted(envs.TASKS))
    parser.add_argument("--steps", type=int, default=1_000_000, help="of all envs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--envs", type=int, help="the robot's own number by default")
    parser.add_argument("--updates", type=int, default=8, help="after each step of all envs")
    parser.add_argument("--every", type=int, default=50_000, help="steps between evaluations")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args(argv)
    for name in ("steps", "envs", "updates", "every", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be positive, got {value}")
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        print(f"error: {PACKAGE} is missing: pip install {PACKAGE}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    path = options.out / options.env / NAME / f"seed_{options.seed}.json"
    count = options.envs or configuration.compose(f"env={options.env}").env_count
    try:
        train(options.env, options.steps, options.seed, count, options.updates, options.every, path)
    except ImportError as error:  # no physics
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
