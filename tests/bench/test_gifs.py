"""The GIFs of the docs: the command that makes them, and captions that are what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import gifs
from bench.pages import VIDEOS
from pwm_fast import config as configuration
from pwm_fast.config import TrainConfig
from pwm_fast.run import build
from pwm_fast.run.evaluation import EvaluateConfig
from tests.bench.stored import check_page, stored

pytest.importorskip("hydra", reason="needs pip install 'pwm-fast[train]'")

CARTPOLE = ("env=cartpole", "num_envs=8", "epochs=3", "seed=4")


def run(*overrides: str) -> TrainConfig:
    return configuration.compose(*overrides)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes what passes for a checkpoint of a run; GIFs and results go to ``tmp_path``."""
    monkeypatch.setattr(gifs, "FIGURES", tmp_path)
    monkeypatch.setattr(gifs, "STORE", tmp_path / "gifs.json")

    def evaluated(config: EvaluateConfig) -> dict[str, Any]:
        assert config.video is not None
        Path(config.video).write_bytes(b"GIF")
        n = config.episodes
        return {
            "env_steps": 1234,
            "epoch": 3,
            "episodes": n,
            "reward_mean": 1000.5,
            "reward_std": 9.0,
            "success": None,
            "returns": [float(i) for i in range(n)],
            "lengths": [10] * n,
        }

    monkeypatch.setattr(gifs, "evaluate_checkpoint", evaluated)

    def make(*overrides: str) -> Path:
        monkeypatch.setattr(build, "load_run", lambda _: (run(*overrides), {}))
        path = tmp_path / "best.pt"
        path.write_bytes(b"a checkpoint")
        return path

    return make


def test_the_captions_are_what_is_stored() -> None:
    pages = gifs.shown_on()
    assert VIDEOS in pages
    found = stored(gifs.STORE)
    assert set(found) == set(gifs.FILMS)
    for page in pages:
        check_page(page, gifs.SECTION, gifs.section(found, page))
    for name in found:
        data = (gifs.FIGURES / f"{name}.gif").read_bytes()
        assert data[:6] == b"GIF89a" and len(data) < 2e6


def test_a_film_and_its_record(trained: Callable[..., Path], tmp_path: Path) -> None:
    path = trained(*CARTPOLE)
    assert gifs.main([f"cartpole={path}"]) == 0
    kept = json.loads((tmp_path / "gifs.json").read_text())["cartpole"]
    assert (tmp_path / "cartpole.gif").read_bytes() == b"GIF"
    assert kept["trained"] == (
        "python -m pwm_fast.train env=cartpole num_envs=8 alg=pwm_tiny_flow epochs=3 seed=4"
    )
    assert kept["filmed"].endswith("video=cartpole.gif 'video_size=[320,240]'")
    assert len(kept["returns"]) == kept["episodes"] == 12
    assert str(tmp_path) not in json.dumps(kept)
    ant = trained("env=ant", "alg=pwm_small_flow", "esnr.every=0")
    assert gifs.main([f"ant={ant}"]) == 0
    both = json.loads((tmp_path / "gifs.json").read_text())
    assert set(both) == {"cartpole", "ant"}, "the others stay"
    assert both["ant"]["trained"].endswith("seed=0 esnr.every=0")
    assert both["ant"]["filmed"].endswith(" video_seconds=6")


@pytest.mark.parametrize("num_envs", ["num_envs=8", "env.num_envs=8"])
def test_the_command_repeats_the_run(num_envs: str) -> None:
    given = run("env=hopper", num_envs, "alg=pwm_small", "epochs=5", "alg.horizon=8", "threads=1")
    command = gifs.training_command(given)
    again = run(*command.removeprefix("python -m pwm_fast.train ").split())
    assert again.env_count == 8
    assert (again.alg, again.epochs, again.seed) == (given.alg, 5, 0)


def test_what_is_refused(trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("alg.horizon=8", "alg.gamma=0.9", "esnr.every=0", "alg.random_epochs=1")
    for given, overrides, message in (
        ("hopper={}", CARTPOLE, "the GIFs are of cartpole, ant, got hopper="),
        ("ant={}", CARTPOLE, "is a checkpoint of env=cartpole"),
        ("cartpole={}", (*CARTPOLE, *keys), "too many keys of its own for a caption: ['alg.g"),
    ):
        assert gifs.main([given.format(trained(*overrides))]) == 2
        assert message in capsys.readouterr().err
    assert not gifs.STORE.exists()
