"""Manifests: what they hold, and that no change of the data passes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pwm_fast.data import DataError, compare, default_manifest, manifest, register, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of three files, one of them in a folder, one empty."""
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / "a.npz").write_bytes(b"first")
    (data / "more" / "b.npz").write_bytes(bytes(range(256)) * 9000)  # of more than one chunk
    (data / "readme.txt").write_bytes(b"")
    return data


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_a_manifest_holds(folder: Path) -> None:
    registered, where = register(folder)
    assert where == folder / "manifest.json"
    content = json.loads(where.read_text())
    assert content["kind"] == "folder"
    assert [f["name"] for f in content["files"]] == ["a.npz", "more/b.npz", "readme.txt"]
    for item in content["files"]:
        data = (folder / item["name"]).read_bytes()
        assert item["size"] == len(data)
        assert item["sha256"] == hashlib.sha256(data).hexdigest()
    assert registered.sha256 == hashlib.sha256(where.read_bytes()).hexdigest(), "as sha256sum says"
    assert registered.size == 5 + 256 * 9000
    assert verify(folder) == registered


def test_the_hash_is_of_the_data_alone(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(copy / "a.npz", (0, 0))
    assert register(copy)[0].sha256 == register(folder)[0].sha256
    assert (copy / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "one.npz"
    file.write_bytes(b"content")
    (tmp_path / "another").write_bytes(b"not part of it")
    _, where = register(file)
    assert where == tmp_path / "one.npz.manifest.json"
    verify(file)
    flip(file, 3)
    with pytest.raises(DataError, match=r"changed: one\.npz"):
        verify(file)


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "first byte": (lambda d: flip(d / "a.npz", 0), "changed", "a.npz"),
    "last byte": (lambda d: flip(d / "more" / "b.npz", -1), "changed", "more/b.npz"),
    "byte in the middle": (lambda d: flip(d / "more" / "b.npz", 1 << 20), "changed", "more/b.npz"),
    "shorter": (lambda d: (d / "a.npz").write_bytes(b"firs"), "changed", "a.npz"),
    "longer": (lambda d: (d / "readme.txt").write_bytes(b"x"), "changed", "readme.txt"),
    "missing": (lambda d: (d / "a.npz").unlink(), "missing", "a.npz"),
    "unknown": (lambda d: (d / "more" / "c.npz").write_bytes(b""), "unknown", "more/c.npz"),
    "unknown folder": (lambda d: shutil.copytree(d / "more", d / "m"), "unknown", "m/b.npz"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_named(case: str, folder: Path) -> None:
    register(folder)
    change, kind, name = CHANGES[case]
    change(folder)
    _, problems = compare(folder)
    assert [(p.kind, p.name) for p in problems] == [(kind, name)]
    with pytest.raises(DataError) as error:
        verify(folder)
    assert f"{kind}: {name}" in str(error.value) and str(folder) in str(error.value)


def test_a_renamed_file_is_missing_and_unknown(folder: Path) -> None:
    register(folder)
    (folder / "a.npz").rename(folder / "z.npz")
    _, problems = compare(folder)
    assert [str(p) for p in problems] == ["missing: a.npz", "unknown: z.npz"]


def test_many_changes_are_counted(folder: Path) -> None:
    register(folder)
    for i in range(9):
        (folder / f"new{i}").write_bytes(b"")
    with pytest.raises(DataError, match=r"unknown: new3; and 5 more$"):
        verify(folder)


def test_hidden_files_are_no_data(folder: Path) -> None:
    register(folder)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.npz").write_bytes(b"x")
    verify(folder)


def test_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "far.npz").write_bytes(b"far away")
    (folder / "linked").symlink_to(tmp_path / "store")
    registered, _ = register(folder)
    assert "linked/far.npz" in [e.name for e in registered.entries]
    flip(tmp_path / "store" / "far.npz", 0)
    with pytest.raises(DataError, match=r"changed: linked/far\.npz"):
        verify(folder)
    (folder / "circle").symlink_to(folder)
    with pytest.raises(DataError, match="circle is a link to a folder that it lies in"):
        verify(folder)
    (folder / "circle").unlink()
    (folder / "gone.npz").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.npz is a link to nothing"):
        verify(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.npz")
    with pytest.raises(DataError, match=r"pipe\.npz is no regular file"):
        register(folder)


def test_registering_again(folder: Path) -> None:
    first, where = register(folder)
    before = where.stat().st_mtime_ns
    assert register(folder)[0] == first and where.stat().st_mtime_ns == before
    flip(folder / "a.npz", 0)
    content = where.read_bytes()
    with pytest.raises(DataError, match=r"changed: a\.npz .*--update"):
        register(folder)
    assert where.read_bytes() == content
    updated, _ = register(folder, update=True)
    assert updated.sha256 != first.sha256 and verify(folder) == updated


def test_a_manifest_elsewhere(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "manifests.json"
    register(folder, where)
    assert not default_manifest(folder).exists()
    verify(folder, where)
    with pytest.raises(DataError, match="is not registered"):
        verify(folder)
    flip(folder / "a.npz", 0)
    with pytest.raises(DataError, match=r"changed: a\.npz"):
        verify(folder, where)


def test_a_failed_write_leaves_the_old_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where = register(folder)
    before = where.read_bytes()
    flip(folder / "a.npz", 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        register(folder, update=True)
    assert where.read_bytes() == before
    assert {p.name for p in folder.iterdir()} == {"a.npz", "more", "readme.txt", "manifest.json"}


def test_only_files_of_the_right_size_are_read(folder: Path) -> None:
    register(folder)
    (folder / "more" / "b.npz").write_bytes(b"short")
    read: list[int] = []
    compare(folder, progress=read.append)
    assert sum(read) == 5, "a.npz alone: the other is known to be wrong, and one is empty"


def test_progress_counts_every_byte(folder: Path) -> None:
    read: list[int] = []
    registered, _ = register(folder, progress=read.append)
    assert sum(read) == registered.size and max(read) <= manifest.CHUNK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "its format is not"),
        ('{"format": "another"}', "its format is not"),
        ('{"format": "pwm_fast.data_manifest", "version": 2}', "version 2, this program reads 1"),
        ('{"format": "pwm_fast.data_manifest", "version": 1}', "is damaged"),
        (
            '{"format": "pwm_fast.data_manifest", "version": 1, "kind": "folder", '
            '"files": [{"name": "a.npz", "size": 5}]}',
            "is damaged",
        ),
    ],
)
def test_a_manifest_that_is_none(text: str, message: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    for use in (verify, register):
        with pytest.raises(DataError, match=message):
            use(folder)
    assert (folder / "manifest.json").read_text() == text, "another program's file stays"


def test_nothing_to_register(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        register(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        register(tmp_path / "empty")


def test_the_manifest_of_a_folder_is_not_of_a_file(folder: Path, tmp_path: Path) -> None:
    register(folder, tmp_path / "m.json")
    with pytest.raises(DataError, match=r"manifest of a folder, .* is a file"):
        verify(folder / "a.npz", tmp_path / "m.json")
