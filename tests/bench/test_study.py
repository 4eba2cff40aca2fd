"""The study's arms, what is collected of their runs, and the page that is made of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from bench import arms, frontier, pages, sac, shac, study
from pwm_fast.config import compose, to_dict
from pwm_fast.run import metrics


@pytest.mark.parametrize("name", arms.STUDIES)
def test_every_arm_is_a_configuration_of_its_own(name: str) -> None:
    found = arms.STUDIES[name]
    assert len({arm.name for arm in found.arms}) == len({a.label for a in found.arms})
    configs = [compose(*found.overrides, *arm.overrides).alg for arm in found.arms]
    seen = [json.dumps(dataclasses.asdict(c) | {"name": None}, sort_keys=True) for c in configs]
    assert len(set(seen)) == len(found.arms)


def test_costs_are_of_the_same_configuration() -> None:
    """``at_5M`` sets in the 5M sizes what the trainer's command sets in the small ones."""
    for arm in arms.CARTPOLE:
        small, large = compose(*arm.overrides).alg, frontier.at_5M(arm)
        for section in ("world_model", "model_learning"):
            for override in arm.overrides[1:]:
                key = override.partition("=")[0]
                if key.rpartition(".")[0] == f"alg.{section}":
                    last = key.rpartition(".")[2]
                    ours = getattr(getattr(large, section), last)
                    assert ours == getattr(getattr(small, section), last), (arm.name, key)
        assert large.world_model.kind == small.world_model.kind
        assert large.world_model.latent_dim == 512


def test_ratios_are_of_medians() -> None:
    result = {
        "updates": 8,
        "seconds": {
            "published": {"world_model": [1.0, 2.0, 90.0], "policy": [4.0, 4.0, 4.0]},
            "flow": {"world_model": [0.5, 0.5, 0.5], "policy": [1.0, 1.0, 7.0]},
        },
    }
    assert frontier.ratios(result, "flow") == (4.0, (8 * 2.0 + 4.0) / (8 * 0.5 + 1.0))


DIAGNOSED = {
    "prediction": {
        "step": [1, 16],
        "latent_per_displacement": [0.25, 0.1],
        "latent_per_spread": [0.01, 0.05],
        "latent_rms": [0.1, 0.2],
    },
    "rewards": {"model": [0.99, 0.9], "linear_obs_actions": [0.5, 0.4]},
    "sensitivity": "not available: of this environment",
}


def finished_run(directory: Path, reward: float, status: str = "finished") -> None:
    directory.mkdir(parents=True)
    summary: dict[str, Any] = {
        "status": status,
        "env": "cartpole",
        "alg": "pwm_tiny",
        "seed": int(directory.name.removeprefix("seed_")),
        "epochs": 2,
        "env_steps": 2048,
        "wall_time": 3.0,
        "evaluation": {"reward_mean": reward, "success": 0.5},
    }
    own = next(a for a in arms.CARTPOLE if a.name == directory.parent.name)
    saved = to_dict(compose(*arms.STUDIES["cartpole"].overrides, *own.overrides))
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    (directory / "summary.json").write_text(json.dumps(summary))
    record = {
        "format": "pwm_fast.provenance",
        "version": 1,
        "history": [
            {
                "git": {"commit": "a" * 40},
                "overrides": " ".join(study.command("cartpole", own, 1, directory)),
                "versions": {"torch": "2.13.0", "python": "3.11.7"},
                "machine": {"cpu": "Xeon", "cpu_capability": "AVX512", "cores": 2},
            }
        ],
    }
    (directory / "provenance.json").write_text(json.dumps(record))
    rows = [{"epoch": e, "env_steps": 1024 * e, "wall_time": 1.5 * e} for e in (0, 1, 2)]
    for row in (rows[0], rows[2]):
        row |= {"eval_reward": reward - 10.0 + row["epoch"], "eval_success": 0.25}
    for row in rows[1:]:
        row |= {"actor_grad_norm": 0.5 * row["epoch"], "actor_std": 0.25}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(metrics.read(directory / "metrics.jsonl")) == 3


