"""``python -m pwm_fast.diagnose`` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pwm_fast.analysis import simulator
from pwm_fast.analysis.diagnosis import DiagnoseConfig
from pwm_fast.analysis.diagnosis import diagnose as run_diagnosis
from pwm_fast.analysis.diagnosis_figures import draw
from pwm_fast.analysis.diagnosis_tables import tables
from pwm_fast.run import metrics
from tests.run.conftest import Launcher, tiny_arguments

PNG = b"\x89PNG\r\n\x1a\n"
FIGURES = ("prediction", "rewards", "sensitivity", "jacobian", "simplex", "esnr")
FILES = {"diagnosis.json", *(f"{name}.png" for name in FIGURES)}
QUICK = ("episodes=4", "points=4", "probes=2", "esnr_samples=[2,4]")
MODULE = {"module": "pwm_fast.diagnose"}


@pytest.fixture(scope="module")
def baseline_run(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline with task embeddings, a termination head and normalised observations."""
    directory = tmp_path_factory.mktemp("baseline")
    arguments = tiny_arguments(
        directory / "run",
        "env=hopper",
        "alg=pwm",
        "env.max_episode_steps=150",
        "alg.normalize_obs=true",
        "alg.world_model.task_dim=3",
    )
    outcome = launcher.run(directory, *arguments)
    assert outcome.status == 0, outcome.err
    return directory / "run"


def diagnose(launcher: Launcher, cwd: Path, *arguments: str) -> dict:
    outcome = launcher.run(cwd, *arguments, "out=here", *QUICK, **MODULE)
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    result: dict = json.loads((cwd / "here" / "diagnosis.json").read_text())
    return result


