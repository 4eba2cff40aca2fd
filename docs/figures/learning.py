"""Collect finished runs into one JSON file, a figure and the table of docs/results.md.

python docs/figures/learning.py bench/results/cartpole.json RUN_DIR...   # collect, then draw
python docs/figures/learning.py bench/results/cartpole.json              # draw what is stored
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pwm_fast.run import metrics

FIGURE = Path(__file__).with_name("cartpole.png")
CURVE = ("epoch", "env_steps", "wall_time", "eval_reward", "eval_success")


def collect(directories: list[Path]) -> dict:
    """Final evaluations and evaluation curves of runs, with what they ran on."""
    runs = []
    for directory in directories:
        summary = json.loads((directory / "summary.json").read_text("utf-8"))
        rows = [r for r in metrics.read(directory / "metrics.jsonl") if "eval_reward" in r]
        curve = {key: [row.get(key) for row in rows] for key in CURVE}
        keys = ("status", "env", "alg", "seed", "epochs", "env_steps", "wall_time", "evaluation")
        runs.append({**{k: summary[k] for k in keys}, "curve": curve})
    git = ["git", "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "runs": sorted(runs, key=lambda r: (r["alg"], r["seed"])),
    }


def table(runs: list[dict]) -> str:
    """Markdown: one row a run."""
    lines = [
        "| configuration | seed | environment steps | wall-clock | return | held upright |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        e = run["evaluation"]
        lines.append(
            f"| `{run['alg']}` | {run['seed']} | {run['env_steps']:,} | {run['wall_time']:.0f} s "
            f"| {e['reward_mean']:.0f} ± {e['reward_std']:.0f} | {e['success']:.0%} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict]) -> None:
    """Return and success of every run over its evaluations."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = {"pwm_tiny_flow": "tab:blue", "pwm_tiny": "tab:orange"}
    for run in runs:
        for axis, key in zip(axes, ("eval_reward", "eval_success"), strict=True):
            label = f"{run['alg']}, seed {run['seed']}"
            style = ("-", "--", ":", "-.")[run["seed"] % 4]
            axis.plot(
                run["curve"]["env_steps"],
                run["curve"][key],
                style,
                color=colours[run["alg"]],
                label=label,
            )
    axes[0].set_ylabel("return of 12 episodes")
    axes[1].set_ylabel("share held upright to the end")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=7)
    for axis in axes:
        axis.set_xlabel("environment steps")
        axis.grid(alpha=0.3)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    path, *directories = map(Path, sys.argv[1:])
    if directories:
        path.write_text(json.dumps(collect(directories), indent=1) + "\n", "utf-8")
    runs = json.loads(path.read_text("utf-8"))["runs"]
    draw(runs)
    print(table(runs))


if __name__ == "__main__":
    main()
