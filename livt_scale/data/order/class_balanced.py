"""Orders that draw by class, and several views of a sample: still pure functions of (seed, epoch, step, slot).

`ClassOrder` gives each class its share of an epoch's draws: 100 draws over shares of 0.705, 0.2 and 0.095 are 71, 20
and 9 in one epoch and 70, 20 and 10 in the next; what is rounded off is owed, and 1000 epochs draw 70,500 of the first.
A class walks through its own images, in another random order each round, and begins again when all have come:

    draws of this epoch    a b a a c a b c …     reshuffled each epoch (in blocks of 2^20 draws)
    a's walk               2 0 1 | 1 2 0 | …     3 images; b's and c's likewise, on from where the last epoch stopped
    views                  0 0 0   1 1 1         an image that repeats within an epoch is augmented differently

`Repeated` shows k views of each sample in one batch (Hoffer et al. 2020, arXiv 1901.09335; DeiT's repeated
augmentation, k = 3). `livt_scale.config.sampling` has the policies that give shares. Cost: 4 bytes a sample once (the
lists of each class's samples) and about 20 MB for a block; no locality, as a class is in all shards: docs/loader.md.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from livt_scale.data.order.instance import Ints, SampleOrder, random_permutation
from livt_scale.util.errors import DataError

BLOCK = 1 << 20  # draws that are shuffled together
FINE = 20  # bits after the point in which shares of a block are counted
SHARES_ERROR = 1e-6  # of their sum
ROUNDS = 8  # of the Feistel network


class ClassShares(Protocol):
    """(int64 [C] images of each class, t/T in 0 … 1) -> float64 [C] shares of the draws, as `Sampler.shares`."""

    def __call__(self, counts: Ints, progress: float, /) -> npt.NDArray[np.float64]: ...


@dataclass(frozen=True)
class _Drawn:
    """The state of the classes after some blocks of the stage."""

    blocks: int
    drawn: Ints  # [C]
    owed: Ints  # [C] share less what was drawn, in 2^-FINE; together 0


@dataclass(frozen=True)
class _Block:
    """A run of an epoch's draws, shuffled."""

    start: int  # of its draws within the epoch
    classes: npt.NDArray[np.integer[Any]]  # [draws] in their order
    nth: npt.NDArray[np.int32]  # [draws] how many of the same class came before it in this block
    before: Ints  # [C] draws of each class before this block, since the stage began
    before_epoch: Ints  # [C] … before this epoch


