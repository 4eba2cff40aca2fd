"""Files that always are whole, the old content or the new."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def user_path(name: str | Path) -> Path:
    """A path as a user wrote it, with ``~`` for a home directory.

    Raises:
        OSError: there is no such user; it names the path.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no home directory of such a user", str(name)
        ) from error


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the name ``path`` in one step when the block ends well.

    The content goes to a temporary file in the same directory and is flushed to the disk first. If
    anything fails, or the process dies, ``path`` is what it was.

    Args:
        path: the file; its directory exists.
        previous: name under which the file that had the name ``path`` is kept.

    Raises:
        OSError: the disk is full or not writable; it names ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        _remove(temporary)
        raise naming(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        OSError: see :func:`replacing`.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def naming(path: Path, error: OSError) -> OSError:
    """The same error with the file's name, which failed writes do not carry."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def also_named(path: Path, name: Path) -> None:
    """Give a file a second name, under which its content stays when ``path`` is replaced.

    Raises:
        OSError: it cannot be read or written; it names the file.
    """
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        try:
            shutil.copy2(path, name)
        except OSError as error:
            _remove(name)
            raise naming(name, error) from error


def _keep(path: Path, previous: Path) -> None:
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make the new name itself durable."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
