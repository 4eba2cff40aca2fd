"""Reading files of published codes without running code of theirs, and telling them apart."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_fast.config import ConfigError
from pwm_fast.data.tensors import these_alone

#: Families of files and the names of the codes that write them.
FAMILIES = {"pwm": "PWM", "flow_mbpo_pwm": "Flow-MBPO-PWM", "tdmpc2": "TD-MPC2"}


class PublishedError(ConfigError):
    """A published checkpoint that cannot be read or used; the message names the file and why."""


class Statistics:
    """Stands where a file has the published running statistics: no more than their attributes."""


# The only classes that these files name and torch does not read by itself.
_CLASS = "utils.running_mean_std.RunningMeanStd"
_STAND_INS: list[Any] = [
    (Statistics, f"pwm.{_CLASS}"),
    (Statistics, f"flow_mbpo_pwm.{_CLASS}"),
]


def read(path: Path) -> Any:
    """What a file holds: tensors, plain containers, and :class:`Statistics`.

    Raises:
        PublishedError: there is none; it is damaged or no file of ``torch.save``; or it names
            classes or functions of other programs, which are not loaded.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise PublishedError(f"there is no checkpoint file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch's reader looks at no checksum of a tensor
        if damaged is not None:
            raise ValueError(f"its record {damaged} is not what was written (by its CRC)")
        return _load(path)
    except (PublishedError, OSError):
        raise
    except Exception as error:  # damage surfaces as almost anything
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if said.startswith("Weights only load failed"):  # torch recommends an unsafe load
            said = "it is no file of tensors and plain containers"
        raise PublishedError(
            f"{path} is no readable checkpoint ({path.stat().st_size} bytes; cut short, damaged or "
            f"of another program): {said}"
        ) from error


def family_of(path: Path, content: Any) -> str:
    """The family of a file's content, of :data:`FAMILIES`.

    Raises:
        PublishedError: it is of none; the message says what it holds.
    """
    found = _family(content)
    if found is not None:
        return found
    known = ", ".join(FAMILIES.values())
    if isinstance(content, Mapping) and content.get("format") == "pwm_fast.checkpoint":
        raise PublishedError(f"{path} is a checkpoint of pwm_fast already: all commands read it")
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        held = f"the keys {', '.join(keys[:6])}{more}"
    else:
        held = f"a {type(content).__name__}"
    raise PublishedError(f"{path} is no checkpoint of {known}: it holds {held}")


def recognise(path: Path) -> str | None:
    """The name of the published code that wrote a file; None for all other files.

    Its tensors are not read.
    """
    try:
        found = _family(_load(path, mmap=True))
    except Exception:
        return None
    return None if found is None else FAMILIES[found]


def model_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters in a file of TD-MPC2, which takes them with and without a ``model`` around."""
    model = content.get("model", content)
    return model if isinstance(model, Mapping) else {}


def _family(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None
    parts = [content.get(key) for key in ("world_model", "actor", "critic")]
    if all(isinstance(part, Mapping) for part in parts):
        if "format" in content:
            return None
        world = parts[0] or {}
        flow = "iter_count" in content or any(str(k).startswith("_velocity.") for k in world)
        return "flow_mbpo_pwm" if flow else "pwm"
    model = model_of(content)
    networks = ("_encoder.", "_dynamics.", "_reward.", "_pi.", "_Qs.")
    found = all(any(str(key).startswith(name) for key in model) for name in networks)
    return "tdmpc2" if found else None


def _load(path: Path, *, mmap: bool = False) -> Any:
    with these_alone(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of foreign files; what matters of them is said
        foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        if foreign:
            raise PublishedError(
                f"{path} is not loaded: it names {', '.join(foreign[:4])}, and loading it would "
                "run code of another program. Only tensors, plain containers and PWM's running "
                "statistics are read"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def numbers(value: Any) -> Tensor | None:
    """A float64 copy of a tensor of finite numbers, or of a number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return None
    found = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    return found if bool(found.isfinite().all()) else None
