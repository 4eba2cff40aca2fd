"""``python -m pwm_fast.pretrain data.path=data/mt30 alg=pwm_48M_flow``: a world model from data.

``python -m pwm_fast.train init=PATH task=NAME`` then learns a policy for one of its tasks. Exit
status and signals are those of :mod:`pwm_fast.train`; the same command goes on where it stopped.
"""

from __future__ import annotations

from typing import Any, NoReturn

from pwm_fast import cli
from pwm_fast import config as configuration
from pwm_fast.run.pretraining import pretrain


def run(cfg: Any) -> int:
    """Pretrain as Hydra's configuration says."""
    return pretrain(configuration.from_hydra(cfg))[1]


def main() -> NoReturn:
    """Compose the configuration with Hydra and pretrain."""
    cli.main(run, "pretrain", configuration.hydra_schema, config_name="pretrain")


if __name__ == "__main__":
    main()
