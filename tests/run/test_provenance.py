"""What a run says of how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError
from pwm_fast.run import provenance
from pwm_fast.run.provenance import config_sha256, experiment_sha256, git_state
from pwm_fast.run.start import train
from tests.run.conftest import Launcher, tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("no_plots")


def history(run_dir: Path) -> list[provenance.Record]:
    return provenance.read(run_dir / "provenance.json")


# The hash


def test_the_hash_is_of_the_values(tmp_path: Path) -> None:
    values = configuration.to_dict(tiny_config(tmp_path))
    turned = dict(reversed(list(values.items())))
    assert config_sha256(values) == config_sha256(turned)
    assert config_sha256(values) != config_sha256({**values, "seed": 1})
    # Written down: another canonical form would part the runs of two versions.
    assert config_sha256({"b": [1, 2.5, None], "a": {"ü": True}}) == (
        hashlib.sha256(b'{"a":{"\\u00fc":true},"b":[1,2.5,null]}').hexdigest()
    )


def test_the_hash_outlives_the_yaml_file(tmp_path: Path) -> None:
    """The hash is of what config.yaml holds, so a reader can check it."""
    from omegaconf import OmegaConf

    train(tiny_config(tmp_path / "run", epochs=0))
    read = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "config.yaml"))
    assert history(tmp_path / "run")[0]["config_sha256"] == config_sha256(read)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 5}, True),
        ({"run_dir": "elsewhere"}, True),
        ({"threads": 2, "device": "auto", "eval__every": 1, "wandb__mode": "offline"}, True),
        ({"tensorboard__enabled": True}, True),
        ({"epochs": 7}, False),
        ({"alg__actor__lr": 1e-3}, False),
        ({"env__max_episode_steps": 20}, False),
        ({"data__path": "some"}, False),
    ],
)
def test_hash_of_the_experiment(changes: dict, same: bool, tmp_path: Path) -> None:
    one = configuration.to_dict(tiny_config(tmp_path))
    run_dir = Path(changes.pop("run_dir", tmp_path))
    other = configuration.to_dict(tiny_config(run_dir, **changes))
    assert (experiment_sha256(one) == experiment_sha256(other)) == same
    assert config_sha256(one) != config_sha256(other)


# The record


def test_a_run_s_record(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", epochs=1, seed=3)
    train(config)
    (record,) = history(tmp_path / "run")
    assert record["seed"] == 3 and record["threads"] == 1 and record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert set(record["versions"]) >= {"pwm_fast", "triton", "mujoco", "numpy"}
    assert record["machine"]["cores"] >= 1 and record["machine"]["cpu"]
    assert record["machine"]["gpu"] is None
    assert record["continues"] is None and record["data"] is None
    assert record["started"].endswith("+00:00")
    assert "commit" in record["git"]


def test_no_host_name_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "a-host-of-ours")
    for asked in (False, True):
        run_dir = tmp_path / str(asked)
        train(tiny_config(run_dir, epochs=0, record_host=asked))
        text = (run_dir / "provenance.json").read_text()
        assert ("a-host-of-ours" in text) == asked
        assert os.path.expanduser("~") not in text or os.path.expanduser("~") in str(tmp_path)


def test_the_command_and_a_sweep_s_overrides(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(Path("run_${seed}"), "epochs=0", "seed=0,1", "launch=hydra")
    assert launcher.run(tmp_path, "-m", *arguments).status == 0
    for seed in (0, 1):
        (record,) = history(tmp_path / f"run_{seed}")
        assert f"seed={seed}" in record["overrides"].split()
        assert "epochs=0" in record["overrides"].split() and record["seed"] == seed


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["/a/folder/python3", "-c", "from pwm_fast import train; train.main()", "a b"]
    monkeypatch.setattr(sys, "orig_argv", given)
    said = provenance.command_line()
    assert said == "python3 -c 'from pwm_fast import train; train.main()' 'a b'"
    script = ["/a/folder/python3", "/home/me/.venv/bin/pwm-fast", "train", "seed=1"]
    monkeypatch.setattr(sys, "orig_argv", script)
    assert provenance.command_line() == "pwm-fast train seed=1"


def test_resuming_adds_to_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that two commits worked on shows both."""
    run_dir = tmp_path / "run"
    for commit, epochs in (("1" * 40, 2), ("2" * 40, 4)):
        monkeypatch.setattr(
            provenance, "git_state", lambda commit=commit: {"commit": commit, "dirty": False}
        )
        train(tiny_config(run_dir, epochs=epochs))
    first, second = history(run_dir)
    assert (first["git"]["commit"], second["git"]["commit"]) == ("1" * 40, "2" * 40)
    assert first["continues"] is None
    assert second["continues"] == {
        "checkpoint": "checkpoints/latest.pt",
        "epoch": 2,
        "config_sha256": first["config_sha256"],
        "config_changes": {"epochs": {"was": 2, "is": 4}},
    }
    # A command that finds nothing to do was not part of the work.
    train(tiny_config(run_dir, epochs=4))
    assert len(history(run_dir)) == 2


