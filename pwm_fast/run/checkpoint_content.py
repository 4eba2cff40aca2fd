"""What the parts of a checkpoint have to look like, checked before anything takes them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pwm_fast.backends import select
from pwm_fast.run.checkpoint import CheckpointError

DEEPEST = 20  # containers within one another in a configuration, which has about 5
MOST = 2**62  # what a tensor can count

Rule = tuple[Callable[[Any], bool], str]


def check(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with a part of a wrong type, size or range.

    The agent's parameters are compared with the agent that takes them up
    (:meth:`pwm_fast.agent.PWM.load_state_dict`), and so is the state of the environment.

    Args:
        path: named in the message.
        content: what :func:`pwm_fast.run.checkpoint.load` gives.

    Raises:
        CheckpointError: naming the file, the part, and what it should be.
    """
    for key, (fits, expected) in RULES.items():
        if not fits(content.get(key)):
            raise CheckpointError(
                f"{path} cannot be used: {key} must be {expected}, got {shown(content.get(key))}"
            )
    for key, expected in _replay_problems(content["replay"]):
        raise CheckpointError(
            f"{path} cannot be used: replay.{key} must be {expected}, got "
            f"{shown(content['replay'].get(key))}"
        )


def unlike(saved: Any, own: Any, name: str) -> Iterator[str]:
    """Where the containers and tensors of a saved state are of another kind than this run's own.

    What only one of them has is passed over, and so are None, the length of lists, and sizes of
    byte tensors, which are states of generators.

    Args:
        saved: nested containers of tensors, numbers and strings.
        own: the same of this run.
        name: of the state, for the messages.
    """
    if saved is None or own is None:
        return
    if isinstance(own, Tensor) and isinstance(saved, Tensor):
        sizes = saved.dtype == torch.uint8 or saved.shape == own.shape
        if saved.dtype != own.dtype or not sizes:
            yield f"{name} is {shown(saved)} instead of {shown(own)}"
    elif _kind(saved) != _kind(own):
        yield f"{name} is {shown(saved)} instead of {shown(own)}"
    elif isinstance(own, dict):
        for key in own:
            if key in saved:
                yield from unlike(saved[key], own[key], f"{name}.{key}")
    elif isinstance(own, (list, tuple)):
        for i, (theirs, ours) in enumerate(zip(saved, own, strict=False)):
            yield from unlike(theirs, ours, f"{name}.{i}")


def shown(value: Any) -> str:
    """A value for a message, in a few words."""
    if isinstance(value, Tensor):
        text = f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        odd = value.is_floating_point() and not bool(value.isfinite().all())
        return text + (" with NaN or infinite values" if odd else "")
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}, {text[:36]}..."


def _kind(value: Any) -> object:
    kinds: tuple[Any, ...] = (dict, (list, tuple), bool, (int, float), Tensor)
    return next((kind for kind in kinds if isinstance(value, kind)), type(value))


# --- rules ----------------------------------------------------------------------------------------


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and _number(v) for k, v in value.items()
    )


def _best(value: Any) -> bool:
    if not _numbers(value):
        return False
    whole = {"reward", "epoch", "env_steps"} <= value.keys()
    counts = ("epoch", "env_steps", *({"diverged"} & value.keys()))  # older ones lack the last
    return not value or (whole and all(_count(value[key]) for key in counts))


def _evaluated(value: Any) -> bool:
    return _numbers(value) and (not value or {"reward", "episode_length"} <= value.keys())


def _config(value: Any) -> bool:
    sections = (value.get("env"), value.get("alg")) if isinstance(value, dict) else (None,)
    named = all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in sections)
    return named and _plain(value)


def _plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (dict, list, tuple)) and depth == DEEPEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, (str, bool, int, float))


def _progress(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    done, sums, counts = value.get("done"), value.get("sums"), value.get("counts")
    if not (isinstance(done, dict) and isinstance(sums, dict) and isinstance(counts, dict)):
        return False
    return (
        all(isinstance(k, str) and _count(v) for k, v in done.items())
        and sums.keys() == counts.keys()
        and all(isinstance(k, str) and _scalar(v) for k, v in sums.items())
        and all(_scalar(v) or _count(v) for v in counts.values())
        and isinstance(value.get("totals", []), list)
        and all(isinstance(k, str) for k in value.get("totals", []))
    )


def _scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _rows(value: Any) -> bool:
    """A finite matrix, one row an env."""
    fits = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    return fits and bool(value.isfinite().all())


def _of_dicts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, dict) for k, v in value.items()
    )


def _rng(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    cuda, numpy, python = (value.get(key) for key in ("cuda", "numpy", "python"))
    return (
        isinstance(value.get("torch"), Tensor)
        and isinstance(cuda, list)
        and all(isinstance(state, Tensor) for state in cuda)
        and isinstance(numpy, list)
        and len(numpy) == 5
        and isinstance(numpy[1], Tensor)
        and isinstance(python, list)
        and len(python) == 3
    )


def _data(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("manifest_sha256"), str)
    )


