"""What is measured of gradients through the physics, and its tables in docs/environments.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

from bench import gradients
from bench.differentiable import STEP, Physics
from bench.pages import ENVIRONMENTS
from pwm_fast.envs import TASKS
from tests.bench.stored import check_page, stored


@pytest.mark.parametrize("name", ["hopper", "ant"])
def test_jacobians_are_those_of_mujoco_s_own_function(name: str) -> None:
    env = gradients.played(TASKS[name](), 3, seed=4)
    wanted = gradients.transitions(env, central=True)
    found = gradients.ours(env, Physics(env))
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-4 * float(wanted.abs().max()))


def test_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gradients.json"
    given = ["--env", "cartpole", "--episodes=16", "--horizons", "3", f"--out={out}"]
    assert gradients.main(given) == 0
    result = json.loads(out.read_text())
    case = result["cases"]["cartpole"]
    assert case["copies"] == 6
    assert case["microseconds"].keys() == {
        "step", "ours", "transition_forward", "transition_central",
    }  # fmt: skip
    assert case["difference"][2] < 1e-5
    (worth,) = case["worth"]
    assert (worth["horizon"], worth["episodes"]) == (3, 16)
    smooth = worth["steps"][str(STEP)]
    assert smooth["typical"] < 0.01 and smooth["mean"] < 0.01
    capsys.readouterr()
    assert gradients.main(["--stored", f"--out={out}"]) == 0
    assert "| `cartpole` | 3 | 16 |" in capsys.readouterr().out


def test_the_tables_in_the_docs_are_the_stored_result() -> None:
    check_page(ENVIRONMENTS, "gradients", gradients.tables(stored(gradients.OUT)))


def test_small_steps_meet_few_contacts() -> None:
    """What bench.differentiable says of its step: no gradient is far out, as with a larger one."""
    tails: dict[str, list[float]] = {str(step): [] for step in gradients.STEPS}
    for name in ("hopper", "ant"):
        for worth in stored(gradients.OUT)["cases"][name]["worth"]:
            for step, found in worth["steps"].items():
                tails[step].append(found["sizes"][2] / found["sizes"][0])
    assert max(tails[str(STEP)]) < 30.0 < max(tails["1e-07"])
