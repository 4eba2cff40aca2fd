"""What reading offline data costs: memory and time for each format, on data sets of two sizes.

python -m bench.data_formats            # writes 3 GB for a while, and takes two minutes
python -m bench.data_formats --docs     # the table, from what is stored

The episodes have the widths and the length of TD-MPC2's mt30. Each data set is read by a process of
its own, which says how much memory it has beside what is mapped from files, and can be dropped.

Writes ``bench/results/data_formats.json`` and, with ``--docs``, the table in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, results
from bench.pages import DATA, publish
from pwm_fast.data import describe
from pwm_fast.data.episodes import write_episode
from pwm_fast.replay import Episode

OUT = results.STORE / "data_formats.json"
STEPS, OBS, ACTION = 500, 24, 6
SIZES = {"TD-MPC2 chunk": (4000, 32_000), "Minari": (1000, 4000), ".npz files": (1000, 4000)}


def write_chunk(folder: Path, episodes: int) -> None:
    """One chunk, as a dict of tensors."""
    values = {
        "obs": torch.rand(episodes, STEPS + 1, OBS),
        "action": torch.rand(episodes, STEPS + 1, ACTION),
        "reward": torch.ones(episodes, STEPS + 1),
        "task": torch.zeros(episodes, STEPS + 1, dtype=torch.int32),
    }
    torch.save(values, folder / "chunk_0.pt")


def write_minari(folder: Path, episodes: int) -> None:
    """One data set of Minari."""
    import h5py

    def box(width: int) -> str:
        bounds = {"low": [-1.0] * width, "high": [1.0] * width}
        return json.dumps({"type": "Box", "dtype": "float32", "shape": [width], **bounds})

    said = {"data_format": "hdf5", "minari_version": "0.5.4", "total_episodes": episodes}
    spaces = {"observation_space": box(OBS), "action_space": box(ACTION)}
    (folder / "metadata.json").write_text(json.dumps({**said, **spaces}))
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for e in range(episodes):
            episode = _episode()
            arrays = {
                "observations": episode.obs,
                "actions": episode.action,
                "rewards": episode.reward,
                "terminations": episode.terminated,
                "truncations": episode.terminated,
            }
            group = file.create_group(f"episode_{e}")
            for key, value in arrays.items():
                shape = (None, *value.shape[1:])
                group.create_dataset(key, data=value.numpy(), chunks=True, maxshape=shape)


def write_files(folder: Path, episodes: int) -> None:
    """A file for each episode."""
    for e in range(episodes):
        write_episode(folder / f"episode_{e:05}.npz", _episode())


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "TD-MPC2 chunk": write_chunk,
    "Minari": write_minari,
    ".npz files": write_files,
}


def _episode() -> Episode:
    ended = torch.zeros(STEPS, dtype=torch.bool)
    obs, action = torch.rand(STEPS + 1, OBS), torch.rand(STEPS, ACTION)
    return Episode(obs, action, torch.ones(STEPS), ended)


def read(path: Path) -> dict[str, Any]:
    """Read a data set; what it took.

    Raises:
        ValueError: not all that was written came back.
    """
    before, began = memory(), time.monotonic()
    data = describe(path)
    described, most, steps, reward = time.monotonic() - began, memory(), 0, 0.0
    for i, (_, episode) in enumerate(data.episodes()):
        steps += len(episode.action)
        reward += float(episode.reward.sum())
        if i % 50 == 0:
            most = max(most, memory())
    if not steps == reward == data.whole.transitions:
        raise ValueError(f"{data.whole.transitions} steps were written, {steps} were read")
    return {
        "episodes": data.whole.episodes,
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "describe_seconds": round(described, 2),
        "read_seconds": round(time.monotonic() - began - described, 2),
        "memory_bytes": most - before,
    }


def memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def measure(kind: str, episodes: int) -> dict[str, Any]:
    """Write a data set, and read it in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        WRITERS[kind](Path(name), episodes)
        command = [sys.executable, "-m", "bench.data_formats", "--read", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"format": kind, **json.loads(done.stdout)}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a line for each data set."""
    heads = ("format", "episodes", "MB", "described in", "read in", "memory above the start")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in result["cases"]:
        cells = [case["format"], f"{case['episodes']:,}", f"{case['bytes'] / 1e6:,.0f}"]
        cells += [f"{case[f'{what}_seconds']:.1f} s" for what in ("describe", "read")]
        cells.append(f"{case['memory_bytes'] / 1e6:.0f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    software = result["software"]
    lines += ["", f"Episodes of {STEPS} steps; one thread of {result['machine']['cpu']}."]
    lines[-1] += f" torch {software['torch']}, NumPy {software['numpy']}, h5py {result['h5py']},"
    lines.append(f"{environment.made(result)}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.data_formats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--read", type=Path, metavar="PATH", help="read a data set, and say so")
    parser.add_argument("--divide", type=int, default=1, help="episodes by this number")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", action="store_true", help="write docs/data.md's table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.read is not None:
        print(json.dumps(read(args.read)))
        return 0
    if args.docs:
        result = json.loads(args.out.read_text("utf-8"))
    else:
        import h5py

        facts = {**environment.describe(torch.device("cpu")), "h5py": h5py.__version__}
        sizes = [(kind, episodes // args.divide) for kind in SIZES for episodes in SIZES[kind]]
        result = results.write(args.out, {**facts, "cases": [measure(*size) for size in sizes]})
    publish(table(result), DATA if args.docs else None, "data_formats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
