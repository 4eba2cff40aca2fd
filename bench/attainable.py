"""What a robot can do at all: a planner that has the simulator for its model.

python -m bench.attainable                                    # every robot and variant
python -m bench.attainable --env ant --variant default        # one, into the same file
python -m bench.attainable --docs                             # the table, from what is stored

Plans with iCEM (Pinneri et al. 2020, https://arxiv.org/abs/2008.06389) in the task that is trained:
its observation, reward r(s_t, a_t), termination and start states, on native MuJoCo. Beside it stand
the rewards of doing nothing, of holding the start pose and of random actions. What a planner does
not reach here may still be reached; what it reaches is there to be learnt.

Writes ``bench/results/attainable.json`` (rewards and falls of each seed, machine, versions, commit)
and, with ``--docs``, the table in docs/environments.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, results
from bench.pages import ENVIRONMENTS, publish
from pwm_fast.envs import TASKS, MujocoEnv, Task

OUT = results.STORE / "attainable.json"
STEPS = 180  # three seconds: a robot that can run does so by then
Policy = Callable[[MujocoEnv], Tensor]  # actions [E, A] for the state of the envs


@dataclass(frozen=True)
class Effort:
    """How hard the planner looks.

    Attributes:
        horizon: H, control steps ahead.
        samples: N, action sequences an iteration.
        iterations: refits of the distribution each control step.
        elites: the sequences that it is refitted to.
        std: of the actions, before the first refit of a control step.
        colour: exponent beta of the noise's power spectrum, f^-beta: 0 is white, 2 a random walk.
        fall: reward that a plan loses where it ends in a terminal state, besides all later ones.
    """

    horizon: int = 24
    samples: int = 40
    iterations: int = 2
    elites: int = 8
    std: float = 0.6
    colour: float = 2.0
    fall: float = 20.0


EFFORTS: dict[str, Effort] = {
    # The start and the end of a swing are a second apart.
    "cartpole": Effort(horizon=60, samples=64),
    # What a hop or a step leads to shows the later, the fewer legs there are.
    "hopper": Effort(horizon=60, samples=64, fall=100.0),
    "humanoid": Effort(horizon=40, fall=100.0),
}


class Planner:
    """iCEM in E envs at once.

    The first action of the best sequence found is executed; the next search starts from the
    fitted mean and the best elites, a step later.

    Args:
        task: the robot.
        num_envs: E.
        effort: how hard to look.
        seed: of the noise.
        threads: physics threads.
    """

    def __init__(
        self, task: Task, num_envs: int, effort: Effort, seed: int = 0, threads: int = 1
    ) -> None:
        self.task, self.effort, self.num_envs = task, effort, num_envs
        total = num_envs * effort.samples
        self._model = MujocoEnv(task, total, max_episode_steps=2**31, threads=threads)
        self._random = torch.Generator().manual_seed(seed)
        shape = (num_envs, effort.horizon, task.action_dim)
        self._mean = torch.zeros(shape)
        self._kept = torch.zeros(num_envs, max(effort.elites // 3, 1), *shape[1:])
        frequency = torch.arange(effort.horizon // 2 + 1).clamp(min=1) / effort.horizon
        self._spectrum = frequency ** (-effort.colour / 2.0)

    def __call__(self, env: MujocoEnv) -> Tensor:
        """Actions ``[E, A]`` for the states that ``env`` is in."""
        effort, state = self.effort, env.get_state()
        begun = state["steps"] == 0  # a new episode has no plan yet
        self._mean[begun], self._kept[begun] = 0.0, 0.0
        std = torch.full_like(self._mean, effort.std)
        for _ in range(effort.iterations):
            new = effort.samples - self._kept.shape[1] - 1
            drawn = self._mean.unsqueeze(1) + std.unsqueeze(1) * self._noise(new)
            plans = torch.cat((self._mean.unsqueeze(1), self._kept, drawn), dim=1).clamp(-1.0, 1.0)
            best = self.returns(state, plans).topk(effort.elites, dim=1).indices
            elites = plans.gather(1, best[..., None, None].expand(-1, -1, *plans.shape[2:]))
            self._mean, std = elites.mean(1), elites.std(1)
            self._kept = elites[:, : self._kept.shape[1]]
        action = elites[:, 0, 0].clone()
        self._mean, self._kept = _later(self._mean, 1), _later(self._kept, 2)
        return action

    def returns(self, state: dict[str, Any], plans: Tensor) -> Tensor:
        """Summed rewards ``[E, N]`` of action sequences ``[E, N, H, A]``.

        The state behind the last action counts, too, as of an action of zero: r(s_t, a_t) is of the
        state before the step, so that without it the last action would gain nothing.

        Args:
            state: of the E envs, from their ``get_state``.
            plans: N for each env.
        """
        model, n = self._model, plans.shape[1]
        repeated = {k: state[k].repeat_interleave(n, 0) for k in ("physics", "obs", "returns")}
        steps = torch.zeros(len(repeated["obs"]), dtype=torch.int64)
        model.set_state({**model.get_state(), **repeated, "steps": steps})
        value = torch.zeros(len(steps))
        alive = torch.ones(len(steps), dtype=torch.bool)
        for actions in plans.flatten(0, 1).unbind(1):
            _, reward, terminated, _, info = model.step(actions)
            value += torch.where(alive, reward, 0.0)
            value -= self.effort.fall * (alive & terminated)
            alive &= ~terminated
        last = self.task.reward(info["final_obs"], torch.zeros_like(actions))
        return (value + torch.where(alive, last, 0.0)).view(-1, n)

    def _noise(self, n: int) -> Tensor:
        """Coloured noise ``[E, n, H, A]`` of unit variance."""
        horizon = self.effort.horizon
        shape = (self.num_envs, n, self.task.action_dim, len(self._spectrum), 2)
        white = torch.view_as_complex(torch.randn(shape, generator=self._random))
        noise = torch.fft.irfft(white * self._spectrum, n=horizon, dim=-1)
        return (noise / noise.std()).transpose(2, 3)


def _later(plans: Tensor, dim: int) -> Tensor:
    """Plans a step later, the last action held."""
    length = plans.shape[dim]
    return plans.index_select(dim, torch.arange(1, length + 1).clamp(max=length - 1))


def idle(env: MujocoEnv) -> Tensor:
    """No torque."""
    return torch.zeros(env.num_envs, env.task.action_dim)


class Hold:
    """Every motor pulls its joint to its mean angle at a start, fully at 1 rad."""

    def __init__(self, task: Task) -> None:
        self._model = model = task.model()
        self._joints = torch.as_tensor(model.jnt_qposadr[model.actuator_trnid[:, 0]]).long()
        random = torch.Generator().manual_seed(0)
        starts, _ = task.sample_reset(1000, random, torch.float64, torch.device("cpu"))
        self._pose = starts.mean(0)[self._joints]

    def __call__(self, env: MujocoEnv) -> Tensor:
        """Actions ``[E, A]``."""
        qpos, _ = coordinates(env, self._model)
        return (self._pose - qpos[:, self._joints]).clamp(-1.0, 1.0).float()


class Random:
    """Uniform actions, new in every step."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, env: MujocoEnv) -> Tensor:
        """Actions ``[E, A]``."""
        shape = (env.num_envs, env.task.action_dim)
        return torch.rand(shape, generator=self._random) * 2.0 - 1.0