class ClassOrder:
    """An order in which each class is drawn by its share.

    `labels`: int64 [N] the class of each position. `steps`: of an epoch. `epochs`: T, what progress is measured by.
    `shares`: called once per epoch. Raises DataError if its result is not shares.
    """

    def __init__(
        self,
        labels: npt.ArrayLike,
        global_batch: int,
        *,
        seed: int,
        steps: int,
        epochs: int,
        shares: ClassShares,
    ) -> None:
        labels = np.asarray(labels)
        self.global_batch, self.steps_per_epoch, self.seed = global_batch, steps, seed
        self.counts: Ints = np.bincount(labels).astype(np.int64)
        self.num_draws = steps * global_batch  # an epoch
        self._epochs, self._shares = epochs, shares
        small = np.int32 if labels.size < 2**31 else np.int64
        self._members = np.argsort(labels, kind="stable").astype(small)  # class after class
        self._first = np.cumsum(self.counts) - self.counts
        self._num_blocks = -(-self.num_draws // BLOCK)
        self._key = _word(seed, "class walk")
        self._drawn_memo = _Drawn(0, np.zeros_like(self.counts), np.zeros_like(self.counts))
        self._up_to_memo: tuple[int, npt.NDArray[np.float64]] = (-1, np.zeros(0))
        self._block_memo: OrderedDict[tuple[int, int], _Block] = OrderedDict()

    def positions(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> Ints:
        """The samples of slots [first_slot, first_slot + num_slots) in a step: int64 `[num_slots]`, positions."""
        return self.draws(epoch, step, first_slot=first_slot, num_slots=num_slots)[0]

    def draws(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> tuple[Ints, Ints]:
        """(positions, views): a view counts how many times the image has appeared in this epoch before."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch}")
        num_slots = self.global_batch - first_slot if num_slots is None else num_slots
        index = step * self.global_batch + np.arange(first_slot, first_slot + num_slots, dtype=np.int64)
        blocks = ((index + 1) * self._num_blocks - 1) // self.num_draws
        positions, views = np.empty_like(index), np.empty_like(index)
        for number in np.unique(blocks).tolist():
            here = blocks == number
            positions[here], views[here] = self._walk(self._block(epoch, number), index[here])
        return positions, views

    def class_counts(self, epochs: range) -> Ints:
        """[C] How often each class is drawn in `epochs`, a run of them."""
        before = self._drawn_before(epochs.start * self._num_blocks).drawn
        return self._drawn_before(epochs.stop * self._num_blocks).drawn - before

    def _walk(self, block: _Block, index: Ints) -> tuple[Ints, Ints]:
        classes = block.classes[index - block.start].astype(np.int64)
        draw = block.before[classes] + block.nth[index - block.start]  # since the stage began
        size = self.counts[classes]
        cycle = draw // size
        place = _shuffled_places(draw % size, size, _keys(self._key, classes, cycle))
        positions = self._members[self._first[classes] + place].astype(np.int64)
        return positions, cycle - block.before_epoch[classes] // size

    def _block(self, epoch: int, number: int) -> _Block:
        if (epoch, number) not in self._block_memo:
            self._block_memo[epoch, number] = self._shuffled_block(epoch, number)
            while len(self._block_memo) > 2:  # this one, and the next one when a step spans both
                self._block_memo.popitem(last=False)
        return self._block_memo[epoch, number]

    def _shuffled_block(self, epoch: int, number: int) -> _Block:
        before_epoch = self._drawn_before(epoch * self._num_blocks).drawn
        before = self._drawn_before(epoch * self._num_blocks + number)
        counts = self._apportioned(before)[0]
        kind: Any = np.uint16 if counts.size < 2**16 else np.int64  # NumPy sorts 16 bits by radix: no comparisons
        row = np.repeat(np.arange(counts.size, dtype=kind), counts)
        classes = row[random_permutation(row.size, self.seed, epoch, "classes", number)]
        by_class = np.argsort(classes, kind="stable")
        nth = np.empty(row.size, dtype=np.int32)
        nth[by_class] = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return _Block(self._span(number)[0], classes, nth, before.drawn, before_epoch)

    def _drawn_before(self, block: int) -> _Drawn:
        """What was drawn before a block. Entering epoch e costs e times O(C): see benchmarks/order.py."""
        if self._drawn_memo.blocks > block:
            zeros = np.zeros_like(self.counts)
            self._drawn_memo = _Drawn(0, zeros, zeros)
        while self._drawn_memo.blocks < block:
            at = self._drawn_memo
            counts, owed = self._apportioned(at)
            self._drawn_memo = _Drawn(at.blocks + 1, at.drawn + counts, owed)
        return self._drawn_memo

    def _apportioned(self, before: _Drawn) -> tuple[Ints, Ints]:
        """[C] The next block's draws of each class, together exactly the block; and what is then owed, in 2^-20.

        Largest remainders, where what was rounded off in one block is owed in the next: after any number of blocks
        a class has had its share to less than two draws, nearly always to less than one.
        """
        epoch, number = divmod(before.blocks, self._num_blocks)
        start, end = self._span(number)
        line = np.rint((end - start) * self._up_to(epoch) * 2.0**FINE).astype(np.int64)
        line[np.flatnonzero(self.counts)[-1] :] = (end - start) << FINE  # all of it, whatever was rounded in the sum
        due = np.diff(line, prepend=0) + before.owed
        counts = np.maximum(due >> FINE, 0)
        left = int(end - start - counts.sum())  # one more for the largest remainders; of equal ones the first classes
        one = np.sign(left)
        may = np.flatnonzero(self.counts if left > 0 else counts)
        rank = one * (due - (counts << FINE))[may] * counts.size - np.arange(may.size)
        counts[may[np.argpartition(-rank, abs(left) - 1)[: abs(left)]]] += one
        return counts, due - (counts << FINE)

    def _up_to(self, epoch: int) -> npt.NDArray[np.float64]:
        """[C] The shares of an epoch, added up class by class."""
        if epoch != self._up_to_memo[0]:
            shares = np.asarray(self._shares(self.counts, min(1.0, epoch / self._epochs)), dtype=np.float64)
            check_shares(shares, self.counts, epoch)
            self._up_to_memo = (epoch, np.cumsum(shares))
        return self._up_to_memo[1]

    def _span(self, number: int) -> tuple[int, int]:
        total, count = self.num_draws, self._num_blocks
        return total * number // count, total * (number + 1) // count


class Repeated:
    """An order that shows `views` views of each sample of `base`, whose batch is that many times smaller.

    An epoch keeps its N // B steps. Over an `Order`, `views` epochs share one of the base's: a sample comes `views`
    times in one of them and not at all in the others. `views` 2, samples a, b, c, d of the base, slots:

        a a b b c c d d      views on neighbouring slots
        a b a b c d c d      `paired`: mixup mixes (2k, 2k + 1), which must not be two views of one image
    """

    def __init__(self, base: SampleOrder, views: int, *, steps: int, paired: bool) -> None:
        self.base, self.views, self.paired = base, views, paired
        self.global_batch, self.steps_per_epoch = base.global_batch * views, steps
        self.epochs_a_pass = views if base.steps_per_epoch >= steps * views else 1

    def positions(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> Ints:
        """The samples of slots [first_slot, first_slot + num_slots) in a step: int64 `[num_slots]`, positions."""
        return self.draws(epoch, step, first_slot=first_slot, num_slots=num_slots)[0]

    def draws(self, epoch: int, step: int, *, first_slot: int = 0, num_slots: int | None = None) -> tuple[Ints, Ints]:
        """(positions, views): no two slots of an epoch have both the same."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch}")
        num_slots = self.global_batch - first_slot if num_slots is None else num_slots
        slots = np.arange(first_slot, first_slot + num_slots, dtype=np.int64)
        if not slots.size:
            return slots, slots
        wide = 2 if self.paired else 1
        group, within = np.divmod(slots, wide * self.views)
        lanes = group * wide + within % wide
        turn, part = divmod(epoch, self.epochs_a_pass)
        low, high = int(lanes.min()), int(lanes.max()) + 1
        positions, views = self.base.draws(
            turn, part * self.steps_per_epoch + step, first_slot=low, num_slots=high - low
        )
        return positions[lanes - low], views[lanes - low] * self.views + within // wide


def check_shares(shares: npt.NDArray[np.float64], counts: Ints, epoch: int) -> None:
    """A sampler from outside the package may give anything."""
    shape = np.shape(shares)
    if shape != counts.shape:
        problem = f"have the shape {list(shape)}"
    elif not np.isfinite(shares).all() or np.min(shares) < 0:
        problem = "are not all finite and at least 0"
    elif abs(np.sum(shares) - 1) > SHARES_ERROR:
        problem = f"add up to {np.sum(shares):g}"
    elif np.any(shares[counts == 0]):
        problem = f"draw from class {np.flatnonzero(shares * (counts == 0))[0]}, which has no image"
    else:
        return
    raise DataError(
        f"the shares of epoch {epoch} {problem}",
        remedy=f"correct the sampler: {counts.size} numbers, together 1, and 0 for a class without an image",
    )


# --- random places without a list of them ---


def _shuffled_places(places: Ints, sizes: Ints, keys: npt.NDArray[np.uint64]) -> Ints:
    """Where a random order of 0 … size − 1, one for each key, puts each place: any of them at the same cost.

    A Feistel network over a × b >= size (Black and Rogaway 2002), entered again where it leaves the range.
    """
    a = np.ceil(np.sqrt(sizes)).astype(np.int64)
    b = -(-sizes // a)
    out = places.copy()
    todo = np.arange(out.size)
    while todo.size:
        out[todo] = _feistel(out[todo], a[todo], b[todo], keys[todo])
        todo = todo[out[todo] >= sizes[todo]]
    return out


def _feistel(x: Ints, a: Ints, b: Ints, keys: npt.NDArray[np.uint64]) -> Ints:
    left, right = x // b, x % b  # left < a, right < b
    for number in range(0, ROUNDS, 2):
        left = (left + _hash_below(a, right, keys, number)) % a
        right = (right + _hash_below(b, left, keys, number + 1)) % b
    return left * b + right


def _hash_below(limit: Ints, value: Ints, keys: npt.NDArray[np.uint64], number: int) -> Ints:
    word = _mix(keys ^ _mix(value.astype(np.uint64) + np.uint64((number + 1) << 40)))
    return (word % limit.astype(np.uint64)).astype(np.int64)


def _keys(key: int, classes: Ints, cycles: Ints) -> npt.NDArray[np.uint64]:
    return _mix(_mix(classes.astype(np.uint64) + np.uint64(key)) ^ cycles.astype(np.uint64))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's mixing of 64 bits (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word(*what: int | str) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=8).digest(), "little")
