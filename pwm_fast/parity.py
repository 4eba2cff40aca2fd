"""``python -m pwm_fast.parity alg=pwm_48M_flow against=pwm_48M env=ant``: is a comparison fair?

Prints the parameters of two agents per component and what they compute. ``alg`` alone is held
against its own baseline (the name without ``_flow``); no ``alg`` checks every shipped pair.
``against.KEY=VALUE`` changes the second agent as ``alg.KEY=VALUE`` does the first, ``actor=NAME``
and ``against.actor=NAME`` choose their policies, every other key is one of training and holds for
both. ``--suggest`` prints the hidden width that meets the baseline best.

Exit status: 0; 1 beyond 2 %, or where encoder or reward head are not the baseline's; 2 and one line
on stderr says what is wrong.
"""

from __future__ import annotations

import sys

from pwm_fast import cli
from pwm_fast.analysis.fairness import Request, check_all, check_pair, shipped_pairs
from pwm_fast.config import ConfigError


def parse(arguments: list[str]) -> Request:
    """Sort the command line.

    Raises:
        ConfigError: an argument is no ``key=value``, or what it is held against cannot be told.
    """
    values: dict[str, str] = {}
    common, ours, theirs = ["env=ant"], [], []
    for argument in arguments:
        if argument == "--suggest":
            continue
        key, equals, value = argument.partition("=")
        if not equals or argument.startswith("-"):
            raise ConfigError(f"{argument!r} is neither key=value nor --suggest; see --help")
        if key in ("alg", "against"):
            values[key] = value
        elif key == "actor" or key.startswith("alg."):
            ours.append(argument)
        elif key == "against.actor":
            theirs.append(f"actor={value}")
        elif key.startswith("against."):
            theirs.append(f"alg.{argument.removeprefix('against.')}")
        else:
            common.append(argument)
    alg, against = values.get("alg"), values.get("against")
    if alg is None and (against is not None or ours or theirs):
        raise ConfigError("alg=NAME is needed beside against= and changes of a configuration")
    if alg is not None and against is None:
        against = dict(shipped_pairs()).get(alg)
        if against is None:
            raise ConfigError(f"against=NAME is needed: alg={alg} has no shipped baseline")
    pair = None if alg is None or against is None else (alg, against)
    return Request(pair, tuple(common), tuple(ours), tuple(theirs), "--suggest" in arguments)


def main() -> None:
    """Compare what the command line names."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return
    cli.plain(lambda: run(arguments))


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    request = parse(arguments)
    return check_all(request) if request.pair is None else check_pair(request, request.pair)


if __name__ == "__main__":
    main()
