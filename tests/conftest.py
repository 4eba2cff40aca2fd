"""Settings that every test shares."""

import os

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # before any test imports matplotlib: no display needed


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from one seed, whatever ran before it."""
    torch.manual_seed(0)