def coordinates(env: MujocoEnv, model: Any) -> tuple[Tensor, Tensor]:
    """Positions ``[E, nq]`` and velocities ``[E, nv]``: a physics state is time, qpos, qvel, ..."""
    physics = env.get_state()["physics"][:, 1 : 1 + model.nq + model.nv]
    qpos, qvel = physics.split([model.nq, model.nv], 1)
    return qpos, qvel


def follow(task: Task, policy: Policy, seeds: int, steps: int) -> dict[str, list[float]]:
    """Act in one env a seed.

    Returns:
        Of each seed: ``reward`` a step; ``falls``, terminated episodes; ``speed``, the mean v_x in
        m/s, and ``last_speed``, that of the last second. An env that falls starts anew.
    """
    env, model = MujocoEnv(task, seeds, seed=0, max_episode_steps=2**31), task.model()
    rewards, falls, speeds = [], [], []
    for _ in range(steps):
        _, reward, terminated, _, _ = env.step(policy(env))
        rewards.append(reward)
        falls.append(terminated)
        speeds.append(coordinates(env, model)[1][:, 0])
    last = torch.stack(speeds[-round(1.0 / task.control_dt) :])
    return {
        "reward": _rounded(torch.stack(rewards).mean(0)),
        "falls": _rounded(torch.stack(falls).sum(0)),
        "speed": _rounded(torch.stack(speeds).mean(0)),
        "last_speed": _rounded(last.mean(0)),
    }


def _rounded(x: Tensor) -> list[float]:
    return [round(value, 3) for value in x.tolist()]


def distinct(variants: Mapping[str, Any]) -> list[list[str]]:
    """Names of variants; those that are the same robot in one list."""
    groups: dict[Any, list[str]] = {}
    for name, change in variants.items():
        groups.setdefault(change, []).append(name)
    return list(groups.values())