def test_what_is_collected(tmp_path: Path) -> None:
    for seed, reward in enumerate((-500.0, -600.0, -700.0)):
        finished_run(tmp_path / "cartpole" / "mlp_n1" / f"seed_{seed}", reward)
    finished_run(tmp_path / "cartpole" / "flow" / "seed_0", -100.0, "interrupted")
    (tmp_path / "cartpole" / "flow" / "seed_1").mkdir()
    for name in study.DIAGNOSES:
        where = tmp_path / "cartpole" / "mlp_n1" / "seed_1" / name
        where.mkdir()
        (where / "diagnosis.json").write_text(json.dumps({"checkpoints": [DIAGNOSED]}))
    result = study.collect("cartpole", tmp_path)
    assert [(r["arm"], r["seed"]) for r in result["runs"]] == [("mlp_n1", i) for i in range(3)]
    assert result["runs"][0]["curve"]["eval_reward"] == [-510.0, -508.0]
    assert result["runs"][0]["commits"] == ["a" * 12]
    assert result["runs"][0]["model"] is None
    assert result["runs"][1]["model"]["reward_r2"] == [0.99, 0.9]
    assert str(tmp_path) not in json.dumps(result)
    (line,) = [x for x in study.table(result).splitlines() if x.startswith("| MLP, windows of 1 |")]
    known = "0.25 | 0.05 | 0.9 | 0.4 | 0.9 | 0.4 | 0.75 | 0.97 | 0.25 |"
    assert f"| 3 | -600 (-700 to -500) | 50%, 50%, 50% | {known}" in line
    assert result["runs"][0]["policy"] == {"grad_norm": [0.75, 0.975], "std": [0.25]}
    study.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "alg.model_learning.rollout_steps=1" in study.commands(result)
    assert study.section(result).startswith("Xeon, AVX512, 2 cores; torch 2.13.0, Python 3.11.7:")
    (tmp_path / "cartpole" / "flow" / "seed_2").mkdir(parents=True)
    config = tmp_path / "cartpole" / "mlp_n1" / "seed_0" / "config.yaml"
    config.write_text(config.read_text().replace("rollout_steps: 1", "rollout_steps: 2"))
    with pytest.raises(ValueError, match="another configuration than the arm mlp_n1 has now"):
        study.collect("cartpole", tmp_path)


def anchor_run(directory: Path, seed: int, reward: float) -> None:
    """What ``bench.sac`` leaves, in what matters here."""
    directory.mkdir(parents=True, exist_ok=True)
    run = {
        "env": "hopper",
        "seed": seed,
        "steps": 200,
        "versions": {sac.PACKAGE: "2.9.2", "torch": "2.13.0"},
        "machine": {"cpu": "Xeon", "isa": "AVX512", "cores": 2},
        "commit": {"id": "b" * 12, "dirty": False},
        "curve": {"env_steps": [0, 100, 200], "seconds": [0, 5, 10], "eval_reward": [0, 0, reward]},
    }
    (directory / f"seed_{seed}.json").write_text(json.dumps(run))


