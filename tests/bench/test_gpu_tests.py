"""The GPU tests' stage: a test that fails, dies, hangs or takes the device along costs itself."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_plugin, gpu_tests
from bench.stages import Deadline, Outcome, Record
from tests.bench.synthetic import FACTS

HEAD = "import os, pathlib, pytest, time\npytestmark = pytest.mark.gpu\n"
HEAD += "here = pathlib.Path(__file__).parent\n"


class Stage:
    """The stage on files made of text."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.record = Record(tmp_path / "gpu_x.json", copy.deepcopy(FACTS))
        self.told: list[str] = []
        self.files: list[str] = []

    def write(self, name: str, text: str) -> str:
        path = self.folder / f"test_{name}.py"
        path.write_text(HEAD + text, "utf-8")
        self.files.append(str(path))
        return str(path)

    def run(self, left: Deadline | None = None, first: bool = False) -> Outcome:
        left = Deadline(120.0) if left is None else left
        return gpu_tests.tests(
            left, self.record, "cuda", self.files, first=first, tell=self.told.append
        )

    def found(self, name: str) -> dict[str, Any]:
        """Counts and messages, read from the file."""
        return Record(self.record.path, self.record.result.facts).result.gpu["tests"][name]


class Until(Deadline):
    """Over when there is a file of that name, and a test of that name was told of as passed.

    Two processes run the tests: of two tests, the later to start may be the first to be seen.
    """

    def __init__(self, path: Path, passed: str) -> None:
        super().__init__(120.0)
        self._path, self._passed = path, passed

    @property
    def left(self) -> float:
        return 0.0 if self._path.exists() and self._told() else super().left

    def _told(self) -> bool:
        lines = (self._path.parent / "tests.jsonl").read_text("utf-8").splitlines(keepends=True)
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        return any(x["outcome"] == "passed" and self._passed in x["tests"] for x in told)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(gpu_tests, "WORK", tmp_path)
    return Stage(tmp_path)


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["passed"], found["failed"], found["skipped"]


def test_without_pytest_the_tests_are_left_for_another_machine(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    stage.write("good", "def test_good():\n    pass\n")
    assert stage.run() == Outcome("partial", "not run: there is no pytest here")
    assert not stage.record.result.gpu["tests"]


def test_one_outcome_a_test(stage: Stage) -> None:
    """And of a file that gives no tests, what it is worth."""
    name = stage.write(
        "outcomes",
        "@pytest.fixture\ndef after():\n    yield\n    assert 1 == 3, 'teardown'\n"
        "def test_good(): pass\n"
        "def test_after(after): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no second GPU')\n",
    )
    others = {
        "import no_such_module\n": (0, 1, 0),
        "pytest.importorskip('no_such_module')\n": (0, 0, 1),
        "pytestmark = []\n": (0, 0, 0),
        "": (1, 0, 0),
    }
    paths = [stage.write(f"{i}", f"{text}def test_x(): pass\n") for i, text in enumerate(others)]
    outcome = stage.run()
    assert outcome.status == "failed" and "2 passed, 3 failed, 2 skipped in 5 of 5" in outcome[1]
    found = stage.found(name)
    assert counts(found) == (1, 2, 1) and "done" not in found
    wanted = ["test_after: AssertionError: teardown", "test_bad: assert 1 == 2"]
    assert sorted(found["messages"]) == wanted
    log = (stage.folder / "failures.log").read_text("utf-8")
    assert "in test_bad\n" in log and "assert 1 == 2" in log and "test_after, teardown:" in log
    told = [text for text in stage.told if name in text]
    assert len(told) == 2 and max(told).endswith("test_bad: assert 1 == 2")
    assert [counts(stage.found(path)) for path in paths] == list(others.values())
    assert "No module named 'no_such_module'" in stage.found(paths[0])["messages"][0]
    stage.told.clear()
    assert stage.run() == outcome and stage.told == []  # nothing is left


def test_what_a_test_takes_along(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies, one that hangs, one whose CUDA context is lost: the others pass."""
    monkeypatch.setattr(gpu_tests, "HANGS", 5.0)
    name = stage.write(
        "fatal",
        "from bench import gpu_plugin\n"
        "def test_one(): pass\n"
        "def test_dies(): os._exit(11)\n"
        "def test_lost():\n    gpu_plugin._context_is_lost = lambda: True\n    assert False\n"
        "def test_two(): pass\n"
        "def test_hangs(): time.sleep(100)\n"
        "def test_three(): pass\n",
    )
    assert stage.run().status == "failed"
    found = stage.found(name)
    assert counts(found) == (3, 3, 0)
    texts = dict(text.split(": ", 1) for text in found["messages"])
    assert "crashed while running" in texts["test_dies"]
    assert texts["test_lost"] == "assert False"
    assert "test_lost, call:" in (stage.folder / "failures.log").read_text("utf-8")
    assert texts["test_hangs"] == "it did not end within 5 s"


def test_the_first_case_of_each_test_comes_first(stage: Stage) -> None:
    """And is not run again; what the time ends is gone on with."""
    name = stage.write(
        "cases",
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_cases(n):\n"
        "    (here / f'ran{n}').touch(exist_ok=False)\n"
        "    if n == 3 and not (here / 'second').exists():\n"
        "        (here / 'ran3').rename(here / 'waits')\n        time.sleep(60)\n"
        "def test_other(): pass\n",
    )
    outcome = stage.run(first=True)
    assert outcome == ("ok", "2 passed, 0 failed, 0 skipped in 0 of 1 files")
    assert sorted(stage.found(name)["done"]) == ["test_cases[1]", "test_other"]
    assert stage.run(Until(stage.folder / "waits", "test_cases[2]")).status == "partial"
    assert counts(stage.found(name)) == (3, 0, 0)
    (stage.folder / "second").touch()
    assert stage.run().status == "ok"
    assert counts(stage.found(name)) == (4, 0, 0) and "done" not in stage.found(name)


def test_first_cases_name_every_word() -> None:
    names = ["f[3-fast-case0]", "f[4-fast-case1]", "f[3-bf16-case2]", "g", "f[9-tf32-case3]"]
    assert gpu_plugin.first_cases(names) == [names[0], names[3], names[2], names[4]]


def test_stages_pass_only_if_some_ran_on_the_gpu(stage: Stage) -> None:
    good = {"passed": 3, "failed": 0, "skipped": 1}
    none = {"passed": 0, "failed": 0, "skipped": 4}
    bad = {"passed": 3, "failed": 1, "skipped": 0}
    known = gpu_tests.Known(stage.record, stage.told.append)

    def summary(device: str = "cuda", **files: dict[str, Any]) -> Outcome:
        known.files.clear()
        known.files.update(files)
        return known.summary(["a", "b"], device)

    assert summary(a=good, b=none).status == "ok"
    assert summary(a=none, b=none).status == "failed"
    assert summary("cpu", a=none, b=none).status == "ok"
    assert summary(a=good).status == "partial"
    found = summary(a=good, b=bad)
    assert found.status == "failed" and "see b" in found.detail


def test_files_with_gpu_tests_are_found() -> None:
    files = gpu_tests.test_files()
    assert "tests/test_replay.py" in files
    assert "tests/bench/test_stages.py" not in files
