"""``python -m pwm_fast.diagnose checkpoint=PATH``: what a world model gets right, and how smoothly.

Prints tables and writes JSON and figures. Exit status: 0, or 2 and one line on stderr that says
what is wrong.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pwm_fast import cli, files
from pwm_fast import config as configuration
from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.analysis.diagnosis_figures import draw
from pwm_fast.analysis.diagnosis_tables import tables
from pwm_fast.config import ConfigError
from pwm_fast.run import metrics

NEED = (
    "checkpoint=PATH is needed: a file such as runs/.../checkpoints/best.pt, or several as "
    "checkpoint=[PATH,PATH]"
)


def run(cfg: Any) -> int:
    """Diagnose as Hydra's configuration says."""
    config = configuration.typed(cfg, DiagnoseConfig, NEED)
    folder = _target(config)
    result = metrics.finite(diagnose(config))
    print(tables(result))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "diagnosis.json", json.dumps(result, indent=1) + "\n")
    try:
        draw(result, folder)
    except ImportError as error:
        print(f"no figures were drawn: {error}")
    print(f"\nwritten to {folder}")
    return 0


def _target(config: DiagnoseConfig) -> Path:
    """Where the results go, looked at before the work starts."""
    first = config.paths[0]
    name = first.stem if len(config.paths) == 1 else "comparison"
    of_task = f".{config.task}" if config.task else ""
    default = first.with_name(f"{name}{of_task}.diagnosis")
    folder = files.user_path(config.out) if config.out else default
    if not config.out and not first.parent.is_dir():
        return folder  # that the checkpoint is missing is said when it is read
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"out={folder} cannot be made; give another out=DIR")
    return folder


def main() -> None:
    """Compose the configuration with Hydra and diagnose."""
    cli.main(run, "diagnose", DiagnoseConfig, config_name="diagnose")


if __name__ == "__main__":
    main()