def _imported(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"file", "sha256", "of"}
        and all(isinstance(each, str) for each in value.values())
    )


def _ended(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"episodes", "diverged"}
        and all(map(_count, value.values()))
    )


def _ranks(value: Any) -> bool:
    if value is None:
        return True
    envs, rngs = (value.get("env"), value.get("rng")) if isinstance(value, dict) else (None, None)
    return (
        isinstance(envs, list)
        and isinstance(rngs, list)
        and len(envs) == len(rngs) > 1
        and all(state is None or isinstance(state, dict) for state in envs)
        and all(map(_rng, rngs))
    )


RULES: dict[str, Rule] = {
    "config": (_config, "the configuration of a run, in plain containers"),
    "epoch": (_count, "a number of epochs, 0 or more"),
    "bootstrapped": (lambda v: type(v) is bool, "true or false"),
    "wall_time": (lambda v: _number(v) and 0.0 <= v < math.inf, "seconds, 0 or more"),
    "best": (_best, "empty, or reward, epoch and env_steps of an evaluation"),
    "latest_eval": (_evaluated, "empty, or reward and episode_length of an evaluation"),
    "progress": (_progress, "done, sums and counts of an epoch's steps"),
    "agent": (_of_dicts, "parameters, statistics and optimisers"),
    "obs": (_rows, "finite observations of all envs"),
    "held_action": (_rows, "finite actions of all envs"),
    "env": (lambda v: v is None or isinstance(v, dict), "the state of an environment, or None"),
    "rng": (_rng, "states of random number generators"),
    "replay": (lambda v: v is None or isinstance(v, dict), "a replay, or None"),
    "data": (_data, "what the replay was filled with, or None"),
    "imported": (_imported, "file, sha256 and of, the code that wrote it, or None"),
    "ended": (_ended, "numbers of episodes, in all and diverged, or None"),
    "precision": (
        lambda v: v is None or (isinstance(v, str) and v in select.PRECISIONS),
        f"one of {', '.join(select.PRECISIONS)}, or None",
    ),
    "ranks": (_ranks, "env and rng of the ranks of a run in several processes, or None"),
    "seeding": (lambda v: v is None or _count(v), "a version of how seeds are derived, or None"),
}


def _replay_problems(replay: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Parts of a replay that do not fit together, and what they should be."""
    if replay is None:
        return
    shape = replay.get("shape")
    if not (isinstance(shape, (list, tuple)) and len(shape) == 5 and all(map(_count, shape))):
        yield "shape", "five numbers: envs, rows, obs, action, horizon"
        return
    num_envs, rows, obs, action, _ = shape
    width = obs + action + 2
    data = replay.get("data")
    used = data.shape[1] if isinstance(data, Tensor) and data.dim() == 3 else 0
    if used > rows or not _like(data, torch.float32, num_envs, used, width):
        yield "data", f"float32 [{num_envs}, up to {rows}, {width}]"
        return
    for key, dtype, shape in (
        ("run", torch.int32, (num_envs, used)),
        ("cursor", torch.int64, (num_envs,)),
        ("length", torch.int32, (num_envs,)),
    ):
        value = replay.get(key)
        if not (_like(value, dtype, *shape) and bool((value >= 0).all())):
            yield key, f"{str(dtype).removeprefix('torch.')} {list(shape)}, 0 or more"
        elif key == "cursor" and bool((value >= rows).any()):
            yield key, f"of {rows} rows"
    yield from _kept_problems(replay, num_envs, rows, used)


def _kept_problems(
    replay: dict[str, Any], num_envs: int, rows: int, used: int
) -> Iterator[tuple[str, str]]:
    """Likewise, of the parts that replays of older versions lack."""
    if "keep" in replay:
        keep = replay["keep"]
        pair = isinstance(keep, (list, tuple)) and len(keep) == 2 and all(map(_count, keep))
        if not (pair and keep[1] <= keep[0] < rows):
            yield "keep", f"two numbers below {rows}, the second not above the first"
        block = replay.get("block")
        if not _like(block, torch.int64, num_envs):
            yield "block", f"int64 {[num_envs]}, 0 or more"
        elif bool(((block < 0) | (block >= rows)).any()):
            yield "block", f"of {rows} rows"
    random = replay.get("random")
    if random is not None and not _like(random, torch.bool, num_envs, used):
        yield "random", f"bool {[num_envs, used]}, or null"
    task = replay.get("task")
    if task is not None and not (
        _like(task, torch.int32, num_envs, used) and bool((task >= 0).all())
    ):
        yield "task", f"int32 {[num_envs, used]}, 0 or more, or null"


def _like(value: Any, dtype: torch.dtype, *shape: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype == dtype and tuple(value.shape) == shape
