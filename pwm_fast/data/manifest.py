"""A manifest of a data set: the name, size and SHA-256 of every file, so that a change is seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pwm_fast import files
from pwm_fast.data.errors import DataError

FORMAT = "pwm_fast.data_manifest"
VERSION = 1
FOLDER_MANIFEST = "manifest.json"
FILE_MANIFEST = ".manifest.json"  # behind the name of a single file
CHUNK = 1 << 20  # bytes read at a time

Progress = Callable[[int], Any]  # is told the number of bytes just read


class Entry(NamedTuple):
    """A file of a data set.

    Attributes:
        name: relative to the folder, with ``/`` between its parts.
        size: in bytes.
        sha256: of the content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of.

    Attributes:
        kind: ``folder`` or ``file``.
        entries: its files in the order of their names.
    """

    kind: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def sha256(self) -> str:
        """SHA-256 of :meth:`text`: equal for equal data, wherever it lies."""
        return hashlib.sha256(self.text().encode("ascii")).hexdigest()

    def text(self) -> str:
        """The manifest file's content; it holds no time and no place, only what the data are."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "files": [entry._asdict() for entry in self.entries],
        }
        return json.dumps(content, indent=1, ensure_ascii=True) + "\n"


class Problem(NamedTuple):
    """How a file differs from the manifest.

    Attributes:
        kind: ``changed``, ``missing`` or ``unknown``.
        name: of the file, as in :class:`Entry`.
        detail: what it is and should be; empty where ``kind`` says it all.
    """

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" ({self.detail})" if self.detail else "")


def default_manifest(path: Path) -> Path:
    """Where the manifest of a data set lies unless it is said: in the folder, beside the file."""
    if path.is_dir():
        return path / FOLDER_MANIFEST
    return path.with_name(path.name + FILE_MANIFEST)


def data_files(path: Path, manifest: Path) -> dict[str, Path]:
    """The files of a data set by their names in the manifest.

    A folder is searched to its depth, through links as well. Hidden files and folders, which
    systems and editors leave behind, and the manifest itself are no part of the data.

    Raises:
        DataError: ``path`` does not exist, or something in it is neither file nor folder.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise DataError(f"there is no data set {path}")
    found: dict[str, Path] = {}
    own = os.path.realpath(manifest)

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
        above = [p for p in Path(folder).parents if p == path or path in p.parents]
        if os.path.realpath(folder) in map(os.path.realpath, above):
            raise DataError(f"{folder} is a link to a folder that it lies in")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = Path(folder, name)
            if name.startswith(".") or os.path.realpath(file) == own:
                continue
            if not file.is_file():
                what = "a link to nothing" if file.is_symlink() else "no regular file"
                raise DataError(f"{file} is {what}")
            found[file.relative_to(path).as_posix()] = file
    return dict(sorted(found.items()))


def measure(files_by_name: dict[str, Path], progress: Progress = lambda n: None) -> list[Entry]:
    """Read all files and describe them."""
    return [_entry(name, file, progress) for name, file in files_by_name.items()]


def _entry(name: str, file: Path, progress: Progress) -> Entry:
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                progress(len(chunk))
    except OSError as error:
        raise files.naming(file, error) from error
    return Entry(name, size, digest.hexdigest())


def read(path: Path) -> Manifest:
    """Read a manifest file.

    Raises:
        DataError: it is missing, or no manifest of this program.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no manifest {path}") from error
    except OSError as error:
        raise files.naming(path, error) from error
    except ValueError as error:
        raise DataError(f"{path} is no manifest of a data set: it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of a data set: its format is not {FORMAT}")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path} has manifest version {content.get('version')}, this program reads {VERSION}"
        )
    kind, listed = content.get("kind"), content.get("files")
    items = listed if isinstance(listed, list) else []
    entries = [Entry(**item) for item in items if _is_entry(item)]
    names = {entry.name for entry in entries}
    if (
        kind not in ("folder", "file")
        or not entries
        or not len(items) == len(entries) == len(names)
    ):
        raise DataError(
            f"{path} is damaged: it needs kind, and files with name, size and sha256 each"
        )
    return Manifest(kind, tuple(sorted(entries)))