def measure(task: Task, effort: Effort, seeds: int, steps: int, threads: int = 1) -> dict[str, Any]:
    """What every policy gets of a robot.

    Args:
        task: the robot, of one variant.
        effort: of the planner.
        seeds: episodes side by side, each from its own start.
        steps: control steps of each.
        threads: physics threads of the planner.
    """
    began = time.monotonic()
    policies: dict[str, Policy] = {"idle": idle, "random": Random(1)}
    if task.can_terminate:  # else there is no pose to keep
        policies["hold"] = Hold(task)
    policies["planner"] = Planner(task, seeds, effort, seed=2, threads=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # plans may diverge; they end there
        found = {name: follow(task, policy, seeds, steps) for name, policy in policies.items()}
    return {
        "env": task.name,
        "variants": next(names for names in distinct(task.variants) if task.variant in names),
        "mass": round(float(task.model().body_mass.sum()), 2),
        "steps": steps,
        "effort": asdict(effort),
        "policies": found,
        "seconds": round(time.monotonic() - began, 1),
    }


# --- the stored result --------------------------------------------------------------------------


def merged(
    old: Mapping[str, Any], facts: Mapping[str, Any], case: dict[str, Any]
) -> dict[str, Any]:
    """A result with one case replaced or added; each case keeps what it was measured on."""
    cases = {(c["env"], *c["variants"]): c for c in [*old.get("cases", ()), {**case, **facts}]}
    return {"cases": [cases[key] for key in sorted(cases)]}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a line a robot and variant, means over seeds."""
    heads = ("`env`, `env.variant`", "mass", "idle", "holding", "random", "**planner**")
    heads += ("v_x, the last second's", "of an episode")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in result["cases"]:
        policies = case["policies"]
        variants = " and ".join(f"`{name}`" for name in case["variants"])
        cells = [f"`{case['env']}`, {variants}", f"{case['mass']:.4g} kg"]
        cells += [_reward(policies.get(name)) for name in ("idle", "hold", "random", "planner")]
        plan = policies["planner"]
        task = TASKS[case["env"]]
        mean, last = (f"{_mean(plan[key]):.1f} m/s" for key in ("speed", "last_speed"))
        span = f"{case['steps'] * task.control_dt:.0f} s"
        cells.append(f"{mean} in {span}, {last}" if task.can_terminate else "")
        best = _mean(plan["reward"]) * task.max_episode_steps
        cells.append("" if any(plan["falls"]) else f"{best:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    measured: dict[str, list[str]] = {}
    for case in result["cases"]:
        names = measured.setdefault(_measured(case), [])
        names += [] if case["env"] in names else [case["env"]]
    return "\n".join([*lines, "", *(f"{', '.join(n)}: {how}" for how, n in measured.items())])


def _measured(case: Mapping[str, Any]) -> str:
    """What a case was measured on."""
    software = case["software"]
    seeds = len(case["policies"]["idle"]["reward"])
    return (
        f"means over {seeds} episodes; {case['machine']['cpu']}, MuJoCo {software['mujoco']}, "
        f"torch {software['torch']}, {environment.made(case)}."
    )


def _reward(policy: Mapping[str, list[float]] | None) -> str:
    if policy is None:
        return ""
    falls = sum(policy["falls"])
    plural = "" if falls == 1 else "s"
    return f"{_mean(policy['reward']):.2f}" + (f" ({falls:.0f} fall{plural})" if falls else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.attainable",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--env", nargs="+", choices=sorted(TASKS), help="robots; default: all")
    parser.add_argument("--variant", nargs="+", help="default: all that the robot has")
    parser.add_argument(
        "--steps", type=int, help=f"control steps; default: {STEPS}, or a whole short episode"
    )
    parser.add_argument("--seeds", type=int, default=3, help="episodes side by side")
    parser.add_argument("--samples", type=int, help="sequences an iteration of the planner")
    parser.add_argument("--threads", type=int, default=1, help="physics threads")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", action="store_true", help="write docs/environments.md's table")
    args = parser.parse_args(argv)
    result = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"cases": []}
    if not args.docs or args.env:
        facts = environment.describe(torch.device("cpu"))
        for name in args.env or sorted(TASKS):
            for variant in args.variant or [v[0] for v in distinct(TASKS[name].variants)]:
                effort = EFFORTS.get(name, Effort())
                if args.samples is not None:
                    effort = replace(effort, samples=args.samples)
                try:
                    task = TASKS[name](variant=variant)
                except ValueError as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 2
                steps = args.steps or (
                    STEPS if task.max_episode_steps > 2 * STEPS else task.max_episode_steps
                )
                case = measure(task, effort, args.seeds, steps, args.threads)
                result = results.write(args.out, merged(result, facts, case))
                print(f"{name} {variant}: {case['seconds']:.0f} s", flush=True)
    publish(table(result), ENVIRONMENTS if args.docs else None, "attainable")
    return 0


if __name__ == "__main__":
    sys.exit(main())
