"""Launch choices measured on one GPU, kept in ``kernels/tuned/<gpu>.json``.

::

    {"gpu": "NVIDIA H200",
     "made": {...},
     "kernels": {"linear_norm_act_fwd": {"16 R512 N512 K512": {"block_m": 64, "block_n": 128}}},
     "times": {"linear_norm_act_fwd": {"16 R512 N512 K512": {"64x128": 5.1, "unfused": 7.2}}}}

``python -m bench.tune`` writes them: ``made`` says when and with what, ``times`` (microseconds)
why; only ``kernels`` is read. A file counts for the GPU of exactly that name. A GEMM's key holds
its precision, the power of two that holds its rows, and its other sizes as they are; a rollout's
all sizes as they are. There is no nearest entry: what no key names is chosen by each kernel's own
heuristic. A file that is wrong anywhere is an error that names the entry, never passed over, and
each is read once in a process. Nothing is tuned at run time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "tuned"
REMEDY = "correct it, delete it, or measure anew: python -m bench.tune"

#: Integers, but for the fields of :attr:`Form.words`.
Options = Mapping[str, Any]
#: Kernel, then key, then the options of a launch.
Entries = Mapping[str, Mapping[str, Options]]


class Form(NamedTuple):
    """What the entries of a kernel look like.

    Attributes:
        key: the form of their keys.
        example: a key.
        fields: of a launch. An entry that has the first alone, as 0, says not to use the kernel.
        words: further fields, which an entry may leave out, and the words that each may be.
    """

    key: re.Pattern[str]
    example: str
    fields: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]] = MappingProxyType({})


_SIZE = r"[1-9]\d*"
PRODUCT = Form(
    re.compile(rf"(16|tf32|ieee)( E{_SIZE})? R{_SIZE} N{_SIZE} K{_SIZE}"),
    "16 E3 R512 N200 K400",
    ("block_m", "block_n"),
)
ROLLOUT = Form(
    re.compile(rf"(float16|bfloat16|float32) B{_SIZE} U{_SIZE}"),
    "float16 B128 U512",
    ("bm", "bn", "warps", "chunks"),
    {"exchange": ("flags", "words")},
)
#: By kernel.
FORMS = {
    "linear_norm_act_fwd": PRODUCT,
    "linear_norm_act_bwd": PRODUCT,
    "linear_act_norm_fwd": PRODUCT,
    "linear_act_norm_bwd": PRODUCT,
    "linear_axpby": PRODUCT,
    "rollout": ROLLOUT,
}


def file_of(gpu: str, folder: Path = FOLDER) -> Path:
    """Where the entries of a GPU lie, by the name that ``torch.cuda.get_device_name`` gives it."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{slug}.json"


@lru_cache(maxsize=8)
def load(gpu: str, folder: Path | None = None) -> Entries:
    """The entries of a GPU; none where there is no file.

    Raises:
        ValueError: the file is not of the form above.
    """
    path = file_of(gpu, FOLDER if folder is None else folder)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; {REMEDY}") from error
    kernels = content.get("kernels") if isinstance(content, dict) else None
    if not isinstance(kernels, dict):
        raise ValueError(f'{path} must be an object with an object "kernels"; {REMEDY}')
    if content.get("gpu") != gpu:
        raise ValueError(f"{path} must be of gpu {gpu!r}, it is of {content.get('gpu')!r}")
    for kernel, entries in kernels.items():
        if kernel not in FORMS:
            raise ValueError(f"{path}: {kernel} must be one of {', '.join(FORMS)}; {REMEDY}")
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {kernel} must be an object, got {entries!r}; {REMEDY}")
        for key, options in entries.items():
            try:
                check(kernel, key, options)
            except ValueError as error:
                raise ValueError(f"{path}: {kernel}: {key!r}: {error}; {REMEDY}") from error
    return kernels


def check(kernel: str, key: str, options: object) -> None:
    """Check the form of an entry.

    Raises:
        ValueError: what is wrong with it.
    """
    form = FORMS[kernel]
    if form.key.fullmatch(key) is None:
        raise ValueError(f"the key must be of the form {form.example!r}")
    if not isinstance(options, dict):
        raise ValueError(f"it must be an object, got {options!r}")
    for name, allowed in form.words.items():
        if name in options and options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {options[name]!r}")
    numbers = {name: value for name, value in options.items() if name not in form.words}
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    if options != {form.fields[0]: 0} and (
        set(numbers) != set(form.fields) or not all(numbers.values())
    ):
        raise ValueError(
            f"it must have {', '.join(form.fields)}, each at least 1, or {form.fields[0]} alone, "
            f"which is 0; got {options}"
        )


def entries(
    gpu: str,
    kernel: str,
    fits: Callable[[str, Options], object],
    folder: Path | None = None,
) -> Mapping[str, Options]:
    """The entries of one kernel, all of which fit this GPU.

    Args:
        gpu: its name.
        kernel: of :data:`FORMS`.
        fits: raises ValueError for a key and options that do not fit the device.
        folder: of the files; None: the package's.

    Raises:
        ValueError: the file is wrong, or an entry of it does not fit.
    """
    found = load(gpu, folder).get(kernel, {})
    for key, options in found.items():
        try:
            fits(key, options)
        except ValueError as error:
            path = file_of(gpu, FOLDER if folder is None else folder)
            raise ValueError(f"{path}: {kernel}: {key!r}: {error}; {REMEDY}") from error
    return found


def save(
    gpu: str,
    entries: Entries,
    folder: Path | None = None,
    *,
    made: Mapping[str, Any] | None = None,
    times: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Path:
    """Write the entries of a GPU, in one step, in place of those it has; returns the file.

    Args:
        gpu: its name.
        entries: of all kernels.
        folder: of the files; None: the package's.
        made: date, commit, machine and software.
        times: by kernel and key, microseconds of each choice.

    Raises:
        ValueError: an entry is not of its kernel's form.
    """
    for kernel, own in entries.items():
        for key, options in own.items():
            check(kernel, key, dict(options))
    path = file_of(gpu, FOLDER if folder is None else folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "made": made or {}, "kernels": entries, "times": times or {}}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(temporary, path)
    load.cache_clear()
    return path
