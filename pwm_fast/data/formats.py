"""Data sets of any known format: what is in one, and its episodes one after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from pwm_fast.data.chunks import CHUNK
from pwm_fast.data.contents import Format, Part, together
from pwm_fast.data.episodes import EPISODE
from pwm_fast.data.errors import DataError
from pwm_fast.data.manifest import data_files, default_manifest
from pwm_fast.data.minari import DATA, METADATA, MINARI
from pwm_fast.data.task_names import names_of
from pwm_fast.replay import Episode

FORMATS = (CHUNK, MINARI, EPISODE)  # the first that a file is of


@dataclass(frozen=True)
class DataSet:
    """What a data set holds.

    Attributes:
        path: a folder or a file.
        files: those with episodes, and the format of each.
        obs_dim: O.
        action_dim: A.
        tasks: the episodes of each task, by its number.
        names: of the tasks by their numbers; empty where nothing says them.
    """

    path: Path
    files: tuple[tuple[Path, Format], ...]
    obs_dim: int
    action_dim: int
    tasks: dict[int, Part]
    names: tuple[str, ...]

    @property
    def whole(self) -> Part:
        """All its episodes."""
        return together(self.tasks.values())

    def name(self, number: int) -> str:
        """What a task is called in messages."""
        return f"{number} ({self.names[number]})" if self.names else str(number)

    def episodes(self, tasks: Container[int] | None = None) -> Iterator[tuple[str, Episode]]:
        """The episodes of some tasks, in the order of the files, and where each is, for messages.

        One episode is in memory at a time.

        Args:
            tasks: their numbers; None for all.

        Raises:
            DataError: an episode is not readable or not right; the message names file and value.
        """
        wanted = self.tasks if tasks is None else tasks
        for file, kind in self.files:
            yield from kind.episodes(file, wanted)

    def text(self) -> str:
        """A description in a few lines."""
        kinds = Counter(kind.title for _, kind in self.files)
        shown = ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in kinds.items())
        lines = [
            f"{self.path}: {shown}; obs [{self.obs_dim}], action [{self.action_dim}]",
            f"  {_part(self.whole)}",
        ]
        lines += [f"  task {self.name(n)}: {_part(part)}" for n, part in self.tasks.items()]
        return "\n".join(lines)


def describe(path: Path, manifest: Path | None = None) -> DataSet:
    """Look at a data set without reading it in full.

    Args:
        path: a file, or a folder with files.
        manifest: its manifest; None is where it lies by default.

    Raises:
        DataError: there are no episodes, or a file is not readable, or the files do not fit
            together.
        OSError: a file cannot be read; it names the file.
    """
    found = data_files(path, manifest or default_manifest(path)).values()
    known = [(file, kind) for file in found if (kind := _format(file)) is not None]
    if not known:
        raise DataError(
            f"{path} holds no episodes: no .npz or .pt file, and no {METADATA} of Minari"
            + (f"; the data set is the folder that holds {METADATA}" if path.name == DATA else "")
        )
    first = known[0][0]
    tasks: dict[int, Part] = {}
    widths: tuple[int, int] | None = None
    for file, kind in known:
        contents = kind.contents(file)
        own = contents.obs_dim, contents.action_dim
        widths = widths or own
        if own != widths:
            raise DataError(
                f"{file} has obs [{own[0]}] and action [{own[1]}], {first} has obs [{widths[0]}] "
                f"and action [{widths[1]}]: fill the narrower up with zeros"
            )
        for number, part in contents.tasks.items():
            tasks[number] = together([part, *([tasks[number]] if number in tasks else [])])
    assert widths is not None
    has_chunks = any(kind is CHUNK for _, kind in known)
    tasks = dict(sorted(tasks.items()))
    return DataSet(path, tuple(known), *widths, tasks, names_of(path, tasks, tdmpc2=has_chunks))


def _format(file: Path) -> Format | None:
    return next((kind for kind in FORMATS if kind.holds(file)), None)


def _part(part: Part) -> str:
    steps = (
        f"{part.shortest}"
        if part.shortest == part.longest
        else (f"{part.shortest} to {part.longest}")
    )
    plural = "" if part.episodes == 1 else "s"
    return f"{part.episodes:,} episode{plural} of {steps} steps, {part.transitions:,} transitions"
