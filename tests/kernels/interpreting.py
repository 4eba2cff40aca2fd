"""Forks a process of Triton's interpreter for the tests of each module, which saves its imports.

Reads one JSON request a line from stdin: arguments of pytest, the environment of the report, and
the file of the output. Answers with a line when that process has ended.
"""

from __future__ import annotations

import json
import os
import sys


def child(request: dict) -> None:
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(descriptor, target)
    os.environ.update(request["env"])
    status = 1
    try:
        import pytest

        status = int(pytest.main(request["arguments"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import triton.runtime.interpreter  # noqa: F401

    import pwm_fast.ops  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        os.waitpid(pid, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
