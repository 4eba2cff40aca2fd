"""Where the data come from: environment steps, and replay."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.cases import QUICK, Case, Provider, Workload
from bench.gate import Mismatch
from bench.measure import Effort
from bench.providers import Absent
from bench.sizes import ACTION, HORIZON, OBS
from pwm_fast import envs
from pwm_fast.replay import Replay
from pwm_fast.run.installation import usable_cpus

ENGINES = {"native": "mujoco", "mujoco_warp": "mujoco_warp"}  # by provider, on a GPU
NUM_ENVS, CAPACITY = 128, 1_000_000
SHORT = Effort(seconds=3.0)


def cases(device: torch.device) -> list[Case]:
    found = []
    robots = [("cartpole", 64), ("hopper", 64), ("ant", 128)]
    for robot, num_envs in robots if device.type == "cpu" else [*robots, ("ant", 4096)]:
        found.append(
            Case(
                f"env-{robot}" if num_envs < 4096 else f"env-{robot}-b{num_envs}",
                {"work": "environment step", "model": robot, "batch": num_envs},
                partial(build_env, robot, num_envs),
                ("floor", "fast") if device.type == "cpu" else ("native", "mujoco_warp"),
                quick=QUICK | {"native", "mujoco_warp"}
                if (robot, num_envs) == ("ant", 128)
                else frozenset(),
                effort=SHORT,
            )
        )
    for batch in (64, 256, 4096):
        found.append(
            Case(
                f"replay_sample-b{batch}",
                {"work": "replay: sample windows", "model": "ant", "batch": batch},
                partial(build_sample, batch),
                ("separate", "fast"),
                quick=QUICK if batch == 256 else frozenset(),
                memory=1e9,
                effort=SHORT,
            )
        )
    found.append(
        Case(
            "replay_add",
            {"work": "replay: add a step", "model": "ant", "batch": NUM_ENVS},
            build_add,
            ("separate", "fast"),
            quick=QUICK,
            memory=1e9,
            effort=SHORT,
        )
    )
    return found


def build_env(robot: str, num_envs: int, device: torch.device) -> Workload:
    """One control step of all envs, with actions and observations where the agent is.

    On a CPU the floor is the physics alone, on the same states. For an agent on a GPU, native
    MuJoCo on all CPU threads, with the copies, stands beside mujoco-warp.
    """
    actions = torch.rand(num_envs, envs.TASKS[robot].action_dim, device=device) * 2 - 1

    def make(engine: str) -> envs.VectorEnv:
        threads = usable_cpus() if engine == "mujoco" and device.type == "cuda" else 1
        env = envs.make(robot, num_envs, seed=0, engine=engine, device=device, threads=threads)
        for _ in range(60):  # past the fall onto the ground
            env.step(actions)
        return env

    def step(engine: str) -> Provider:
        why_not = envs.why_unusable(device) if engine == "mujoco_warp" else None
        if why_not is not None:
            raise Absent(why_not)
        try:
            env = make(engine)
        except ImportError as error:
            raise Absent(str(error)) from error

        def call() -> list[Tensor]:
            return [x.to(device) for x in env.step(actions.to(env.device))[:4]]

        def check() -> None:
            obs, reward = call()[:2]
            if not (torch.isfinite(obs).all() and torch.isfinite(reward).all()):
                raise Mismatch("an observation or a reward is not finite")

        return Provider(call, check)

    def physics() -> Provider:
        env = make("mujoco")
        assert isinstance(env, envs.MujocoEnv)
        return Provider(partial(env._batch.step, nstep=env.task.substeps))

    if device.type == "cpu":
        return Workload({"floor": physics, "fast": partial(step, "mujoco")})
    return Workload({name: partial(step, engine) for name, engine in ENGINES.items()})


class SeparateTensors:
    """Replay as it is often written: a tensor a field, and indices for every row of a window.

    It does less than ours: windows may cross from one episode into the next.
    """

    def __init__(self, device: torch.device) -> None:
        rows = CAPACITY // NUM_ENVS
        self.rows, self.device, self.cursor, self.filled = rows, device, 0, 0
        self.fields = {
            "obs": torch.zeros(rows, NUM_ENVS, OBS, device=device),
            "action": torch.zeros(rows, NUM_ENVS, ACTION, device=device),
            "reward": torch.zeros(rows, NUM_ENVS, device=device),
            "terminated": torch.zeros(rows, NUM_ENVS, device=device),
        }

    def add(self, **row: Tensor) -> None:
        for name, value in row.items():
            self.fields[name][self.cursor] = value
        self.cursor = (self.cursor + 1) % self.rows
        self.filled = min(self.filled + 1, self.rows)

    def sample(self, batch: int) -> dict[str, Tensor]:
        start = torch.randint(self.filled - HORIZON, (batch,), device=self.device)
        env = torch.randint(NUM_ENVS, (batch,), device=self.device)
        index = start + torch.arange(HORIZON + 1, device=self.device).unsqueeze(-1)
        return {
            name: field[index if name == "obs" else index[:-1], env]
            for name, field in self.fields.items()
        }


def _rows(step: int, device: torch.device) -> dict[str, Tensor]:
    """Observations that count the steps, so that a window shows whether it is one."""
    return {
        "obs": torch.full((NUM_ENVS, OBS), float(step), device=device),
        "action": torch.zeros(NUM_ENVS, ACTION, device=device),
        "reward": torch.zeros(NUM_ENVS, device=device),
        "terminated": torch.zeros(NUM_ENVS, device=device),
    }


STEPS = 1000


def _filled(device: torch.device) -> tuple[Replay, SeparateTensors]:
    ours, separate = (
        Replay(CAPACITY, NUM_ENVS, OBS, ACTION, HORIZON, device),
        SeparateTensors(device),
    )
    ended = torch.zeros(NUM_ENVS, dtype=torch.bool, device=device)
    for i in range(STEPS):
        row = _rows(i, device)
        separate.add(**row)
        ours.add(row["obs"], row["action"], row["reward"], ended, ended, row["obs"] + 1)
    return ours, separate


def build_sample(batch: int, device: torch.device) -> Workload:
    """Windows of 16 transitions from a replay for a million of the Ant's."""
    ours, separate = _filled(device)

    def check(obs: Tensor) -> None:
        if obs.shape != (HORIZON + 1, batch, OBS):
            raise Mismatch(f"windows of shape {tuple(obs.shape)}")
        if not bool((obs.diff(dim=0) == 1).all()):
            raise Mismatch("a sampled window is not made of consecutive steps")

    def sample() -> Provider:
        return Provider(lambda: ours.sample(batch), lambda: check(ours.sample(batch).obs))

    def plain() -> Provider:
        call = partial(separate.sample, batch)
        return Provider(call, lambda: check(call()["obs"]))

    return Workload({"separate": plain, "fast": sample})


def build_add(device: torch.device) -> Workload:
    """One step of 128 envs into the replay."""
    ours, separate = _filled(device)
    row = _rows(0, device)
    ended = torch.zeros(NUM_ENVS, dtype=torch.bool, device=device)

    def add() -> None:
        ours.add(row["obs"], row["action"], row["reward"], ended, ended, row["obs"] + 1)

    def check() -> None:
        before = len(ours)
        add()
        if len(ours) != before + NUM_ENVS:
            raise Mismatch(f"{len(ours) - before} transitions were added, not {NUM_ENVS}")

    make = {"separate": Provider(lambda: separate.add(**row)), "fast": Provider(add, check)}
    return Workload({name: lambda found=found: found for name, found in make.items()})
