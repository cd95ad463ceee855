"""What a GPU spends on one micro-batch and one optimizer step, from the shapes of the products. Pure arithmetic.

    products    a roofline: operations over the speed of full tiles, or bytes over the memory's bandwidth, whichever
                takes longer. An output is cut into tiles; as many as there are multiprocessors run at a time, so that
                the last wave may be nearly empty (wave quantisation) and the edge tiles too (tile quantisation)
    attention   fused: tiles of queries and keys; written out: products of each head, and the matrix through memory
    streams     norms, GELU, residuals, casts, bias gradients, the optimizer: bytes over the memory's bandwidth
    launches    the host issues kernels one after another: where that takes longer than the kernels do, it decides

Bytes are counted kernel by kernel for a timm block under autocast, eager or as torch.compile fuses it (comments below).
Sources: NVIDIA, Matrix Multiplication Background User's Guide (tiles, waves, dimension k); FlashAttention-2, arXiv
2307.08691 (fused attention); Williams et al. 2009, doi 10.1145/1498765.1498785 (roofline).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from livt_scale.plan.constants import Chip
from livt_scale.plan.shapes import BlockStack, Network, Product

FP32 = 4
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))  # rows, columns, speed against the largest
FILL_K = 64  # elements of the inner dimension in whose time a tile is begun and stored
MAX_SPLIT = 16  # parts of the inner dimension that are added up: weight gradients have few tiles and a long k
FUSED_TILE = 64  # queries and keys of a tile of fused attention
FUSED_BACKWARD = 2.5  # products of the backward pass of fused attention over those of the forward pass: scores again
ALIGNED = 8  # elements: rows of 16-bit matrices of other lengths are read piecemeal
TENSORS_PER_BLOCK = 12
ADAMW_BYTES = {"fused": 28, "foreach": 80, "loop": 80}  # of a weight: 7 passes in one kernel; 20 passes in ten
ADAMW_LAUNCHES = {"fused": 0.05, "foreach": 0.3, "loop": 12}  # of a tensor


@dataclass(frozen=True)
class Software:
    """How the network is run. `half`: weights and residual stream in 16 bits too, not autocast's fp32."""

    low_bytes: int = 2
    compiled: bool = False
    fused_attention: bool = True
    adamw: Literal["fused", "foreach", "loop"] = "fused"
    half: bool = False

    @property
    def residual_bytes(self) -> int:
        return self.low_bytes if self.half else FP32

    @property
    def casts(self) -> bool:
        return self.residual_bytes != self.low_bytes


@dataclass(frozen=True)
class Parts:
    """Seconds on the device by part, and kernels that the host launches."""

    products: float = 0.0
    attention: float = 0.0
    streams: float = 0.0
    launches: float = 0.0

    @property
    def busy_s(self) -> float:
        """Without the gaps between kernels."""
        return self.products + self.attention + self.streams

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Parts:
        return Parts(*(factor * getattr(self, f.name) for f in fields(self)))


