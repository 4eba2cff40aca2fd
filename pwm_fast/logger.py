"""Where a run's metrics go: the run directory, the terminal, and Weights & Biases when asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.metrics import MetricsFile, Row

BAR = {"reward": "reward", "wm_loss": "wm", "actor_loss": "actor", "value_loss": "value"}


class RunLogger:
    """Writes rows to ``metrics.jsonl``, a progress bar and wandb.

    The bar shows on a terminal only; elsewhere a line is printed for every evaluation.

    Args:
        config: of the run.
        last_epoch: see :class:`~pwm_fast.metrics.MetricsFile`.

    Raises:
        ConfigError: wandb was asked for and is not installed, or not logged in.
    """

    def __init__(self, config: TrainConfig, last_epoch: int | None = None) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._wandb = _start_wandb(config)
        self.file = MetricsFile(self.run_dir / "metrics.jsonl", last_epoch)
        self.interactive = sys.stderr.isatty()
        self._bar = _progress_bar(config.epochs, last_epoch or 0, self.interactive)

    def write(self, row: Row) -> None:
        """Log one epoch."""
        self.file.write(row)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=row["epoch"])
        self._bar.n = row["epoch"]
        self._bar.set_postfix(
            {label: f"{row[k]:.3g}" for k, label in BAR.items() if row.get(k) is not None}
        )
        if "eval_reward" in row and not self.interactive:
            success = row.get("eval_success")
            self.say(
                f"epoch {row['epoch']}/{self.config.epochs}  env_steps {row['env_steps']}  "
                f"reward {row['eval_reward']:.1f} +- {row['eval_reward_std']:.1f}"
                + (f"  success {success:.0%}" if success is not None else "")
                + f"  {row['wall_time']:.0f} s"
            )

    def status(self, text: str) -> None:
        """Show what goes on within an epoch."""
        self._bar.set_description(text)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def histograms(self, epoch: int, gradients: Mapping[str, Tensor]) -> None:
        """Log histograms of gradients to wandb."""
        if self._wandb is not None:
            import wandb

            self._wandb.log(
                {
                    f"gradients/{name}": wandb.Histogram(g.detach().float().cpu().numpy())
                    for name, g in gradients.items()
                    if bool(torch.isfinite(g).all())
                },
                step=epoch,
            )

    def best(self, values: Mapping[str, Any]) -> None:
        """Record best-so-far values in wandb's summary."""
        if self._wandb is not None:
            self._wandb.summary.update(dict(values))

    def sync(self) -> None:
        """Make what was logged so far durable."""
        self.file.sync()

    def close(self, status: str) -> None:
        """End the bar, the file and the wandb run."""
        self._bar.close()
        self.file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if status == "finished" else 1)


def _progress_bar(epochs: int, done: int, interactive: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=epochs, initial=done, unit="epoch", disable=not interactive, dynamic_ncols=True
    )


def run_name(config: TrainConfig) -> str:
    """Name of a run for people: environment, algorithm and seed."""
    return config.wandb.name or f"{config.env.name}-{config.alg.name}-seed{config.seed}"


def _start_wandb(config: TrainConfig) -> Any:
    if config.wandb.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb.mode={config.wandb.mode} needs wandb: pip install 'pwm-fast[wandb]'"
        ) from error
    run_dir = Path(config.run_dir)
    # One wandb run a run directory: a resumed run continues it.
    id_file = run_dir / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(wandb.util.generate_id(), "utf-8")
    try:
        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=run_name(config),
            id=id_file.read_text("utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            mode=config.wandb.mode,  # type: ignore[arg-type]
            config=configuration.to_dict(config),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"wandb.mode={config.wandb.mode} cannot start: {error}; log in with `wandb login`, or "
            "use wandb.mode=offline"
        ) from error
