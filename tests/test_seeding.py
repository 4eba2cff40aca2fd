"""Every use of a seed has random numbers of its own."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from pwm_fast import seeding
from pwm_fast.run.build import seed_everything
from pwm_fast.seeding import Purpose, env_seeds, stream, words

# Neighbours, and what has the same lowest 31, 32 or 40 bits.
SEEDS = (*range(70), 1_000_003, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1)
GOLDEN = (
    2440950710608614359,
    6857370355126290321,
    5732826375231505755,
    [1571496317, 587063900, 793954658],
)


def test_streams_differ() -> None:
    streams = [stream(*key) for key in itertools.product(SEEDS, Purpose)]
    streams += [stream(s, Purpose.EXPORT, i) for s in SEEDS for i in range(0, 320, 64)]
    streams += [stream(s, Purpose.RESUMED, e, t) for s in SEEDS for e in range(9) for t in (0, 3)]
    assert len(set(streams)) == len(streams)
    assert len({s % 2**32 for s in streams}) == len(streams), "torch looks at 32 bits"
    assert all(seeding.in_range(s) for s in streams), "a stream can seed an environment"


def test_envs_differ() -> None:
    streams = [stream(seed, purpose) for seed in range(8) for purpose in Purpose]
    seeds = [seed for s in (*streams, *SEEDS) for seed in env_seeds(s, 64)]
    assert len(set(seeds)) == len(seeds)
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    bits = {words(s, env).tobytes() for s in (*streams, *SEEDS) for env in range(64)}
    assert len(bits) == len(seeds)


def test_the_first_envs_are_the_same_for_all() -> None:
    assert env_seeds(5, 12) == env_seeds(5, 200)[:12]


def test_envs_of_one_seed_never_coincide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "words", lambda seed, env, draw: np.array([2 * (draw // 2)]))
    assert env_seeds(0, 5) == [0, 1, 2, 3, 4]


def test_streams_are_what_they_were() -> None:
    """Another number here is another run for everybody's seed."""
    assert stream(0, Purpose.TRAINING) == GOLDEN[0]
    assert stream(2**40 + 7, Purpose.RESUMED, 3, 11) == GOLDEN[1]
    assert seeding.generator_seed(42) == GOLDEN[2]
    assert env_seeds(42, 3) == GOLDEN[3]
    assert [p.value for p in Purpose] == list(range(14))


def test_global_generators() -> None:
    drawn = {}
    for key in itertools.product((0, 1, 2**32, 2**32 + 1), (Purpose.AGENT, Purpose.EXPORT_AGENT)):
        for _ in range(2):
            seed_everything(*key)
            numbers = (random.random(), np.random.rand(), torch.rand(()).item())
            assert drawn.setdefault(key, numbers) == numbers
    flat = [number for numbers in drawn.values() for number in numbers]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize(
    ("seed", "kind"),
    [(-1, ValueError), (-(2**40), ValueError), (2**63, ValueError), (0.5, TypeError)],
)
def test_what_is_no_seed(seed: object, kind: type[Exception]) -> None:
    for call in (
        lambda s: stream(s, Purpose.TRAINING),
        lambda s: env_seeds(s, 2),
        words,
        seeding.generator_seed,
        seed_everything,
    ):
        with pytest.raises(kind, match=r"seed must be in \[0, 2\^63\)|integer"):
            call(seed)  # type: ignore[operator]


def test_numpys_integers_are_seeds() -> None:
    assert stream(np.int64(3), Purpose.TRAINING) == stream(3, Purpose.TRAINING)  # type: ignore[arg-type]
