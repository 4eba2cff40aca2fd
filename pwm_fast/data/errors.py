"""What is wrong with a data set."""

from __future__ import annotations

from pwm_fast.config import ConfigError


class DataError(ConfigError):
    """A data set that cannot be used; the message names the file and what is wrong with it."""
