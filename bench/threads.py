"""Updates on one and on all CPU threads, idle and busy: ``python -m bench.threads``.

OpenMP's threads wait for one another at the end of every operation: spinning (torch's default) or
asleep (``OMP_WAIT_POLICY=passive``, which the commands of pwm_fast set). The machine is made busy
by processes that only compute. Numbers of threads take turns in one process, so that they share
its noise; the wait policy is one of a process. Writes ``bench/results/threads_cpu.json`` and, with
``--docs``, the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch

from bench import environment, results
from bench.pages import PERFORMANCE, publish
from pwm_fast import config
from pwm_fast.run import build

RESULT = results.STORE / "threads_cpu.json"
ALGS = ("pwm_tiny_flow", "pwm_5M_flow")
POLICIES = ("active", "passive")
STEPS = 80  # environment steps in the replay


def updates(alg: str) -> dict[str, Callable[[], object]]:
    """A world-model and a policy update of an agent on random transitions."""
    cpu = torch.device("cpu")
    run = config.compose(f"alg={alg}", "env=cartpole", "device=cpu")
    with closing(build.make_env(run, run.env_count, 0)) as env:
        agent, replay = build.make_agent(run, env, cpu), build.make_replay(run, env, cpu)
        obs, _ = env.reset()
        for _ in range(STEPS):
            action = torch.rand(run.env_count, agent.action_dim) * 2 - 1
            new, reward, terminated, truncated, info = env.step(action)
            over = terminated | truncated
            replay.add(obs, action, reward, terminated, over, info["final_obs"])
            obs = new
    rows, starts = run.alg.model_learning.batch_size, run.alg.actor.batch_size
    return {
        "world model": lambda: agent.update_world_model(replay.sample(rows)),
        "policy": lambda: agent.update_policy(*replay.sample_starts(starts)),
    }


def measure(alg: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Wall and processor time of an update, in milliseconds, with 1 and with all threads."""
    most = torch.get_num_threads()
    work = updates(alg)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for threads in (1, most):
            torch.set_num_threads(threads)
            for name, update in work.items():
                wall, used, count = time.perf_counter(), time.process_time(), 0
                while not count or time.perf_counter() - wall < seconds:
                    update()
                    count += 1
                times = (time.perf_counter() - wall, time.process_time() - used)
                if turn:
                    found.setdefault((name, threads), []).append(
                        (times[0] / count * 1e3, times[1] / count * 1e3)
                    )
    return [
        {
            "alg": alg,
            "update": name,
            "threads": threads,
            "wall_ms": statistics.median(wall for wall, _ in times),
            "wall_ms_all": [wall for wall, _ in times],
            "cpu_ms": statistics.median(used for _, used in times),
        }
        for (name, threads), times in found.items()
    ]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside, so many processes do nothing but compute."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios of the wall times: how many times as fast all threads are as one."""
    lines = ["| update | busy processes | " + " | ".join(POLICIES) + " |", "|---|---|---|---|"]
    for alg, name, load in dict.fromkeys((r["alg"], r["update"], r["busy"]) for r in rows):
        cells = []
        for policy in POLICIES:
            mine = [
                r
                for r in rows
                if (r["alg"], r["update"], r["busy"], r["policy"]) == (alg, name, load, policy)
            ]
            one, many = sorted(mine, key=lambda r: r["threads"])
            cells.append(
                f"{one['wall_ms']:.3g} / {many['wall_ms']:.3g} ms, "
                f"{one['wall_ms'] / many['wall_ms']:.2f}x"
            )
        lines.append(f"| {alg}, {name} | {load} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure everything, or one process's share of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alg", choices=ALGS, help="measure it in this process alone")
    parser.add_argument("--algs", nargs="+", choices=ALGS, default=ALGS, help="(default: all)")
    parser.add_argument("--busy", type=int, default=8, help="busy processes (default: 8)")
    parser.add_argument("--seconds", type=float, default=1.0, help="a round (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--docs", action="store_true", help="write the stored result's table")
    options = parser.parse_args()
    if options.alg:
        print(json.dumps(measure(options.alg, options.seconds, options.rounds)))
        return
    if options.docs:
        stored = json.loads(RESULT.read_text("utf-8"))
    else:
        rows = []
        for alg in options.algs:
            for load in (0, options.busy):
                for policy in POLICIES:
                    command = [sys.executable, "-m", "bench.threads", f"--alg={alg}"]
                    command += [f"--seconds={options.seconds}", f"--rounds={options.rounds}"]
                    variables = {**os.environ, "OMP_WAIT_POLICY": policy}
                    if policy == "active":
                        del variables["OMP_WAIT_POLICY"]  # the runtime's own default
                    with busy(load):
                        done = subprocess.run(
                            command, env=variables, stdout=subprocess.PIPE, text=True, check=True
                        )
                    rows += [
                        {**row, "busy": load, "policy": policy} for row in json.loads(done.stdout)
                    ]
        facts = environment.describe(torch.device("cpu"))
        stored = results.write(RESULT, {**facts, "rows": rows})
    machine = stored["machine"]
    head = (
        f"Milliseconds an update on 1 / on {machine['threads']} threads, and how many times as "
        f"fast the latter is ({machine['cpu']}, {machine['isa']}, {machine['cores']} cores; "
        f"{stored['date'][:10]}, commit {stored['commit']['id']}):"
    )
    publish(f"{head}\n\n{table(stored['rows'])}", PERFORMANCE if options.docs else None, "threads")


if __name__ == "__main__":
    main()
