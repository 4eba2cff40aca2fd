"""The packed-weight cache: weights in the form that GEMMs want, kept while they stay as they are.

A packed weight (a folded, centred, padded, 16-bit or reordered copy) must never stand for weights
that have changed, and nobody can be relied on to say that they have: writes through ``.data``,
NumPy, shared memory or a fused optimiser move no version counter. So

- on the CPU a packed weight is kept with a checksum of the weights' bytes, which every operation
  compares before it takes the copy (:mod:`pwm_fast.fused.fingerprint`);
- elsewhere, where comparing would wait for the device, it is made in each call, and kept by version
  counters only between those who say when they write: of the weights that :func:`keeping` names. A
  CUDA graph must make its own: while one is captured they come from a store of that capture alone,
  if there is one (:func:`capturing`), and are not kept otherwise;
- within an operation (:func:`one_call`) each is looked for once;
- what is packed from packed weights needs no check: nobody else has them.

Nothing is kept while a compiler traces. The store holds no weight alive: entries die with their
tensors' memory.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pwm_fast.backends.transforms import PLAIN, compiled_or_mapped
from pwm_fast.fused.fingerprint import fingerprint

VARIABLE = "PWM_FAST_PACKS"
LIMIT = 256  # entries; a world model with its critics has about 20

P = ParamSpec("P")
T = TypeVar("T")


class _Copy(NamedTuple):
    storage: StorageWeakRef
    version: int
    value: Tensor


class _Entry(NamedTuple):
    storages: tuple[StorageWeakRef, ...]  # of the tensors, so that the key stands for no others
    state: Any  # of the tensors when the value was made
    value: Any


Key = tuple[Any, ...]
Store = OrderedDict[Key, _Entry]

_store: Store = OrderedDict()
_recorded: Store | None = None  # of the capture that is going on
_copies: dict[int, _Copy] = {}  # by storage
_own: dict[int, StorageWeakRef] = {}  # storages of packed weights; nobody writes to them
_most = 64  # of them, before those that are gone are taken out
_named: Counter[int] = Counter()  # storages whose writers tell, by those who named them
_lock = threading.RLock()  # on CUDA autograd runs backward passes in threads of its own


class _Local(threading.local):
    call: dict[Key, tuple[Any, Any]] | None = None  # of the operation that is going on


_local = _Local()


def _identity(x: Tensor) -> Key:
    return _storage(x), x.data_ptr(), x.dtype, x.device, x.shape, x.stride()


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def one_call(function: Callable[P, T]) -> Callable[P, T]:
    """An operation, in which weights stay as they are: each packed one is looked for once."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _local.call
        _local.call = {} if before is None else before
        try:
            return function(*args, **kwargs)
        finally:
            _local.call = before

    return run


@contextmanager
def keeping(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, what is packed from these weights is kept on a GPU, in any thread.

    Meanwhile they are written to by what moves their version counters alone, or by what calls
    :func:`invalidate` afterwards.
    """
    storages = Counter(_storage(x) for x in weights)
    with _lock:
        _named.update(storages)
    try:
        yield
    finally:
        with _lock:
            _named.subtract(storages)
            ended = {s for s in storages if _named[s] <= 0}
            for s in ended:
                del _named[s]
            _forget(_store, ended)


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, where a CUDA graph is captured, it makes each packed weight once.

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


def _plain(tensors: Iterable[Tensor]) -> bool:
    """Identity says where the tensors' values are."""
    return not compiled_or_mapped() and all(type(x) in PLAIN and not x.is_neg() for x in tensors)


def _on() -> bool:
    choice = os.environ.get(VARIABLE) or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {choice!r}")
    return choice == "1"


def _place(tensors: Sequence[Tensor], key: Key) -> tuple[Store | None, Callable[[], Any]]:
    """Where what is packed from them is kept, if anywhere, and what tells their values' state."""
    store: Store | None = _store if _on() else None
    foreign = [x for x, identity in zip(tensors, key[1:], strict=True) if identity[0] not in _own]
    on_cuda = any(x.is_cuda for x in tensors)
    if not on_cuda and all(x.is_cpu for x in tensors):
        return store, partial(fingerprint, foreign)
    if store is None or any(x.is_inference() for x in tensors):  # they have no version
        return None, tuple
    if on_cuda and torch.cuda.is_current_stream_capturing():
        store = _recorded
    elif any(_storage(x) not in _named for x in foreign):
        store = None
    return store, partial(_versions, tensors)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x._version for x in tensors)


def kept(kind: tuple[Any, ...], tensors: tuple[Tensor, ...], make: Callable[..., Any]) -> Any:
    """``make(*tensors)``, or what it gave for the same values before; what is kept has no gradient.

    Args:
        kind: what is made, with every option that it depends on.
        tensors: what it is made of.
        make: the function; its result is not to be written to.
    """
    if not _plain(tensors):
        return make(*tensors)  # under vmap gradients may be wanted though no tensor here says so
    key = (kind, *map(_identity, tensors))
    call = _local.call
    if call is not None and key in call:
        return call[key][0]
    store, state = _place(tensors, key)
    before = None if store is None else state()
    found = _found(store, key, before)
    if found is not None:
        value = found.value
    else:
        value = _made(make, tensors)
        _keep(store, key, tensors, before, state, value)
    if call is not None:
        call[key] = value, tensors  # which thus keep their places until the call is over
    return value


