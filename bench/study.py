"""The study of docs/results.md: the runs, what is kept of them, and the page's tables and figures.

python -m bench.study run cartpole --seeds 0-4 --jobs 2    # go on where an earlier call stopped
python -m bench.study diagnose cartpole                    # each finished run, once
python -m bench.study collect cartpole                     # into bench/results/study_cartpole.json,
                                                           # beside the runs that are stored there;
                                                           # those of bench.sac and .shac, too
python -m bench.study docs                                 # draw what is stored

``run`` starts ``python -m pwm_fast.train`` once for each arm and seed, ``--jobs`` at a time at low
priority. A run that was interrupted goes on; one that is finished is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import environment, frontier, pages, sac, shac
from bench.arms import STUDIES, Arm, Study
from bench.results import STORE
from pwm_fast import config as configuration
from pwm_fast.analysis import legend, published, statistics
from pwm_fast.run import metrics, provenance

RESULTS = environment.ROOT / "docs" / "results.md"
FIGURES = environment.ROOT / "docs" / "figures"
REFERENCES = environment.ROOT / "bench" / "references"
# What the tables have of diagnoses and logs: heading, which of them, key, and which of its steps.
MODEL = (
    ("latent error / displacement, step 1", "model", "latent_per_displacement", 0),
    ("/ spread, step 16", "model", "latent_per_spread", -1),
    ("reward R2, step 16", "model", "reward_r2", -1),
    ("of a linear regression", "model", "linear_r2", -1),
    ("effect of an action on the reward 4 steps later, cosine", "model", "reward_cosine", 1),
    ("reward R2 on random data", "model_on_random", "reward_r2", -1),
    ("of a linear regression there", "model_on_random", "linear_r2", -1),
    ("effective dimensions of latents", "model", "dimensions", 0),
    ("R2 of the observation, from them", "model", "obs_r2", 0),
    ("norm of the policy's gradient, median", "policy", "grad_norm", 0),
    ("95th percentile", "policy", "grad_norm", 1),
    ("deviation of its actions before the tanh, median", "policy", "std", 0),
)
ANCHORS = (sac, shac)
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


DIAGNOSE = ("threads=1", "points=16", "probes=2", "esnr_horizons=[1]", "esnr_samples=[2]")
DIAGNOSIS, ON_RANDOM = "study_diagnosis", "study_diagnosis_random"
DIAGNOSES = {DIAGNOSIS: (), ON_RANDOM: ("policy=random",)}


def diagnose(study: str, out: Path) -> int:
    """Diagnose the finished runs that are not yet; the number of failures.

    Once on episodes of their own policies, once on random actions.
    """
    failed = 0
    runs = sorted((out / study).glob("*/seed_*"))
    for directory, (name, more) in itertools.product(runs, DIAGNOSES.items()):
        last, target = directory / "checkpoints" / "final.pt", directory / name
        if not last.is_file() or (target / "diagnosis.json").is_file():
            continue
        given = (f"checkpoint={last}", f"out={target}", *DIAGNOSE, *more)
        done = subprocess.run(
            [sys.executable, "-m", "pwm_fast.diagnose", *given],
            capture_output=True,
            text=True,
            check=False,
        )
        failed += done.returncode != 0
        print(f"{target}: {'written' if done.returncode == 0 else done.stderr.strip()}")
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
                _check_arm(study, arm, known["configs"][arm.name], "what is stored")
        for run in known["runs"]:
            if run["arm"] not in order:
                raise ValueError(f"what is stored has the arm {run['arm']}, which is gone")
            found.setdefault((run["arm"], run["seed"]), run)
    anchors: dict[str, list[dict[str, Any]]] = {}
    for anchor in ANCHORS:
        runs = {run["seed"]: run for run in (known or {}).get(anchor.NAME, [])}
        runs |= {run["seed"]: run for run in _anchors(out / study / anchor.NAME, anchor)}
        anchors[anchor.NAME] = [runs[seed] for seed in sorted(runs)]
    return {
        "study": study,
        "overrides": common,
        "configs": {name: configs[name] for name in order if name in configs},
        "runs": sorted(found.values(), key=lambda r: (order.index(r["arm"]), r["seed"])),
        **anchors,
    }


def _anchors(directory: Path, anchor: Any) -> list[dict[str, Any]]:
    """What is kept of the finished runs of one of :data:`ANCHORS`."""
    runs = []
    for path in sorted(directory.glob("seed_*.json")):
        run = json.loads(path.read_text("utf-8"))
        if run["curve"]["env_steps"][-1] < run["steps"]:
            continue
        m, v, curve = run["machine"], run["versions"], run["curve"]
        # Of one thread the CPU's seconds, which do not depend on what else a machine does.
        alone = run.get("threads") == 1 and "cpu_seconds" in curve  # not in older runs
        runs.append(
            {
                "seed": run["seed"],
                "label": anchor.label(run),
                "command": f"python -m {anchor.__name__} {run['env']} --steps {run['steps']}",
                "commit": run["commit"]["id"] or "unknown commit",
                "on": f"{m['cpu']}, {m['isa']}, {m['cores']} cores; torch {v['torch']}",
                "evaluation": {
                    "reward_mean": curve["eval_reward"][-1],
                    "success": run.get("success"),  # not in older runs
                },
                "curve": {
                    "env_steps": curve["env_steps"],
                    "wall_time": curve["cpu_seconds" if alone else "seconds"],
                    "eval_reward": curve["eval_reward"],
                },
            }
        )
    return runs


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
            _check_arm(study, arm, saved, str(directory))
            configs[arm.name] = saved
            logged = metrics.read(directory / "metrics.jsonl")
            rows = [r for r in logged if "eval_reward" in r]
            keys = ("env", "alg", "seed", "epochs", "env_steps", "wall_time")
            evaluation = dict(summary["evaluation"])
            history = provenance.read(directory / "provenance.json")
            runs.append(
                {
                    "arm": arm.name,
                    "overrides": _own(study, history[-1]["overrides"]),
                    **{k: summary[k] for k in keys},
                    "commits": sorted({c[:12] for r in history if (c := r["git"]["commit"])}),
                    "on": _ran_on(history[-1]),
                    "evaluation": evaluation,
                    "policy": _policy(logged),
                    "model": _model(directory / DIAGNOSIS),
                    "model_on_random": _model(directory / ON_RANDOM),
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


def _check_arm(study: str, arm: Arm, saved: dict[str, Any], where: str) -> None:
    """Raise ValueError for an agent's configuration that is another than the arm has today."""
    ran = configuration.from_dict({"env": {"name": "cartpole"}, "alg": saved}).alg  # any will do
    now = configuration.compose(*STUDIES[study].overrides, *arm.overrides).alg
    if replace(ran, name=now.name) != now:
        raise ValueError(f"{where} is of another configuration than the arm {arm.name} has now")


