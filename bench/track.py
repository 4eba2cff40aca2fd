"""Say what became slower since a stored result of the same kind of machine.

python -m bench.track NEW.json [BASE.json]

Without BASE.json it is the newest of bench/results with the same processor, instruction set,
threads and versions. The exit status is 1 if something became slower, wrong, or is no longer
measured; 2 if there is nothing to compare with.

The rule. Every row's time is divided by the time of the case's first provider (the published code)
in the same round of the same run, so the speed of the whole machine cancels. A row became slower if
its median ratio rose by more than the threshold (10 %) and the two spreads do not meet: the new
20th percentile lies above the old 80th. Judged are the rows of pwm_fast; of all others only whether
their results are right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import results
from bench.results import Group, Result, ResultError, Row, Spread, ratio

THRESHOLD = 0.10
OURS = ("reference", "algebra", "fast", "fast_edit", "fast_bf16", "mujoco_warp")


class Change(NamedTuple):
    """What became of a row.

    Attributes:
        case: name of the case.
        provider: of the row.
        verdict: ``slower``, ``faster``, ``same``, ``failed`` (its result is wrong), ``lost``
            (measured before; absent or out of memory now).
        detail: in words.
    """

    case: str
    provider: str
    verdict: str
    detail: str

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "failed", "lost")


def compare(new: Result, base: Result, threshold: float = THRESHOLD) -> list[Change]:
    """Rows of pwm_fast that both runs selected, and every row that failed."""
    changes = []
    for name, group in new.groups.items():
        before = base.groups.get(name)
        if before is not None:
            changes += list(_rows(group, before, threshold))
    return changes


def _rows(group: Group, before: Group, threshold: float) -> Iterator[Change]:
    for provider, row in group.rows.items():
        old = before.rows.get(provider)
        if row.status == "failed":
            yield Change(group.name, provider, "failed", row.reason or "")
        elif provider in OURS and old is not None and old.status == "ok":
            if row.status != "ok":
                yield Change(group.name, provider, "lost", row.reason or "")
            else:
                yield from _compare(group, row, before, old, threshold)


def _compare(group: Group, row: Row, before: Group, old: Row, threshold: float) -> Iterator[Change]:
    anchor = group.anchor
    if anchor is None or row is anchor:  # alone: nothing cancels the machine's own speed
        return
    its_anchor = before.rows.get(anchor.provider)
    if its_anchor is None or its_anchor.status != "ok":
        return
    now, then = ratio(row, anchor), ratio(old, its_anchor)
    change = now.p50 / then.p50 - 1.0
    verdict = "same"
    if change > threshold and now.p20 > then.p80:
        verdict = "slower"
    elif change < -threshold and now.p80 < then.p20:
        verdict = "faster"
    detail = f"{change:+.0%}: {_span(now)} of {anchor.provider}'s time, was {_span(then)}"
    yield Change(group.name, row.provider, verdict, detail)


def _span(s: Spread) -> str:
    return f"{s.p50:.3g} ({s.p20:.3g} to {s.p80:.3g})"


def differences(a: Result, b: Result) -> list[str]:
    """In what two runs' kinds of machine differ."""
    mine, other = a.kind(), b.kind()
    keys = list(dict.fromkeys([*mine, *other]))
    return [
        f"{key}: {mine.get(key)} and {other.get(key)}"
        for key in keys
        if mine.get(key) != other.get(key)
    ]


def base_for(new: Result, found: Sequence[Result]) -> Result:
    """The newest comparable result that shares a case.

    Raises:
        ResultError: there is none; the message says what the nearest differs in.
    """
    others = [r for r in found if r.path is None or new.path is None or not _same(r, new)]
    if not others:
        raise ResultError("no stored result to compare with: bench/results has none of speed")
    fitting = [r for r in others if not differences(new, r) and new.groups.keys() & r.groups.keys()]
    if fitting:
        return fitting[-1]
    nearest = min(others, key=lambda r: len(differences(new, r)))
    why = "; ".join(differences(new, nearest)) or "it has none of these cases"
    raise ResultError(
        f"no stored result of this kind of machine among {len(others)}; "
        f"the nearest, {nearest.path}, differs in {why}"
    )


def _same(a: Result, b: Result) -> bool:
    assert a.path is not None and b.path is not None
    return a.path.resolve() == b.path.resolve()


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.track", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("base", nargs="?", type=Path, metavar="BASE.json")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="PART", help="0.1 is 10 %% (default)"
    )
    options = parser.parse_args(argv)
    try:
        new = results.load(options.new)
        if options.base is None:
            base = base_for(new, results.stored())
        else:
            base = results.load(options.base)
            other = differences(new, base)
            if other:
                raise ResultError(f"{base.path} is of another kind of machine: {'; '.join(other)}")
        changes = compare(new, base, options.threshold)
        if not changes:
            raise ResultError(f"{new.path} and {base.path} share no case")
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"against {base.path}, commit {base.facts['commit']['id']}:")
    for change in changes:
        if change.verdict != "same":
            print(f"{change.verdict:6}  {change.case}, {change.provider}: {change.detail}")
    bad = sum(change.bad for change in changes)
    print(f"{len(changes)} rows compared, {bad} slower, wrong or lost")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
