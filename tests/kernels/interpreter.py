"""Triton's interpreter, without the work that it repeats.

Its time goes into objects that describe types and shapes, some twenty for each operation of a
program, and hardly into numbers. Here those that would be equal are made once. What is computed
stays as it is: every replacement asks Triton's own function for what it has not seen before.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from pwm_fast.kernels import column_sums


class _Stays:
    def restore(self) -> None:
        """Nothing: the process interprets all that it runs."""


def patch_once() -> None:
    """Make what repeats itself once, for the life of the process."""
    _patch_languages()
    _patch_types()
    _patch_shapes()
    _patch_overflow()
    # Sums of real widths take several programs still, and not tens of them.
    column_sums.COLUMNS = 128


def _patch_languages() -> None:
    """Replace the functions of ``triton.language`` by the interpreter's once.

    It does so at every launch and every call of a device function, thousands of times a launch,
    which took half of the time of the tests.
    """
    patch, done = interpreter._patch_lang, set[frozenset[int]]()
    languages = (interpreter.tl, interpreter.tl.core)
    modules: dict[int, Any] = {}  # by id, which stays theirs as they are kept

    def patched(function: Any) -> _Stays:
        names = function.__globals__
        if id(names) not in modules:
            modules[id(names)] = names
            key = frozenset(id(x) for x in names.values() if any(x is lang for lang in languages))
            if key not in done:
                patch(function)
                done.add(key)
        return _Stays()

    interpreter._patch_lang = patched


def _patch_types() -> None:
    """The types of numbers: NumPy's for one of Triton's, and whether two are equal."""
    original, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    def equal(self: tl.dtype, other: Any) -> bool:
        if isinstance(other, tl.constexpr):
            other = other.value
        return isinstance(other, tl.dtype) and self.name == other.name

    interpreter._get_np_dtype = numpy_type
    tl.dtype.__eq__ = equal


def _patch_shapes() -> None:
    """Shapes of tensors and of their types, and whether two are equal."""
    block, blocks = tl.block_type.__init__, dict[Any, dict[str, Any]]()
    tensor, tensors = tl.tensor.__init__, dict[Any, tuple[Any, Any]]()
    same = tl.tuple.__eq__

    def make_block(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        key = element_ty.name, *(x.value if isinstance(x, tl.constexpr) else x for x in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def make_tensor(self: Any, handle: Any, type: tl.dtype) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key not in tensors:
            tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    def equal(self: Any, other: Any) -> Any:
        if isinstance(other, list | tuple) and all(type(x) is int for x in other):
            return tl.constexpr(self.values == [*other])
        return same(self, other)

    tl.block_type.__init__ = make_block
    tl.tensor.__init__ = make_tensor
    tl.tuple.__eq__ = equal


def _patch_overflow() -> None:
    """Leave out what looks for sums of integers that do not fit, by a dozen operations a sum.

    Its finding is dropped: the interpreter asserts only with ``debug``, which it does not have.
    """
    assert not interpreter.interpreter_builder.options.debug
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
