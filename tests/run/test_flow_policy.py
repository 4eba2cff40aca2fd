"""Runs with flow policies, from the command line to the comparison."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.agent import PWM
from pwm_fast.config import compose, to_dict
from pwm_fast.run import checkpoint
from pwm_fast.run.inherit import inherited
from pwm_fast.run.start import train
from tests.run.conftest import (
    TINY,
    VOLATILE,
    Launcher,
    rows,
    tiny_arguments,
    tiny_config,
    train_without_plots,
)

ACTORS = ("flow", "flow_g", "meanflow")


@pytest.mark.parametrize("actor", ["gaussian", *ACTORS])
@pytest.mark.parametrize("alg", ["pwm", "pwm_tiny", "pwm_5M_flow"])
def test_the_group_changes_the_policy_alone(alg: str, actor: str) -> None:
    plain, own = (to_dict(compose(f"alg={alg}", *more)) for more in ((), (f"actor={actor}",)))
    suffix = "" if actor == "gaussian" else f"_actor_{actor}"
    assert own["run_dir"] == f"runs/cartpole/{alg}{suffix}/seed_0"
    assert own["alg"]["actor"]["suffix"] == suffix
    changed = {k for k, v in own["alg"]["actor"].items() if v != plain["alg"]["actor"][k]}
    assert changed <= {"kind", "suffix", "form", "substeps", "init_logstd", "min_logstd"}
    assert bool(changed) == (actor != "gaussian")
    for each in (plain, own):
        del each["alg"]["actor"], each["run_dir"]
    assert own == plain


@pytest.mark.slow
def test_four_arms_as_one_sweep(launcher: Launcher, tmp_path: Path) -> None:
    """{MLP, flow} x {Gaussian, flow}: directories apart, and one page that names them."""
    own = [f"{k}={v}".replace(" ", "") for k, v in TINY.items() if k != "epochs"]
    arms = ("alg=pwm_tiny,pwm_tiny_flow", "actor=gaussian,flow", "epochs=2")
    outcome = launcher.run(tmp_path, "-m", "env=cartpole", *arms, *own)
    assert outcome.status == 0, outcome.err
    names = {"pwm_tiny", "pwm_tiny_actor_flow", "pwm_tiny_flow", "pwm_tiny_flow_actor_flow"}
    top = tmp_path / "runs" / "cartpole"
    assert {p.name for p in top.iterdir()} == names
    for name in names:
        assert json.loads((top / name / "seed_0" / "summary.json").read_text())["alg"] == name
    outcome = launcher.run(tmp_path, "runs/cartpole", "--out", "out", module="pwm_fast.compare")
    assert outcome.status == 0, outcome.err
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        labels = {row["configuration"].partition(",")[0] for row in csv.DictReader(file)}
    assert labels == names


@pytest.mark.parametrize("actor", ACTORS)
def test_a_run_and_its_continuation(
    actor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    """Interrupted in an update and resumed, it ends in the same numbers."""
    settings = compose(f"actor={actor}").alg.actor
    own: dict[str, Any] = {
        f"alg__actor__{key}": getattr(settings, key)
        for key in ("kind", "form", "substeps", "init_logstd", "min_logstd")
    }
    assert train(tiny_config(tmp_path / "whole", **own))[1] == 0
    update, calls = PWM.update_policy, []

    def interrupted(self: PWM, *inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *inputs)

    monkeypatch.setattr(PWM, "update_policy", interrupted)
    assert train(tiny_config(tmp_path / "parts", **own))[1] == 128 + signal.SIGTERM
    assert train(tiny_config(tmp_path / "parts", **own))[1] == 0
    whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoints" / "final.pt")["agent"]
        for name in ("whole", "parts")
    )
    assert "init_logstd" in whole["actor"]
    for name, x in whole["actor"].items():
        assert torch.equal(parts["actor"][name], x), name
    one, other = (
        [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert one == other and one[-1]["actor_std"] > 0.0 and "esnr_db" in one[-1]


@pytest.mark.slow
def test_other_commands(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(Path("run"), "actor=flow_g", "epochs=2")
    assert launcher.run(tmp_path, *arguments).status == 0
    best = "checkpoint=run/checkpoints/final.pt"
    few = ("samples=8", "elites=2", "policy_trajectories=2", "iterations=1", "horizon=2")
    for module, more in (
        ("pwm_fast.evaluate", ["episodes=2"]),
        ("pwm_fast.evaluate", ["episodes=2", "planning=mppi", *(f"planning.{x}" for x in few)]),
        (
            "pwm_fast.diagnose",
            ["episodes=2", "windows=4", "points=2", "probes=2", "horizon=3", "esnr_samples=[2]",
             "esnr_batch=2"],
        ),
    ):  # fmt: skip
        outcome = launcher.run(tmp_path, best, "device=cpu", *more, module=module)
        assert outcome.status == 0, outcome.err
    again = launcher.run(tmp_path, *tiny_arguments(Path("run"), "actor=flow", "epochs=3"))
    assert again.status == 2 and "alg.actor.form was 'gated', is 'ode'" in again.err
    refused = launcher.run(
        tmp_path, *tiny_arguments(Path("other"), "actor=flow", "alg.actor.entropy_coef=0.02")
    )
    assert refused.status == 2 and not (tmp_path / "other").exists()
    assert refused.err.count("\n") == 1
    assert "alg.actor.entropy_coef must be 0 for a flow policy" in refused.err


def test_a_new_policy_on_an_old_model(tmp_path: Path) -> None:
    """``init=MODEL actor=flow`` takes the checkpoint's alg, and the policy of the command line."""
    directory = tmp_path / "gaussian"
    train_without_plots(tiny_config(directory, epochs=2))
    source = directory / "checkpoints" / "final.pt"
    config = compose(f"init={source}", "actor=flow")
    found = inherited(config, [f"init={source}", "actor=flow"])
    assert found.alg.world_model.latent_dim == 16 and found.alg.actor.units == [16]
    assert (found.alg.actor.kind, found.alg.actor.substeps) == ("flow", 4)
    assert found.run_dir.endswith(f"{found.alg.name}_actor_flow/seed_0")
    plain = inherited(compose(f"init={source}"), [f"init={source}"])
    assert plain.alg.actor.kind == "pwm" and plain.alg.actor.suffix == ""