def _policy(logged: Sequence[metrics.Row]) -> dict[str, Any] | None:
    """What a study keeps of a policy's updates: percentiles over epochs."""
    norms, deviations = (
        [r[key] for r in logged if r.get(key) is not None]
        for key in ("actor_grad_norm", "actor_std")
    )
    if not (norms and deviations):
        return None
    return {
        "grad_norm": np.percentile(norms, (50, 95)).tolist(),
        "std": np.percentile(deviations, (50,)).tolist(),
    }


def _model(directory: Path) -> dict[str, Any] | None:
    """What a study keeps of a diagnosis: open-loop errors, and what is known of actions."""
    file = directory / "diagnosis.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text("utf-8"))["checkpoints"][0]
    prediction, rewards = found["prediction"], found["rewards"]
    sensitivity = found["sensitivity"]
    has = isinstance(sensitivity, dict) and "reward_cosine" in sensitivity
    latents = found.get("latents")  # not in older diagnoses
    return {
        **{k: prediction[k] for k in ("step", "latent_per_displacement", "latent_per_spread")},
        "reward_r2": rewards["model"],
        "linear_r2": rewards["linear_obs_actions"],
        "after": sensitivity["after"] if has else None,
        "reward_cosine": sensitivity["reward_cosine"] if has else None,
        "dimensions": [latents["dimensions"]] if latents else None,
        "obs_r2": [latents["obs_r2_median"]] if latents else None,
    }


# --- the page -----------------------------------------------------------------------------------


