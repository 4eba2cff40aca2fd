"""``pwm-fast`` and ``python -m pwm_fast``: the list of commands, and each of them by its name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import pwm_fast
from pwm_fast import __main__ as console
from pwm_fast import info
from tests.run.conftest import ROOT, Launcher, clean_environment, rows, tiny_arguments

PACKAGE = Path(pwm_fast.__file__).parent


def test_every_command_is_listed() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
    folders = {p.parent.name for p in PACKAGE.glob("*/__main__.py")}
    assert set(console.COMMANDS) == (modules | folders) - {"__main__"}
    composed = [p.stem for p in PACKAGE.glob("*.py") if "cli.main(" in p.read_text()]
    assert sorted(console.COMPOSED) == sorted(composed)


def test_the_installed_script_is_this_one() -> None:
    (value,) = re.findall(r'^pwm-fast = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert EntryPoint("pwm-fast", value, "console_scripts").load() is console.main


def test_it_lists_them_without_waiting_for_torch() -> None:
    code = "import sys; from pwm_fast.__main__ import main; main(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    *listed, with_torch = done.stdout.splitlines()
    assert with_torch == "False"
    for name, text in console.COMMANDS.items():
        assert sum(line.split() == [name, *text.split()] for line in listed) == 1


def test_version(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(tmp_path, "--version", module="pwm_fast")
    assert (outcome.status, outcome.out) == (0, f"pwm-fast {pwm_fast.__version__}\n")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("trian", "did you mean train?"),
        ("import-checkpont", "did you mean import_checkpoint?"),
        ("env=ant", "pwm-fast without one lists them"),
    ],
)
def test_no_such_command(launcher: Launcher, tmp_path: Path, given: str, hint: str) -> None:
    outcome = launcher.run(tmp_path, given, "seed=1", module="pwm_fast")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == f"error: there is no command {given!r}; {hint}\n"


def test_it_trains_as_the_module_does(launcher: Launcher, whole_run: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run")
    outcome = launcher.run(tmp_path, "train", *arguments, module="pwm_fast")
    assert (outcome.status, outcome.err) == (0, "")
    assert rows(tmp_path / "run") == rows(whole_run)


@pytest.mark.parametrize(
    ("given", "module", "arguments", "status"),
    [
        ("train", "pwm_fast.train", ["seed=x"], 2),
        ("import-checkpoint", "pwm_fast.import_checkpoint", [], 2),
        ("data", "pwm_fast.data", ["describe", "nowhere"], 2),
        ("compare", "pwm_fast.compare", ["--help"], 0),
        ("parity", "pwm_fast.parity", ["nonsense"], 2),
    ],
)
def test_status_and_words_are_the_module_s(
    launcher: Launcher, tmp_path: Path, given: str, module: str, arguments: list[str], status: int
) -> None:
    ours = launcher.run(tmp_path / "ours", given, *arguments, module="pwm_fast")
    theirs = launcher.run(tmp_path / "theirs", *arguments, module=module)
    assert ours == theirs
    assert ours.status == status and ours.out + ours.err


def test_a_command_finds_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(info, "main", lambda: seen.append([*sys.argv]))
    monkeypatch.setattr(sys, "argv", ["/bin/pwm-fast", "info", "-x", "info"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # undone afterwards, which deleting it is not
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert console.main() is None
    assert seen == [["/bin/pwm-fast", "-x", "info"]]
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pwm-fast ", " ".join(console.COMMANDS)),
        ("pwm-fast tr", " ".join(console.COMMANDS)),
        ("pwm-fast train env=an", "env=ant env=anymal"),
        (" .venv/bin/pwm-fast  train  seed=1 alg.ac", "alg.actor."),
        ("pwm-fast import-checkpoint crit", "critics="),
        ("pwm-fast plot ", ""),
        ("pwm-fast nonsense ", ""),
    ],
)
def test_completion(launcher: Launcher, tmp_path: Path, line: str, expected: str) -> None:
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    outcome = launcher.run(tmp_path, "-sc", "query=bash", module="pwm_fast", env=asked)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.split() == expected.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path: Path) -> None:
    """Hydra's shell function, installed as the page says, calls the script and fills in a word."""
    script = tmp_path / "pwm-fast"
    script.write_text(f"#!{sys.executable}\nfrom pwm_fast.__main__ import main\nexit(main())\n")
    script.chmod(0o755)
    code = """eval "$(pwm-fast -sc install=bash)"; complete -p pwm-fast
COMP_LINE="pwm-fast train env=hum"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=2
hydra_bash_completion; echo "${COMPREPLY[@]}"
"""
    env = clean_environment()
    done = subprocess.run(
        ["bash", "-c", code],
        env={**env, "PATH": f"{tmp_path}:{env['PATH']}"},
        capture_output=True,
        text=True,
    )
    registered, completed = done.stdout.splitlines()
    assert registered.endswith("-F hydra_bash_completion pwm-fast")
    assert completed == "env=humanoid", done.stderr
