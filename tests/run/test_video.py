"""Films: the pictures of the evaluated episodes in their order and time, or no file at all."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pwm_fast import evaluate as command
from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError
from pwm_fast.envs import CannotRender, VectorEnv
from pwm_fast.run import video
from pwm_fast.run.evaluation import EvaluateConfig, evaluate, evaluate_checkpoint
from pwm_fast.run.start import train
from pwm_fast.run.video import Film, Filming, TrainingFilm
from tests.envs.opengl import opengl
from tests.run.conftest import Launcher, content_of, rows, tiny_arguments, tiny_config
from tests.run.test_evaluation import Idle, Scripted

WIDTH, HEIGHT = 32, 16
SIZE = (WIDTH, HEIGHT)
needs_av = pytest.mark.usefixtures("av")


@pytest.fixture
def av() -> Any:
    pytest.importorskip("PIL")
    return pytest.importorskip("av", reason="needs pip install 'pwm-fast[video]'")


def colors(env: int, t: int) -> tuple[int, int]:
    return 85 * (env + 1), 85 * (t % 4)


class Painter:
    """Env i at step t is of this red and green; a GIF has these colours, whatever comes first."""

    def __init__(self, env: Filmed) -> None:
        self.env, self.step_seconds = env, env.step_seconds
        self.asked: list[int] = []
        self.closed = False

    def frame(self, env: int) -> np.ndarray:
        self.asked.append(env)
        picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        picture[..., :2] = colors(env, int(self.env.t[env]))
        return picture

    def close(self) -> None:
        self.closed = True


class Filmed(Scripted):
    """Shows pictures; see :class:`Painter`."""

    def __init__(self, lengths: list[int], step_seconds: float = 0.05) -> None:
        super().__init__(lengths)
        self.step_seconds = step_seconds

    def viewer(self, width: int, height: int) -> Painter:
        assert (width, height) == SIZE
        self.painter = Painter(self)
        return self.painter


def played(env: Filmed, path: Path, **options: Any) -> Any:
    filming = Filming(size=SIZE, **options)
    before = path.stat().st_size if path.exists() else None
    with closing(Film(cast(VectorEnv, env), path, filming)) as film:
        result = evaluate(cast(PWM, Idle()), cast(VectorEnv, env), 7, film=film)
        assert not path.exists() or path.stat().st_size == before, "until it is finished"
        film.finish()
    assert env.painter.closed
    return result


def pictures(av: Any, path: Path) -> tuple[list[np.ndarray], Fraction]:
    """The frames of a file, and how many there are a second."""
    with av.open(str(path)) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return found, container.streams.video[0].average_rate


def shade(tile: np.ndarray) -> tuple[int, int]:
    """Red and green, the same all over but for rounding."""
    assert tile.std(axis=(0, 1)).max() < 12
    return tuple(int(v) for v in tile.mean(axis=(0, 1))[:2].round())


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_episodes_side_by_side(kind: str, av: Any, tmp_path: Path) -> None:
    env = Filmed([4, 8, 6])
    path = tmp_path / f"out.{kind}"
    result = played(env, path, episodes=3)
    assert result.lengths.tolist() == [4, 8, 6]
    found, rate = pictures(av, path)
    assert (len(found), rate) == (8, 20), "one for each step of the longest, in real time"
    assert found[0].shape == (2 * HEIGHT, 2 * WIDTH, 3)
    for t, picture in enumerate(found):
        tiles = picture.reshape(2, HEIGHT, 2, WIDTH, 3).transpose(0, 2, 1, 3, 4)
        for i, length in enumerate((4, 8, 6)):
            seen, last = shade(tiles[divmod(i, 2)]), colors(i, min(t, length - 1))
            expected = last if t < length else np.floor_divide(last, 2)
            # Half of a colour is not of a GIF's 64, but no further from one than this.
            slack = 12 if t < length or kind == "mp4" else 43
            assert np.abs(np.subtract(seen, expected)).max() <= slack, (t, i)
        assert shade(tiles[1, 1]) <= (6, 6), "nobody is there"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("kind", "seconds", "options", "every", "rate"),
    [
        ("mp4", 1 / 60, {}, 1, 60),
        ("gif", 1 / 60, {}, 3, 20),
        ("mp4", 0.008, {}, 3, Fraction(125, 3)),
        ("gif", 0.02, {}, 2, 25),
        ("gif", 0.1, {}, 1, 10),
        ("mp4", 1 / 60, {"fps": 20.0}, 3, 20),
        ("mp4", 1 / 60, {"fps": 25.0}, 3, 20),
        ("mp4", 0.05, {"fps": 300.0}, 1, 20),
        ("mp4", 0.001, {"fps": 300.0}, 17, Fraction(1000, 17)),
    ],
)
def test_real_time(
    kind: str, seconds: float, options: Any, every: int, rate: Any, av: Any, tmp_path: Path
) -> None:
    env = Filmed([40], seconds)
    played(env, tmp_path / f"out.{kind}", **options)
    found, there = pictures(av, tmp_path / f"out.{kind}")
    assert len(found) == len(env.painter.asked) == -(-40 // every)
    assert float(there) == pytest.approx(float(rate), rel=0.02)
    assert shade(found[1]) == pytest.approx(colors(0, every), abs=8)


def test_the_first_seconds_of_the_first_episode(av: Any, tmp_path: Path) -> None:
    env = Filmed([30, 40])
    played(env, tmp_path / "out.mp4", seconds=0.5)
    assert env.painter.asked == [0] * 10
    env = Filmed([5, 40])
    played(env, tmp_path / "out.mp4")
    assert env.painter.asked == [0] * 5
    assert len(pictures(av, tmp_path / "out.mp4")[0]) == 5, "its end ends the film"
    env = Filmed([2])
    played(env, tmp_path / "out.MP4", episodes=3)
    assert env.painter.asked == [0] * 2, "there are not more"


@needs_av
@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("after", [0, 3])
def test_an_evaluation_that_stops_leaves_no_file(kind: str, after: int, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    path.write_text("an older one")
    calls = iter(range(after))

    def check() -> None:
        next(calls)

    env = Filmed([10])
    film = Film(cast(VectorEnv, env), path, Filming(size=SIZE))
    with pytest.raises(StopIteration), closing(film):
        evaluate(cast(PWM, Idle()), cast(VectorEnv, env), 7, check=check, film=film)
    assert len(env.painter.asked) == after and env.painter.closed
    assert content_of(tmp_path) == {path.name: b"an older one"}


@needs_av
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"No space left on device.*out\.mp4"):
        played(Filmed([3]), tmp_path / "out.mp4")
    assert content_of(tmp_path) == {}


# --- what is refused ------------------------------------------------------------------------------


@needs_av
@pytest.mark.parametrize(
    ("name", "filming", "message"),
    [
        ("out.avi", Filming(), r"video must end in .mp4 or .gif, got '.*out.avi'"),
        ("out", Filming(), r"video must end in .mp4 or .gif"),
        ("no/out.mp4", Filming(), "there is no directory .*no"),
        ("folder.gif", Filming(), "cannot be written; give another video=PATH"),
        ("a.mp4", Filming(5, (4096, 64)), r"video_episodes=5 .* 12288 x 128, at most 8192 a side"),
    ],
)
def test_wrong_paths_and_sizes(name: str, filming: Filming, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(ConfigError, match=message):
        video.check(tmp_path / name, filming)


@pytest.mark.parametrize("module", ["av", "PIL.Image"])
def test_a_missing_package(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("av", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, io)  # there
    video.require_packages()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'pwm-fast\[video\]'"):
        video.check(tmp_path / "out.mp4", Filming())
    with pytest.raises(ConfigError, match=r"pip install 'pwm-fast\[video\]'"):
        train(tiny_config(tmp_path / "run", eval__video_every=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"video": ""}, "video must be a path or null"),
        ({"video": None, "video_episodes": 2}, "video must be a path where other keys of the film"),
        ({"video": None, "video_fps": 30.0}, "video must be a path where other keys of the film"),
        ({"video_size": [640]}, r"video_size must be \[width, height\], both even"),
        ({"video_size": [640, 481]}, r"video_size must be .* got \[640, 481\]"),
        ({"video_size": [8, 480]}, r"in \[16, 8192\]"),
        ({"video_episodes": 0}, "video_episodes must be positive"),
        ({"video_episodes": 13}, "video_episodes must be at most episodes=12, got 13"),
        ({"video_seconds": 0.0}, "video_seconds must be positive or null"),
        ({"video_fps": -1.0}, "video_fps must be positive or null"),
    ],
)
def test_wrong_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig("a.pt", **{"video": "a.mp4", **keys})


@needs_av
def test_refused_before_any_episode(finished: Path, tmp_path: Path) -> None:
    """And before the checkpoint is read: this one is none."""
    config = EvaluateConfig(str(finished / "metrics.jsonl"), video=str(tmp_path / "no" / "a.gif"))
    with pytest.raises(ConfigError, match="there is no directory"):
        evaluate_checkpoint(config)


# --- the command ----------------------------------------------------------------------------------


@needs_av
@pytest.mark.parametrize("json_to", ["result.json", "-"])
def test_the_command(
    json_to: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    opengl()
    target, path = tmp_path / "result.json", str(finished / "checkpoints" / "final.pt")
    plain = evaluate_checkpoint(EvaluateConfig(path, episodes=3, device="cpu"))
    config = EvaluateConfig(
        path,
        episodes=3,
        device="cpu",
        json=json_to if json_to == "-" else str(target),
        video=str(tmp_path / "out.gif"),
        video_episodes=2,
        video_size=[96, 64],
    )
    assert command.run(OmegaConf.structured(config)) == 0
    said = capsys.readouterr()
    text = said.out if json_to == "-" else target.read_text()
    found = json.loads(text)
    assert plain.pop("video") is None
    assert found.pop("video") == str(tmp_path / "out.gif")
    assert found == plain, "filming changes nothing"
    assert f"filmed in {tmp_path / 'out.gif'}" in (said.err if json_to == "-" else said.out)


def test_the_pictures_of_the_command(av: Any, finished: Path, tmp_path: Path) -> None:
    opengl()
    path = str(finished / "checkpoints" / "final.pt")
    target = tmp_path / "out.mp4"
    options: dict[str, Any] = {"video": str(target), "video_episodes": 2, "video_size": [96, 64]}
    evaluate_checkpoint(EvaluateConfig(path, episodes=3, device="cpu", **options))
    found, rate = pictures(av, target)
    assert (len(found), found[0].shape, rate) == (12, (64, 192, 3), 60)
    assert all(picture.std() > 8 for picture in found), "something is to be seen"
    assert np.abs(found[0].astype(int) - found[-1]).max() > 30, "and it moves"
    assert np.abs(found[0][:, :96].astype(int) - found[0][:, 96:]).max() > 30


def test_other_libraries_are_asked_for_pictures() -> None:
    config = tiny_config(Path("run"), "gym", env__id="Pendulum-v1", env__kwargs={"g": 9.0})
    assert video.visible(config.env).options["kwargs"] == {"render_mode": "rgb_array", "g": 9.0}
    assert config.env.options["kwargs"] == {"g": 9.0}
    own = tiny_config(Path("run"), "gym", env__kwargs={"render_mode": "human"}).env
    assert video.visible(own).options["kwargs"] == {"render_mode": "human"}
    robot = tiny_config(Path("run")).env
    assert video.visible(robot) == robot


@pytest.mark.usefixtures("no_plots")
def test_gymnasium(av: Any, tmp_path: Path) -> None:
    pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")
    opengl()
    train(tiny_config(tmp_path / "run", "gym", env__id="Hopper-v5", epochs=1))
    path = str(tmp_path / "run" / "checkpoints" / "final.pt")
    options: dict[str, Any] = {"video": str(tmp_path / "out.mp4"), "video_size": [64, 64]}
    plain = evaluate_checkpoint(EvaluateConfig(path, episodes=2, device="cpu"))
    found = evaluate_checkpoint(EvaluateConfig(path, episodes=2, device="cpu", **options))
    assert found["returns"] == plain["returns"]
    shown, _ = pictures(av, tmp_path / "out.mp4")
    assert shown[0].shape == (64, 64, 3) and shown[0].std() > 8


# --- training -------------------------------------------------------------------------------------


class Broken(Painter):
    """Fails at the third picture."""

    def frame(self, env: int) -> np.ndarray:
        if len(self.asked) == 2:
            raise CannotRender("the screen fell down")
        return super().frame(env)


class Full(video._Encoder):
    """Cannot be written, and so not be closed either."""

    def add(self, picture: np.ndarray) -> None:
        self._container.close()
        self._container = self
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        if self._container is self:
            self._container = object()  # which has no close
        super().close()


@needs_av
@pytest.mark.parametrize("where", ["viewer", "frame", "encoder", "finish"])
def test_a_film_in_training_may_fail(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, errors = Filmed([5]), list[Exception]()
    if where == "viewer":
        monkeypatch.setattr(Filmed, "viewer", None)
    if where == "frame":
        monkeypatch.setattr(sys.modules[__name__], "Painter", Broken)
    if where == "encoder":
        monkeypatch.setattr(video, "_Encoder", Full)
    path = tmp_path / "videos" / "a.mp4"
    film = TrainingFilm(cast(VectorEnv, env), path, Filming(size=SIZE), errors.append)
    with closing(film):
        if where == "finish":
            path.mkdir()
        result = evaluate(cast(PWM, Idle()), cast(VectorEnv, env), 7, film=film)
        assert result.lengths.tolist() == [5]
        assert not film.finish()
        assert not film.finish()
    assert len(errors) == 1
    assert where == "viewer" or env.painter.closed
    assert not path.is_file() and not list(tmp_path.glob("videos/.*"))


@needs_av
def test_a_film_in_training(tmp_path: Path) -> None:
    def failed(error: Exception) -> None:
        raise error

    env, path = Filmed([5]), tmp_path / "videos" / "a.mp4"
    with closing(TrainingFilm(cast(VectorEnv, env), path, Filming(size=SIZE), failed)) as film:
        evaluate(cast(PWM, Idle()), cast(VectorEnv, env), 7, film=film)
        assert film.finish()
    assert path.stat().st_size > 100 and env.painter.closed


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(video, "TRAINING", Filming(size=(48, 32), fps=30.0))
    yield


@pytest.mark.usefixtures("no_plots", "small")
def test_a_run_films_its_evaluations(av: Any, finished: Path, tmp_path: Path) -> None:
    opengl()
    run = tmp_path / "run"
    train(tiny_config(run, eval__video_every=2))
    names = sorted(p.name for p in (run / "videos").iterdir())
    assert names == ["epoch_0.mp4", "epoch_4.mp4", "final.mp4"], "every other of 0, 2, 4 and 6"
    shown, rate = pictures(av, run / "videos" / "final.mp4")
    assert (len(shown), shown[0].shape, rate) == (6, (32, 48, 3), 30)
    assert rows(run) == rows(finished), "filming changes nothing"


@pytest.mark.usefixtures("no_plots", "small", "av")
def test_a_run_without_opengl_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []

    def none(*args: Any) -> None:
        asked.append(args)
        raise CannotRender("there is no OpenGL to draw with")

    monkeypatch.setattr(video, "viewer_of", none)
    summary, status = train(tiny_config(tmp_path / "run", eval__video_every=1))
    assert (summary["status"], status, len(asked)) == ("finished", 0, 1)
    said = capsys.readouterr().out
    assert said.count("no evaluation is filmed from here on: there is no OpenGL to draw with") == 1
    assert rows(tmp_path / "run") == rows(finished)
    assert not list((tmp_path / "run").glob("videos/*"))


@pytest.mark.usefixtures("no_plots")
def test_a_run_films_nothing_unasked(finished: Path) -> None:
    assert not (finished / "videos").exists()


@needs_av
@pytest.mark.slow
def test_films_go_to_wandb(launcher: Launcher, tmp_path: Path) -> None:
    """And a run that draws before its first update goes on, which loads Triton."""
    pytest.importorskip("wandb")
    from tests.run.wandb_files import history

    opengl()
    run = tmp_path / "run"
    arguments = tiny_arguments(run, "wandb.mode=offline", "eval.video_every=3")
    outcome = launcher.run(tmp_path, *arguments)
    assert (outcome.status, outcome.err) == (0, "")
    (path,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    logged = {
        key: [row["epoch"] for row in history(path) if key in row]
        for key in ("eval_video", "final_video")
    }
    assert logged == {"eval_video": [0, 6], "final_video": [6]}
    assert len(list((run / "wandb").glob("offline-run-*/files/media/videos/*.mp4"))) == 3
