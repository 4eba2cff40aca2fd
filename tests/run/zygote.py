"""Starts commands by forking a process that has imported everything, which saves seconds a run.

A child is the command as a user runs it, from ``sys.argv`` to the exit status; ``hook`` is code run
before it. One that is ``composed`` trains with a configuration that Hydra made in this process once
for all children with the same arguments: composing takes a command as long as a tiny run. Reads one
JSON request a line from stdin, answers with one a line.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import os
import pickle
import runpy
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any

SIMULATORS = {
    "env=dmc": "dm_control.suite",
    "env=dmc_tasks": "dm_control.suite",
    "env=gym": "gymnasium.envs.mujoco",
}


@functools.cache
def composed(arguments: tuple[str, ...]) -> Any:
    """The configuration of a run, made in a child: Hydra would know here where plugins lie.

    What the env is simulated with is imported here.
    """
    for argument in arguments:
        if argument in SIMULATORS and find_spec(SIMULATORS[argument].partition(".")[0]):
            import_module(SIMULATORS[argument])
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        from pwm_fast import config

        with os.fdopen(theirs, "wb") as pipe:
            pickle.dump(config.compose(*arguments), pipe)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        found = pickle.load(pipe)
    os.waitpid(pid, 0)
    return found


def train(config: Any, changes: dict[str, str]) -> None:
    """What ``pwm_fast.train`` does once it has composed."""
    from pwm_fast import cli
    from pwm_fast.run import start

    own = dataclasses.replace(copy.deepcopy(config), **changes)
    raise SystemExit(cli.exit_status(lambda: start.train(own)[1]))


def child(request: dict, config: Any) -> None:
    os.setpgid(0, 0)
    out = os.open(request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    err = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, target)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        exec(request["hook"], {})
        if config is not None:
            train(config, request["composed"])
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import hydra  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import mujoco.batch  # noqa: F401
    import torch
    import torch._dynamo  # torch's optimisers import it

    import pwm_fast.cli
    import pwm_fast.run.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # children need not look at what they share
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        config = None
        if request["composed"] is not None:
            config = composed(tuple(request["arguments"]))
        pid = os.fork()
        if pid == 0:
            child(request, config)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
