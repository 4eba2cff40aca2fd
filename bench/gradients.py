"""What gradients through the robots' control steps cost, and what they are worth.

python -m bench.gradients --docs      # into bench/results/gradients.json and docs/environments.md

Three things, on one thread:

- The time of a Jacobian of one env's control step: that of :mod:`bench.differentiable`, and
  MuJoCo's own ``mjd_transitionFD`` once a physics step, by forward and by central differences of
  1e-6.
- How the first differs from the last, in states that random actions lead to.
- The gradient of a return over H steps, by the means of the actions, in each of many episodes:
  through the physics, and as the central difference of the return itself, over a step that is large
  enough to meet contacts. Where the physics is smooth both are the same. What jumps where a contact
  begins or ends is in the second alone, which has no more of it than the return has. Episodes that
  end are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import environment, results
from bench.anchors import positive
from bench.differentiable import STEP, Physics
from bench.pages import ENVIRONMENTS, markdown, publish
from bench.results import STORE
from pwm_fast.envs import TASKS, MujocoEnv
from pwm_fast.envs.tasks.base import Task

OUT = STORE / "gradients.json"
ROBOTS = ("cartpole", "hopper", "ant")
HORIZONS = (8, 16, 32)
WARM_UP = 16  # steps of the same random actions before those that are looked at
STD = 0.37  # of actions before the tanh, as a new policy's
MOVED = 0.05  # of their mean
STEPS = (STEP, 1e-7)  # of the physics' differences


def played(task: Task, num_envs: int, seed: int) -> MujocoEnv:
    """Envs after some steps of random actions."""
    env = MujocoEnv(task, num_envs, seed=seed, max_episode_steps=2**31)
    for drawn in noise(task, WARM_UP, num_envs, seed):
        env.step(torch.tanh(STD * drawn))
    return env


def noise(task: Task, steps: int, num_envs: int, seed: int) -> Tensor:
    """Standard normal ``[H, N, A]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, num_envs, task.action_dim, generator=generator)


def transitions(env: MujocoEnv, central: bool, eps: float = 1e-6) -> Tensor:
    """Jacobians by ``mjd_transitionFD``, ``[N, 2 nv + nu, 2 nv]``: a row for each input."""
    import mujoco

    model, everything = env.task.model(), mujoco.mjtState.mjSTATE_INTEGRATION
    data = mujoco.MjData(model)
    nv, nu = model.nv, model.nu
    a, b = np.zeros((2 * nv, 2 * nv)), np.zeros((2 * nv, nu))
    found = []
    for state in env.get_state()["physics"].numpy():
        mujoco.mj_setState(model, data, state, everything)
        whole = np.eye(2 * nv, 2 * nv + nu)
        for _ in range(env.task.substeps):
            mujoco.mjd_transitionFD(model, data, eps, central, a, b, None, None)
            whole = a @ whole
            whole[:, 2 * nv :] += b
            mujoco.mj_step(model, data)
        found.append(whole.T)
    return torch.from_numpy(np.stack(found))


def ours(env: MujocoEnv, physics: Physics) -> Tensor:
    """The same by :mod:`bench.differentiable`, along the degrees of freedom."""
    qpos, qvel, rows, _ = physics.differences(physics.state().action)
    motions = physics.joints.motions(qpos)
    dqpos, dqvel = rows.split([qpos.shape[1], qvel.shape[1]], dim=-1)
    scale = motions.square().sum(-1).unsqueeze(1)
    return torch.cat((dqpos @ motions.mT / scale, dqvel), dim=-1)


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median of some calls, of the CPU: nothing here has a second thread."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found)


