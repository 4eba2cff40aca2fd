"""The study of docs/results.md: the runs, what is kept of them, and the page's tables and figures.

python -m bench.study run cartpole --seeds 0-4 --jobs 2    # go on where an earlier call stopped
python -m bench.study diagnose cartpole                    # each finished run, once
python -m bench.study collect cartpole                     # into bench/results/study_cartpole.json,
                                                           # beside the runs that are stored there
python -m bench.study docs                                 # draw what is stored

``run`` starts ``python -m pwm_fast.train`` once for each arm and seed, ``--jobs`` at a time at low
priority. A run that was interrupted goes on; one that is finished is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment, frontier, pages
from bench.arms import STUDIES, Arm
from bench.results import STORE
from pwm_fast import config as configuration
from pwm_fast.analysis import statistics
from pwm_fast.run import metrics, provenance

RESULTS = environment.ROOT / "docs" / "results.md"
FIGURES = environment.ROOT / "docs" / "figures"
CURVE = ("epoch", "env_steps", "wall_time", "eval_reward", "eval_success")

# --- running ------------------------------------------------------------------------------------


def command(study: str, arm: Arm, seed: int, out: Path) -> list[str]:
    """The trainer's arguments, after ``python -m pwm_fast.train``."""
    where = out / study / arm.name / f"seed_{seed}"
    return [*STUDIES[study].overrides, *arm.overrides, f"seed={seed}", f"run_dir={where}"]


def run(study: str, arms: Sequence[Arm], seeds: Sequence[int], out: Path, jobs: int) -> int:
    """Run what is not finished; the number of runs that failed."""
    work = [(arm, seed) for seed in seeds for arm in arms]

    def one(item: tuple[Arm, int]) -> bool:
        arm, seed = item
        arguments = command(study, arm, seed, out)
        log = out / study / f"{arm.name}_seed_{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            status = subprocess.run(
                [sys.executable, "-m", "pwm_fast.train", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        state = "finished" if status == 0 else f"ended with status {status}, see {log}"
        print(f"{arm.name} seed {seed}: {state}", flush=True)
        return status == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not ok for ok in pool.map(one, work))


DIAGNOSE = ("threads=1", "points=4", "probes=2", "esnr_horizons=[1]", "esnr_samples=[2]")
DIAGNOSIS = "study_diagnosis"


def diagnose(study: str, out: Path) -> int:
    """Diagnose the finished runs that are not yet; the number of failures."""
    failed = 0
    for directory in sorted((out / study).glob("*/seed_*")):
        last = directory / "checkpoints" / "final.pt"
        if not last.is_file() or (directory / DIAGNOSIS / "diagnosis.json").is_file():
            continue
        given = (f"checkpoint={last}", f"out={directory / DIAGNOSIS}", *DIAGNOSE)
        done = subprocess.run(
            [sys.executable, "-m", "pwm_fast.diagnose", *given],
            capture_output=True,
            text=True,
            check=False,
        )
        failed += done.returncode != 0
        print(f"{directory}: {'diagnosed' if done.returncode == 0 else done.stderr.strip()}")
    return failed


# --- collecting ---------------------------------------------------------------------------------


