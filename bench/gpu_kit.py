"""What was built before a visit to a GPU, packed: Triton's cache, the native extension, tools.

:mod:`bench.prepare` packs it on a machine without a GPU, :mod:`bench.gpu` unpacks it on one that
has nothing but Python, torch and Triton. Parts that do not fit there are left out, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import gpu_checks
from bench.environment import ROOT

KIT = ROOT / "build" / "gpu-kit"  # a folder, carried as it is
LIMIT = 64 * 2**20  # bytes that may be brought to a machine
MANIFEST = "manifest.json"
TRITON, NATIVE, TOOLS = "triton.tar.xz", "native.tar.xz", "tools.tar.xz"
SCHEMA = 3
_GROUP = "__grp__"  # Triton's lists of a kernel's files, with absolute paths


class KitError(ValueError):
    """The kit cannot be packed or is no kit; the message says why."""


def here() -> dict[str, Any]:
    """What must be equal for what was built to be used, by the parts' names."""
    python = {"python": ".".join(platform.python_version_tuple()[:2])}
    machine = {"platform": f"{platform.system()} {platform.machine()}"}
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        TRITON: {**python, **machine, "triton": triton},
        NATIVE: {**python, **machine, "sources": sources()},
        TOOLS: {**python, **machine},
    }


def sources() -> str:
    """A digest of what the extension is built from."""
    digest = hashlib.sha256()
    for path in gpu_checks.sources():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# --- packing ------------------------------------------------------------------------------------


def pack(
    kit: Path,
    cache: Path,
    extensions: Sequence[Path],
    tools: Path,
    facts: Mapping[str, Any],
    limit: int = LIMIT,
) -> dict[str, Any]:
    """Pack into a folder, and return its manifest.

    Args:
        kit: the folder; what it holds of an earlier kit is replaced.
        cache: of Triton, all of which is taken.
        extensions: files of ``pwm_fast``.
        tools: a folder of Python packages, to be found where one of them is missing.
        facts: for the manifest: the commit, the arch, versions.
        limit: bytes of all files together.

    Raises:
        KitError: it would be too large.
    """
    kit.mkdir(parents=True, exist_ok=True)
    (kit / MANIFEST).unlink(missing_ok=True)
    parts = {
        TRITON: [(p, name) for p, name in _files(cache) if ".tmp" not in name],
        NATIVE: [(p, p.name) for p in extensions],
        TOOLS: [(p, name) for p, name in _files(tools) if "__pycache__" not in name],
    }
    manifest: dict[str, Any] = {"schema": SCHEMA, **facts, "needs": here(), "files": {}}
    for name, members in parts.items():
        with tarfile.open(kit / name, "w:xz") as tar:
            for path, inside in members:
                tar.add(path, inside)
        manifest["files"][name] = {
            "members": len(members),
            "bytes": (kit / name).stat().st_size,
            "unpacked": sum(path.stat().st_size for path, _ in members),
            "sha256": _digest(kit / name),
        }
    size = sum(part["bytes"] for part in manifest["files"].values())
    if size > limit:
        raise KitError(
            f"the kit has {size / 2**20:.1f} MiB, at most {limit / 2**20:.0f} may be brought along"
        )
    (kit / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _files(folder: Path) -> list[tuple[Path, str]]:
    """All files below a folder, with their names there."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return [(p, p.relative_to(folder).as_posix()) for p in found]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- unpacking ----------------------------------------------------------------------------------


def load(kit: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        KitError: there is none, or it is none.
    """
    try:
        manifest = json.loads((kit / MANIFEST).read_text("utf-8"))
        if manifest["schema"] != SCHEMA:
            raise KitError(f"{kit} has schema {manifest['schema']}, this code reads {SCHEMA}")
        if set(manifest["files"]) != set(here()) or set(manifest["needs"]) != set(here()):
            raise KitError(f"{kit / MANIFEST} names other parts")
    except OSError as error:
        raise KitError(f"{kit} is no kit: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, KitError):
            raise
        raise KitError(f"{kit / MANIFEST} is no manifest: {error!r}") from error
    return manifest  # type: ignore[no-any-return]


def why_not(manifest: Mapping[str, Any], name: str, kit: Path) -> str | None:
    """Why a part cannot be used here."""
    mine = here()[name]
    wrong = [
        f"{key} is {mine[key]}, the kit's {value}"
        if key != "sources"
        else "the extension's sources have changed since"
        for key, value in manifest["needs"][name].items()
        if mine.get(key) != value
    ]
    if wrong:
        return "; ".join(wrong)
    path = kit / name
    if not path.is_file() or _digest(path) != manifest["files"][name]["sha256"]:
        return f"{name} is missing or damaged"
    return None


def unpack(kit: Path, cache: Path, package: Path, tools: Path) -> dict[str, Any]:
    """Unpack what fits, and say what does not.

    Args:
        kit: a folder that :func:`pack` has filled.
        cache: Triton's; what it has already stays as it is.
        package: the folder of ``pwm_fast``.
        tools: a folder for Python packages.

    Returns:
        ``commit`` of the kit, and of each part in words what became of it.

    Raises:
        KitError: it is no kit.
    """
    manifest = load(kit)
    said = {}
    for name, target in ((TRITON, cache), (NATIVE, package), (TOOLS, tools)):
        reason = why_not(manifest, name, kit)
        if reason is not None:
            said[name] = f"not used: {reason}"
            continue
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(kit / name, "r:xz") as tar:
            every = tar.getmembers()
            members = [m for m in every if not (target / m.name).exists()]
            tar.extractall(target, members, filter="data")
        for path in (target / member.name for member in every):
            if name == TRITON and path.name.startswith(_GROUP):
                _relocate(path)  # also where an earlier run was killed before it did
            if name == NATIVE:
                os.utime(path)  # later than its sources, whose times are those of a checkout
        said[name] = f"{len(members)} of {len(every)} files unpacked"
    return {"commit": manifest.get("commit"), **said}


def _relocate(group: Path) -> None:
    """Triton's list of a kernel's files names them where they were compiled."""
    paths = json.loads(group.read_text("utf-8"))["child_paths"]
    moved = {name: str(group.parent / name) for name in paths}
    group.write_text(json.dumps({"child_paths": moved}), "utf-8")
