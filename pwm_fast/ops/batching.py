"""How ``torch.vmap`` sees the operators.

Where only what varies by row is mapped over, the mapped axis joins the rows of one call. Where the
parameters of an MLP are, they are an ensemble. All else is a loop over that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Update = Callable[[list[Any]], list[Any]]


def _unchanged(args: list[Any]) -> list[Any]:
    return args


def _fold(x: Tensor, dim: int | None, size: int, axis: int, rows: int) -> Tensor:
    """Make the mapped axis part of the axis of rows, in front of them."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.shape[axis + 1] != rows:  # one row that stands for all
        x = x.expand(*x.shape[: axis + 1], rows, *x.shape[axis + 2 :])
    return x.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(y: Tensor, size: int, axis: int, members: int, rows: int) -> Tensor:
    """The mapped axis first again; with members rows are those of one member after another."""
    y = y.unflatten(axis, (members, size, rows)).movedim(axis + 1, 0)
    return y.flatten(axis + 1, axis + 2)


def _loop(
    operator: Any, size: int, in_dims: Sequence[Any], args: Sequence[Any], update: Update, read: int
) -> tuple[Any, Any]:
    """One call for each element of the mapped axis."""
    if size == 0:
        raise ValueError(f"{operator} cannot be mapped over an axis of length 0")
    flat, structure = pytree.tree_flatten(list(args))
    dims = _dims(args, in_dims)
    results = []
    for i in range(size):
        each = [x if d is None else x.select(d, i) for x, d in zip(flat, dims, strict=True)]
        result = operator(*update(pytree.tree_unflatten(each, structure)))
        results.append(_read(result, read))
    leaves = [pytree.tree_flatten(r)[0] for r in results]
    outputs = [torch.stack(parts) for parts in zip(*leaves, strict=True)]
    structure = pytree.tree_structure(results[0])
    return (
        pytree.tree_unflatten(outputs, structure),
        pytree.tree_unflatten([0] * len(outputs), structure),
    )


def _dims(args: Sequence[Any], in_dims: Sequence[Any]) -> list[int | None]:
    """The mapped axis of every leaf of ``args``."""
    dims: list[int | None] = []
    for arg, dim in zip(args, in_dims, strict=True):
        leaves = len(pytree.tree_flatten(arg)[0])
        dims += dim if isinstance(dim, (list, tuple)) else [dim] * leaves
    return dims


def _read(result: Any, read: int) -> Any:
    """Without the lists of buffers behind the outputs that callers read."""
    if not isinstance(result, (tuple, list)) or not read:
        return result
    return tuple(x if i < read else [] if isinstance(x, list) else x for i, x in enumerate(result))


def stacked(size: int, tensors: Sequence[Tensor], dims: Any) -> list[Tensor]:
    """Tensors with the mapped axis first, those that are not mapped over expanded."""
    each = dims if isinstance(dims, (list, tuple)) else [dims] * len(tensors)
    return [
        x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(tensors, each, strict=True)
    ]


def is_mapped(dims: Any) -> bool:
    """Whether one of the axes of an argument is the mapped one."""
    return any(d is not None for d in (dims if isinstance(dims, (list, tuple)) else (dims,)))


def rule(
    operator: Any,
    rows: Mapping[int, int] | None = None,
    outputs: Sequence[int] = (),
    *,
    update: Update = _unchanged,
    members: Callable[[Sequence[Any]], int] = lambda args: 1,
    broadcast: int | None = None,
    ensemble: Callable[[int, Sequence[Any], Sequence[Any]], Any] = lambda *_: None,
) -> Callable[..., tuple[Any, Any]]:
    """What ``torch.library.register_vmap`` takes for an operator.

    Args:
        operator: what is mapped.
        rows: arguments (tensors or lists of them) that vary by row, each with its axis of rows.
        outputs: axes of rows of the outputs; further ones are buffers that callers do not read.
        update: decides anew what is kept for a backward pass.
        members: how many times the outputs' rows are those of the arguments.
        broadcast: the argument whose only row may stand for all.
        ensemble: arguments of one call whose rows are the mapped axis and what it was, or None.
    """
    rows = rows or {}

    def mapped(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        together = ensemble(size, in_dims, args)
        if together is not None:
            y, *kept = operator(*update(together))
            return (y.unflatten(0, (size, -1)), *([] for _ in kept)), (0, *([] for _ in kept))
        if not rows or any(is_mapped(d) for i, d in enumerate(in_dims) if i not in rows):
            return _loop(operator, size, in_dims, args, update, len(outputs))
        folded = list(args)
        count = -1
        for i, axis in rows.items():
            if args[i] is None:
                continue
            listed = isinstance(args[i], (list, tuple))
            tensors = args[i] if listed else [args[i]]
            dims = in_dims[i] if is_mapped(in_dims[i]) else [None] * len(tensors)
            dims = dims if isinstance(dims, (list, tuple)) else [dims]
            if count < 0:
                x, d = tensors[0], dims[0]
                count = x.shape[axis + (d is not None and d % x.dim() <= axis)]
            if i == broadcast and not is_mapped(dims) and tensors[0].shape[axis] == 1:
                continue
            new = [_fold(x, d, size, axis, count) for x, d in zip(tensors, dims, strict=True)]
            folded[i] = new if listed else new[0]
        result = operator(*update(folded))
        single = isinstance(result, Tensor)
        parts = [result] if single else list(result)
        each = members(args)
        unfolded: list[Any] = [
            _unfold(y, size, axis, each, count) for y, axis in zip(parts, outputs, strict=False)
        ]
        out_dims: list[Any] = [0 for _ in unfolded]
        for y in parts[len(outputs) :]:
            unfolded.append([] if isinstance(y, list) else y)
            out_dims.append([] if isinstance(y, list) else None)
        return (unfolded[0], 0) if single else (tuple(unfolded), tuple(out_dims))

    return mapped
