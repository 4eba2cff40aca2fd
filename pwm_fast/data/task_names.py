"""What the numbers of tasks mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pwm_fast import files
from pwm_fast.data.errors import DataError

FILE = "tasks.json"  # a list of names in a data set's folder, in the order of their numbers

# TD-MPC2's sets, in its order (``TASK_SET`` of its ``common/__init__.py``).
MT30 = (
    *("walker-stand", "walker-walk", "walker-run", "cheetah-run", "reacher-easy", "reacher-hard"),
    *("acrobot-swingup", "pendulum-swingup", "cartpole-balance", "cartpole-balance-sparse"),
    *("cartpole-swingup", "cartpole-swingup-sparse", "cup-catch", "finger-spin"),
    *("finger-turn-easy", "finger-turn-hard", "fish-swim", "hopper-stand", "hopper-hop"),
    *("walker-walk-backwards", "walker-run-backwards", "cheetah-run-backwards"),
    *("cheetah-run-front", "cheetah-run-back", "cheetah-jump", "hopper-hop-backwards"),
    *("reacher-three-easy", "reacher-three-hard", "cup-spin", "pendulum-spin"),
)
META_WORLD = (
    *("assembly", "basketball", "button-press-topdown", "button-press-topdown-wall"),
    *("button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push"),
    *("dial-turn", "disassemble", "door-open", "door-close", "drawer-close", "drawer-open"),
    *("faucet-open", "faucet-close", "hammer", "handle-press-side", "handle-press"),
    *("handle-pull-side", "handle-pull", "lever-pull", "peg-insert-side", "peg-unplug-side"),
    *("pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide", "plate-slide-side"),
    *("plate-slide-back", "plate-slide-back-side", "push-back", "push", "push-wall", "reach"),
    *("reach-wall", "shelf-place", "soccer", "stick-push", "stick-pull", "sweep-into", "sweep"),
    *("window-open", "window-close", "bin-picking", "box-close", "door-lock", "door-unlock"),
    "hand-insert",
)
SETS = {"mt30": MT30, "mt80": (*MT30, *(f"mw-{name}" for name in META_WORLD))}


def write_names(folder: Path, names: Mapping[int, str]) -> None:
    """Write what tasks are called into the folder of a data set; gaps get their number's name.

    Raises:
        OSError: the file cannot be written; it names the file.
    """
    listed = [names.get(number, f"task {number}") for number in range(max(names) + 1)]
    files.write_text(folder / FILE, json.dumps(listed, indent=1) + "\n")


def names_of(path: Path, numbers: Iterable[int], *, tdmpc2: bool) -> tuple[str, ...]:
    """The names of a data set's tasks by their numbers; empty where nothing says them.

    A file :data:`FILE` in the folder says them. Without it, TD-MPC2's chunks are of its tasks if
    the name of their folder, or of the one around it, has ``mt30`` or ``mt80`` in it, which that
    program asks of their path.

    Args:
        path: of the data set.
        numbers: of the tasks in it.
        tdmpc2: it has TD-MPC2's chunks.

    Raises:
        DataError: the file is no list of different names, or says too few.
    """
    file = path / FILE
    most = max(numbers)
    if not file.is_file():
        folders = " ".join(path.absolute().parts[-2:])
        names = next((names for key, names in SETS.items() if tdmpc2 and key in folders), ())
        return names if most < len(names) else ()
    try:
        listed = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from error
    ok = isinstance(listed, list) and all(isinstance(name, str) and name for name in listed)
    if not ok or len(set(listed)) != len(listed):
        raise DataError(f"{file} must be a list of the tasks' names, each once, got {listed!r}")
    if most >= len(listed):
        raise DataError(f"{file} names {len(listed)} tasks, the data are of task {most} as well")
    return tuple(listed)
