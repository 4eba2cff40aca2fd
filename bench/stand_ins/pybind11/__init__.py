"""Where the headers of pybind11 are that come with torch."""

from importlib.util import find_spec
from pathlib import Path


def get_include() -> str:
    """The folder; torch is not imported for it."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise ImportError("there is neither pybind11 nor torch, which brings its headers along")
    return str(Path(found.origin).with_name("include"))
