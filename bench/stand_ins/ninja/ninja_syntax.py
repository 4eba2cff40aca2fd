"""Writes a build file of JSON lines, in the place of ninja's own."""

import json
from collections.abc import Sequence
from string import Template
from typing import Any, TextIO


class Writer:
    """Takes variables, rules and builds, and writes the commands."""

    def __init__(self, output: TextIO, width: int = 0) -> None:
        self._output = output
        self._variables: dict[str, str] = {}
        self._rules: dict[str, str] = {}

    def variable(self, name: str, value: str) -> None:
        """A variable of all commands; what it refers to is known already."""
        self._variables[name] = self._expanded(value)

    def rule(self, name: str, command: str, **unused: Any) -> None:
        """A command with variables; ``$in`` and ``$out`` are files."""
        self._rules[name] = command

    def build(
        self,
        outputs: str,
        rule: str,
        inputs: str | Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> list[str]:
        """A file that a rule makes from others."""
        files = [inputs] if isinstance(inputs, str) else list(inputs)
        own = {name: self._expanded(value) for name, value in (variables or {}).items()}
        known = {**self._variables, **own, "in": " ".join(files), "out": outputs}
        command = Template(self._rules[rule]).substitute(known)
        self._output.write(json.dumps({"out": outputs, "in": files, "command": command}) + "\n")
        return [outputs]

    def _expanded(self, value: str) -> str:
        return Template(value).substitute(self._variables)


def escape(text: str) -> str:
    """The text such that nothing in it is taken for a variable."""
    return text.replace("$", "$$")
