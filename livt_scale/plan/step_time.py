"""How long a step takes, by formula: computing, what ranks exchange and how much of it hides, AdamW.

    computing   images of a rank · FLOPs an image (recomputed ones too) / (peak · mfu), or its kernels' launches
    exchange    bytes through each rank, over the slower of the node's own links and its share of the network
    AdamW       seven passes over the fp32 states of a rank, at the device's memory bandwidth
    offload     pieces of weights to the device, of gradients back; AdamW at the host's bandwidth; none of it hides

A ring over N ranks sends S·(N−1)/N through each for an all-gather or a reduce-scatter of S bytes, and twice that for an
all-reduce; at a node's border the same bytes pass its adapters. W bytes in fp32, w as gathered (bf16: W/2), a
micro-batches a step:

    ddp     all-reduce W                          zero1   reduce-scatter W, all-gather W (neither hides)
    fsdp    a · 2 all-gathers w, reduce-scatter W zero2   a reduce-scatters W, all-gather W (neither hides)
    hybrid  the same within a node, and           zero3   a · (2 all-gathers W, reduce-scatter W)
            an all-reduce of a rank's share

Sources: ZeRO, arXiv 1910.02054, section 7; rings, Patarasuk and Yuan 2009; Daly 2006, doi
10.1016/j.future.2004.11.016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from livt_scale.plan.assumptions import Accelerator, Assumptions, peak_tflops
from livt_scale.plan.flops import Flops
from livt_scale.plan.memory import FP32, Spread
from livt_scale.plan.parameters import Weight

PASSES_OF_ADAMW = 7  # reads weight, gradient, two moments; writes weight and two moments


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; `exposed_s`: exchange that does not hide. Bytes: through each rank, a step."""

    compute_s: float
    exchange_s: float
    exposed_s: float
    optimizer_s: float
    exchanged_bytes: int
    offload_s: float = 0.0

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s + self.optimizer_s + self.offload_s

    @property
    def efficiency(self) -> float:
        """Share of a step that is computing."""
        return self.compute_s / self.step_s


@dataclass(frozen=True)
class Collective:
    """`count` of them, `traffic` bytes through each of `ranks` ranks, all together."""

    traffic: float
    count: int
    ranks: int
    within_node: bool


def step_time(
    flops: Flops, weights: Sequence[Weight], spread: Spread, device: Accelerator, assumed: Assumptions, *, per_node: int
) -> StepTime:
    images = spread.micro_batch * spread.accumulation
    work = flops.hardware if spread.recompute else flops.train
    launches_s = spread.accumulation * len({w.block for w in weights if w.block}) * assumed.block_us * 1e-6
    launches_s *= work / flops.train  # a block that is computed again is launched again
    compute_s = max(images * work / (peak_tflops(device, spread.precision) * 1e12 * assumed.mfu), launches_s)
    collectives = exchange(weights, spread)
    exchange_s = sum(_seconds(c, device, assumed, per_node=min(per_node, spread.gpus)) for c in collectives)
    hidden_s = min(assumed.overlap * exchange_s, compute_s) if spread.can.overlaps else 0.0
    trained = sum(w.numel for w in weights if w.trained)
    own = trained / spread.shards if spread.can.shards_moments else trained
    traffic = round(sum(c.traffic for c in collectives))
    exposed_s, here = exchange_s - hidden_s, min(per_node, spread.gpus)
    if spread.offload != "none":
        optimizer_s = PASSES_OF_ADAMW * FP32 * own * here / (assumed.host_gb_s * 1e9)
        offload_s = _offload_s(FP32 * own, spread, assumed)
        return StepTime(compute_s, exchange_s, exposed_s, optimizer_s, traffic, offload_s)
    optimizer_s = PASSES_OF_ADAMW * FP32 * own / (device.memory_gb_s * 1e9)
    return StepTime(compute_s, exchange_s, exposed_s, optimizer_s, traffic)


def _offload_s(own_bytes: float, spread: Spread, assumed: Assumptions) -> float:
    """Seconds that a step's pieces move: of weights, `own_bytes` each, for every gather; of gradients, when reduced."""
    gathers = 2 * spread.accumulation if spread.can.shards_parameters else 1  # otherwise the updated weights, once
    reduced = spread.accumulation if spread.can.reduces_each_micro_batch else 1
    return (gathers + reduced) * own_bytes / (assumed.host_copy_gb_s * 1e9)


def exchange(weights: Sequence[Weight], spread: Spread) -> list[Collective]:
    """The exchange between the ranks in a step."""
    if spread.gpus == 1:
        return []
    low = spread.low_bytes
    whole = FP32 * sum(w.numel for w in weights if w.trained)
    go_back = {w.block for w in weights if w.trained}  # a frozen block is gathered for the forward pass alone
    gathered = sum((1 + (w.block in go_back)) * (low if w.block else FP32) * w.numel for w in weights)
    units, gathers = len(go_back), len({w.block for w in weights}) + len(go_back)
    micro = spread.accumulation
    ranks = spread.shards
    share = (ranks - 1) / ranks
    within = spread.within_node is not None
    if spread.strategy == "ddp":
        return [Collective(2 * share * whole, units, ranks, False)]
    if spread.can.zero_stage in (1, 2):
        times = micro if spread.can.reduces_each_micro_batch else 1
        return [
            Collective(share * whole * times, units * times, ranks, False),
            Collective(share * whole, 1, ranks, False),
        ]
    if spread.can.zero_stage == 3:
        return [Collective(3 * share * whole * micro, 3 * units * micro, ranks, False)]
    found = [
        Collective(share * gathered * micro, gathers * micro, ranks, within),
        Collective(share * whole, units, ranks, within),
    ]
    nodes = spread.gpus // ranks
    if nodes > 1:  # each rank's share, over the nodes; the ranks of a node do it side by side, through one network
        found.append(Collective(2 * (nodes - 1) / nodes * whole, units, nodes, False))
    return found


def _seconds(collective: Collective, device: Accelerator, assumed: Assumptions, *, per_node: int) -> float:
    alone = collective.within_node or collective.ranks <= per_node
    speed = device.node_link_gb_s if alone else min(device.node_link_gb_s, device.network_gb_s)
    latency = collective.count * assumed.latency_us * 1e-6 * math.log2(max(collective.ranks, 2))
    return collective.traffic / (speed * 1e9) + latency


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that lose least, if a save holds up `save_s` and failures come every `mtbf_s`.

    Daly 2006, equation 37: √(2δM)·(1 + √(δ/2M)/3 + (δ/2M)/9) − δ where δ < 2M, else M.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, save_s: float, *, mtbf_s: float, restart_s: float) -> float:
    """Share of the time that goes to saves, to work done again and to restarts (first order in interval / mtbf)."""
    return save_s / (interval_s + save_s) + (interval_s / 2 + save_s + restart_s) / mtbf_s
