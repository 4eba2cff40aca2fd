"""``python -m tests.architecture`` draws docs/architecture.md's picture from the code's imports.

The layers are those of ``[tool.importlinter]`` in pyproject.toml, which ``make lint`` holds.
"""

from __future__ import annotations

import re
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- layers:begin -->", "<!-- layers:end -->"

#: What stands in one box: a layer of the contract has many modules.
BOXES = {
    "commands": (
        *("submit", "compare", "diagnose", "evaluate", "import_checkpoint", "info"),
        *("parity", "plot", "pretrain", "train"),
    ),
    "leaves": ("published", "data", "envs", "config", "replay"),
    "help": ("cli", "recording", "configs", "files", "hooks", "memory", "optional", "scopes"),
}
HIDDEN = {"__main__", "seeding", "help", "parallel"}  # every part may use them


def layers() -> list[list[str]]:
    """The layers of pyproject.toml, the highest first, each with its modules."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^layers = \[(.*?)^\]", text, re.S | re.M)
    assert listed is not None
    return [line.split(" | ") for line in re.findall(r'"([^"]+)"', listed[1])]


def box(module: str) -> str:
    """The box that a module below ``pwm_fast`` is drawn in."""
    return next((name for name, parts in BOXES.items() if module in parts), module)


def arrows() -> set[tuple[str, str]]:
    """Imports between boxes."""
    graph = grimp.build_graph(
        "pwm_fast",
        exclude_type_checking_imports=True,
        cache_dir=None,
        include_external_packages=False,
    )
    found: set[tuple[str, str]] = set()
    for importer in graph.modules:
        parts = importer.split(".")
        if len(parts) < 2 or importer == "pwm_fast.data.__main__":  # a command
            continue
        for imported in graph.find_modules_directly_imported_by(importer):
            names = imported.split(".")
            if len(names) > 1 and box(parts[1]) != box(names[1]):
                found.add((box(parts[1]), box(names[1])))
    return {pair for pair in found if not HIDDEN & set(pair)}


def drawn() -> str:
    """The picture, in Mermaid's words: an arrow points at what is imported."""
    order = list(dict.fromkeys(box(module) for layer in layers() for module in layer))
    shown = [name for name in order if name not in HIDDEN]
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {name}" for name in shown]
    for importer, imported in sorted(arrows(), key=lambda pair: [order.index(p) for p in pair]):
        lines.append(f"    {importer} --> {imported}")
    return "\n".join([*lines, "```"])


def stored() -> str:
    """The picture that the page holds."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Draw it anew."""
    text = PAGE.read_text("utf-8")
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{drawn()}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
