"""The planner in the simulator, and its table in docs/environments.md."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

from bench import attainable
from bench.attainable import Effort, Hold, Planner, coordinates, follow
from bench.pages import ENVIRONMENTS
from pwm_fast.envs import TASKS, MujocoEnv
from tests.bench.stored import check_page, stored


def test_a_plan_s_return_is_what_the_task_pays() -> None:
    """Of two envs with three plans each, against envs that are stepped one plan at a time."""
    task = TASKS["hopper"]()
    planner = Planner(task, 2, Effort(horizon=4, samples=3, elites=2, fall=7.0))
    state = MujocoEnv(task, 2, seed=3).get_state()
    # Lying in the air, just above the height of a fall.
    z, pitch = -0.449, math.pi / 2
    state["physics"][1, 2:4] = torch.tensor([z, pitch])
    state["physics"][1, 7:13] = 0.0
    state["obs"][1] = torch.tensor([z, pitch, *[0.0] * 9])
    plans = torch.rand(2, 3, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = planner.returns(state, plans)
    for n in range(3):
        env = MujocoEnv(task, 2)
        env.set_state(state)
        steps = [env.step(plans[:, n, t]) for t in range(4)]
        last = task.reward(steps[-1][4]["final_obs"], torch.zeros(2, 3))
        assert [bool(step[2][1]) for step in steps] == [True, False, False, False]
        assert found[0, n] == pytest.approx(sum(float(s[1][0]) for s in steps) + float(last[0]))
        assert found[1, n] == pytest.approx(float(steps[0][1][1]) - 7.0)


def test_noise_is_smooth_and_of_unit_variance() -> None:
    changes = []
    for colour in (0.0, 2.0):
        effort = Effort(horizon=32, samples=3, elites=2, colour=colour)
        noise = Planner(TASKS["cartpole"](), 2, effort)._noise(500)
        assert noise.shape == (2, 500, 32, 1)
        assert noise.std() == pytest.approx(1.0, abs=1e-3)
        changes.append(float((noise[:, :, 1:] - noise[:, :, :-1]).std()))
    assert changes[1] < 0.5 * changes[0]


def test_the_planner_is_better_than_nothing() -> None:
    """A cart that should stand still is pushed back, within a second."""
    task = TASKS["cartpole"](start="upright")
    idle = follow(task, attainable.idle, 2, 30)
    plan = follow(task, Planner(task, 2, Effort(horizon=15, samples=12, elites=4)), 2, 30)
    assert all(a > b + 0.1 for a, b in zip(plan["reward"], idle["reward"], strict=True))
    assert plan["falls"] == [0, 0]


def test_holding_pulls_towards_the_start() -> None:
    task = TASKS["ant"]()
    env = MujocoEnv(task, 3)
    hold = Hold(task)
    qpos, _ = coordinates(env, task.model())
    expected = torch.tensor(task.start_joints, dtype=torch.float64) - qpos[:, 7:]
    torch.testing.assert_close(hold(env).double(), expected, rtol=0, atol=0.02)


def test_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attainable.json"
    given = ["--steps=2", "--seeds=2", "--samples=12", f"--out={out}"]
    assert attainable.main(["--env", "cartpole", "ant", *given]) == 0
    assert attainable.main(["--env", "ant", "--variant", "dflex", *given]) == 0
    cases = json.loads(out.read_text())["cases"]
    found = {(case["env"], *case["variants"]): case for case in cases}
    assert list(found) == [("ant", "default"), ("ant", "dflex"), ("cartpole", "default", "dflex")]
    ant = found["ant", "dflex"]
    assert ant["mass"] == pytest.approx(182.18, abs=0.1)
    assert ant["commit"].keys() == {"id", "dirty"} and ant["machine"]["cpu"]
    assert ant["policies"].keys() == {"idle", "random", "hold", "planner"}
    assert all(len(x) == 2 for policy in ant["policies"].values() for x in policy.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("| `cartpole`, `default` and `dflex` | 52.5 kg | -")
    assert attainable.main(["--env", "ant", "--variant", "fast", *given]) == 2
    assert "must be one of default, dflex, got 'fast'" in capsys.readouterr().err


def test_the_table_in_the_docs_is_the_stored_result() -> None:
    check_page(ENVIRONMENTS, "attainable", attainable.table(stored(attainable.OUT)))


def test_every_robot_and_variant_is_measured() -> None:
    wanted = {
        (name, tuple(v)) for name, t in TASKS.items() for v in attainable.distinct(t.variants)
    }
    cases = stored(attainable.OUT)["cases"]
    assert {(case["env"], tuple(case["variants"])) for case in cases} == wanted


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_default_robot_can_do_more_than_nothing(name: str) -> None:
    cases = stored(attainable.OUT)["cases"]
    (case,) = [c for c in cases if c["env"] == name and "default" in c["variants"]]
    best = {p: attainable._mean(x["reward"]) for p, x in case["policies"].items()}
    planned = best.pop("planner")
    assert planned > 1.5 * max(best.values()) if planned > 0 else planned > 0.8 * max(best.values())