def test_one_checkpoint(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """Beside the checkpoint, with everything in the table, the JSON and the figures."""
    file = tmp_path / "best.pt"
    shutil.copy(whole_run / "checkpoints" / "best.pt", file)
    outcome = launcher.run(tmp_path, f"checkpoint={file}", *QUICK, **MODULE)
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    folder = tmp_path / "best.diagnosis"
    assert {p.name for p in folder.iterdir()} == FILES
    assert all(p.read_bytes().startswith(PNG) for p in folder.glob("*.png"))
    for text in (
        "latent error / displacement",
        "reward error",
        "Jacobian",
        "ESNR",
        "negative mass",
        "R2 of the reward of step h",
        "linear in o_0 and actions",
        "saturated actions of the policy",
        "effect of an action on the reward",
        "What latents hold",
    ):
        assert text in outcome.out
    assert f"written to {folder}" in outcome.out
    result = json.loads((folder / "diagnosis.json").read_text())
    (found,) = result["checkpoints"]
    assert (found["env"], found["kind"], found["horizon"]) == ("cartpole", "flow", 4)
    assert (found["episodes"], found["steps"]) == (4, 48)
    prediction = found["prediction"]
    assert prediction["step"] == [1, 2, 3, 4]
    assert prediction["windows"] == [48, 44, 40, 36], "episodes of 12 steps"
    assert all(v > 0 for v in prediction["latent_rms"] + prediction["reward_rmse"])
    assert "termination_bce" not in prediction, "the cart-pole does not terminate"
    assert [r["horizon"] for r in found["esnr"]["rows"]] == [1, 1, 2, 2, 4, 4]
    assert [r["samples"] for r in found["esnr"]["rows"]] == [2, 4] * 3
    assert found["esnr"]["batch"] == 4, "as the run's own: 8 rollouts in 2 samples"
    assert found["simplex"]["step"] == [0, 1, 2, 3, 4]
    assert found["simplex"]["negative_mass"][0] == 0.0
    rewards = found["rewards"]
    assert rewards["step"] == [1, 2, 3, 4]
    assert rewards["windows"] == [44, 40, 36, 32], "with a step before them"
    assert rewards["episodes"] == 4 and rewards["fitted"] == 24, "half of the episodes, all steps"
    for name in ("model", "persistence", "linear_obs", "linear_obs_actions", "advantage"):
        assert all(v is not None for v in rewards[name] + rewards[f"{name}_low"]), name
    sensitivity = found["sensitivity"]
    assert sensitivity["after"] == [1, 4] and sensitivity["starts"] == 4
    assert all(-1.0 <= c <= 1.0 for c in sensitivity["reward_cosine"])
    assert all(v > 0 for v in sensitivity["reward_norm_real"] + sensitivity["latent_norm_real"])
    assert 0.0 <= found["action_saturation"] <= 1.0
    latents = found["latents"]
    assert (latents["width"], latents["obs_width"], len(latents["obs_r2"])) == (16, 5, 5)
    assert latents["obs_r2_min"] <= latents["obs_r2_median"] <= 1.0
    assert 1.0 <= latents["dimensions"] <= 16.0 and 1.0 <= latents["obs_dimensions"] <= 5.0
    assert found["integration"] is None, "not asked for"
    assert result["versions"]["torch"] and "commit" in result["git"]


def test_several_checkpoints(
    whole_run: Path, baseline_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """Flow and baseline of different environments side by side; each gets what it gets alone."""
    # Not the best ones: an untrained flow, which may be that, is the identity.
    paths = [f"{run}/checkpoints/final.pt" for run in (whole_run, baseline_run)]
    both = diagnose(launcher, tmp_path, f"checkpoint=[{','.join(paths)}]")["checkpoints"]
    assert {p.name for p in (tmp_path / "here").iterdir()} == FILES
    for path, found in zip(paths, both, strict=True):
        alone = diagnose(launcher, tmp_path, f"checkpoint={path}")["checkpoints"][0]
        same = found.keys() - {"label"}
        assert {k: found[k] for k in same} == {k: alone[k] for k in same}
    flow, baseline = both
    assert flow["label"] != baseline["label"]
    assert (flow["kind"], baseline["kind"]) == ("flow", "mlp")
    assert max(baseline["simplex"]["negative_mass"]) == 0.0
    assert max(baseline["simplex"]["sum_error_max"]) < 1e-5
    assert min(flow["simplex"]["sum_error"][1:]) > 1e-5
    assert len(baseline["prediction"]["termination_bce"]) == 4, "the hopper terminates"
    assert sum(baseline["prediction"]["terminated"]) > 0


def test_latents_that_are_observations(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """They lie on no simplices, so there is no figure of these, but beside one that does."""
    arguments = tiny_arguments(
        tmp_path / "run", "alg.world_model.encoder=identity", "alg.normalize_obs=true"
    )
    outcome = launcher.run(tmp_path, *arguments)
    assert outcome.status == 0, outcome.err
    own = tmp_path / "run" / "checkpoints" / "final.pt"
    (found,) = diagnose(launcher, tmp_path, f"checkpoint={own}")["checkpoints"]
    assert {p.name for p in (tmp_path / "here").iterdir()} == FILES - {"simplex.png"}
    assert found["simplex"] == {"step": [0, 1, 2, 3, 4]}
    assert (found["latents"]["width"], found["latents"]["obs_width"]) == (5, 5)
    assert found["latents"]["obs_r2_median"] > 0.9
    assert found["jacobian"]["norm_z"] > 0.0
    other = whole_run / "checkpoints" / "final.pt"
    (tmp_path / "both").mkdir()
    diagnose(launcher, tmp_path / "both", f"checkpoint=[{own},{other}]")
    assert {p.name for p in (tmp_path / "both" / "here").iterdir()} == FILES


def test_pooled_windows(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """Both checkpoints see the episodes of both; those of different environments cannot."""
    paths = [f"{whole_run}/checkpoints/{name}.pt" for name in ("best", "final")]
    result = diagnose(launcher, tmp_path, f"checkpoint=[{','.join(paths)}]", "pool=true")
    first, second = result["checkpoints"]
    assert first["episodes"] == second["episodes"] == 8
    assert first["return_mean"] == second["return_mean"]
    assert len({first["label"], second["label"]}) == 2


def test_pooling_different_environments(
    whole_run: Path, baseline_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    paths = ",".join(f"{run}/checkpoints/best.pt" for run in (whole_run, baseline_run))
    outcome = launcher.run(tmp_path, f"checkpoint=[{paths}]", "pool=true", "out=x", **MODULE)
    assert outcome.status == 2 and "pool=true needs checkpoints of one environment" in outcome.err
    assert not (tmp_path / "x").exists()


def test_the_seed_and_the_policy_decide(whole_run: Path) -> None:
    path = f"{whole_run}/checkpoints/final.pt"
    results = []
    for changes in (
        {},
        {"seed": 0},
        {"seed": 1},
        {"policy": "deterministic"},
        {"policy": "random"},
        {"random_share": 0.5},
    ):
        config = DiagnoseConfig(
            path, episodes=4, points=4, probes=2, esnr_samples=[2], threads=1, **changes
        )
        results.append(json.dumps(run_diagnosis(config)["checkpoints"]))
    assert results[0] == results[1]
    assert len(set(results)) == 5, "every other setting gives other episodes"


def test_a_longer_horizon_than_the_run_s(
    whole_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """Beyond the episodes' length there is nothing to compare with: null, a gap in the figure."""
    path = f"checkpoint={whole_run}/checkpoints/final.pt"
    (found,) = diagnose(launcher, tmp_path, path, "horizon=14", "esnr_horizons=[3]")["checkpoints"]
    assert found["prediction"]["windows"][11:] == [4, 0, 0]
    assert found["prediction"]["latent_rms"][11] > 0
    assert found["prediction"]["latent_rms"][12:] == [None, None]
    assert {row["horizon"] for row in found["esnr"]["rows"]} == {3}


def test_integrators_of_a_flow(
    whole_run: Path, baseline_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    """The run's own gives what it gives anyway, others something else; a baseline has none."""
    paths = ",".join(f"{run}/checkpoints/final.pt" for run in (whole_run, baseline_run))
    asked = ("substeps=[1,2]", "integrators=[heun,euler]")
    result = diagnose(launcher, tmp_path, f"checkpoint=[{paths}]", *asked)
    flow, baseline = result["checkpoints"]
    assert {p.name for p in (tmp_path / "here").iterdir()} == FILES | {"integration.png"}
    rows = flow["integration"]["rows"]
    cost = [(r["integrator"], r["substeps"], r["evaluations"]) for r in rows]
    assert cost == [("heun", 1, 2), ("heun", 2, 4), ("euler", 1, 1), ("euler", 2, 2)]
    (own,) = [row for row in rows if row["own"]]
    assert own["latent_rms"] == flow["prediction"]["latent_rms"]
    assert own["reward_r2"] == flow["rewards"]["model"]
    assert len({row["latent_rms"][0] for row in rows}) == 4
    assert all(v > 0 for v in flow["sensitivity"]["latent_norm_model"])
    assert "not integrated" in baseline["integration"]["unavailable"]
    assert baseline["rewards"]["windows"][0] > 0 and baseline["sensitivity"]["points"][0] > 0


def test_an_environment_whose_state_cannot_be_set(
    whole_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The report says so, and has everything else."""
    path = f"{whole_run}/checkpoints/final.pt"
    config = DiagnoseConfig(path, episodes=4, points=4, probes=2, esnr_samples=[2], threads=1)
    monkeypatch.setattr(simulator, "why_not", lambda env: "it cannot")
    result = metrics.finite(run_diagnosis(config))
    (found,) = result["checkpoints"]
    assert found["sensitivity"] == {"unavailable": "it cannot"}
    assert "effect of an action, not available: it cannot" in tables(result)
    assert found["rewards"]["model"][0] is not None
    assert {p.name for p in draw(result, tmp_path)} == FILES - {"diagnosis.json"}


def test_random_actions_are_not_the_policy_s(whole_run: Path) -> None:
    path = f"{whole_run}/checkpoints/final.pt"
    quick = {"episodes": 2, "points": 2, "probes": 2, "esnr_samples": [2], "threads": 1}
    config = DiagnoseConfig(path, policy="random", **quick)
    (found,) = metrics.finite(run_diagnosis(config))["checkpoints"]
    assert found["action_saturation"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint=PATH is needed"),
        (["checkpoint=no.pt"], "there is no checkpoint file no.pt"),
        (["checkpoint=[]"], "checkpoint must be a file or list, got []"),
        (["checkpoint=[1]"], "checkpoint must be a file or list, got [1]"),
        (["checkpoint={}", "windows=0"], "windows must be positive, got 0"),
        (["checkpoint={}", "episodes=0"], "episodes must be positive, got 0"),
        (["checkpoint={}", "points=1"], "points must be at least 2, got 1"),
        (["checkpoint={}", "probes=0"], "probes must be positive, got 0"),
        (["checkpoint={}", "radius=0"], "radius must be positive and finite, got 0.0"),
        (["checkpoint={}", "action_step=1"], "action_step must be between 0 and 1: actions"),
        (["checkpoint={}", "substeps=[0]"], "substeps must be a list of positive numbers"),
        (["checkpoint={}", "integrators=[rk4]"], "integrators must be null or a list of heun"),
        (["checkpoint={}", "horizon=0"], "horizon must be positive or null, got 0"),
        (["checkpoint={}", "esnr_samples=[1]"], "esnr_samples must be a list of numbers of at"),
        (["checkpoint={}", "esnr_horizons=[]"], "esnr_horizons must be a list of positive"),
        (
            ["checkpoint={}", "policy=best"],
            "policy must be one of stochastic, deterministic, random",
        ),
        (["checkpoint={}", "random_share=-1"], "random_share must be in [0, 1]"),
        (["checkpoint={}", "seed=-1"], "seed must be in"),
        (["checkpoint={}", "device=tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["checkpoint={}", "out=/proc/x"], "/proc/x"),
        (["checkpoint={}", "foo=1"], "foo: there is no such key"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, whole_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    path = whole_run / "checkpoints" / "final.pt"
    filled = [a.replace("{}", str(path)) for a in arguments]
    outcome = launcher.run(tmp_path, *filled, **MODULE)
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1 and message in outcome.err, outcome.err


@pytest.mark.parametrize("alg", ["pwm_tiny_flow", "pwm_tiny"])
def test_an_untrained_checkpoint(alg: str, launcher: Launcher, tmp_path: Path) -> None:
    """Its actions change nothing and its actor has no gradient: figures show what there is."""
    arguments = tiny_arguments(tmp_path / "run", f"alg={alg}", "epochs=0")
    assert launcher.run(tmp_path, *arguments).status == 0
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    outcome = launcher.run(tmp_path, f"checkpoint={best}", "out=here", *QUICK, **MODULE)
    assert (outcome.status, outcome.err) == (0, "")
    assert {p.name for p in (tmp_path / "here").iterdir()} == FILES


@pytest.mark.parametrize("value", [0.0, None])
def test_figures_of_nothing(value: float | None, whole_run: Path, tmp_path: Path) -> None:
    """Every figure is drawn, whatever quantity is zero or missing everywhere."""
    best = whole_run / "checkpoints" / "best.pt"
    settings = DiagnoseConfig(
        str(best), episodes=2, points=2, probes=2, esnr_samples=[2], device="cpu"
    )
    result = run_diagnosis(settings)
    for key, group in result["checkpoints"][0].items():
        columns = group["rows"][0] if key == "esnr" else group
        if key not in ("prediction", "rewards", "sensitivity", "jacobian", "simplex", "esnr"):
            continue
        for name, old in columns.items():
            if name not in ("step", "horizon", "samples", "points", "probes", "windows", "after"):
                columns[name] = [value] * len(old) if isinstance(old, list) else value
        if key == "esnr":
            group["rows"] = [{**row, **{"esnr_db": value}} for row in group["rows"]]
    assert {p.name for p in draw(result, tmp_path)} == FILES - {"diagnosis.json"}
