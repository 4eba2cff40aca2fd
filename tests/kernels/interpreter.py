"""Triton's interpreter, without the work that it repeats."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


class _Stays:
    def restore(self) -> None:
        """Nothing: the process interprets all that it runs."""


def patch_once() -> None:
    """Replace the functions of ``triton.language`` by the interpreter's once.

    It does so at every launch and every call of a device function, thousands of times a launch,
    which took half of the time of the tests.
    """
    patch, done = interpreter._patch_lang, set[frozenset[int]]()
    languages = (interpreter.tl, interpreter.tl.core)

    def patched(function: Any) -> _Stays:
        seen = function.__globals__.values()
        key = frozenset(id(value) for value in seen if any(value is lang for lang in languages))
        if key not in done:
            patch(function)
            done.add(key)
        return _Stays()

    interpreter._patch_lang = patched
