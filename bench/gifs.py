"""The GIFs of trained policies in docs/figures, and the captions of the pages that show them.

python -m bench.gifs cartpole=CHECKPOINT ant=CHECKPOINT   # film these; the others stay
python -m bench.gifs --docs                               # the captions, of what is stored

Each is of the first of 12 episodes that ``python -m pwm_fast.evaluate`` evaluates. A caption names
the training command: a run that no short command repeats is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, pages, results
from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.envs import CannotRender
from pwm_fast.run import build, provenance
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint

FIGURES = environment.ROOT / "docs" / "figures"
STORE = results.STORE / "gifs.json"
SECTION = "gifs"
# Of the robots: what a caption calls them, and the seconds that are filmed.
FILMS = {"cartpole": ("Cart-pole swing-up", None), "ant": ("Ant", 6.0)}
SIZE, EPISODES = [320, 240], 12
MOST_KEYS = 3  # of a training command, besides those of every one
# What an episode of the evaluation came to, and all of them.
KEPT = ("episodes", "reward_mean", "reward_std", "success", "returns", "lengths", "epoch")


def film(name: str, checkpoint: Path) -> dict[str, Any]:
    """Film a robot's policy; what is to be stored of it.

    Raises:
        ConfigError: there is no such film, the run is of another environment, or it has no short
            command.
        CheckpointError: the checkpoint cannot be read.
        CannotRender: there is no OpenGL.
    """
    if name not in FILMS:
        raise ConfigError(f"the GIFs are of {', '.join(FILMS)}, got {name}={checkpoint}")
    run, _ = build.load_run(checkpoint)
    if run.env.name != name:
        raise ConfigError(f"{name}={checkpoint} is a checkpoint of env={run.env.name}")
    trained, path = training_command(run), FIGURES / f"{name}.gif"
    config = EvaluateConfig(
        str(checkpoint),
        episodes=EPISODES,
        device="cpu",
        video=str(path),
        video_size=SIZE,
        video_seconds=FILMS[name][1],
    )
    found = evaluate_checkpoint(config)
    seconds = "" if config.video_seconds is None else f" video_seconds={config.video_seconds:g}"
    size = str(SIZE).replace(" ", "")
    return {
        "trained": trained,
        "env_steps": found["env_steps"],
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "filmed": "python -m pwm_fast.evaluate checkpoint=CHECKPOINT "
        f"video={path.name} 'video_size={size}'{seconds}",
        **{key: found[key] for key in KEPT},
        **environment.describe(torch.device("cpu")),
    }


def training_command(run: TrainConfig) -> str:
    """The command that repeats a run: its environment, agent, size and seed, and few other keys.

    Raises:
        ConfigError: more than :data:`MOST_KEYS` of them.
    """
    keys = {
        "env": run.env.name,
        "num_envs": run.env_count,
        "alg": run.alg.name,
        "epochs": run.epochs,
        "seed": run.seed,
    }
    given = [f"{key}={value}" for key, value in keys.items()]
    ours, theirs = (
        provenance.flat(configuration.to_dict(config))
        for config in (run, configuration.compose(*given))
    )
    for config in (ours, theirs):  # the number of envs may stand in either
        config["num_envs"] = config["num_envs"] or config["env.num_envs"]
        config["env.num_envs"] = None
    own = {
        key: ours.get(key)
        for key in sorted(ours.keys() | theirs.keys())
        if not provenance.within(key, provenance.HOW_IT_RUNS) and ours.get(key) != theirs.get(key)
    }
    if len(own) > MOST_KEYS or not all(type(value) in (int, float, str) for value in own.values()):
        raise ConfigError(f"this run has too many keys of its own for a caption: {list(own)}")
    given += [f"{key}={value}" for key, value in own.items()]
    return f"python -m pwm_fast.train {' '.join(given)}"


def section(stored: dict[str, Any], page: Path) -> str:
    """The GIFs side by side with their captions, for a page."""
    folder = FIGURES.relative_to(page.parent).as_posix()
    names = [name for name in FILMS if name in stored]
    captions, commands = [], []
    for name in names:
        found, (title, seconds) = stored[name], FILMS[name]
        shown = "an episode" if seconds is None else f"the first {seconds:g} s of an episode"
        held = found["success"]
        captions.append(
            f"**{title}**: {shown} with a return of {found['returns'][0]:,.0f}. The mean of "
            f"{found['episodes']} is {found['reward_mean']:,.0f} +- {found['reward_std']:,.0f}"
            + ("." if held is None else f"; the pole stays up in {held:.0%} of them.")
        )
        commands.append(f"`{found['trained']}`, best policy, after {found['env_steps']:,} steps")
    pictures = [f"![{FILMS[name][0]}]({folder}/{name}.gif)" for name in names]
    return pages.markdown(pictures, [captions, commands])


def main(argv: Sequence[str] | None = None) -> int:
    """Film, or write captions; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gifs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("films", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--docs", action="store_true", help="write the pages that show them")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        stored = json.loads(STORE.read_text("utf-8")) if STORE.is_file() else {}
        for given in args.films:
            name, _, checkpoint = given.partition("=")
            stored[name] = film(name, Path(checkpoint))
            results.write(STORE, stored)
        for page in shown_on() if args.docs else []:
            pages.write(page, SECTION, section(stored, page))
    except (ConfigError, CheckpointError, CannotRender, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def shown_on() -> list[Path]:
    """The pages that have a place for the GIFs."""
    begin = f"<!-- {SECTION}:begin -->"
    return [p for p in (pages.README, pages.VIDEOS) if begin in p.read_text("utf-8")]


if __name__ == "__main__":
    raise SystemExit(main())
