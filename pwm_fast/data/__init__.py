"""Offline data sets: episodes in files, a SHA-256 manifest of them, and their way into replay.

``python -m pwm_fast.data register|verify|export``; ``docs/reproducibility.md`` says how a run uses
one.
"""

from pwm_fast.data.errors import DataError
from pwm_fast.data.manifest import Manifest, compare, default_manifest, register, verify

__all__ = ["DataError", "Manifest", "compare", "default_manifest", "register", "verify"]
