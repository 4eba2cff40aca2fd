"""Saying why an optional package cannot be imported."""

from __future__ import annotations


def reason(error: Exception, module: str, needed: str) -> str:
    """What to tell a user of a failed import.

    Args:
        error: of the import.
        module: the package's own module.
        needed: what is needed and how to install it, which says all where the package is missing.
            Of one that is there but broken, or too old, the message also has its own error.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return needed
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{needed}; {module} is installed, but its import fails: {said}"