def collect(study: str, out: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Final evaluations and evaluation curves of the finished runs, and what they ran on.

    Args:
        study: its name.
        out: where the runs are.
        known: what was collected before. Its runs stay, but for those that are in ``out`` again.

    Raises:
        ValueError: a run is of another configuration than its arm has today.
    """
    common = list(STUDIES[study].overrides)
    configs: dict[str, Any] = {}
    found = {(r["arm"], r["seed"]): r for r in _finished(study, out, configs)}
    order = [arm.name for arm in STUDIES[study].arms]
    if known is not None:
        if known["overrides"] != common:
            raise ValueError(f"what is stored was run with {shlex.join(known['overrides'])}")
        for arm in STUDIES[study].arms:
            if arm.name in known["configs"]:
                configs.setdefault(arm.name, known["configs"][arm.name])
                _check_arm(arm, known["configs"][arm.name], "what is stored")
        for run in known["runs"]:
            if run["arm"] not in order:
                raise ValueError(f"what is stored has the arm {run['arm']}, which is gone")
            found.setdefault((run["arm"], run["seed"]), run)
    return {
        "study": study,
        "overrides": common,
        "configs": {name: configs[name] for name in order if name in configs},
        "runs": sorted(found.values(), key=lambda r: (order.index(r["arm"]), r["seed"])),
    }


def _finished(study: str, out: Path, configs: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished runs; ``configs`` gets the agent's configuration of each arm, as saved."""
    runs = []
    for arm in STUDIES[study].arms:
        for directory in sorted((out / study / arm.name).glob("seed_*")):
            summary_file = directory / "summary.json"
            if not summary_file.is_file():
                continue
            summary = json.loads(summary_file.read_text("utf-8"))
            if summary["status"] != "finished":
                continue
            saved = configuration.read_yaml(directory / "config.yaml")["alg"]
            _check_arm(arm, saved, str(directory))
            configs[arm.name] = saved
            rows = [r for r in metrics.read(directory / "metrics.jsonl") if "eval_reward" in r]
            keys = ("env", "alg", "seed", "epochs", "env_steps", "wall_time")
            evaluation = dict(summary["evaluation"])
            file = directory / DIAGNOSIS / "diagnosis.json"
            diagnosed = json.loads(file.read_text("utf-8")) if file.is_file() else None
            history = provenance.read(directory / "provenance.json")
            runs.append(
                {
                    "arm": arm.name,
                    "overrides": _own(study, history[-1]["overrides"]),
                    **{k: summary[k] for k in keys},
                    "commits": sorted({c[:12] for r in history if (c := r["git"]["commit"])}),
                    "on": _ran_on(history[-1]),
                    "evaluation": evaluation,
                    "model": None if diagnosed is None else _model(diagnosed["checkpoints"][0]),
                    "curve": {k: [row.get(k) for row in rows] for k in CURVE},
                }
            )
    return runs


def _ran_on(record: dict[str, Any]) -> str:
    m, v = record["machine"], record["versions"]
    where = f"{m['cpu']}, {m['cpu_capability']}, {m['cores']} cores"
    return f"{where}; torch {v['torch']}, Python {v['python']}"


def _own(study: str, given: str) -> str:
    """Of the overrides that a run was given those of its arm."""
    shared = STUDIES[study].overrides
    return shlex.join(
        x
        for x in shlex.split(given)
        if x not in shared and x.partition("=")[0] not in ("seed", "run_dir")
    )


def _check_arm(arm: Arm, saved: dict[str, Any], where: str) -> None:
    """Raise ValueError for an agent's configuration that is another than the arm has today."""
    ran = configuration.from_dict({"env": {"name": "cartpole"}, "alg": saved}).alg  # any will do
    now = configuration.compose(*arm.overrides).alg
    if replace(ran, name=now.name) != now:
        raise ValueError(f"{where} is of another configuration than the arm {arm.name} has now")


def _model(found: dict[str, Any]) -> dict[str, Any]:
    """What a study keeps of a diagnosis: open-loop errors, and what is known of actions."""
    prediction, rewards = found["prediction"], found["rewards"]
    sensitivity = found["sensitivity"]
    has = isinstance(sensitivity, dict) and "reward_cosine" in sensitivity
    return {
        **{k: prediction[k] for k in ("step", "latent_per_displacement", "latent_per_spread")},
        "reward_r2": rewards["model"],
        "linear_r2": rewards["linear_obs_actions"],
        "after": sensitivity["after"] if has else None,
        "reward_cosine": sensitivity["reward_cosine"] if has else None,
    }


# --- the page -----------------------------------------------------------------------------------


def stored(study: str) -> dict[str, Any] | None:
    """What is stored of a study."""
    path = STORE / f"study_{study}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _interval(estimate: statistics.Estimate, text: Callable[[float], str]) -> str:
    found = text(estimate.iqm)
    if estimate.iqm_interval is not None:
        found += f" ({text(estimate.iqm_interval.low)} to {text(estimate.iqm_interval.high)})"
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: one row an arm.

    Returns are interquartile means over seeds with 95 % bootstrap intervals, what is known of a
    model is the median over them, costs are those of :mod:`bench.frontier`.
    """
    study, costs = STUDIES[result["study"]], frontier.stored()
    head = ["configuration", "update", "epoch", "seeds", "return"]
    head += ["success"] if study.success else []
    head += ["latent error / displacement, step 1", "/ spread, step 16", "reward R2, step 16"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in study.arms:
        runs = [r for r in result["runs"] if r["arm"] == arm.name]
        if not runs:
            continue
        returns = statistics.estimate([r["evaluation"]["reward_mean"] for r in runs])
        cells = [arm.label]
        there = costs is not None and arm.name in costs["seconds"]
        cells += [f"{x:.2f}x" for x in frontier.ratios(costs, arm.name)] if there else ["", ""]
        cells += [str(len(runs)), _interval(returns, lambda x: f"{x:.0f}")]
        if study.success:
            each = [f"{r['evaluation']['success']:.0%}" for r in runs]
            cells.append(", ".join(each))
        models = [r["model"] for r in runs if r["model"] is not None]
        for key, i in (
            ("latent_per_displacement", 0),
            ("latent_per_spread", -1),
            ("reward_r2", -1),
        ):
            each = [m[key][i] for m in models if m[key][i] is not None]
            cells.append(f"{np.median(each):.2g}" if each else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commands(result: dict[str, Any]) -> str:
    """The trainer's commands of the arms, as they were given, and the commits that they ran."""
    study = STUDIES[result["study"]]
    lines = [f"python -m pwm_fast.train {shlex.join(study.overrides)} seed=0 ..."]
    for arm in study.arms:
        runs = [r for r in result["runs"] if r["arm"] == arm.name]
        for given in dict.fromkeys(r["overrides"] for r in runs):
            commits = sorted({c for r in runs if r["overrides"] == given for c in r["commits"]})
            lines.append(f"  {given}   # {arm.label}; {', '.join(commits)}")
    return "```sh\n" + "\n".join(lines) + "\n```"


def draw(result: dict[str, Any], path: Path) -> None:
    """Returns over environment steps and over cost: interquartile means and their bands.

    Cost is in epochs of the published baseline, as :mod:`bench.frontier` measured them: seconds of
    runs that shared a machine would tell nothing.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    study, costs = STUDIES[result["study"]], frontier.stored()
    arms = [a for a in study.arms if sum(r["arm"] == a.name for r in result["runs"]) > 1]
    figure = Figure(figsize=(10.0, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for i, arm in enumerate(arms):
        runs = [r for r in result["runs"] if r["arm"] == arm.name]
        shortest = min(len(r["curve"]["epoch"]) for r in runs)
        runs = [{**r, "curve": {k: v[:shortest] for k, v in r["curve"].items()}} for r in runs]
        curves = np.array([r["curve"]["eval_reward"] for r in runs], dtype=float)
        centre, band = statistics.bands(curves, statistics.iqm)
        steps = np.array(runs[0]["curve"]["env_steps"], dtype=float)
        known = costs is not None and arm.name in costs["seconds"]
        cost = frontier.ratios(costs, arm.name)[1] if known else np.nan
        epochs = np.array(runs[0]["curve"]["epoch"], dtype=float)
        for axis, x in zip(axes, (steps, epochs / cost), strict=True):
            axis.plot(x, centre, color=colours[i % 20], label=f"{arm.label} ({len(runs)})")
            if band is not None:
                axis.fill_between(x, *band, color=colours[i % 20], alpha=0.15, linewidth=0)
    axes[0].set_ylabel("return of 12 episodes")
    for axis, what in zip(
        axes,
        ("environment steps", "updates' cost, in epochs of the published baseline at 5M"),
        strict=True,
    ):
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def section(result: dict[str, Any]) -> str:
    """What docs/results.md has of a study."""
    where = "; ".join(sorted({r["on"] for r in result["runs"]}))
    figure = f"![Returns](figures/study_{result['study']}.png)"
    return "\n\n".join((f"{where}:", table(result), figure, commands(result)))


def docs() -> list[str]:
    """Rewrite the page's sections; the names of the studies that are there."""
    found = []
    for study in STUDIES:
        result = stored(study)
        if result is None:
            continue
        pages.write(RESULTS, f"study-{study}", section(result))
        draw(result, FIGURES / f"study_{study}.png")
        found.append(study)
    return found


def seeds_of(text: str) -> list[int]:
    """``0-4`` or ``0,2,5``.

    Raises:
        argparse.ArgumentTypeError: there is a part without a seed.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdigit() or not last.isdigit() or int(last) < int(first):
            raise argparse.ArgumentTypeError(f"must be like 0-4 or 0,2,5, got {text!r}")
        found += range(int(first), int(last) + 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0, 1 where runs failed, 2 for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("run", "diagnose", "collect", "docs"))
    parser.add_argument("study", nargs="?", choices=STUDIES, help="of all but docs")
    parser.add_argument("--arms", nargs="+", help="names; all by default")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-4"), help="0-4 or 0,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="of the runs")
    options = parser.parse_args(argv)
    if options.what == "docs":
        try:
            print(f"{RESULTS.name}: {', '.join(docs()) or 'nothing is stored'}")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    if options.study is None:
        parser.error(f"name a study: {', '.join(STUDIES)}")
    known = {arm.name: arm for arm in STUDIES[options.study].arms}
    unknown = [name for name in options.arms or () if name not in known]
    if unknown:
        parser.error(f"--arms: no {', '.join(unknown)}; there are {', '.join(known)}")
    if options.what == "run":
        arms = [known[name] for name in options.arms or known]
        os.nice(10)
        return min(run(options.study, arms, options.seeds, options.out, options.jobs), 1)
    if options.what == "diagnose":
        return min(diagnose(options.study, options.out), 1)
    path = STORE / f"study_{options.study}.json"
    try:
        result = collect(options.study, options.out, stored(options.study))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"{path.name}: {len(result['runs'])} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
