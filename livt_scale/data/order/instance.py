"""The position of each sample in an epoch: a pure function from numbers to numbers, without I/O.

Guarantees: it depends on seed, epoch, samples per shard and global batch size, never on ranks or workers. A sample
occurs at most once per epoch; the N mod B left-over samples are redrawn each epoch, all equally likely. Every step
costs the same, the first and the millionth.

    shards (here 5, of 4 samples)        A B C D E
    shuffled for the epoch               D A E B C
    20 samples in a row, less 20 mod 6   d d d d a a . a e e e . b b b b c c c c
    dealt to 2 lane groups               [d d d d a a a e e] [e b b b b c c c c]   disjoint shards, except at borders
    shuffled inside a group's windows    [a d e d a d e d a] [c b c e b c b c b]
    a step takes 3 of each group         step 0: a d e c b c   step 1: d a d e b c   …   in slots 0-2 and 3-5

Shuffles sort by random 64-bit keys from Philox, whose bit stream is fixed permanently; numpy's own shuffles may change.
A rank takes a contiguous run of slots, so a node reads only the shards of its groups. Why not webdataset's or torch's
shuffling: their order depends on the number of ranks and workers, and cannot be resumed in the middle. Policies that
draw by class, and several views of a sample, are in `livt_scale.data.order.class_balanced`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from math import lcm
from typing import Protocol

import numpy as np
import numpy.typing as npt

from livt_scale.util.errors import DataError

Ints = npt.NDArray[np.int64]

SHARDS_A_GROUP = 12  # at least: the shards that two nodes share are then a twelfth, and under a tenth of uneven bytes
MAX_LANE_GROUPS = 512  # bounds the memory of one process that reads all groups: a window each


class SampleOrder(Protocol):
    """The interface of a stage's order, for any sampling policy: the same at any world size, from any step on."""

    global_batch: int
    steps_per_epoch: int

    def positions(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> Ints:
        """The samples of slots [first_slot, first_slot + num_slots) in a step: int64 `[num_slots]`, positions."""

    def draws(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> tuple[Ints, Ints]:
        """(positions, views): a view counts how many times the sample has appeared in this epoch before."""


@dataclass(frozen=True)
class _Epoch:
    """What is drawn once an epoch."""

    shards: Ints  # [num_shards] the shards in this epoch's sequence
    ends: Ints  # [num_shards] where each of them ends in the row of all samples
    gaps: Ints  # [N mod B] kept samples before each one left out, ascending


class Order:
    """The training order of a set of shards at one global batch size.

    `samples_per_shard`: int64 `[num_shards]`, what is in quarantine already left out. Positions count those samples,
    shard after shard. `lane_groups`: None picks it so that up to `most_nodes` nodes share few shards.
    Raises DataError where an epoch would not fill one global batch.
    """

    def __init__(
        self,
        samples_per_shard: npt.ArrayLike,
        global_batch: int,
        *,
        seed: int,
        lane_groups: int | None = None,
        window: int = 65536,
    ) -> None:
        self._per_shard = np.asarray(samples_per_shard, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._per_shard)])
        self.num_samples = int(self._first[-1])
        self.global_batch = global_batch
        self.seed = seed
        self.window = window
        self.steps_per_epoch = self.num_samples // global_batch
        if not self.steps_per_epoch:
            raise DataError(
                f"the set has {self.num_samples} samples, fewer than one global batch of {global_batch}",
                remedy=f"set global_batch to at most {self.num_samples}" if self.num_samples else "give it samples",
            )
        self.most_nodes = _most_nodes(global_batch, len(self._per_shard))
        self.lane_groups = lane_groups or _lane_groups_for(global_batch, self.most_nodes)
        if global_batch % self.lane_groups:
            raise DataError(
                f"data.lane_groups is {self.lane_groups} and does not divide the global batch of {global_batch}",
                remedy=f"leave it out, or take {_divisor_near(global_batch, self.lane_groups)}",
            )
        self._lanes = global_batch // self.lane_groups
        self._group_samples = self.steps_per_epoch * self._lanes
        self._num_windows = max(1, round(self._group_samples / window))
        self._epoch_memo: tuple[int, _Epoch] | None = None
        self._window_memo: OrderedDict[tuple[int, int, int], Ints] = OrderedDict()

    def positions(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> Ints:
        """The samples of slots [first_slot, first_slot + num_slots) in a step: int64 `[num_slots]`, positions."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch}")
        num_slots = self.global_batch - first_slot if num_slots is None else num_slots
        slots = np.arange(first_slot, first_slot + num_slots, dtype=np.int64)
        groups, lanes = slots // self._lanes, slots % self._lanes
        return self._in_shards(epoch, self._shuffled(epoch, groups, step * self._lanes + lanes))

    def draws(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> tuple[Ints, Ints]:
        """(positions, views): as `positions`; each is the first and only view in its epoch, number 0."""
        positions = self.positions(epoch, step, first_slot=first_slot, num_slots=num_slots)
        return positions, np.zeros_like(positions)

    def left_out(self, epoch: int) -> Ints:
        """The samples that do not come in this epoch: int64 `[N mod B]`, positions."""
        drawn = self._draw(epoch)
        return self._in_row(drawn, drawn.gaps + np.arange(drawn.gaps.size))

    def _shuffled(self, epoch: int, groups: Ints, index: Ints) -> Ints:
        """Index in a group's sequence -> place among the kept samples of the epoch's row."""
        size, count = self._group_samples, self._num_windows
        windows = ((index + 1) * count - 1) // size  # window j spans [size·j // count, size·(j + 1) // count)
        starts = size * windows // count
        places = np.empty_like(index)
        for group, window in sorted({(int(g), int(w)) for g, w in zip(groups, windows, strict=True)}):
            here = (groups == group) & (windows == window)
            shuffle = self._window(epoch, group, window)
            places[here] = group * size + starts[here] + shuffle[index[here] - starts[here]]
        return places

    def _window(self, epoch: int, group: int, window: int) -> Ints:
        key = (epoch, group, window)
        if key in self._window_memo:
            self._window_memo.move_to_end(key)
            return self._window_memo[key]
        size, count = self._group_samples, self._num_windows
        length = size * (window + 1) // count - size * window // count
        shuffle = random_permutation(length, self.seed, epoch, "window", group, window)
        self._window_memo[key] = shuffle
        while len(self._window_memo) > self.lane_groups + 1:  # one a group, and the next one of a group that moves on
            self._window_memo.popitem(last=False)
        return shuffle

    def _in_shards(self, epoch: int, places: Ints) -> Ints:
        """Place among the kept samples of the epoch's row -> position among all samples, shard after shard."""
        drawn = self._draw(epoch)
        return self._in_row(drawn, places + np.searchsorted(drawn.gaps, places, side="right"))

    def _in_row(self, drawn: _Epoch, row: Ints) -> Ints:
        """Place in the epoch's row of all samples -> position."""
        rank = np.searchsorted(drawn.ends, row, side="right")
        shard = drawn.shards[rank]
        within = row - (drawn.ends[rank] - self._per_shard[shard])
        return self._first[shard] + within

    def _draw(self, epoch: int) -> _Epoch:
        if self._epoch_memo is not None and self._epoch_memo[0] == epoch:
            return self._epoch_memo[1]
        shards = random_permutation(len(self._per_shard), self.seed, epoch, "shards")
        num_left_out = self.num_samples - self.steps_per_epoch * self.global_batch
        left_out = np.sort(_sample(self.num_samples, num_left_out, self.seed, epoch))
        drawn = _Epoch(shards, np.cumsum(self._per_shard[shards]), left_out - np.arange(num_left_out))
        self._epoch_memo = (epoch, drawn)
        return drawn


def eval_positions(num_samples: int, *, rank: int, world_size: int) -> range:
    """A rank's share of an evaluation: over all ranks each sample exactly once, sizes differing by one at most."""
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def _most_nodes(global_batch: int, num_shards: int) -> int:
    """The largest number of nodes with equal slots that leaves each twelve shards."""
    most = max(1, min(num_shards // SHARDS_A_GROUP, MAX_LANE_GROUPS, global_batch))
    return next(g for g in range(most, 0, -1) if global_batch % g == 0)


def _lane_groups_for(global_batch: int, most_nodes: int) -> int:
    """The fewest groups that any possible number of nodes up to `most_nodes` divides, so that none is split.

    A batch of 1024 and 8 nodes: 8 groups. A batch of 24 and 8 nodes: 24, as 3 and 8 must divide it. Smaller groups
    cost no bytes: over an epoch n nodes read the shards once, and those that span the n - 1 borders twice.
    """
    groups = 1
    for nodes in range(most_nodes, 0, -1):
        if global_batch % nodes == 0 and lcm(groups, nodes) <= MAX_LANE_GROUPS:
            groups = lcm(groups, nodes)
    return groups


def _divisor_near(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def _random_u64(count: int, *what: int | str) -> npt.NDArray[np.uint64]:
    """`count` random words, a function of `what` alone: raw Philox output, which numpy promises never to change."""
    key = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def random_permutation(count: int, *what: int | str) -> Ints:
    return np.argsort(_random_u64(count, *what), kind="stable")


def _sample(population: int, count: int, seed: int, epoch: int) -> Ints:
    """`count` different numbers below `population`, each set equally likely."""
    if population <= 4 * count or population <= 65536:
        return random_permutation(population, seed, epoch, "left out")[:count]
    drawn = np.empty(0, dtype=np.int64)  # few among many: draw, keep the first appearance of each
    for attempt in range(64):
        more = (_random_u64(2 * count + 8, seed, epoch, "left out", attempt) % np.uint64(population)).astype(np.int64)
        drawn = np.concatenate([drawn, more])
        _, first = np.unique(drawn, return_index=True)
        drawn = drawn[np.sort(first)]
        if drawn.size >= count:
            return drawn[:count]
    raise AssertionError(f"no {count} different numbers below {population} in 64 tries")
