"""Files in TD-MPC2's form, written without tensordict.

``tests/data/tensordict_files`` has some that tensordict itself wrote; a test compares the two.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

# Releases of tensordict from which on it writes files in another way.
LAYOUTS = ("0.1", "0.2", "0.3", "0.5")


def save(path: Path, values: Mapping[str, Any], layout: str = "0.5") -> Path:
    """Write a TensorDict as releases of tensordict do; a dict in it is another one."""
    module = "tensordict.tensordict" if layout in ("0.1", "0.2") else "tensordict._td"
    held = _named("_StringOnlyDict", "tensordict.utils", dict)
    cls = _named("TensorDict", module)

    def _make_td(cls: type, state: dict[str, Any]) -> None:
        """Is named in the file, never called."""

    _make_td.__module__, _make_td.__qualname__ = "tensordict._reductions", "_make_td"

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        kept = held(self.values) if layout in ("0.2", "0.3") else self.values
        size = torch.Size([])
        state = {"_tensordict": kept, "_batch_size": size, "_device": torch.device("cpu")}
        if layout == "0.5":
            return _make_td, (cls, {**state, "_td_dim_names": None})
        return copyreg.__newobj__, (cls,), {**state, "_is_locked": False}  # type: ignore[attr-defined]

    def made(content: Mapping[str, Any]) -> Any:
        new = cls()
        new.values = {k: made(v) if isinstance(v, dict) else v for k, v in content.items()}
        return new

    cls.__reduce_ex__ = reduce  # type: ignore[assignment]
    names = {}
    for item in (held, cls, _make_td):
        names[item.__module__] = ModuleType(item.__module__)
        setattr(names[item.__module__], item.__name__, item)
    with mock.patch.dict(sys.modules, {"tensordict": ModuleType("tensordict"), **names}):
        torch.save(made(values), path)
    return path


def _named(name: str, module: str, base: type = object) -> type:
    return type(name, (base,), {"__module__": module, "__qualname__": name})
