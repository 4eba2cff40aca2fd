"""``python -m pwm_fast.info``: versions and hardware, for bug reports."""

from __future__ import annotations

from pwm_fast.run.installation import report


def main() -> None:
    """Print the report."""
    rows = report()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
