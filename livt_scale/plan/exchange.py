"""What ranks exchange in a step, and how much of it hides behind computing: a short simulation, block by block.

A ring over N ranks sends S·(N−1)/N through each for an all-gather or a reduce-scatter of S bytes, and twice that for an
all-reduce; at a node's border the same bytes pass its adapters. W bytes in fp32, w as gathered (bf16: W/2), a
micro-batches a step:

    ddp     all-reduce W                          zero1   reduce-scatter W, all-gather W (neither hides)
    fsdp    a · 2 all-gathers w, reduce-scatter W zero2   a reduce-scatters W, all-gather W (neither hides)
    hybrid  the same within a node, and           zero3   a · (2 all-gathers W, reduce-scatter W)
            an all-reduce of a rank's share

ddp reduces a block when its backward pass is over, behind the blocks before it. fsdp and zero3 gather the next block
while one is computed, and reduce the last one. One exchange is under way at a time.

Sources: ZeRO, arXiv 1910.02054, section 7; rings, Patarasuk and Yuan 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from livt_scale.plan.assumptions import Accelerator, Assumptions
from livt_scale.plan.memory import FP32, Spread


@dataclass(frozen=True)
class Unit:
    """A block, or what is outside of all: weights that are gathered and reduced together, and its seconds."""

    weights: int
    trained: int
    forward_s: float = 0.0
    backward_s: float = 0.0
    gathered_wide: bool = False  # outside of blocks: in fp32


@dataclass(frozen=True)
class Exchange:
    """Seconds of all exchange of a step, those that computing waits for, and bytes through each rank."""

    exchange_s: float = 0.0
    exposed_s: float = 0.0
    traffic: int = 0


@dataclass(frozen=True)
class Links:
    """One rank's links. bytes/s that collectives reach within its node and between nodes; seconds of latency."""

    within: float
    between: float
    latency_s: float
    per_node: int

    def ring_s(self, traffic: float, ranks: int, *, crosses: bool | None = None) -> float:
        """Seconds of one collective that sends `traffic` bytes through each of `ranks` ranks.

        crosses: whether it leaves a node; None: if one node does not hold so many.
        """
        crosses = ranks > self.per_node if crosses is None else crosses
        speed = min(self.within, self.between) if crosses else self.within
        return traffic / speed + self.latency_s * math.log2(max(ranks, 2))


def links_of(device: Accelerator, assumed: Assumptions, *, per_node: int) -> Links:
    share = 1e9 * assumed.link_share
    return Links(device.node_link_gb_s * share, device.network_gb_s * share, assumed.latency_us * 1e-6, per_node)


def exchange(units: Sequence[Unit], spread: Spread, links: Links) -> Exchange:
    """Of one step over `units` in the order of the forward pass, what is outside of blocks first."""
    if spread.gpus == 1:
        return Exchange()
    if spread.can.zero_stage in (1, 2):
        return _at_the_end(units, spread, links)
    ring = _Ring(spread, links)
    if spread.strategy == "ddp":
        reduces = [ring.reduce(unit) for unit in units]
        return Exchange(sum(reduces), _exposed_behind_backward(units, reduces), round(ring.traffic))
    last = _exposed_of_gathers(units, ring, reducing=True)
    earlier = 0.0
    if spread.accumulation > 1:
        before = ring.total_s, ring.traffic
        earlier = _exposed_of_gathers(units, ring, reducing=spread.can.reduces_each_micro_batch)
        more = spread.accumulation - 2
        ring.total_s += more * (ring.total_s - before[0])
        ring.traffic += more * (ring.traffic - before[1])
    exposed_s = last + (spread.accumulation - 1) * earlier
    return Exchange(ring.total_s, exposed_s, round(ring.traffic))


class _Ring:
    """Seconds of a unit's collectives under one strategy; adds up what was asked for."""

    def __init__(self, spread: Spread, links: Links) -> None:
        self.spread, self.links = spread, links
        self.share = (spread.shards - 1) / spread.shards
        self.crosses = None if spread.within_node is None else False  # of gathers and reductions among the shards
        self.total_s = self.traffic = 0.0

    def gather(self, unit: Unit) -> float:
        wide = unit.gathered_wide or self.spread.can.zero_stage == 3
        size = (FP32 if wide else self.spread.low_bytes) * unit.weights
        return self._take(self.share * size, self.spread.shards, crosses=self.crosses)

    def reduce(self, unit: Unit) -> float:
        if not unit.trained:
            return 0.0
        size = FP32 * unit.trained
        if self.spread.strategy == "ddp":
            return self._take(2 * self.share * size, self.spread.shards)
        seconds = self._take(self.share * size, self.spread.shards, crosses=self.crosses)
        nodes = self.spread.gpus // self.spread.shards
        if nodes > 1:  # each rank's share, over the nodes; the ranks of a node side by side, through one network
            seconds += self._take(2 * (nodes - 1) / nodes * size, nodes, crosses=True)
        return seconds

    def _take(self, traffic: float, ranks: int, *, crosses: bool | None = None) -> float:
        seconds = self.links.ring_s(traffic, ranks, crosses=crosses)
        self.total_s += seconds
        self.traffic += traffic
        return seconds


def _at_the_end(units: Sequence[Unit], spread: Spread, links: Links) -> Exchange:
    """Stages 1 and 2: gradients and updated weights, while nothing is computed."""
    whole = FP32 * sum(unit.trained for unit in units)
    share = (spread.shards - 1) / spread.shards
    times = spread.accumulation if spread.can.reduces_each_micro_batch else 1
    reduced = links.ring_s(share * whole, spread.shards)
    reduced += links.latency_s * math.log2(spread.shards) * (len(units) - 1)
    gathered = links.ring_s(share * whole, spread.shards)
    seconds = times * reduced + gathered
    return Exchange(seconds, seconds, round(share * whole * (times + 1)))


def _exposed_behind_backward(units: Sequence[Unit], reduces: Sequence[float]) -> float:
    """What is left of the reductions when the backward pass is over."""
    now = free = 0.0
    for unit, seconds in zip(reversed(units), reversed(reduces), strict=True):
        now += unit.backward_s
        free = max(free, now) + seconds
    return max(0.0, free - now)


def _exposed_of_gathers(units: Sequence[Unit], ring: _Ring, *, reducing: bool) -> float:
    """Seconds that one micro-batch waits for gathers, one block ahead, and for the last reductions."""
    now = free = 0.0  # of the device, of the links
    for passes, seconds_of in ((list(units), "forward_s"), (list(reversed(units)), "backward_s")):
        back = seconds_of == "backward_s"
        needed = [unit for unit in passes if not back or (unit.trained and not unit.gathered_wide)]
        ready = now  # when the weights of the next unit are there
        if needed:
            free = max(free, now) + ring.gather(needed[0])
            ready = free
        for k, unit in enumerate(needed):
            now = max(now, ready)
            if k + 1 < len(needed):  # asked for when this one begins
                free = max(free, now) + ring.gather(needed[k + 1])
                ready = free
            now += getattr(unit, seconds_of)
            if back and reducing:
                free = max(free, now) + ring.reduce(unit)
    if reducing:
        free = max(free, now) + sum(ring.reduce(unit) for unit in units if unit.gathered_wide)
        now = max(now, free)
    busy = sum(unit.forward_s + (unit.backward_s if unit.trained and not unit.gathered_wide else 0.0) for unit in units)
    return max(0.0, now - busy)
