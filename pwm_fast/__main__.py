"""``python -m pwm_fast``: what commands there are."""

from __future__ import annotations

import sys

COMMANDS = {
    "train": "train an agent, many with -m, or go on where a run stopped",
    "pretrain": "train a world model alone on data, of many tasks",
    "evaluate": "evaluate a checkpoint's policy in real episodes",
    "diagnose": "prediction error, Jacobians, simplex drift and gradient noise of checkpoints",
    "import_checkpoint": "take up a checkpoint of PWM, Flow-MBPO-PWM or TD-MPC2",
    "compare": "compare runs over seeds, on one page",
    "plot": "draw the figures of runs anew",
    "parity": "parameters and FLOPs of two agents",
    "submit": "send an experiment of several runs to a Slurm cluster",
    "data": "describe, register, verify and export offline data",
    "info": "versions, hardware and backends, for bug reports",
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  python -m pwm_fast.{name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        (
            "Fast flow-matching world models for reinforcement learning. The commands:",
            "",
            *lines,
            "",
            "Each takes --help. The first one to try:",
            "  python -m pwm_fast.train",
        )
    )


def main() -> int:
    """Print the commands; 2 if something else was asked for."""
    asked = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    if not asked:
        print(usage())
        return 0
    name = asked[0]
    hint = f"python -m pwm_fast.{name}" if name in COMMANDS else "python -m pwm_fast lists them"
    print(f"error: commands are modules of their own: {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
