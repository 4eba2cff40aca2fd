"""``python -m pwm_fast.import_checkpoint PATH env=NAME out=DIR``: take up a published checkpoint.

Reads files of PWM, Flow-MBPO-PWM and TD-MPC2 (:func:`pwm_fast.load_published`), says what they
hold, and makes a checkpoint that evaluates, trains and is diagnosed. Without ``env`` and ``out`` it
writes nothing. Exit status: 0, or 2 and one line on stderr that says what is wrong.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from pwm_fast import cli
from pwm_fast import config as configuration
from pwm_fast.run.importing import ImportConfig, import_checkpoint, look, training_arguments

NEED = "checkpoint=PATH is needed: a file of PWM, Flow-MBPO-PWM or TD-MPC2"


def run(cfg: Any) -> int:
    """Import as Hydra's configuration says."""
    config = configuration.typed(cfg, ImportConfig, NEED)
    found = look(config)
    if config.out is None:
        print(found.describe())
        print(
            "\nnothing was written: env=NAME, the environment that it is for, and out=DIR make a "
            "checkpoint of it"
        )
        return 0
    path, found = import_checkpoint(config, found)
    print(found.describe())
    print(
        f"\nwritten to {path}; what to run next:\n"
        f"  python -m pwm_fast.evaluate checkpoint={path}\n"
        f"  python -m pwm_fast.diagnose checkpoint={path}"
    )
    if found.alg.critic.kind == "pwm":
        print(f"  python -m pwm_fast.train init={path}")
        if found.optimizers:  # only a resume takes them, and wants the configuration in full
            arguments = shlex.join(training_arguments(config, found))
            print(f"or, with the optimisers' moments:\n  ... train resume={path} {arguments}")
    else:
        print(
            "to train it, import it with critics=new, for Q functions are there to evaluate and "
            "plan with; policy=new critics=new takes its world model alone"
        )
    return 0


def named(arguments: list[str]) -> list[str]:
    """Arguments in which a file in the first place is ``checkpoint=PATH``, quoted for Hydra."""
    first = arguments[0] if arguments else ""
    plain = bool(first) and first[0] not in "-+~" and "=" not in first
    if not (plain or (first and Path(first).is_file())):
        return arguments
    quoted = first.replace("'", "\\'")
    return [f"checkpoint='{quoted}'", *arguments[1:]]


def main() -> NoReturn:
    """Compose the configuration with Hydra and import."""
    sys.argv[1:] = named(sys.argv[1:])
    cli.main(run, "import_checkpoint", ImportConfig, config_name="import_checkpoint")


if __name__ == "__main__":
    main()
