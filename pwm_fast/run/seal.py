"""Zip archives that carry the SHA-256 of their own bytes, so that any change is seen.

The digest is the archive's comment, which every reader of zip files, torch's too, passes over.
"""

from __future__ import annotations

import errno
import hashlib
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

MARK = b"pwm_fast sha256 "
LENGTH = len(MARK) + 64  # of the comment: the mark and the digest in hexadecimal
CHUNK = 1 << 20  # bytes read at a time


class SealedWriter:
    """Writes an archive into ``file`` and hashes what passes through.

    Args:
        file: an empty binary file; what is written last is the archive's end, without a comment.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._end = b""  # the last two bytes: the length of the comment

    def write(self, data: bytes) -> int:
        """Write bytes, or what has them as a buffer."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        size = len(view)
        # The digest is of everything but the last two bytes so far.
        if size >= 2:
            self._digest.update(self._end)
            self._digest.update(view[:-2])
            self._end = bytes(view[-2:])
        else:
            pending = self._end + bytes(view)
            self._digest.update(pending[:-2])
            self._end = pending[-2:]
        return size

    def flush(self) -> None:
        """Hand on what the file buffers."""
        self._file.flush()

    def seal(self) -> str:
        """Make the digest the archive's comment; return it in hexadecimal."""
        digest = self._digest.hexdigest()
        self._file.seek(-2, 2)
        self._file.write(struct.pack("<H", LENGTH) + MARK + digest.encode("ascii"))
        return digest


def verify(path: Path) -> str | None:
    """Check that an archive is as it was written.

    An archive without a seal (of an older version, or written with ``torch.save``) has the zip
    format's own checksums of its records' contents.

    Returns:
        The SHA-256 that it was sealed with; None for an archive without a seal.

    Raises:
        ValueError: it is damaged, or no archive; the message says what is wrong.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - LENGTH - 2, 0))
        end = file.read()
        if not (len(end) == LENGTH + 2 and end[2:].startswith(MARK)):
            # Python's zipfile takes an end that announces a comment and has none.
            if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
                raise ValueError("its end is cut short or damaged")
            _verify_records(path)
            return None
        digest, left = hashlib.sha256(), size - LENGTH - 2
        file.seek(0)
        while left > 0:
            data = file.read(min(CHUNK, left))
            if not data:
                raise ValueError("it became shorter while it was read")
            digest.update(data)
            left -= len(data)
    sealed = end[2 + len(MARK) :].decode("ascii", "replace")
    if digest.hexdigest() != sealed or struct.unpack("<H", end[:2])[0] != LENGTH:
        raise ValueError("its content is not what was written (by its SHA-256)")
    return sealed


def _verify_records(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:
                raise ValueError("its end, with its SHA-256, is cut short or damaged")
            odd = [info.filename for info in archive.infolist() if not _is_plain(info)]
            damaged = odd[0] if odd else archive.testzip()
    except Exception as error:  # zipfile trusts what it reads: damage surfaces as almost anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to nowhere
            raise
        raise ValueError(str(error) or type(error).__name__) from error
    if damaged is not None:
        raise ValueError(f"its record {damaged} is not what was written (by its CRC)")


def _is_plain(info: zipfile.ZipInfo) -> bool:
    """It is stored as torch stores records: of their headers, nothing else has a checksum."""
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    return stored and info.external_attr == 0 and not info.is_dir()
