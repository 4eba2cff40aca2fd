"""``python -m pwm_fast`` lists the commands, all of them."""

from __future__ import annotations

from pathlib import Path

import pwm_fast
from pwm_fast import __main__ as listing
from tests.run.conftest import Launcher

PACKAGE = Path(pwm_fast.__file__).parent


def test_every_command_is_listed() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
    folders = {p.parent.name for p in PACKAGE.glob("*/__main__.py")}
    assert set(listing.COMMANDS) == (modules | folders) - {"__main__"}


def test_it_prints_them(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(tmp_path, module="pwm_fast")
    assert (outcome.status, outcome.err) == (0, "")
    assert all(f"python -m pwm_fast.{name} " in outcome.out for name in listing.COMMANDS)


def test_a_command_behind_a_space(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(tmp_path, "train", "seed=1", module="pwm_fast")
    assert outcome.status == 2
    assert outcome.err == "error: commands are modules of their own: python -m pwm_fast.train\n"
