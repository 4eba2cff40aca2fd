"""Films of evaluations: MP4 files and GIFs, with PyAV."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from pwm_fast import files, optional
from pwm_fast.config import ConfigError, EnvConfig
from pwm_fast.envs import VectorEnv, choose_gl, viewer_of

NEEDED = "films need PyAV and Pillow: pip install 'pwm-fast[video]'"
MOST_PIXELS = 8192  # of a side of the whole picture
COLORS = 256  # of a GIF
LEVELS = 0, 85, 170, 255  # of red, green and blue, all 64 mixtures of which it has


class Kind(NamedTuple):
    """What a file name's ending stands for.

    Attributes:
        codec: FFmpeg's.
        pixels: FFmpeg's name of the pixels' format.
        rate: the most pictures a second; browsers show no more than 50 of a GIF.
    """

    codec: str
    pixels: str
    rate: float


KINDS = {".mp4": Kind("libx264", "yuv420p", 60.0), ".gif": Kind("gif", "pal8", 25.0)}


@dataclass(frozen=True)
class Filming:
    """What is filmed of an evaluation.

    Attributes:
        episodes: the first ones of the evaluation, side by side in one picture.
        size: width and height in pixels of the picture of one of them; both are even.
        seconds: of simulated time, at most; None is to the end of the longest.
        fps: the most pictures a second; None is what the kind of file can show. A whole number of
            control steps is between two of them, so that it plays in real time.
    """

    episodes: int = 1
    size: tuple[int, int] = (640, 480)
    seconds: float | None = None
    fps: float | None = None


TRAINING = Filming(size=(320, 240), fps=30.0)  # small: no run should wait for its films


def check(path: Path, filming: Filming) -> None:
    """Look at everything that can be known before an environment is made.

    Raises:
        ConfigError: the name's ending is of no film, its directory is not there or not writable,
            the picture is too large, or a package is missing.
    """
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"video must end in {' or '.join(KINDS)}, got {str(path)!r}")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"video={path}: there is no directory {folder}")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"video={path} cannot be written; give another video=PATH")
    width, height = _sheet(filming)
    if max(width, height) > MOST_PIXELS:
        raise ConfigError(
            f"video_episodes={filming.episodes} of video_size={list(filming.size)} make a picture "
            f"of {width} x {height}, at most {MOST_PIXELS} a side"
        )
    require_packages()


def require_packages() -> None:
    """Look for what films are written with.

    Raises:
        ConfigError: a package is missing, or broken.
    """
    for module in ("av", "PIL.Image"):
        _imported(module)


def visible(env: EnvConfig) -> EnvConfig:
    """The environment as one that shows pictures, which some have to know when they are made.

    Also chooses what MuJoCo draws with, before dm_control looks.
    """
    choose_gl()
    if env.name != "gym":
        return env
    kwargs = {"render_mode": "rgb_array", **(env.options.get("kwargs") or {})}
    return replace(env, options={**env.options, "kwargs": kwargs})


class Film:
    """The first episodes of an evaluation, encoded as they are played.

    An episode is filmed up to the state before its last step, since the env restarts within that
    step; its picture then stays, at half the brightness, until the others are over. The file
    appears as a whole, when :meth:`finish` is called.

    Args:
        env: plays the episodes.
        path: of the file; its ending is one of :data:`KINDS`.
        filming: what is filmed.

    Raises:
        ConfigError: as of :func:`check`.
        CannotRender: the environment shows no pictures, or not here.
    """

    def __init__(self, env: VectorEnv, path: Path, filming: Filming) -> None:
        check(path, filming)
        kind = KINDS[path.suffix.lower()]
        self._path, self._size = path, filming.size
        self._count = min(filming.episodes, env.num_envs)
        width, height = _sheet(replace(filming, episodes=self._count))
        self._columns = width // filming.size[0]
        self._picture = np.zeros((height, width, 3), dtype=np.uint8)
        self._shown = [True] * self._count  # whose episode was not over at the last look
        self._steps = 0
        with ExitStack() as stack:
            self._viewer = stack.enter_context(closing(viewer_of(env, *filming.size)))
            seconds = self._viewer.step_seconds
            most = kind.rate if filming.fps is None else min(filming.fps, kind.rate)
            # A hair less, for rates of which the steps' seconds are rounded.
            self._every = max(1, math.ceil(1.0 / (seconds * most) - 1e-6))
            self._limit = math.inf if filming.seconds is None else filming.seconds / seconds
            rate = 1 / (Fraction(seconds).limit_denominator(10_000) * self._every)
            # In the folder, where there is room for it or is not; it has no name.
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            self._encoder = stack.enter_context(
                closing(_Encoder(self._file, path.suffix[1:].lower(), kind, rate, width, height))
            )
            self._open = stack.pop_all()

    def add(self, running: Tensor) -> None:
        """Film the state that the envs are in, if a picture is due.

        Args:
            running: bool ``[N]``, whose episode is not over; called once before every step.

        Raises:
            CannotRender: an env gave no picture.
        """
        step, self._steps = self._steps, self._steps + 1
        if step % self._every or step >= self._limit:
            return
        alive = running[: self._count].tolist()
        if not any(alive):
            return
        width, height = self._size
        for i, (on, was_on) in enumerate(zip(alive, self._shown, strict=True)):
            row, column = divmod(i, self._columns)
            top, left = row * height, column * width
            tile = self._picture[top : top + height, left : left + width]
            if on:
                tile[:] = self._viewer.frame(i)
            elif was_on:
                tile //= 2
        self._shown = alive
        self._encoder.add(self._picture)

    def finish(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written; what had its name is untouched.
        """
        self._encoder.finish()
        self._file.seek(0)
        with files.replacing(self._path) as file:
            shutil.copyfileobj(self._file, file)

    def close(self) -> None:
        """Release everything; without :meth:`finish` before there is no file."""
        self._open.close()


