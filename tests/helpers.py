"""What several test files use: random layers and the rule for lower precision."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_fast.backends.precision import BY_NAME
from pwm_fast.backends.select import BACKENDS, Choice
from pwm_fast.ops import Activation, Layer
from pwm_fast.parallel import Ranks

PARAMETERS = ("weight", "bias", "ln_weight", "ln_bias")


def choice(backend: str, precision: str = "exact") -> Choice:
    """A backend and a precision, as a call would choose them."""
    return Choice(BACKENDS[backend], BY_NAME[precision])


class Pair(Ranks):
    """Two ranks in one process, in threads that wait for each other; :meth:`run` calls in both."""

    size = 2

    def __init__(self, rank: int, others: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._said, self._barrier = rank, others, barrier

    def gather(self, value: Any) -> list[Any]:
        self._barrier.wait(60)
        self._said[self.rank] = value
        self._barrier.wait(60)
        return list(self._said)

    def gather_first(self, value: Any) -> list[Any]:
        found = self.gather(value)
        return found if self.first else []

    def highest(self, number: int) -> int:
        return max(self.gather(number))

    def gather_tensors(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value.clone()))

    def average_(self, tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            x.copy_(self.gather_tensors(x).sum(0) / self.size)

    @classmethod
    def run(cls, function: Callable[[Ranks], Any]) -> list[Any]:
        """What a function returns on either rank."""
        barrier, said = threading.Barrier(2), [None, None]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, [cls(rank, said, barrier) for rank in range(2)]))


class Operators(TorchDispatchMode):
    """The names of our operators that run inside, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pwm_fast":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def random_layer(
    inputs: int,
    outputs: int,
    act: Activation = "none",
    *,
    norm: bool = True,
    bias: bool = True,
    members: tuple[int, ...] = (),
    simnorm_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> Layer:
    """Draw a layer with outputs of order 1; ``members=(E,)`` makes an ensemble of E."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*members, *shape, dtype=dtype, generator=generator)

    return Layer(
        weight=normal(outputs, inputs) / inputs**0.5,
        bias=normal(outputs) if bias else None,
        ln_weight=1.0 + 0.3 * normal(outputs) if norm else None,
        ln_bias=0.3 * normal(outputs) if norm else None,
        act=act,
        simnorm_dim=simnorm_dim,
    )


def tensors_of(layer: Layer) -> list[Tensor]:
    """Return the parameters that the layer has, in the order of its fields."""
    return [p for p in (getattr(layer, name) for name in PARAMETERS) if p is not None]


def with_tensors(layer: Layer, tensors: list[Tensor]) -> Layer:
    """Put other parameters in the place of those of ``tensors_of(layer)``."""
    names = [name for name in PARAMETERS if getattr(layer, name) is not None]
    return layer._replace(**dict(zip(names, tensors, strict=True)))


def assert_2x(
    ours: Tensor,
    torch_same_dtype: Tensor,
    ref_fp64: Tensor,
    what: str = "",
    nearby: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """Assert that ours errs at most twice as much as PyTorch in the same dtype, plus rounding.

    The rounding floor comes from the data: what is lost by ``+ 0.3 - 0.3`` in the output's dtype.

    Args:
        ours: result under test.
        torch_same_dtype: PyTorch's own result in the same dtype.
        ref_fp64: the truth.
        what: named in the message.
        nearby: more pairs of PyTorch's result and its truth, at inputs close to these: in a small
            result a single rounding error of PyTorch's may be next to nothing by luck. They only
            allow more: made as they are asked for, they cost nothing where one is enough.
    """
    assert ref_fp64.dtype == torch.float64
    assert ours.dtype == torch_same_dtype.dtype
    assert ours.shape == torch_same_dtype.shape == ref_fp64.shape
    if ref_fp64.numel() == 0:
        return
    rounded = ref_fp64.to(ours.dtype)
    floor = 2.0 * _distance(rounded + 0.3 - 0.3, rounded)
    torch_error = _distance(torch_same_dtype, ref_fp64)
    error, allowed = _distance(ours, ref_fp64), 2.0 * torch_error + floor
    if error <= allowed:
        return
    torch_error = max([torch_error, *(_distance(t, ref) for t, ref in nearby)])
    allowed = 2.0 * torch_error + floor
    assert error <= allowed, f"{what}: error {error:.3e} exceeds {allowed:.3e} ({ours.dtype})"


def errs_alike(
    ours: Sequence[Tensor], torch_same_dtype: Sequence[Tensor], ref_fp64: Sequence[Tensor]
) -> bool:
    """Return whether ours errs as PyTorch does over several draws of the inputs.

    One draw of ours against the worst of PyTorch's is a gamble where a result is a single number,
    or a few sums of many terms. Here both err on all the draws: ours at most twice as much in the
    root mean square, and never three times as much as PyTorch at its worst.
    """
    mine = [_distance(x, ref) for x, ref in zip(ours, ref_fp64, strict=True)]
    torchs = [_distance(x, ref) for x, ref in zip(torch_same_dtype, ref_fp64, strict=True)]
    return math.hypot(*mine) <= 2.0 * math.hypot(*torchs) and max(mine) <= 3.0 * max(torchs)


def _distance(x: Tensor, ref: Tensor) -> float:
    return (x.double() - ref.double()).abs().max().item()
