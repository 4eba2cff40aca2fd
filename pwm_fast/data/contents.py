"""What a file of episodes holds, as far as it shows before the file is read in full."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pwm_fast.replay import Episode


class Part(NamedTuple):
    """Some episodes.

    Attributes:
        episodes: how many, at least 1.
        transitions: steps in all of them.
        shortest: steps of the shortest.
        longest: steps of the longest.
    """

    episodes: int
    transitions: int
    shortest: int
    longest: int


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        obs_dim: O.
        action_dim: A.
        tasks: the episodes of each task, by its number.
    """

    obs_dim: int
    action_dim: int
    tasks: dict[int, Part]


class Format(NamedTuple):
    """A kind of file that holds episodes.

    Attributes:
        title: what it is called in messages.
        holds: whether a file is of this kind.
        contents: what such a file holds. Data that do not fit together raise a ``DataError``.
        episodes: its episodes of the tasks given, in order, one in memory at a time, and where each
            is, for messages. An episode that is wrong raises a ``DataError``.
    """

    title: str
    holds: Callable[[Path], bool]
    contents: Callable[[Path], Contents]
    episodes: Callable[[Path, Container[int]], Iterator[tuple[str, Episode]]]


def by_task(task: Tensor, steps: Tensor) -> dict[int, Part]:
    """The episodes of each task.

    Args:
        task: integers ``[E]``, the task of each episode.
        steps: integers ``[E]``, the steps of each.
    """
    found = {}
    for number in task.unique().tolist():
        own = steps[task == number]
        found[number] = Part(len(own), int(own.sum()), int(own.min()), int(own.max()))
    return found


def together(parts: Iterable[Part]) -> Part:
    """All of at least one part as one."""
    episodes, transitions, shortest, longest = zip(*parts, strict=True)
    return Part(sum(episodes), sum(transitions), min(shortest), max(longest))
