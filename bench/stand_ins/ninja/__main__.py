"""``python -m ninja -C FOLDER``: run the commands of its build file, those at once that can be."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main(folder: Path) -> int:
    """1 if a command fails, after what it printed."""
    lines = (folder / "build.ninja").read_text("utf-8").splitlines()
    waiting = [json.loads(line) for line in lines]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while waiting:
            missing = {build["out"] for build in waiting}
            ready = [build for build in waiting if not missing.intersection(build["in"])]
            if not ready:
                print(f"error: {', '.join(sorted(missing))} are made from each other")
                return 1
            waiting = [build for build in waiting if build not in ready]

            def run(build: dict[str, str]) -> "subprocess.CompletedProcess[str]":
                return subprocess.run(
                    build["command"],
                    shell=True,
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )

            for build, done in zip(ready, pool.map(run, ready), strict=True):
                print(build["command"], done.stdout, sep="\n")
                if done.returncode:
                    print(f"FAILED: {build['out']}")
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[sys.argv.index("-C") + 1])))
