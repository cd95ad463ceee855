"""Which samples one rank reads, micro-batch by micro-batch, from any (epoch, step) on. Needs no torch.

    ranks = RankOrder(shards, order, epochs=10, rank=3, world_size=8, micro_batch=64)
    for batch in ranks.micro_batches(epoch=3, step=100, worker=w, num_workers=n):     # w, w + n, w + 2n, …
        batch.samples

A rank takes a contiguous run of slots of each global batch, cut into equal micro-batches; loader process w of n takes
every n-th of them, so neither the number of ranks nor of processes changes a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from livt_scale.data.order.instance import Ints, SampleOrder
from livt_scale.data.seeds import view_key
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import UsageError


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass of one rank, in the order of their slots."""

    epoch: int
    step: int  # within the epoch
    micro_index: int  # which of the rank's micro-batches in this step
    samples: Ints  # [n] sample numbers
    views: Ints | None = None  # [n] how many times each has appeared in this epoch before; None: never

    def seed_keys(self, keys: list[str]) -> list[str]:
        """`keys`, made different for each view of a sample: what random numbers are derived from."""
        if self.views is None:
            return keys
        return [view_key(key, view) for key, view in zip(keys, self.views.tolist(), strict=True)]


class RankOrder:
    """The micro-batches of one rank: its contiguous run of slots of each global batch, cut into equal parts.

    `micro_batch`: None takes all slots of the rank. Raises UsageError if the batch sizes do not divide.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        *,
        epochs: int,
        rank: int,
        world_size: int,
        micro_batch: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size}: ranks are numbered from 0 to {world_size - 1}")
        slots, left = divmod(order.global_batch, world_size)
        if left:
            raise UsageError(
                f"a global batch of {order.global_batch} cannot be divided equally among {world_size} ranks",
                remedy="start a number of processes that divides it, or change global_batch",
            )
        self.micro_batch = slots if micro_batch is None else micro_batch
        if self.micro_batch < 1 or slots % self.micro_batch:
            raise UsageError(
                f"micro_batch is {self.micro_batch} and does not divide the {slots} slots of a rank "
                f"(global batch {order.global_batch} on {world_size} ranks)",
                remedy="choose a divisor",
            )
        self.shards = shards
        self.order = order
        self.accumulation = slots // self.micro_batch
        self.num_steps = epochs * order.steps_per_epoch
        self._first_slot = rank * slots

    def micro_batches(self, *, epoch: int, step: int, worker: int = 0, num_workers: int = 1) -> Iterator[MicroBatch]:
        """From (epoch, step) to the end of the stage, every `num_workers`-th micro-batch beginning with `worker`.

        `step` may exceed an epoch: (0, 1000) with 300 steps an epoch is (3, 100). Starting late costs nothing.
        """
        start = (epoch * self.order.steps_per_epoch + step) * self.accumulation
        for number in range(start + worker, self.num_steps * self.accumulation, num_workers):
            run_step, micro_index = divmod(number, self.accumulation)
            yield self._micro_batch(*divmod(run_step, self.order.steps_per_epoch), micro_index)

    def _micro_batch(self, epoch: int, step: int, micro_index: int) -> MicroBatch:
        first = self._first_slot + micro_index * self.micro_batch
        positions, views = self.order.draws(epoch, step, first_slot=first, num_slots=self.micro_batch)
        return MicroBatch(epoch, step, micro_index, self.shards.usable_to_sample(positions), views)
