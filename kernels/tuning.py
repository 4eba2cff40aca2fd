"""Launch choices measured on one GPU, kept in ``kernels/tuned/<gpu>.json``.

::

    {"gpu": "NVIDIA H200", "kernels": {"linear_norm_act_fwd": {"fp16 R512 N512 K512": {...}}}}

Nothing is tuned at run time: what no file names is chosen by each kernel's own heuristic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "tuned"

#: Kernel, then key, then the options of a launch.
Entries = Mapping[str, Mapping[str, Mapping[str, int]]]


def file_of(gpu: str, folder: Path = FOLDER) -> Path:
    """Where the entries of a GPU lie, by the name that ``torch.cuda.get_device_name`` gives it."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{slug}.json"


@lru_cache(maxsize=8)
def load(gpu: str, folder: Path = FOLDER) -> Entries:
    """The entries of a GPU; none where there is no file.

    Raises:
        ValueError: the file is not of the form above.
    """
    path = file_of(gpu, folder)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    kernels = content.get("kernels") if isinstance(content, dict) else None
    if not isinstance(kernels, dict):
        raise ValueError(f'{path} must be an object with an object "kernels"')
    for kernel, entries in kernels.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {kernel} must be an object, got {entries!r}")
        for key, options in entries.items():
            _check_options(f"{path}: {kernel}: {key}", options)
    return kernels


def _check_options(where: str, options: object) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"{where} must be an object, got {options!r}")
    for name, value in options.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}: {name} must be an integer of at least 0, got {value!r}")


def save(gpu: str, entries: Entries, folder: Path = FOLDER) -> Path:
    """Write the entries of a GPU in place of those it has; returns the file."""
    path = file_of(gpu, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "kernels": {k: dict(v) for k, v in entries.items()}}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    load.cache_clear()
    return path