def test_the_anchor_and_published_curves_stand_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal steps are the simulator's; published curves are known at their points alone."""
    own = arms.STUDIES["cartpole"]._replace(steps=(2048, 300), seconds=(2, 4), action_repeat=2)
    monkeypatch.setitem(arms.STUDIES, "cartpole", own)
    monkeypatch.setattr(study, "REFERENCES", tmp_path)
    (tmp_path / "cartpole.csv").write_text(
        "name,step,return,low,high\nSAC,0,0,0,0\nSAC,300,300,270,330\nfar,0,0,0,0\nfar,600,600,540,660\n"
    )
    for seed in range(2):
        finished_run(tmp_path / "cartpole" / "mlp" / f"seed_{seed}", -500.0 - 100.0 * seed)
        anchor_run(tmp_path / "cartpole" / sac.NAME, seed, 100.0 + 100.0 * seed)
    result = study.collect("cartpole", tmp_path)
    (tmp_path / "cartpole" / sac.NAME / "seed_1.json").unlink()
    anchor_run(tmp_path / "cartpole" / sac.NAME, 0, 300.0)
    anchor_run(tmp_path / "cartpole" / sac.NAME, 2, 400.0)
    unfinished = tmp_path / "cartpole" / sac.NAME / "seed_2.json"
    unfinished.write_text(unfinished.read_text().replace('"steps": 200', '"steps": 300'))
    result = study.collect("cartpole", tmp_path, result)
    assert [r["evaluation"]["reward_mean"] for r in result[sac.NAME]] == [300.0, 200.0]
    assert study.equal(result).splitlines()[0].endswith("| 2,048 steps | 300 steps | 2 s | 4 s |")
    ours, anchor, reference, far = study.equal(result).splitlines()[2:]
    # Evaluations at 0 and 2048 decisions, which are 4096 steps, and 0 and 3 s.
    assert ours.endswith("| -559 (-609 to -509) | -560 (-610 to -510) | -559 (-609 to -509) |  |")
    label = "SAC (Stable-Baselines3 2.9.2)"
    assert anchor == f"| {label} |  | 125 (100 to 150) | 0 (0 to 0) | 0 (0 to 0) |"
    assert reference == "| SAC |  | 300 (270 to 330) |  |  |"
    assert far == "| far |  |  |  |  |"  # nothing is known between its points
    assert f"| {label} |  |  | 2 | 250 (200 to 300) | ,  |" in study.table(result)
    assert study.section(result).startswith("Xeon, AVX512, 2 cores; torch 2.13.0, Python 3.11.7:")
    assert f"python -m bench.sac hopper --steps 200 --seed 1   # {label}; {'b' * 12}" in (
        study.commands(result)
    )
    study.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_another_anchor_stands_below(tmp_path: Path) -> None:
    """SHAC's seconds are those of the CPU where it had one thread; it knows who held the pole."""
    finished_run(tmp_path / "cartpole" / "mlp" / "seed_0", -500.0)
    for seed, threads in enumerate((1, 2)):
        anchor_run(tmp_path / "cartpole" / shac.NAME, seed, 100.0)
        path = tmp_path / "cartpole" / shac.NAME / f"seed_{seed}.json"
        run = json.loads(path.read_text())
        run |= {"threads": threads, "horizon": 16, "success": 0.25}
        run["versions"][shac.PACKAGE] = "3.17.0"
        run["curve"]["cpu_seconds"] = [0, 3, 6]
        path.write_text(json.dumps(run))
    anchor_run(tmp_path / "cartpole" / sac.NAME, 0, 50.0)
    result = study.collect("cartpole", tmp_path)
    assert study.collect("cartpole", tmp_path / "elsewhere", result) == result
    assert [run["curve"]["wall_time"][-1] for run in result[shac.NAME]] == [6, 10]
    label = "SHAC, H = 16, through MuJoCo 3.17.0"
    assert [row.label for row in study.rows(result)][1:] == ["SAC (Stable-Baselines3 2.9.2)", label]
    assert "| 2 | 100 (100 to 100) | 25%, 25% |" in study.table(result).splitlines()[-1]
    assert f"python -m bench.shac hopper --steps 200 --seed 1   # {label}" in study.commands(result)


@pytest.mark.parametrize("path", sorted(study.REFERENCES.glob("*.csv")), ids=lambda p: p.stem)
def test_published_curves_can_be_read(path: Path) -> None:
    for curve in study.references(path.stem):
        bounds = curve.band_at(200_000)
        assert bounds is not None
        assert bounds[0] <= curve.at(200_000) <= bounds[1]
    assert {c.name.partition(",")[0] for c in study.references(path.stem)} == {"TD-MPC2", "SAC"}