def _is_entry(item: object) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == set(Entry._fields)
        and isinstance(item["name"], str)
        and type(item["size"]) is int
        and isinstance(item["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", item["sha256"]) is not None
    )


def register(
    path: Path,
    manifest: Path | None = None,
    *,
    update: bool = False,
    progress: Progress = lambda n: None,
) -> tuple[Manifest, Path]:
    """Write the manifest of a data set as it is now.

    Args:
        path: a file, or a folder with files.
        manifest: the manifest file; None is :func:`default_manifest`.
        update: replace a manifest that says otherwise.
        progress: see :data:`Progress`.

    Returns:
        The manifest, and where it was written.

    Raises:
        DataError: there is nothing to register, or a manifest that says otherwise is there.
        OSError: a file cannot be read or written; it names the file.
    """
    target = manifest or default_manifest(path)
    before = read(target) if target.exists() else None  # another program's file stays
    found = data_files(path, target)
    if not found:
        raise DataError(f"{path} holds no files")
    now = Manifest(_kind(path), tuple(measure(found, progress)))
    if before is not None and before != now and not update:
        raise DataError(
            f"{target} registers other data: {summary(differences(before, now))}; "
            "--update registers them as they are now"
        )
    if before != now:
        files.write_text(target, now.text())
    return now, target


def compare(
    path: Path, manifest: Path | None = None, *, progress: Progress = lambda n: None
) -> tuple[Manifest, list[Problem]]:
    """Compare a data set with its manifest.

    Only files whose size is right are read.

    Returns:
        The manifest, and every difference.

    Raises:
        DataError: there is no data set or no manifest to compare with.
        OSError: a file cannot be read; it names the file.
    """
    target = manifest or default_manifest(path)
    found = data_files(path, target)
    if not target.exists():
        option = "" if manifest is None else f" --manifest {target}"
        raise DataError(
            f"{path} is not registered: there is no {target}; "
            f"'python -m pwm_fast.data register {path}{option}' writes it"
        )
    expected = read(target)
    if expected.kind != _kind(path):
        raise DataError(f"{target} is the manifest of a {expected.kind}, {path} is a {_kind(path)}")
    by_name = {entry.name: entry for entry in expected.entries}
    now = []
    for name, file in found.items():
        size = file.stat().st_size
        known = name in by_name and by_name[name].size == size
        now.append(_entry(name, file, progress) if known else Entry(name, size, ""))
    return expected, differences(expected, Manifest(expected.kind, tuple(now)))


def verify(
    path: Path, manifest: Path | None = None, *, progress: Progress = lambda n: None
) -> Manifest:
    """The manifest of a data set, which is just as registered.

    Raises:
        DataError: a file changed, is missing or unknown; the message names it.
        OSError: a file cannot be read; it names the file.
    """
    expected, problems = compare(path, manifest, progress=progress)
    if problems:
        raise DataError(
            f"{path} is not as registered in {manifest or default_manifest(path)}: "
            f"{summary(problems)}"
        )
    return expected


def differences(before: Manifest, now: Manifest) -> list[Problem]:
    """How the files of ``now`` differ from those of ``before``, in the order of their names."""
    old = {entry.name: entry for entry in before.entries}
    new = {entry.name: entry for entry in now.entries}
    problems = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            problems.append(Problem("missing", name))
        elif name not in old:
            problems.append(Problem("unknown", name))
        elif old[name].size != new[name].size:
            detail = f"{new[name].size} bytes, registered with {old[name].size}"
            problems.append(Problem("changed", name, detail))
        elif old[name].sha256 != new[name].sha256:
            problems.append(Problem("changed", name, "same size, another content"))
    return problems


def summary(problems: list[Problem], shown: int = 4) -> str:
    """The first few problems in a line."""
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(map(str, problems[:shown])) + more


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"
