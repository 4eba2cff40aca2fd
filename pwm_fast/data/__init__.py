"""Offline data sets: episodes in files, a SHA-256 manifest of them, and their way into replay.

``python -m pwm_fast.data describe|register|verify|export``; ``docs/data.md`` says which formats
there are and how a run uses one.
"""

from pwm_fast.data.errors import DataError
from pwm_fast.data.formats import DataSet, describe
from pwm_fast.data.manifest import Manifest, compare, default_manifest, register, verify

__all__ = [
    "DataError",
    "DataSet",
    "Manifest",
    "compare",
    "default_manifest",
    "describe",
    "register",
    "verify",
]
