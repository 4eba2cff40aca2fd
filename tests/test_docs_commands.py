"""The commands that README, CONTRIBUTING and docs show are read as the programs read them.

Nothing is run: configurations are composed and checked, other command lines go through their
parser. A key, an option or a file of ``configs/`` that got another name is found here.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import compare, import_checkpoint, launch, parity, plot, submit
from pwm_fast import config as configuration
from pwm_fast.analysis.diagnosis import DiagnoseConfig
from pwm_fast.config import ConfigError
from pwm_fast.data import __main__ as data
from pwm_fast.launch import options
from pwm_fast.launch.experiment import sweep_arguments
from pwm_fast.run.evaluation import EvaluateConfig
from pwm_fast.run.export import ExportConfig
from pwm_fast.run.importing import ImportConfig
from tests.test_docs_paths import PAGES, ROOT

FENCED = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"python -m pwm_fast\.(\w+)(.*)")
#: Settings within a sentence or a table, such as `alg.horizon=5 eval.every=0`.
SETTINGS = re.compile(r"(?:(?:alg|eval|esnr|checkpoint)\.[\w.]+=\S+ ?)+")
#: Of a shell, or left to the reader.
UNKNOWN = re.compile(r"\.\.\.|\$[a-z]")

SCHEMAS: dict[str, Callable[[], Any]] = {
    "train": configuration.hydra_schema,
    "pretrain": configuration.hydra_schema,
    "evaluate": lambda: EvaluateConfig,
    "diagnose": lambda: DiagnoseConfig,
    "export": lambda: ExportConfig,
    "import_checkpoint": lambda: ImportConfig,
}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every ``python -m pwm_fast.NAME`` of a page: the name and the arguments."""
    lines = [line for block in FENCED.findall(text) for line in _lines(block)]
    lines += INLINE.findall(FENCED.sub("", text))
    for line in lines:
        found = COMMAND.search(line)
        if found is not None and not UNKNOWN.search(found[2]):
            words = shlex.split(found[2], comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if words or found[1] in ("train", "parity", "info"):  # else only the name is meant
                yield found[1], words


def _lines(block: str) -> list[str]:
    """The command lines of a block; a backslash joins two."""
    return [part for line in re.sub(r"\\\n", " ", block).splitlines() for part in line.split("; ")]


def settings(text: str) -> list[list[str]]:
    """Overrides of training that stand in a sentence or in a table."""
    found = [code for code in INLINE.findall(text) if SETTINGS.fullmatch(code)]
    return [code.split() for code in found if not UNKNOWN.search(code) and "=n" not in code]


def runs(overrides: list[str]) -> list[list[str]]:
    """Overrides of enough runs of a sweep that each listed value is in one of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override() and override.key_or_group != "seed":
            key = override.get_key_element()
            choices.append([f"{key}={v}" for v in override.sweep_string_iterator()])
        elif override.is_sweep_override():
            choices.append([f"seed={next(iter(override.sweep_iterator()))}"])
        else:
            choices.append([override.input_line])
    count = max((len(values) for values in choices), default=1)
    return [[values[i % len(values)] for values in choices] for i in range(count)]


def composed(name: str, overrides: list[str]) -> None:
    """Compose a command's configuration, for each run of a sweep, and check its values.

    Raises:
        ConfigError, HydraException: as the command would.
    """
    configuration.check_choices(overrides)
    for run in runs(configuration.open_overrides(overrides)):
        _composed(name, tuple(run))


@functools.cache  # pages repeat each other's commands
def _composed(name: str, overrides: tuple[str, ...]) -> None:
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    launch.register()
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name]())
    with initialize_config_module("pwm_fast.configs", version_base="1.3"):
        found = compose("config" if name == "train" else name, overrides=list(overrides))
    if SCHEMAS[name] is configuration.hydra_schema:
        configuration.from_hydra(found)
        if found.get("launch"):  # not of launch=hydra
            of_slurm = "partition" in found.launch
            options.read(options.SlurmOptions if of_slurm else options.LocalOptions, found.launch)
    else:
        configuration.typed(found, SCHEMAS[name](), "checkpoint=PATH")


def check(name: str, words: list[str]) -> None:
    """Read a command as the program does."""
    if name == "info":
        assert not words
    elif name == "compare":
        compare.parse(words)
    elif name == "plot":
        with pytest.raises(ConfigError, match=r"no run|there is no"):  # after the options are read
            plot.run(words)
    elif name == "parity":
        request = parity.parse(words)
        for alg, own in zip(request.pair or (), (request.ours, request.theirs), strict=False):
            composed("train", [f"alg={alg}", *request.common, *own])
    elif name == "submit":
        given, overrides = submit.parser().parse_known_args(words)
        assert not [word for word in overrides if word.startswith("-")]
        if given.what not in ("status", "script"):
            check("train", sweep_arguments(given, overrides))
    elif name == "data" and words[0] != "export":
        data._parser().parse_args(words)
    else:
        if name == "data":
            name, words = "export", words[1:]
        if name == "import_checkpoint":
            words = import_checkpoint.named(words)
        flags = {word for word in words if word.startswith("-")}
        assert flags <= {"-m", "--cfg", "--config-dir"}, flags
        if "--config-dir" not in flags:  # a file of the reader's
            composed(name, [word for word in words if "=" in word])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_read(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    for name, words in commands(text):
        try:
            check(name, words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"python -m pwm_fast.{name} {' '.join(words)}") from error
    if page.parent.name == "guides":
        for overrides in settings(text):
            try:
                composed("train", overrides)
            except Exception as error:
                raise AssertionError(" ".join(overrides)) from error


def test_enough_commands_are_found() -> None:
    """Else the patterns above have lost them."""
    found = [command for page in PAGES for command in commands(page.read_text("utf-8"))]
    assert len(found) > 90
    assert {*SCHEMAS, "submit", "parity", "compare", "plot", "data"} - {
        name for name, _ in found
    } == {"export"}
