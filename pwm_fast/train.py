"""``python -m pwm_fast.train env=ant alg=pwm_5M_flow epochs=100 seed=42``: train an agent.

Exit status: 0 finished; 2 one line on stderr says what is wrong; 128 + signal number after SIGINT,
SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, with a checkpoint and the plots written. The same command then
goes on where it stopped. ``-m`` makes a sweep, whose runs ``pwm_fast.launch`` starts.
"""

from __future__ import annotations

from typing import Any, NoReturn

from pwm_fast import cli
from pwm_fast import config as configuration
from pwm_fast.run.inherit import inherited
from pwm_fast.run.start import train


def run(cfg: Any) -> int:
    """Train as Hydra's configuration and command line say."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    return train(inherited(configuration.from_hydra(cfg), overrides))[1]


def main() -> NoReturn:
    """Compose the configuration with Hydra and train."""
    cli.main(run, "train", configuration.hydra_schema, config_name="config")


if __name__ == "__main__":
    main()
