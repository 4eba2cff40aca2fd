"""Processes that share one training run (data parallel): who they are, what they exchange.

Every rank steps its part of the envs, keeps its part of the replay, and computes its part of every
batch; gradients and running statistics are those of all. Started by ``torchrun``, or by
:mod:`pwm_fast.launch`, which sets the same variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what starts and watches runs imports this, and no torch
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A process that died is noticed at once, by its closed connections. This long one that lives may
# keep the others waiting: it writes a checkpoint, or compiles kernels.
PATIENCE = timedelta(minutes=30)


LOST = "another process of this run is gone, or cannot be reached"


class RankLost(RuntimeError):
    """Another process of the run is gone, so that this one cannot go on."""


class Followed(RuntimeError):
    """Another rank failed, and says why; this one ends for that alone."""


class Ranks:
    """One process of R, and its ways to the others. This class is of one process alone.

    What it offers is called by all ranks, in the same order.

    Attributes:
        rank: of this process, from 0 to R - 1; rank 0 writes what is written.
        size: R.
        local_rank: among the processes on this machine.
    """

    rank = 0
    size = 1
    local_rank = 0

    @property
    def first(self) -> bool:
        """This process writes checkpoints and logs."""
        return self.rank == 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from rank 0's, which one process alone has."""
        return () if self.first else (self.rank,)

    def part(self, count: int) -> int:
        """This rank's share of ``count``; where R does not divide it, the first ones have more."""
        return count // self.size + (self.rank < count % self.size)

    def gather(self, value: Any) -> list[Any]:
        """Of every rank its ``value``, which can be pickled, in the order of the ranks.

        Tensors in its dicts, lists and tuples come from other processes on the CPU.
        """
        return [value]

    def gather_first(self, value: Any) -> list[Any]:
        """As :meth:`gather` on rank 0; on the others nothing."""
        return [value]

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers, below 2^31; a GPU is not waited for."""
        return number

    def gather_tensors(self, value: Tensor) -> Tensor:
        """Tensors ``[R, ...]`` of ``[...]``, which has one shape on all ranks."""
        return value.unsqueeze(0)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their means over the ranks, in one flat all-reduce."""

    @contextmanager
    def together(self, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Inside, what some rank raises ends the block on all ranks.

        Args:
            alike: what all ranks raise if one does.

        Raises:
            Followed: another rank raised something else, which it tells itself.
        """
        yield


class Group(Ranks):
    """One of R processes of torch's default process group; its methods raise :class:`RankLost`.

    Args:
        local_rank: among the processes on this machine.
    """

    def __init__(self, local_rank: int) -> None:
        from torch import distributed

        self._distributed = distributed
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self.local_rank = local_rank

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        found: list[Any] = [None] * self.size
        with _reaching():
            self._distributed.all_gather_object(found, _on_cpu(value))
        return found

    def gather_first(self, value: Any) -> list[Any]:
        """See :meth:`Ranks.gather_first`."""
        found: list[Any] = [None] * self.size if self.first else []
        with _reaching():
            self._distributed.gather_object(_on_cpu(value), found if self.first else None)
        return found

    def highest(self, number: int) -> int:
        """See :meth:`Ranks.highest`."""
        import torch

        shared = torch.tensor(number, dtype=torch.int32, device="cpu")
        with _reaching():
            self._distributed.all_reduce(shared, self._distributed.ReduceOp.MAX)
        return int(shared)

    def gather_tensors(self, value: Tensor) -> Tensor:
        """See :meth:`Ranks.gather_tensors`."""
        import torch

        own = value.contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _reaching():
            self._distributed.all_gather(found, own)
        return torch.stack(found)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See :meth:`Ranks.average_`."""
        import torch

        flat = torch.cat([x.reshape(-1) for x in tensors])
        with _reaching():
            self._distributed.all_reduce(flat)
        flat.div_(self.size)
        parts = flat.split([x.numel() for x in tensors])
        means = [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), means)

    @contextmanager
    def together(self, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """See :meth:`Ranks.together`."""
        own: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            own = error
        if not self.highest(own is not None):
            return
        shared = (type(own), str(own)) if isinstance(own, alike) else None
        said = self.gather(None if own is None else (shared, own.__class__.__name__))
        failed = [rank for rank, what in enumerate(said) if what is not None]
        unlike = [rank for rank in failed if said[rank][0] is None]
        first = (unlike or failed)[0]
        if first == self.rank:
            assert own is not None
            raise own
        if unlike:
            raise Followed(f"rank {first} failed: {said[first][1]}") from own
        kind, text = said[first][0]
        same: Exception = kind.__new__(kind)  # without what its own constructor adds to a message
        same.args = (text,)
        raise same

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """The same: a copy of an agent learns with the same others."""
        return self


ALONE = Ranks()
_were_joined = False


def started_together() -> bool:
    """Whether this process was started as one of several, as torchrun does it."""
    return all(os.environ.get(name) for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def repeats() -> bool:
    """Whether another process here says it, too: before they are joined all err alike."""
    return started_together() and os.environ["LOCAL_RANK"] != "0" and not _were_joined


def local_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if started_together() else 1


@contextmanager
def joined(*, cuda: bool) -> Iterator[Ranks]:
    """Inside, this process is one of those that it was started with; alone where it was not.

    Args:
        cuda: GPUs take part: what lies on them goes through NCCL.

    Raises:
        RankLost: the others cannot be reached.
    """
    if not started_together():
        yield ALONE
        return
    from torch import distributed

    global _were_joined
    _were_joined = True
    with _reaching():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Group(int(os.environ["LOCAL_RANK"]))
    finally:
        distributed.destroy_process_group()


def _on_cpu(value: Any) -> Any:
    """Nested containers with their tensors on the CPU: another process has other GPUs."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


@contextmanager
def _reaching() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo; NCCL's and the store's are subclasses
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RankLost(f"{LOST} ({lines[0].partition('. ')[0]})") from error