class TrainingFilm:
    """A film of an evaluation in training: what goes wrong with it is told, and ends no run.

    Args:
        env: plays the episodes.
        path: of the file; its directory is made.
        filming: what is filmed.
        failed: is told what went wrong, once; nothing more is filmed then.
    """

    def __init__(
        self, env: VectorEnv, path: Path, filming: Filming, failed: Callable[[Exception], None]
    ) -> None:
        self._film: Film | None = None
        self._failed = failed

        def begin() -> None:
            path.parent.mkdir(exist_ok=True)
            self._film = Film(env, path, filming)

        self._try(begin)

    def add(self, running: Tensor) -> None:
        """See :meth:`Film.add`."""
        if self._film is not None:
            self._try(self._film.add, running)

    def finish(self) -> bool:
        """Write the file; whether there is one."""
        return self._film is not None and self._try(self._film.finish)

    def close(self) -> None:
        """See :meth:`Film.close`."""
        film, self._film = self._film, None
        if film is not None:
            with suppress(Exception):  # what could not be written is written again by closing
                film.close()

    def _try(self, call: Callable[..., None], *args: Any) -> bool:
        try:
            call(*args)
        except Exception as error:
            self.close()
            self._failed(error)
            return False
        return True


class _Encoder:
    """Encodes pictures of one size into an open file, one after another.

    Args:
        file: to write to; the container seeks in it.
        container: FFmpeg's name of its format.
        kind: of the pictures in it.
        rate: pictures a second.
        width: of a picture, pixels.
        height: likewise.
    """

    def __init__(
        self, file: BinaryIO, container: str, kind: Kind, rate: Fraction, width: int, height: int
    ) -> None:
        self._av = _imported("av")
        self._container = self._av.open(file, "w", format=container)
        self._stream = self._container.add_stream(kind.codec, rate=rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = kind.pixels
        self._few_colors = kind.pixels == "pal8"
        self._palette: Any = None
        self._colors = np.full((COLORS, 4), 255, dtype=np.uint8)

    def add(self, picture: np.ndarray) -> None:
        """Encode the next picture, uint8 ``[height, width, 3]``."""
        make = self._av.VideoFrame.from_ndarray
        if self._few_colors:
            frame = make(self._indexed(picture), format="pal8")
        else:
            frame = make(picture, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what is held back, and the container's end."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """Release the encoder, whatever was written."""
        with suppress(Exception):
            self._container.close()

    def _indexed(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices ``[height, width]`` and the palette: alpha, red, green and blue ``[256, 4]``.

        All pictures have one palette, so that what does not move does not change: the first one's
        colours, and a few of every kind for what it does not show.
        """
        image = _imported("PIL.Image")
        given, plain = image.fromarray(picture), image.Dither.NONE
        if self._palette is None:
            mixtures = [v for color in itertools.product(LEVELS, repeat=3) for v in color]
            own = given.quantize(COLORS - len(mixtures) // 3, dither=plain).getpalette()
            self._palette = image.new("P", (1, 1))
            self._palette.putpalette(own + mixtures)
            self._colors[: len(own + mixtures) // 3, 1:] = np.reshape(own + mixtures, (-1, 3))
        return np.asarray(given.quantize(palette=self._palette, dither=plain)), self._colors


def _sheet(filming: Filming) -> tuple[int, int]:
    """Width and height of the picture with all episodes in rows."""
    columns = math.ceil(math.sqrt(filming.episodes))
    width, height = filming.size
    return columns * width, math.ceil(filming.episodes / columns) * height


def _imported(module: str) -> Any:
    try:
        # Not the import statement: what its types look like depends on what is installed.
        return import_module(module)
    except Exception as error:  # what a broken installation raises can be anything
        raise ConfigError(optional.reason(error, module.partition(".")[0], NEEDED)) from error