def stored(study: str) -> dict[str, Any] | None:
    """What is stored of a study."""
    path = STORE / f"study_{study}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _value(value: float, bounds: tuple[float, float] | None) -> str:
    """A return and what it lies between; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" + (f" ({bounds[0]:.0f} to {bounds[1]:.0f})" if bounds else "")


def _estimated(returns: Sequence[float]) -> str:
    found = statistics.estimate(returns)
    return _value(found.iqm, found.iqm_interval)


def _costs(study: Study) -> dict[str, tuple[float, float]]:
    """How many times as fast arms' updates and epochs are as the baseline's, where it is known."""
    stored = frontier.stored()
    names = [arm.name for arm in study.arms if stored and arm.name in stored["seconds"]]
    return {name: frontier.ratios(stored, name) for name in names}


class Row(NamedTuple):
    """What is compared: the runs of an arm, or of an anchor."""

    label: str
    runs: list[dict[str, Any]]
    arm: Arm | None

    def returns(self) -> list[float]:
        """Of the final evaluations."""
        return [r["evaluation"]["reward_mean"] for r in self.runs]


def rows(result: dict[str, Any]) -> list[Row]:
    """Arms in the study's order, then the anchors; without those that have no run."""
    study = STUDIES[result["study"]]
    found = [Row(a.label, [r for r in result["runs"] if r["arm"] == a.name], a) for a in study.arms]
    anchors = [run for anchor in ANCHORS for run in result.get(anchor.NAME, [])]
    labels = dict.fromkeys(run["label"] for run in anchors)
    found += [Row(x, [run for run in anchors if run["label"] == x], None) for x in labels]
    return [row for row in found if row.runs]


def references(name: str) -> list[published.Published]:
    """The published curves that a study is compared with."""
    path = REFERENCES / f"{name}.csv"
    return published.read(path) if path.is_file() else []


def table(result: dict[str, Any]) -> str:
    """Markdown: one row an arm, and an anchor.

    Returns are interquartile means over seeds with 95 % bootstrap intervals, what is known of a
    model is the median over them, costs are those of :mod:`bench.frontier`, where it has them.
    """
    study = STUDIES[result["study"]]
    costs = _costs(study)
    shown = [m for m in MODEL if any((r.get(m[1]) or {}).get(m[2]) for r in result["runs"])]
    head = ["configuration", *(["update", "epoch"] if costs else []), "seeds", "return"]
    head += ["success"] if study.success else []
    head += [heading for heading, _, _, _ in shown]
    lines = []
    for row in rows(result):
        cells = [row.label]
        if costs:
            there = row.arm is not None and row.arm.name in costs
            cells += [f"{x:.2f}x" for x in costs[row.arm.name]] if there else ["", ""]
        cells += [str(len(row.runs)), _estimated(row.returns())]
        if study.success:
            each = [r["evaluation"].get("success") for r in row.runs]
            cells.append(", ".join("" if x is None else f"{x:.0%}" for x in each))
        for _, which, key, i in shown:
            models = [m for r in row.runs if (m := r.get(which)) is not None]
            values = [m[key][i] for m in models if m.get(key) and m[key][i] is not None]
            cells.append(f"{np.median(values):.2g}" if values else "")
        lines.append(cells)
    return pages.markdown(head, lines)


def equal(result: dict[str, Any]) -> str:
    """Markdown: returns after so many steps and seconds; published curves beside them.

    Between evaluations, which are close, a run's return is interpolated; then interquartile means
    over seeds. A published curve is read at its own points alone: they are far apart.
    """
    study = STUDIES[result["study"]]
    head = ["configuration", *(f"{n:,} steps" for n in study.steps)]
    head += [f"{n} s" for n in study.seconds]
    points = [("env_steps", n / study.action_repeat) for n in study.steps]
    points += [("wall_time", float(n)) for n in study.seconds]
    lines = []
    for row in rows(result):
        curves = [run["curve"] for run in row.runs]
        lines.append([row.label])
        for key, x in points:
            there = [np.interp(x, c[key], c["eval_reward"], right=np.nan) for c in curves]
            lines[-1].append(_estimated(there))
    for curve in references(result["study"]):
        known = set(curve.steps.tolist())
        cells = [_value(curve.at(n), curve.band_at(n)) if n in known else "" for n in study.steps]
        lines.append([curve.name, *cells, *[""] * len(study.seconds)])
    return pages.markdown(head, lines)


