"""Taking networks out of a published state dict, with their widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.published.reading import PublishedError


class Network(NamedTuple):
    """Widths of an MLP.

    Attributes:
        columns: of its input.
        units: of its hidden layers.
        rows: of its output.
        normed: its last layer has a LayerNorm.
    """

    columns: int
    units: list[int]
    rows: int
    normed: bool


class Parts:
    """The tensors of a state dict, each of which is taken once.

    Args:
        path: of the file, for messages.
        name: of the state dict there.
        state: tensors by their names.

    Attributes:
        taken: what was taken so far, by name.

    Raises:
        PublishedError: something in it is no tensor.
    """

    def __init__(self, path: Path, name: str, state: Mapping[Any, Any]) -> None:
        self._where = f"{path}: {name}"
        self._left: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise self.error(f"{key} is a {type(value).__name__} instead of a tensor")
            self._left[str(key)] = value

    def error(self, said: str) -> PublishedError:
        """An error that names the file and the part."""
        return PublishedError(f"{self._where} cannot be converted: {said}")

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, *shape: int) -> Tensor:
        """A tensor of numbers.

        Args:
            key: its name.
            shape: what it must be; -1 is any width.

        Raises:
            PublishedError: it is missing, or of another shape or type.
        """
        found = self._left.pop(key, None)
        if found is None:
            raise self.error(f"{key} is missing")
        fits = found.dim() == len(shape) and all(
            want in (-1, is_) for want, is_ in zip(shape, found.shape, strict=True)
        )
        if not (fits and found.is_floating_point()):
            wanted = ", ".join("*" if n == -1 else str(n) for n in shape)
            raise self.error(
                f"{key} is {list(found.shape)} of {str(found.dtype).removeprefix('torch.')} "
                f"instead of [{wanted}] of floating numbers"
            )
        self.taken[key] = found
        return found

    def mlp(self, name: str) -> Network:
        """A Sequential of NormedLinear layers; the last may be a plain Linear."""
        names = ("weight", "bias", "ln.weight", "ln.bias")
        first = next(i for i in count() if f"{name}.{i}.weight" not in self)
        return self._network(
            (tuple(f"{name}.{i}.{n}" for n in names) for i in range(max(first, 1))), ()
        )

    def act_norm(self, name: str) -> Network:
        """A Sequential of Linear, activation and LayerNorm in turn, and a last Linear."""
        first = next(i for i in count(0, 3) if f"{name}.{i}.weight" not in self)
        return self._network(
            (
                tuple(f"{name}.{i + k}.{n}" for k in (0, 2) for n in ("weight", "bias"))
                for i in range(0, max(first, 3), 3)
            ),
            (),
        )

    def ensemble(self) -> tuple[int, Network]:
        """Members' stacked parameters ``params.N`` of layers with a LayerNorm and a last Linear.

        Returns:
            The number of members, and the widths of one.
        """
        last = next(i for i in count() if f"params.{i}" not in self)
        layers = (tuple(f"params.{i + k}" for k in range(4)) for i in range(0, max(last, 1), 4))
        weight = self._left.get("params.0")
        members = 0 if weight is None or weight.dim() == 0 else weight.shape[0]
        return members, self._network(layers, (members,))

    def done(self, without: Mapping[str, str] | None = None) -> None:
        """Refuse what nothing was made of.

        Args:
            without: beginnings of names with a reason, for a better message.

        Raises:
            PublishedError: there is something; the message names it.
        """
        for start, reason in (without or {}).items():
            if any(key.startswith(start) for key in self._left):
                raise self.error(f"{start}* {reason}")
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise self.error(f"{', '.join(names[:4])}{more} have no counterpart here")

    def _network(self, layers: Iterable[tuple[str, ...]], stack: tuple[int, ...]) -> Network:
        """Take layers, of which each has names of weight, bias and LayerNorm's weight and bias."""
        columns = -1
        widths: list[int] = []
        normed: list[bool] = []
        for weight, bias, gain, shift in layers:
            taken = self.take(weight, *stack, -1, widths[-1] if widths else -1)
            columns = columns if widths else taken.shape[-1]
            rows = taken.shape[-2]
            self.take(bias, *stack, rows)
            normed.append(gain in self)
            if normed[-1]:
                self.take(gain, *stack, rows)
                self.take(shift, *stack, rows)
            widths.append(rows)
        if not all(normed[:-1]):
            raise self.error("a hidden layer has no LayerNorm")
        return Network(columns, widths[:-1], widths[-1], normed[-1])


def keep(tensor: Tensor, places: Iterable[int], dim: int = -1) -> Tensor:
    """A copy of ``tensor`` with these places of an axis alone, in this order."""
    return tensor.index_select(dim, torch.tensor(list(places), dtype=torch.int64))
