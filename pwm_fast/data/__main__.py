"""``python -m pwm_fast.data describe|register|verify|export``: offline data and their manifests.

Exit status: 0; 1 if ``verify`` finds a difference; 2 and one line on stderr for what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pwm_fast import cli
from pwm_fast.data.errors import DataError
from pwm_fast.data.formats import describe
from pwm_fast.data.manifest import Manifest, compare, default_manifest, register
from pwm_fast.data.progress import reading_bar

SHOWN = 50  # differences that verify prints


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status.

    Args:
        arguments: of the command line, without the program's name; None takes ``sys.argv``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["export"]:
        from pwm_fast.run import export

        sys.argv = [sys.argv[0], *given[1:]]  # what Hydra reads
        cli.main(export.run, "export", export.ExportConfig, config_name="export")
    options = _parser().parse_args(given)
    return cli.exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.manifest is not None and len(options.paths) > 1:
        raise DataError(
            f"--manifest {options.manifest} is of one data set, got {len(options.paths)} paths"
        )
    commands = {"describe": _describe, "register": _register, "verify": _verify}
    return commands[options.command](options)


def _describe(options: argparse.Namespace) -> int:
    for path in options.paths:
        print(describe(path, options.manifest).text())
    return 0


def _register(options: argparse.Namespace) -> int:
    for path in options.paths:
        with reading_bar(path, options.manifest, f"reading {path}") as progress:
            manifest, where = register(
                path, options.manifest, update=options.update, progress=progress
            )
        print(f"{path}: {_size(manifest)} registered in {where} (sha256 {manifest.sha256})")
    return 0


def _verify(options: argparse.Namespace) -> int:
    status = 0
    for path in options.paths:
        with reading_bar(path, options.manifest, f"reading {path}") as progress:
            manifest, problems = compare(path, options.manifest, progress=progress)
        where = options.manifest or default_manifest(path)
        if not problems:
            print(f"{path}: {_size(manifest)} as registered (sha256 {manifest.sha256})")
            continue
        status = 1
        print(f"{path}: not as registered in {where}:")
        for problem in problems[:SHOWN]:
            print(f"  {problem}")
        if len(problems) > SHOWN:
            print(f"  and {len(problems) - SHOWN} more")
    return status


def _size(manifest: Manifest) -> str:
    count = len(manifest.entries)
    return f"{count} file{'' if count == 1 else 's'}, {manifest.size:,} bytes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pwm_fast.data",
        description="Offline data sets of several formats, and their SHA-256 manifests.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("describe", "say what a data set holds"),
        ("register", "write the manifest of a data set as it is now"),
        ("verify", "compare a data set with its manifest; exit status 1 if it differs"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
        command.add_argument(
            "--manifest",
            type=Path,
            metavar="FILE",
            help="the manifest; by default manifest.json in the folder, FILE.manifest.json beside "
            "the file",
        )
        if name == "register":
            command.add_argument(
                "--update", action="store_true", help="replace a manifest that says otherwise"
            )
    commands.add_parser(
        "export", help="record episodes of a checkpoint or of random actions", add_help=False
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
