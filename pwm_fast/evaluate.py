"""``python -m pwm_fast.evaluate checkpoint=PATH episodes=12``: evaluate a trained policy.

With ``planning=mppi`` a planner acts in its place (:func:`pwm_fast.ops.plan`); with
``video=out.mp4`` its episodes are filmed.

Prints a table and writes the same as JSON. Exit status: 0, or 2 and one line on stderr that says
what is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pwm_fast import cli, files
from pwm_fast import config as configuration
from pwm_fast.config import ConfigError
from pwm_fast.run import checkpoint, metrics
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint, table

NEED = "checkpoint=PATH is needed: a file such as runs/.../checkpoints/best.pt"


def run(cfg: Any) -> int:
    """Evaluate as Hydra's configuration says."""
    config = configuration.typed(cfg, EvaluateConfig, NEED)
    target = None if config.json == "-" else _target(config)
    result = evaluate_checkpoint(config)
    text = json.dumps(metrics.finite(result), indent=2)
    if target is None:
        print(table(result), file=sys.stderr)
        print(text)
    else:
        print(table(result))
        files.write_text(target, text + "\n")
        print(f"\nwritten to {target}")
    if config.video is not None:
        print(f"filmed in {result['video']}", file=sys.stderr if target is None else sys.stdout)
    return 0


def _target(config: EvaluateConfig) -> Path:
    """Where the JSON goes, looked at before the work starts."""
    checkpoint_path = checkpoint.named(config.checkpoint)
    path = files.user_path(config.json or checkpoint_path.with_suffix(".evaluation.json"))
    if config.json and not path.parent.is_dir():
        raise ConfigError(f"json={config.json}: there is no directory {path.parent}")
    if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK)):
        raise ConfigError(f"json={path} cannot be written; give another json=PATH, or json=-")
    return path


def main() -> None:
    """Compose the configuration with Hydra and evaluate."""
    cli.main(run, "evaluate", EvaluateConfig, config_name="evaluate")


if __name__ == "__main__":
    main()
