"""A run's files are few, small, in one folder, and a later run goes on from them."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_out
from bench.gpu_out import FILES, LOGS, RUN, WORK, WORKER, Output, resume, shorten
from bench.results import STORE, ResultError, Row
from bench.stages import Record
from tests.bench.synthetic import FACTS

NAME = "gpu_x.json"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu_out.VARIABLE, raising=False)


# --- the place -----------------------------------------------------------------------------------


def test_a_folder_takes_all_files_and_a_file_is_the_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(named: Path | None) -> tuple[Path, Path]:
        found = Output.of(named, NAME)
        return found.result, found.folder

    a, b = tmp_path / "a", tmp_path / "b"
    assert of(a / "b.json") == (a / "b.json", WORK)
    assert of(None) == (STORE / NAME, WORK)
    assert of(a) == (a / NAME, a)
    monkeypatch.setenv("OUT", str(b))
    assert of(None) == (b / NAME, b) and of(a) == (a / NAME, a)  # what is asked for goes first


def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match=r"cannot write to .*file/a: Not a directory"):
        Output.of(tmp_path / "file" / "a", NAME)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(ResultError, match=f"cannot write to {tmp_path}: Permission denied"):
        Output.of(tmp_path, NAME)


def test_there_are_at_most_eight_files(tmp_path: Path) -> None:
    assert len(LOGS) + len({"the result", "its successor"}) == FILES == 8
    output = Output.of(tmp_path, NAME)
    for name in LOGS:
        output.append(name, "x")
    Record(output.result, copy.deepcopy(FACTS)).save()
    assert len(list(tmp_path.iterdir())) == FILES - 1
    (tmp_path / f".{NAME}.tmp").touch()  # of a run that was killed while it saved
    Output.of(tmp_path, NAME)  # its own files are no others
    (tmp_path / "other").touch()
    with pytest.raises(ResultError, match="holds other: name a folder of the run's own"):
        Output.of(tmp_path, NAME)


def test_what_is_told_is_there_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output.of(tmp_path, NAME)
    output.tell("first: ok")
    output.tell("µs")
    assert output.path(RUN).read_text("utf-8") == capsys.readouterr().out == "first: ok\nµs\n"


# --- the size ------------------------------------------------------------------------------------


def test_a_log_loses_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "log"
    text = b"".join(b"%07d\n" % i for i in range(1000))
    path.write_bytes(text)
    shorten(path, len(text))
    assert path.read_bytes() == text
    shorten(path, 800)
    found = path.read_bytes()
    assert len(found) <= 800
    assert found.startswith(text[:200]) and found.endswith(text[-400:])
    assert b"[... 7400 bytes left out ...]" in found
    shorten(path, 800)
    assert path.read_bytes() == found
    shorten(tmp_path / "none", 800)


def test_logs_are_shortened_while_somebody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_out, "shorten", lambda path: shorten(path, 1000))
    output = Output.of(tmp_path, NAME)
    path = output.path(WORKER)
    with path.open("ab", buffering=0) as file, output.watched(0.01):
        for i in range(40):
            file.write(b"%099d\n" % i)
        end = time.monotonic() + 20.0
        while path.stat().st_size > 1000 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_size <= 1000
        file.write(b"the last words")
    assert path.stat().st_size <= 1000
    assert path.read_bytes().endswith(b"%099d\nthe last words" % 39)


def test_a_file_too_large_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output.of(tmp_path / "out", NAME)
    source = tmp_path / "report"
    source.write_bytes(b"12345")
    monkeypatch.setattr(gpu_out, "BYTES", 4)
    assert not output.keep(gpu_out.NCU_REPORT, source) and not list(output.folder.iterdir())
    monkeypatch.setattr(gpu_out, "BYTES", 5)
    assert output.keep(gpu_out.NCU_REPORT, source)
    assert output.path(gpu_out.NCU_REPORT).read_bytes() == b"12345"


# --- going on -------------------------------------------------------------------------------------


def earlier(folder: Path, name: str = NAME, **commit: Any) -> Path:
    """A result with a row."""
    facts = copy.deepcopy(FACTS)
    facts["commit"].update(commit)
    record = Record(folder / name, facts)
    record.add("case", {"work": "w"}, Row("fast", "ok", None, [1.0]), ("fast",))
    return record.path


def go_on(named: Path, result: Path) -> str:
    return resume(named, result, copy.deepcopy(FACTS))


def test_a_result_that_was_brought_along_is_gone_on_with(tmp_path: Path) -> None:
    before = earlier(tmp_path / "checkout")
    for i, named in enumerate((before, before.parent)):
        output = Output.of(tmp_path / f"out{i}", NAME)
        go_on(named, output.result)
        go_on(named, output.result)  # again: it is there
        record = Record(output.result, copy.deepcopy(FACTS))
        assert record.missing("case", ("fast", "published")) == ["published"]
    assert before.exists()


def test_the_same_command_goes_on_from_where_it_was_stopped(tmp_path: Path) -> None:
    """Also where it names what was brought along, which the result has left behind."""
    before, mine = earlier(tmp_path / "a"), tmp_path / NAME
    digest = go_on(before, mine)
    record = Record(mine, copy.deepcopy(FACTS))
    record.result.gpu["resumed"] = digest
    record.add("case", {"work": "w"}, Row("published", "ok", None, [2.0]), ("fast",))
    assert go_on(before, mine) == digest
    assert Record(mine, copy.deepcopy(FACTS)).missing("case", ("published",)) == []


def test_the_only_result_of_a_folder_is_meant(tmp_path: Path) -> None:
    text = earlier(tmp_path / "a", "gpu_y.json").read_text()
    go_on(tmp_path / "a", tmp_path / NAME)
    assert (tmp_path / NAME).read_text() == text
    earlier(tmp_path / "a", "gpu_z.json")
    with pytest.raises(ResultError, match=r"holds gpu_y\.json, gpu_z\.json; name"):
        go_on(tmp_path / "a", tmp_path / "b" / NAME)
    (tmp_path / "none").mkdir()
    with pytest.raises(ResultError, match=r"holds no gpu_\*.json"):
        go_on(tmp_path / "none", tmp_path / "b" / NAME)
    with pytest.raises(ResultError, match=r"--resume: there is no .*c\.json"):
        go_on(tmp_path / "c.json", tmp_path / "b" / NAME)


def test_two_results_are_not_mixed(tmp_path: Path) -> None:
    before, mine = earlier(tmp_path / "a"), earlier(tmp_path / "b")
    os.utime(mine)
    go_on(before, mine)
    mine.write_text(mine.read_text().replace('"fast"', '"tf32"'))
    with pytest.raises(ResultError, match="is there already"):
        go_on(before, mine)
    other = earlier(tmp_path / "c", id="ba9876543210")
    with pytest.raises(ResultError, match=r"commit was ba9876543210, is 0123456789ab.*--restart"):
        go_on(other, tmp_path / NAME)
    assert not (tmp_path / NAME).exists()  # where it would be in the way of the next run