def test_stored_runs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is collected joins what is stored, in the place of the same seed's run."""
    monkeypatch.setattr(study, "STORE", tmp_path)
    for part, arm, seed, reward in (
        ("a", "mlp_n1", 1, -1.0),
        ("a", "flow", 0, -2.0),
        ("b", "flow", 1, -3.0),
        ("b", "flow", 0, -4.0),
        ("b", "mlp", 3, -5.0),
    ):
        finished_run(tmp_path / part / "cartpole" / arm / f"seed_{seed}", reward)
    assert study.main(["collect", "cartpole", "--out", str(tmp_path / "a")]) == 0
    assert study.main(["collect", "cartpole", "--out", str(tmp_path / "b")]) == 0
    result = study.stored("cartpole")
    assert result is not None
    shown = [(r["arm"], r["seed"], r["evaluation"]["reward_mean"]) for r in result["runs"]]
    assert shown == [
        ("mlp", 3, -5.0),
        ("mlp_n1", 1, -1.0),
        ("flow", 0, -4.0),
        ("flow", 1, -3.0),
    ]
    before = (tmp_path / "study_cartpole.json").read_text()
    again = ["collect", "cartpole", "--out", str(tmp_path / "a")]
    for change, message in (
        (lambda r: r["configs"]["mlp"].update(gamma=0.5), "configuration than the arm mlp has now"),
        (lambda r: r.update(overrides=["env=hopper"]), "what is stored was run with env=hopper"),
        (lambda r: r["runs"][0].update(arm="best"), "the arm best, which is gone"),
    ):
        result = json.loads(before)
        change(result)
        (tmp_path / "study_cartpole.json").write_text(json.dumps(result))
        assert study.main(again) == 2
        assert message in capsys.readouterr().err
        assert json.loads((tmp_path / "study_cartpole.json").read_text()) == result


def test_runs_are_started_and_failures_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(command: list[str], **options: Any) -> Any:
        started.append(command[3:])
        return subprocess.CompletedProcess(command, 1 if "seed=1" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    given = ["run", "cartpole", "--arms", "flow", "mlp", "--seeds", "0-1", "--out", str(tmp_path)]
    assert study.main(given) == 1
    assert len(started) == 4
    assert started[0][-2:] == ["seed=0", f"run_dir={tmp_path / 'cartpole' / 'flow' / 'seed_0'}"]
    shown = capsys.readouterr().out
    assert "flow seed 0: finished" in shown and "mlp seed 1: ended with status 1" in shown
    with pytest.raises(SystemExit):
        study.main(["run", "cartpole", "--arms", "best"])
    assert "--arms: no best; there are mlp, " in capsys.readouterr().err


@pytest.mark.parametrize("name", arms.STUDIES)
def test_the_page_is_made_of_what_is_stored(name: str) -> None:
    result = study.stored(name)
    assert result is not None, "python -m bench.study collect"
    page = study.RESULTS.read_text("utf-8")
    expected = pages.put(page, f"study-{name}", study.section(result))
    assert page == expected, "python -m bench.study docs"
    assert (study.FIGURES / f"study_{name}.png").is_file()


@pytest.mark.parametrize("name", arms.STUDIES)
def test_the_pages_commands_make_what_is_stored(name: str) -> None:
    """The arms are today's, the agents those of the stored runs."""
    result = study.stored(name)
    assert result is not None
    known = {arm.name: arm for arm in arms.STUDIES[name].arms}
    for arm, saved in result["configs"].items():
        study._check_arm(name, known[arm], saved, arm)
    given = [line.strip() for line in study.commands(result).splitlines()]
    for arm in result["configs"]:
        assert any(line.startswith(shlex.join(known[arm].overrides)) for line in given)


def test_seeds() -> None:
    assert study.seeds_of("0-2,5") == [0, 1, 2, 5]
    for wrong in ("4-0", "", "a", "1-"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be like 0-4"):
            study.seeds_of(wrong)
