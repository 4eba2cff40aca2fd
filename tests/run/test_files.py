"""Files that are replaced in one step."""

import errno
import os
from pathlib import Path

import pytest

from pwm_fast import files


def test_takes_the_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(28, "full")])
def test_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), files.replacing(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_failure_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(OSError) as caught, files.replacing(path):
        pass
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("links", [True, False])
def test_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", no_links)
    path, previous = tmp_path / "file", tmp_path / "previous"
    for text in ("1", "2", "3"):
        with files.replacing(path, previous=previous) as file:
            file.write(text.encode())
    assert (path.read_text(), previous.read_text()) == ("3", "2")
