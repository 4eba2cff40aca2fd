"""Independent streams of random numbers, one for everything that a seed is used for.

A sum such as ``seed + i`` gives envs of neighbouring seeds, and evaluations of neighbouring runs,
the same episodes. Here NumPy's ``SeedSequence`` hashes the seed, what it is for and the number of
the env: other numbers in any of them are other streams.
"""

from __future__ import annotations

import operator
from enum import IntEnum

import numpy as np

END = 2**63  # of seeds
VERSION = 1  # of how streams follow from seeds, in checkpoints


class Purpose(IntEnum):
    """What a seed is used for. The numbers decide the streams: a new purpose gets a new one."""

    AGENT = 0  # the global generators: first weights, actions, noise, batches
    TRAINING = 1  # envs that a run collects in
    RESUMED = 2  # the same after a resume that could not restore them
    EVALUATION = 3  # evaluations of a run, which all start alike
    FINAL_EVALUATION = 4  # the one at its end
    EVALUATE = 5  # python -m pwm_fast.evaluate
    DIAGNOSE = 6  # held-out episodes
    DIAGNOSE_AGENT = 7  # the global generators while they are collected and measured
    DIAGNOSE_DRAWS = 8  # windows, directions and samples
    EXPORT = 9  # recorded episodes
    EXPORT_AGENT = 10  # the global generators while they are recorded
    PLANNING = 11  # a planner's trajectories
    TASK = 12  # envs of each of several tasks
    RANK = 13  # the global generators of a rank but the first


def in_range(seed: int) -> bool:
    """A seed that can be used: in [0, 2^63)."""
    return 0 <= seed < END


def checked(seed: int) -> int:
    """The seed as Python's integer.

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of range.
    """
    number = operator.index(seed)
    if not in_range(number):
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    return number


def stream(seed: int, purpose: Purpose, *numbers: int) -> int:
    """The seed in [0, 2^63) of a stream of its own.

    Args:
        seed: that the user gave.
        purpose: of the stream.
        numbers: that tell streams of one purpose apart, 0 or more each.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range.
    """
    key = (int(purpose), *numbers)
    return _one(np.random.SeedSequence(checked(seed), spawn_key=key))


def generator_seed(seed: int) -> int:
    """The seed of one of torch's generators, whose CPU kind looks at the lowest 32 bits alone.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range.
    """
    return _one(np.random.SeedSequence(checked(seed)))


def words(seed: int, *numbers: int) -> np.ndarray:
    """128 bits, uint32 ``[4]``, that seed a generator of NumPy's.

    Args:
        seed: of all the generators.
        numbers: that tell one generator from the others, 0 or more each.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range.
    """
    return np.random.SeedSequence(checked(seed), spawn_key=numbers).generate_state(4)


def env_seeds(seed: int, count: int) -> list[int]:
    """Seeds of ``count`` envs of another library, all different; the first are the same for all.

    They have 31 bits, which every library takes: of two seeds' envs any two are alike with a
    probability of 5e-10.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range.
    """
    found: dict[int, None] = {}
    for env in range(count):
        draw = 0
        while len(found) == env:
            found.setdefault(int(words(seed, env, draw)[0]) >> 1)
            draw += 1
    return list(found)


def _one(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1