def snapshot(tensors: tuple[Tensor, ...], wgrad: bool) -> tuple[Tensor, ...]:
    """Copies of tensors that nobody writes to; themselves where nobody can, as in a CUDA graph.

    With ``wgrad`` gradients pass through them, and they are not kept.
    """
    if not _plain(tensors):
        return tensors
    if any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing():
        return tensors
    return _cloned(*tensors) if wgrad else kept(("snapshot",), tensors, _cloned)


def _cloned(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in tensors)


def keep_each(
    kind: tuple[Any, ...], tensors: Sequence[Tensor], make: Callable[..., Sequence[Any]]
) -> None:
    """Make at once, for :func:`kept` of each tensor by itself, what it would have to make.

    Nothing happens where nothing is kept.

    Args:
        kind: as there.
        tensors: what one packed copy each is made of.
        make: takes the tensors without a packed copy, and returns these copies.
    """
    call = _local.call
    if not _plain(tensors):
        return
    missing = []
    for x in tensors:
        key = (kind, _identity(x))
        if call is not None and key in call:
            continue
        store, state = _place((x,), key)
        if store is None and call is None:
            continue
        before = None if store is None else state()
        found = _found(store, key, before)
        if found is None:
            missing.append((x, key, store, state, before))
        elif call is not None:
            call[key] = found.value, (x,)
    if not missing:
        return
    made = _made(make, [x for x, *_ in missing])
    for (x, key, store, state, before), value in zip(missing, made, strict=True):
        _keep(store, key, (x,), before, state, value)
        if call is not None:
            call[key] = value, (x,)


def _found(store: Store | None, key: Key, state: Any) -> _Entry | None:
    if store is None:
        return None
    with _lock:
        entry = store.get(key)
        if entry is None:
            return None
        if entry.state != state:
            del store[key]
            return None
        store.move_to_end(key)
    return entry


def _made(make: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """A packed weight, which any mode of autograd can use."""
    global _most
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            value = make(*tensors)
    else:
        value = make(*tensors)
    given = {_storage(x) for x in tensors}  # what needs no change may be handed back
    with _lock:
        if len(_own) >= _most:
            for gone in [k for k, s in _own.items() if s.expired()]:
                del _own[gone]
            _most = 2 * len(_own) + 64
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, Tensor) and not x.is_mkldnn and _storage(x) not in given:
                _own[_storage(x)] = StorageWeakRef(x.untyped_storage())
    return value


def _keep(
    store: Store | None,
    key: Key,
    tensors: tuple[Tensor, ...],
    before: Any,
    state: Callable[[], Any],
    value: Any,
) -> None:
    if store is None or state() != before:  # or somebody wrote while it was made
        return
    storages = tuple(StorageWeakRef(x.untyped_storage()) for x in tensors)

    def is_over(other: Key, entry: _Entry) -> bool:
        changed = other[1:] == key[1:] and entry.state != before  # other copies of these weights
        return changed or any(s.expired() for s in entry.storages)

    with _lock:
        for old in [k for k, e in store.items() if is_over(k, e)]:
            del store[old]
        while len(store) >= LIMIT:
            store.popitem(last=False)
        store[key] = _Entry(storages, before, value)


def attach(pack: Tensor, copy: Tensor) -> None:
    """Let :func:`attached` find a rounded copy of a packed weight, made with it.

    Unlike what :func:`kept` keeps this holds in a captured graph: there both are made by it.

    Args:
        pack: fills its storage but for the ends of rows, and is not written to any more.
        copy: with the same shape and strides.
    """
    if compiled_or_mapped() or pack.is_inference():
        return
    storage = pack.untyped_storage()
    with _lock:
        for key in [k for k, c in _copies.items() if c.storage.expired()]:
            del _copies[key]
        _copies[storage._cdata] = _Copy(StorageWeakRef(storage), pack._version, copy)


def attached(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The rounded copy of a packed weight, or of a view of one, if it has one of that dtype."""
    if torch._C._are_functorch_transforms_active() or x.is_inference():
        return None
    with _lock:
        found = _copies.get(x.untyped_storage()._cdata)
    if found is None or found.storage.expired() or found.version != x._version:
        return None
    if found.value.dtype != dtype or found.value.device != x.device:
        return None
    return found.value.as_strided(x.shape, x.stride(), x.storage_offset())


def invalidate(weights: torch.nn.Module | Iterable[Tensor] | None = None) -> None:
    """Forget packed copies of weights: the next operation makes them anew.

    Never needed for right results, as what changed is noticed (docs/ops.md); it frees their memory.

    Args:
        weights: a module, or tensors; None for all.
    """
    tensors = weights.parameters() if isinstance(weights, torch.nn.Module) else weights
    changed = None if tensors is None else {_storage(x) for x in tensors}
    with _lock:
        for store in (_store, _recorded):
            if store is None:
                continue
            if changed is None:
                store.clear()
            else:
                _forget(store, changed)


def _forget(store: Store, changed: set[int]) -> None:
    # One copy may be made of another: take what hangs on it along.
    changed = set(changed)
    while True:
        stale = [key for key, e in store.items() if any(s.cdata in changed for s in e.storages)]
        if not stale:
            return
        for key in stale:
            value = store.pop(key).value
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, Tensor) and not x.is_mkldnn:
                    changed.add(_storage(x))
