"""Groups of ranks: what they gather, and how the failure of one rank is raised on all.

    Peers()                            alone: each call is the identity
    world.peers                        all ranks of the run, over the process group of the training
    Peers.of_world(rank, world_size)   all ranks, over a separate gloo group: a save in a thread never interleaves with
                                       the collectives of the training step (pytorch/pytorch#144657)

An exception on one rank is raised on every rank, so no rank is left waiting.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from livt_scale.util.errors import LivtError

T = TypeVar("T")
_Portable = tuple[type[LivtError], str, str]


@dataclass(frozen=True)
class Peers:
    """`rank` of `world_size`, which speak over `group` (None: over the process group of all).

    all_raise: what every rank raises when something fails: the first failure, as an error of ours (one that is not,
    such as an OSError, becomes an `all_raise`). None: a rank that failed raises its own error, whatever it is, and the
    others the first of those.
    """

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None
    all_raise: type[LivtError] | None = None

    @classmethod
    def of_world(
        cls, rank: int, world_size: int, *, timeout_s: float = 1800, all_raise: type[LivtError] | None = None
    ) -> Peers:
        """A separate group over all ranks; a collective call. No process group is needed for one rank."""
        return cls.of_ranks(rank, [list(range(world_size))], timeout_s=timeout_s, all_raise=all_raise)

    @classmethod
    def of_ranks(
        cls,
        rank: int,
        parts: list[list[int]],
        *,
        timeout_s: float = 1800,
        all_raise: type[LivtError] | None = None,
    ) -> Peers:
        """Make a group of each list in `parts` and return the one that has `rank`. A collective call of all ranks."""
        mine = cls(all_raise=all_raise)
        for part in parts:
            if len(part) > 1:
                assert dist.is_initialized(), "start torch.distributed before its ranks make a group"
                group = dist.new_group(part, backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
                if rank in part:
                    assert isinstance(group, dist.ProcessGroup)
                    mine = cls(part.index(rank), len(part), group, all_raise)
        return mine

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Each rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: T) -> list[T] | None:
        """Each rank's value on rank 0, None elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values, group_dst=0, group=self.group)
        return values

    def scatter(self, values: list[T] | None) -> T:
        """Rank 0's list, one value to each rank."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, values, group_src=0, group=self.group)
        return received[0]

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def run_all(self, work: Callable[[], T]) -> T:
        """Run `work` on each rank and return this rank's result; if it fails anywhere it fails everywhere."""
        result, error = _attempt(work)
        self.all_or_none(error)
        return result  # type: ignore[return-value]

    def all_or_none(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error."""
        self._raise_first(self.all_gather(self._portable(error)), error)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank; so does its failure."""
        result, error = _attempt(work) if self.leads else (None, None)
        result, first = self.broadcast((result, self._portable(error)))
        self._raise_first([first], error)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Give the group back; the process group of all stays."""
        if self.group is not None and dist.is_initialized():  # the process group may have been destroyed before us
            dist.destroy_process_group(self.group)

    def _raise_first(self, errors: list[_Portable | None], own: Exception | None) -> None:
        if own is not None and (self.all_raise is None or (self.world_size == 1 and not isinstance(own, OSError))):
            raise own
        for rank, error in enumerate(errors):
            if error is not None:
                kind, message, remedy = error
                if len(errors) > 1 and not message.startswith("rank "):
                    message = f"rank {rank}: {message}"
                raise kind(message.splitlines(), remedy=remedy) from own

    def _portable(self, error: Exception | None) -> _Portable | None:
        """What can be sent to another rank: the class of our error, its message and its remedy."""
        if error is None:
            return None
        if isinstance(error, LivtError):
            return type(error), error.message, error.remedy
        return self.all_raise or LivtError, f"{type(error).__name__}: {error}", ""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # handed to all ranks, then raised by each
        return None, error
