"""The ranks that write or read one checkpoint together: what they gather, and how one's failure reaches all.

Alone (`Peers()`) each call is the identity. With more ranks they speak over a gloo group of their own, so that a save
in a thread never meets the collectives of the training step (pytorch/pytorch#144657). An exception on one rank is
raised on every rank, with the rank's number: nobody is left waiting.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from livt_scale.errors import CheckpointError, LivtError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """`rank` of `world_size`; `group` is None when alone."""

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None

    @classmethod
    def of_world(cls, rank: int, world_size: int, *, timeout_s: float = 1800) -> Peers:
        """A group of its own over all ranks; a collective call. No process group is needed for one rank."""
        if world_size == 1:
            return cls()
        import torch.distributed as dist

        assert dist.is_initialized(), "start torch.distributed before the checkpoint store"
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        assert isinstance(group, dist.ProcessGroup)
        return cls(rank, world_size, group)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, value: T) -> list[T] | None:
        """Each rank's value on rank 0, None elsewhere."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def deal(self, values: list[T] | None) -> T:
        """Rank 0's list, one value to each rank."""
        if self.group is None:
            assert values is not None
            return values[0]
        import torch.distributed as dist

        received: list[Any] = [None]
        dist.scatter_object_list(received, values, src=0, group=self.group)
        return received[0]

    def tell(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value  # type: ignore[return-value]
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def all_do(self, work: Callable[[], T]) -> T:
        """Run `work` on each rank and return this rank's result; if it fails anywhere it fails everywhere."""
        result, error = _attempt(work)
        errors = self.gather(_portable(error))
        self._raise_first(errors, error)
        return result  # type: ignore[return-value]

    def lead_does(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank; so does its failure."""
        result, error = _attempt(work) if self.leads else (None, None)
        result, first = self.tell((result, _portable(error)))
        self._raise_first([first], error)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        if self.group is not None:
            import torch.distributed as dist

            if dist.is_initialized():  # the world may have been taken down before us
                dist.destroy_process_group(self.group)

    def _raise_first(self, errors: list[tuple[type[LivtError], str, str] | None], own: Exception | None) -> None:
        for rank, error in enumerate(errors):
            if error is None:
                continue
            if self.world_size == 1 and not isinstance(own, OSError):
                assert own is not None
                raise own
            kind, message, remedy = error
            if len(errors) > 1:
                message = f"rank {rank}: {message}"
            raise kind(message, remedy=remedy) from own


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # handed to all ranks, then raised by each
        return None, error


def _portable(error: Exception | None) -> tuple[type[LivtError], str, str] | None:
    """What can be sent to another rank: the kind of our own error, its message and its remedy."""
    if error is None:
        return None
    if isinstance(error, CheckpointError):
        return type(error), error.message, error.remedy
    return CheckpointError, f"{type(error).__name__}: {error}", ""