def test_a_run_from_another_run_s_checkpoint(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "one", epochs=2))
    source = tmp_path / "one" / "checkpoints" / "final.pt"
    train(tiny_config(tmp_path / "two", epochs=4, seed=9, resume=str(source)))
    (record,) = history(tmp_path / "two")
    assert record["continues"]["checkpoint"] == str(source)
    assert record["continues"]["config_sha256"] == history(tmp_path / "one")[0]["config_sha256"]
    assert record["continues"]["config_changes"]["seed"] == {"was": 0, "is": 9}


def test_a_killed_start_stays_in_the_history(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run")
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "PWM.observe = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert launcher.run(tmp_path, *arguments, hook=code).status == -9
    assert launcher.run(tmp_path, *arguments).status == 0
    records = history(tmp_path / "run")
    assert [r["continues"] for r in records] == [None, None]
    assert records[0]["config_sha256"] == records[1]["config_sha256"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "pwm_fast.run.provenance", "version": 7}'])
def test_a_damaged_record_is_said_first(text: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(tiny_config(run_dir, epochs=1))
    (run_dir / "provenance.json").write_text(text)
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"provenance\.json"):
        train(tiny_config(run_dir, epochs=2))
    assert (run_dir / "provenance.json").read_text() == text
    assert (run_dir / "metrics.jsonl").read_bytes() == before


# Git


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a folder of a git checkout with one commit; the package's folder."""
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package.parent / ".gitignore").write_text("ignored\n")
    try:
        git(package.parent, "init", "-q")
    except FileNotFoundError:
        pytest.skip("no git installed")
    git(package.parent, "add", ".")
    git(package, "commit", "-q", "-m", "first")
    return package


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    hidden = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env=hidden,
    ).stdout.strip()


def test_a_clean_checkout(checkout: Path) -> None:
    (checkout.parent / "ignored").write_text("of no interest")
    assert git_state(checkout) == {
        "commit": git(checkout, "rev-parse", "HEAD"),
        "dirty": False,
        "changed": [],
        "untracked": 0,
        "diff_sha256": None,
    }


def test_a_changed_checkout(checkout: Path) -> None:
    (checkout / "__init__.py").write_text("x = 2\n")
    one = git_state(checkout)
    assert one["dirty"] is True and one["changed"] == ["package/__init__.py"]
    (checkout / "__init__.py").write_text("x = 3\n")
    two = git_state(checkout)
    assert one["diff_sha256"] != two["diff_sha256"], "two changes are told apart"
    git(checkout, "add", ".")
    assert git_state(checkout)["diff_sha256"] == two["diff_sha256"], "staged or not"


def test_a_new_file_makes_a_checkout_dirty(checkout: Path) -> None:
    (checkout.parent / "private_name.py").write_text("")
    state = git_state(checkout)
    assert state["dirty"] is True and state["untracked"] == 1
    assert "private_name" not in json.dumps(state)


def test_another_project_s_checkout_is_not_ours(checkout: Path) -> None:
    """A virtual environment within a checkout: installed code has no commit of that project."""
    installed = checkout.parent / "venv" / "pwm_fast"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    state = git_state(installed)
    assert state["commit"] is None and state["reason"] == "the code is in no git checkout"


def test_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    state = git_state(tmp_path)
    assert state == {"commit": None, "dirty": None, "reason": "the code is in no git checkout"}


def test_no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert git_state(checkout)["reason"] == "git is not installed"


def test_of_a_git_hook(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GIT_DIR of another repository, as in a hook, does not mislead."""
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    assert git_state(checkout)["commit"] == commit