def commands(result: dict[str, Any]) -> str:
    """The trainer's commands of the arms, as they are given today, and the commits that ran them.

    What is shipped may have changed since: :func:`_check_arm` has seen to it that the agents are
    the same.
    """
    study = STUDIES[result["study"]]
    lines = [f"python -m pwm_fast.train {shlex.join(study.overrides)} seed=0 ..."]
    for arm in study.arms:
        runs = [r for r in result["runs"] if r["arm"] == arm.name]
        if runs:
            commits = sorted({commit for run in runs for commit in run["commits"]})
            lines.append(f"  {shlex.join(arm.overrides)}   # {arm.label}; {', '.join(commits)}")
    for run in (run for anchor in ANCHORS for run in result.get(anchor.NAME, [])):
        said = f"{run['label']}; {run['commit']}; {run['on']}"
        lines.append(f"{run['command']} --seed {run['seed']}   # {said}")
    return "```sh\n" + "\n".join(lines) + "\n```"


def draw(result: dict[str, Any], path: Path) -> None:
    """Returns over environment steps, and over cost or seconds: interquartile means, their bands.

    Cost is in epochs of the published baseline, as :mod:`bench.frontier` measured them. Seconds
    are drawn where it did not. Rows of one seed are left out where others have more.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    study = STUDIES[result["study"]]
    costs = _costs(study)
    figure = Figure(figsize=(10.0, 5.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    all_rows = rows(result)
    first = {run["label"] for run in result.get(ANCHORS[0].NAME, [])}
    fewest = min(2, max(len(row.runs) for row in all_rows))
    end = 0.0
    for i, row in enumerate(all_rows):
        if len(row.runs) < fewest:
            continue
        shortest = min(len(r["curve"]["env_steps"]) for r in row.runs)
        curves = [{k: v[:shortest] for k, v in r["curve"].items()} for r in row.runs]
        centre, band = statistics.bands(
            np.array([c["eval_reward"] for c in curves], dtype=float), statistics.iqm
        )
        steps = np.array(curves[0]["env_steps"], dtype=float) * study.action_repeat
        end = max(end, steps[-1])
        style = {"color": colours[i % 20]}
        if row.arm is None:
            style = {"color": "black", "linestyle": "--" if row.runs[0]["label"] in first else ":"}
        for axis, x in zip(axes, (steps, _spent(row, curves, costs)), strict=True):
            axis.plot(x, centre, label=f"{row.label} ({len(curves)})", **style)
            if band is not None:
                axis.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)
    for i, curve in enumerate(references(result["study"])):
        shown = curve.steps <= end
        dashes = (0, legend.reference_dashes(i))
        style = {"color": legend.REFERENCE, "linestyle": dashes, "marker": "."}
        axes[0].plot(curve.steps[shown], curve.values[shown], label=curve.label, **style)
    axes[0].set_ylabel("return of 12 episodes")
    cost = "updates' cost, in epochs of the published baseline at 5M"
    over = cost if costs else "seconds of training, one thread"
    for axis, what in zip(axes, ("environment steps", over), strict=True):
        axis.set_xlabel(what)
        axis.locator_params("x", nbins=6)
        axis.grid(alpha=0.3)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _spent(
    row: Row, curves: Sequence[dict[str, Any]], costs: dict[str, tuple[float, float]]
) -> np.ndarray:
    """What each point of a row's curves cost, for the second axis; NaN where it is not known."""
    if not costs:
        return np.mean([np.array(c["wall_time"], dtype=float) for c in curves], axis=0)
    if row.arm is None or row.arm.name not in costs:
        return np.full(len(curves[0]["env_steps"]), np.nan)
    return np.array(curves[0]["epoch"], dtype=float) / costs[row.arm.name][1]


def section(result: dict[str, Any]) -> str:
    """What docs/results.md has of a study."""
    study = STUDIES[result["study"]]
    where = "; ".join(sorted({r["on"] for r in result["runs"]}))
    figure = f"![Returns](figures/study_{result['study']}.png)"
    at = [equal(result)] if study.steps or study.seconds else []
    return "\n\n".join((f"{where}:", table(result), *at, figure, commands(result)))


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