def product_s(m: int, n: int, k: int, chip: Chip, *, low_bytes: int, count: int = 1) -> float:
    """Seconds of `count` products `[m, k]` by `[k, n]` in one launch."""
    flops_s = chip.peak * 1e12 * chip.matmul
    best = math.inf
    for rows, columns, speed in TILES:
        tiles = count * math.ceil(m / rows) * math.ceil(n / columns)
        split = max(1, min(MAX_SPLIT, chip.sms // tiles, k // (4 * FILL_K)))
        waves = math.ceil(tiles * split / chip.sms)
        tile_s = 2 * rows * columns * (k / split + FILL_K) / (flops_s * speed / chip.sms)
        best = min(best, waves * tile_s)
    traffic = count * low_bytes * (m * k + k * n + m * n)
    return max(best, traffic / chip.bandwidth)


def _both_ways_s(product: Product, images: int, chip: Chip, low_bytes: int) -> tuple[float, float]:
    """Seconds (forward, backward) of a linear layer over the rows of all images."""
    rows = images * product.rows
    forward = product_s(rows, product.columns, product.inner, chip, low_bytes=low_bytes)
    backward = 0.0
    if product.trained:
        backward += product_s(product.inner, product.columns, rows, chip, low_bytes=low_bytes)
    if product.leads_back:
        backward += product_s(rows, product.inner, product.columns, chip, low_bytes=low_bytes)
    return forward, backward


def _attention_s(blocks: BlockStack, images: int, chip: Chip, software: Software) -> tuple[float, float]:
    """Seconds (forward, backward) of one block's attention, without what of it goes through memory."""
    heads = images * blocks.heads
    head = blocks.width // blocks.heads
    if software.fused_attention:
        padded = [FUSED_TILE * math.ceil(n / FUSED_TILE) for n in (blocks.answered, blocks.tokens)]
        forward = 2 * 2 * heads * padded[0] * padded[1] * head / (chip.peak * 1e12 * chip.fused_attention)
        return forward, FUSED_BACKWARD * forward
    speed = chip.unaligned if software.low_bytes == 2 and blocks.tokens % ALIGNED else 1.0
    forward = sum(
        product_s(*shape, chip, low_bytes=software.low_bytes, count=heads)
        for shape in ((blocks.answered, blocks.tokens, head), (blocks.answered, head, blocks.tokens))
    )
    return forward / speed, 2 * forward / speed


def _block_bytes(blocks: BlockStack, software: Software) -> tuple[float, float]:
    """Bytes (forward, backward) that pass through memory outside of products, of one block and image."""
    r, low, casts = software.residual_bytes, software.low_bytes, software.casts
    all_values, values = blocks.tokens * blocks.width, blocks.answered * blocks.width
    hidden = blocks.answered * blocks.hidden
    if software.compiled:
        norms = (r + low) * all_values + (2 * r + 2 * low) * values  # the second one with the sum before it
        forward = norms + (2 * r + low) * values
        backward = (3 * r + 2 * low) * (all_values + values)  # gradients of both, summed and cast
    else:
        wide = FP32 if casts else low  # what a norm writes
        norm = r + wide + (wide + low if casts else 0)
        forward = norm * (all_values + values) + 2 * (2 * r + low) * values  # two sums
        undo = (low + wide if casts else 0) + 2 * (wide + r) + r + 3 * r  # cast, input, scale and shift; the sum
        backward = (undo + (r + low if casts else 0)) * (all_values + values)
        if blocks.drops_paths:
            forward += 2 * 2 * low * values
            backward += 2 * 2 * low * values
    forward += 2 * low * hidden  # GELU
    backward += 3 * low * hidden
    backward += (
        low * (3 * all_values + 2 * values + hidden) + 6 * low * all_values
    )  # biases; gradients of q, k, v joined
    if not software.fused_attention:
        matrix = blocks.heads * blocks.answered * blocks.tokens
        through_fp32 = (2 * FP32, 3 * FP32) if casts else (2 * low, 3 * low)
        cast = 2 * (low + FP32) if casts else 0
        forward += matrix * (4 * low + through_fp32[0] + cast) + 2 * low * (3 * all_values + values)
        backward += matrix * (6 * low + through_fp32[1] + cast) + 2 * low * (3 * all_values + values)
    return forward, backward


def _block_launches(blocks: BlockStack, software: Software) -> tuple[int, int]:
    """Kernels (forward, backward) of one block."""
    if software.compiled:
        return 12, 24
    forward, backward = (21, 36) if software.casts else (11, 24)
    forward, backward = forward + 2 * len(blocks.added), backward + 4 * len(blocks.added)
    if not software.fused_attention:
        forward, backward = forward + 9, backward + 12
    drops = 4 * blocks.drops_paths
    return forward + drops, backward + drops


def micro_batch(
    network: Network, images: int, chip: Chip, software: Software, *, recompute: bool = False, frozen: bool = False
) -> tuple[Parts, Parts]:
    """(forward, backward) of one micro-batch; `recompute`: blocks are computed again in the backward pass.

    frozen: only the last product outside of blocks, the head, has a backward pass.
    """
    low = software.low_bytes
    forward, backward = Parts(), Parts()
    for blocks in network.blocks:
        there, back = block_parts(blocks, images, chip, software, recompute=recompute)
        forward, backward = forward + there.times(blocks.depth), backward + back.times(blocks.depth)
    for product in network.outside:
        there_s, back_s = _both_ways_s(product, images, chip, low)
        forward += Parts(products=there_s, launches=3)
        backward += Parts(products=back_s, launches=6)
    if frozen:
        _, back_s = _both_ways_s(network.outside[-1], images, chip, low)
        backward = Parts(products=back_s / 2, launches=6)  # the gradient of its weights alone
    inputs = 3 * FP32 * network.image_values * images / chip.bandwidth  # copied, normalised, cut into patches
    weights = network.weights * ((FP32 + low) if software.casts else 0) / chip.bandwidth
    forward += Parts(streams=inputs + weights, launches=20)
    if not frozen:
        backward += Parts(streams=2 * weights, launches=20)  # gradients cast, and put where they are summed
    return forward, backward


@functools.lru_cache(maxsize=1024)
def block_parts(
    blocks: BlockStack, images: int, chip: Chip, software: Software, *, recompute: bool = False
) -> tuple[Parts, Parts]:
    """(forward, backward) of one block of `blocks`."""
    low = software.low_bytes
    each = [_both_ways_s(product, images, chip, low) for product in blocks.products]
    attention = _attention_s(blocks, images, chip, software)
    streams = [images * number / chip.bandwidth for number in _block_bytes(blocks, software)]
    launches = _block_launches(blocks, software)
    forward = Parts(sum(f for f, _ in each), attention[0], streams[0], launches[0])
    backward = Parts(sum(b for _, b in each), attention[1], streams[1], launches[1])
    if recompute:  # all but the last product
        backward += Parts(forward.products - each[-1][0], forward.attention, forward.streams, forward.launches)
    return forward, backward


def optimizer_parts(weights: float, tensors: int, chip: Chip, software: Software, *, clipped: bool = False) -> Parts:
    """One step of AdamW over `weights` elements of a rank."""
    passes = ADAMW_BYTES[software.adamw] + (3 * FP32 if clipped else FP32)  # the norm is read once, scaling is two more
    launches = tensors * ADAMW_LAUNCHES[software.adamw]
    return Parts(streams=weights * passes / chip.bandwidth, launches=launches)


def elapsed_s(parts: Sequence[Parts], chip: Chip, software: Software) -> float:
    """Seconds of parts that follow each other without waiting: what the device takes, or the host to launch them."""
    whole = sum(parts, Parts())
    return max(whole.busy_s + whole.launches * chip.gap_us * 1e-6, host_s(whole, chip, software))


def host_s(parts: Parts, chip: Chip, software: Software) -> float:
    each = chip.host_compiled_us if software.compiled else chip.host_us
    return parts.launches * each * 1e-6
