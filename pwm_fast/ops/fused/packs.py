"""Copies of weights in the form that products want, kept until the weights change.

A pack (a folded, centred, padded, 16-bit or reordered copy) is kept under the identity and the
version counter of every tensor it was made of, so an in-place change makes a new one. What bumps no
counter is covered otherwise: any step of a ``torch.optim`` optimiser empties the store (fused Adam
bumps none), and after writing through ``.data`` or replaying a captured update there is
:func:`invalidate`. Nothing is kept, nor taken from the store, while a compiler traces, and of
tensors without a counter. A CUDA graph must make its own packs: while one is captured they come
from a store of that capture alone, if there is one (:func:`capturing`), and are not kept otherwise.

The store holds no weight alive: entries die with their tensors' memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

VARIABLE = "PWM_FAST_PACKS"
_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass, whose values may lie elsewhere
LIMIT = 256  # entries; a world model with its critics has about 20


class _Copy(NamedTuple):
    storage: StorageWeakRef
    version: int
    value: Tensor


class _Entry(NamedTuple):
    storages: tuple[StorageWeakRef, ...]
    value: Any


Store = OrderedDict[tuple[Any, ...], _Entry]

_store: Store = OrderedDict()
_recorded: Store | None = None  # of the capture that is going on
_copies: dict[int, _Copy] = {}  # by storage
_lock = threading.RLock()  # on CUDA autograd runs backward passes in threads of its own
_hooked = False


def _identity(x: Tensor) -> tuple[Any, ...]:
    return (
        x.untyped_storage()._cdata,
        x.data_ptr(),
        x._version,
        x.dtype,
        x.device,
        tuple(x.shape),
        x.stride(),
    )


def hidden() -> bool:
    """Whether a compiler or a transform is between tensors and their values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, where a CUDA graph is captured, it makes each of its packs once.

    For one capture, from before its beginning to its end; another thread may not capture meanwhile.
    """
    global _recorded
    with _lock:
        before, _recorded = _recorded, OrderedDict()
    try:
        yield
    finally:
        with _lock:
            _recorded = before


def _store_of(tensors: Iterable[Tensor]) -> Store | None:
    """The store where identity and version of the tensors say all about their values, else None."""
    if hidden():
        return None
    store: Store | None = _store
    for x in tensors:
        if type(x) not in _PLAIN or x.is_inference():
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            store = _recorded
    choice = os.environ.get(VARIABLE) or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {choice!r}")
    return store if choice == "1" else None


def kept(kind: tuple[Any, ...], tensors: tuple[Tensor, ...], make: Callable[..., Any]) -> Any:
    """``make(*tensors)``, or what it gave for the same values before; what is kept has no gradient.

    Args:
        kind: what is made, with every option that it depends on.
        tensors: what it is made of.
        make: the function; its result is not to be written to.
    """
    store = _store_of(tensors)
    if store is None:
        return make(*tensors)  # under vmap gradients may be wanted though no tensor here says so
    with _lock:
        key = (kind, *(_identity(x) for x in tensors))
        found = _found(store, key)
        if found is not None:
            return found.value
        with torch.no_grad():
            value = make(*tensors)
        _keep(store, key, tensors, value)
    return value


def keep_each(
    kind: tuple[Any, ...], tensors: Sequence[Tensor], make: Callable[..., Sequence[Any]]
) -> None:
    """Make at once, for :func:`kept` of each tensor by itself, what it would have to make.

    Nothing happens where nothing is kept.

    Args:
        kind: as there.
        tensors: what one pack each is made of.
        make: takes those whose packs are missing, and returns these.
    """
    store = _store_of(tensors)
    if store is None:
        return
    with _lock:
        keys = [(kind, _identity(x)) for x in tensors]
        missing = [i for i, key in enumerate(keys) if _found(store, key) is None]
        if not missing:
            return
        with torch.no_grad():
            made = make(*(tensors[i] for i in missing))
        for i, value in zip(missing, made, strict=True):
            _keep(store, keys[i], (tensors[i],), value)


def _found(store: Store, key: tuple[Any, ...]) -> _Entry | None:
    entry = store.get(key)
    if entry is None:
        return None
    if any(s.expired() for s in entry.storages):
        del store[key]
        return None
    store.move_to_end(key)
    return entry


def _keep(store: Store, key: tuple[Any, ...], tensors: tuple[Tensor, ...], value: Any) -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        # Fused optimisers write to parameters without bumping their version counters.
        register_optimizer_step_post_hook(_after_step)
    for old in [k for k, e in store.items() if any(s.expired() for s in e.storages)]:
        del store[old]
    while len(store) >= LIMIT:
        store.popitem(last=False)
    store[key] = _Entry(tuple(StorageWeakRef(x.untyped_storage()) for x in tensors), value)


def attach(pack: Tensor, copy: Tensor) -> None:
    """Let :func:`attached` find a rounded copy of a pack, made with it.

    Unlike what :func:`kept` keeps this holds in a captured graph: there both are made by it.

    Args:
        pack: fills its storage but for the ends of rows, and is not written to any more.
        copy: with the same shape and strides.
    """
    if hidden() or pack.is_inference():
        return
    storage = pack.untyped_storage()
    with _lock:
        for key in [k for k, c in _copies.items() if c.storage.expired()]:
            del _copies[key]
        _copies[storage._cdata] = _Copy(StorageWeakRef(storage), pack._version, copy)


def attached(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The rounded copy of a pack, or of a view of one, if it has one of that dtype."""
    if torch._C._are_functorch_transforms_active() or x.is_inference():
        return None
    with _lock:
        found = _copies.get(x.untyped_storage()._cdata)
    if found is None or found.storage.expired() or found.version != x._version:
        return None
    if found.value.dtype != dtype or found.value.device != x.device:
        return None
    return found.value.as_strided(x.shape, x.stride(), x.storage_offset())


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    invalidate()


def invalidate(weights: torch.nn.Module | Iterable[Tensor] | None = None) -> None:
    """Forget packed copies of weights: the next operation makes them anew.

    Needed where values changed behind PyTorch's back: written through ``.data`` or another library,
    or by replaying a CUDA graph that updates parameters.

    Args:
        weights: a module, or tensors; None for all.
    """
    tensors = weights.parameters() if isinstance(weights, torch.nn.Module) else weights
    changed = None if tensors is None else {x.untyped_storage()._cdata for x in tensors}
    with _lock:
        for store in (_store, _recorded):
            if store is None:
                continue
            if changed is None:
                store.clear()
            else:
                _forget(store, changed)


def _forget(store: Store, changed: set[int]) -> None:
    # A pack may be made of a pack: take what hangs on it along.
    while True:
        stale = [key for key in store if any(identity[0] in changed for identity in key[1:])]
        if not stale:
            return
        for key in stale:
            value = store.pop(key).value
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, Tensor) and not x.is_mkldnn:
                    changed.add(x.untyped_storage()._cdata)
