"""``pwm-fast COMMAND ...`` or ``python -m pwm_fast COMMAND ...``; alone they list the commands.

A command is a module of this package: ``pwm-fast train env=ant`` does what ``python -m
pwm_fast.train env=ant`` does. Exit status: the command's; 2 and one line on stderr where there is
none of that name.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from importlib import import_module
from typing import Any

import pwm_fast

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
COMPOSED = ("train", "pretrain", "evaluate", "diagnose", "import_checkpoint")  # by Hydra
COMPLETION = ("-sc", "--shell-completion")


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        (
            "Fast flow-matching world models for reinforcement learning.",
            "",
            "pwm-fast COMMAND ..., or python -m pwm_fast.COMMAND ...:",
            "",
            *(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()),
            "",
            "Each takes --help. The first one to try:",
            "  pwm-fast train",
        )
    )


def main() -> Any:
    """Run the command that the command line names, or list them; return the exit status."""
    given = sys.argv[1:]
    first = given[0] if given else "--help"
    if first in ("-h", "--help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"pwm-fast {pwm_fast.__version__}")
        return 0
    if first in COMPLETION:
        return complete(given)
    name = first.replace("-", "_")
    if name in COMMANDS:
        return run(name, given[1:])
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else "pwm-fast without one lists them"
    print(f"error: there is no command {first!r}; {hint}", file=sys.stderr)
    return 2


def run(name: str, arguments: list[str]) -> Any:
    """Run a command as if its module had been started with these arguments."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as pwm_fast/__init__.py for its modules
    sys.argv[1:] = arguments
    # Imported here: a list of commands should not wait for torch.
    module = "data.__main__" if name == "data" else name
    return import_module(f"pwm_fast.{module}").main()


def complete(arguments: list[str]) -> Any:
    """Do what Hydra's shell completion asks for.

    Hydra's shell function knows one application with one command line: it hands over the whole
    line, and never the command. So the command's name is completed here, and Hydra completes the
    rest as if it were an application of its own. Commands without a configuration have nothing.

    Args:
        arguments: as in ``-sc install=bash``, which prints that function, and ``-sc query=bash``.
    """
    if not arguments[-1].startswith("query="):
        return run("train", arguments)
    line = os.environ.get("COMP_LINE", "")
    of_command = re.match(r"(\s*\S+\s+)(\S+)\s+", line)
    if of_command is None:  # its name is still being written
        print("\n".join(COMMANDS))
        return 0
    name = of_command[2].replace("-", "_")
    if name not in COMPOSED:
        return 0
    os.environ["COMP_LINE"] = of_command[1] + line[of_command.end() :]
    return run(name, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