def cost(task: Task, num_envs: int) -> dict[str, Any]:
    """Microseconds for one env, and the Jacobians' differences, relative to the largest entry."""
    env = played(task, num_envs, seed=0)
    physics = Physics(env)
    state, action = env.get_state(), torch.zeros(num_envs, task.action_dim)

    def plain() -> None:
        env.set_state(state)
        env.step(action)

    timed: dict[str, Callable[[], object]] = {
        "step": plain,
        "ours": lambda: ours(env, physics),
        "transition_forward": lambda: transitions(env, central=False),
        "transition_central": lambda: transitions(env, central=True),
    }
    times = {name: 1e6 / num_envs * seconds(call) for name, call in timed.items()}
    env.set_state(state)
    wanted = transitions(env, central=True)
    error = (ours(env, physics) - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    return {
        "microseconds": {name: round(value, 1) for name, value in times.items()},
        "copies": physics.copies,
        "difference": _quantiles(error),
    }


def returns(
    task: Task, mean: Tensor, drawn: Tensor, step: float | None = None
) -> tuple[Tensor, Tensor]:
    """What is earned by actions ``tanh(mean + STD noise)``.

    Args:
        task: the robot.
        mean: ``[N, A]``, the same in all steps.
        drawn: noise ``[H, N, A]``.
        step: of the physics' differences; None for returns without gradients.

    Returns:
        Returns ``[N]``, and where no episode ended ``[N]``.
    """
    env = played(task, len(mean), seed=1)
    physics = None if step is None else Physics(env, step=step)
    state = None if physics is None else physics.state()
    total, whole = torch.zeros(len(mean)), torch.ones(len(mean), dtype=torch.bool)
    for eps in drawn:
        action = torch.tanh(mean + STD * eps)
        if physics is not None and state is not None:
            total = total + task.reward(task.observation(*state).float(), action)
            state = physics.step(state, action)
        _, reward, terminated, _, _ = env.step(action.detach())
        if physics is None:
            total = total + reward
        whole &= ~terminated
    return total, whole


def worth(task: Task, horizon: int, num_envs: int) -> dict[str, Any]:
    """Gradients ``[A]`` of as many episodes, both ways."""
    drawn = noise(task, horizon, num_envs, seed=2)
    mean = torch.zeros(num_envs, task.action_dim, requires_grad=True)
    through: dict[float, Tensor] = {}
    for step in STEPS:
        total, kept = returns(task, mean, drawn, step)
        (through[step],) = torch.autograd.grad(total.sum(), mean)
    changes = []
    for moved in MOVED * torch.eye(task.action_dim):
        high, up = returns(task, moved.expand_as(mean), drawn)
        low, down = returns(task, -moved.expand_as(mean), drawn)
        kept = kept & up & down
        changes.append((high - low) / (2.0 * MOVED))
    change = torch.stack(changes, dim=-1)[kept]
    return {
        "horizon": horizon,
        "episodes": int(kept.sum()),
        "size": float(change.square().sum(-1).mean().sqrt()),
        "steps": {str(step): _compared(through[step][kept], change) for step in STEPS},
    }


def _compared(through: Tensor, change: Tensor) -> dict[str, Any]:
    """Gradients ``[N, A]`` beside those of returns."""
    apart = through - change
    size = change.square().sum(-1).mean().sqrt()
    sizes = torch.linalg.vector_norm(through, dim=-1)
    return {
        "typical": float(torch.linalg.vector_norm(apart, dim=-1).median() / size),
        "mean": float(torch.linalg.vector_norm(apart.mean(0)) / size),
        "mean_error": float((apart.var(0) / len(apart)).sum().sqrt() / size),
        "cosine": float(torch.cosine_similarity(through.mean(0), change.mean(0), 0)),
        "sizes": _quantiles(sizes),
    }


def _quantiles(x: Tensor) -> list[float]:
    """Median, 95 % and the largest."""
    return torch.quantile(x.double(), torch.tensor([0.5, 0.95, 1.0]).double()).tolist()


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: what a Jacobian costs, and what gradients are worth."""
    heads = ["`env`", "control step", "a Jacobian", "`mjd_transitionFD`, forward", "central"]
    heads += ["difference to the last: median, largest"]
    lines = []
    for name, case in result["cases"].items():
        times = case["microseconds"]
        plain = times["step"]
        lines.append([f"`{name}`", f"{plain:.0f} us"])
        for key in ("ours", "transition_forward", "transition_central"):
            lines[-1].append(f"{times[key]:.0f} us ({times[key] / plain:.0f}x)")
        lines[-1].append(f"{case['difference'][0]:.0e}, {case['difference'][2]:.0e}")
    first = markdown(heads, lines)
    heads = ["`env`", "H", "episodes", "typical difference", "of the means"]
    heads += [f"largest over median, steps of {step:g}" for step in STEPS]
    lines = []
    for name, case in result["cases"].items():
        for worth in case["worth"]:
            by = [worth["steps"][str(step)] for step in STEPS]
            lines.append([f"`{name}`", str(worth["horizon"]), str(worth["episodes"])])
            lines[-1].append(f"{by[0]['typical']:.1%}")
            lines[-1].append(f"{by[0]['mean']:.1%} +- {by[0]['mean_error']:.1%}")
            lines[-1] += [f"{x['sizes'][2] / x['sizes'][0]:.3g}" for x in by]
    where = (
        f"{result['machine']['cpu']}, one thread, MuJoCo {result['software']['mujoco']}, "
        f"{environment.made(result)}."
    )
    return "\n\n".join((first, markdown(heads, lines), where))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.gradients", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--env", nargs="+", choices=sorted(TASKS), default=ROBOTS)
    parser.add_argument("--episodes", type=positive, default=512)
    parser.add_argument("--horizons", type=positive, nargs="+", default=HORIZONS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", action="store_true", help="write docs/environments.md's tables")
    parser.add_argument("--stored", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    if options.stored:
        result = json.loads(options.out.read_text("utf-8"))
    else:
        torch.set_num_threads(1)
        cases = {}
        for name in options.env:
            task = TASKS[name]()
            cases[name] = cost(task, 32)
            cases[name]["worth"] = [worth(task, h, options.episodes) for h in options.horizons]
            print(f"{name}: measured", flush=True)
        facts = environment.describe(torch.device("cpu"))
        result = results.write(options.out, {**facts, "cases": cases})
    publish(tables(result), ENVIRONMENTS if options.docs else None, "gradients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
