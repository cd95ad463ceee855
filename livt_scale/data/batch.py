"""A batch, and how it crosses from a loader process to the main one: as one block of shared memory.

    loader process   pack(labels, noise, keys …) -> block with room for the images -> each is decoded into its place
    pipe             number of the block and its layout: a few hundred bytes
    main process     Packed.unpack() -> Batch, its tensors views of the block

Why not torch's default: it shares every tensor on its own, a file descriptor and a round trip each. Blocks go round:
when the last view of one is gone in the main process, the loader process fills it again. Fresh memory for each batch
cost a tenth of the loader's time (224 px: 150 µs an image in page faults, both sides together).
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from livt_scale.data.mixup import Mix
from livt_scale.util.errors import DataError

HEADER = 64  # bytes before the images; the first says whether the block is in use
ROUNDED = 1 << 16  # block sizes are multiples of this: the keys' lengths differ in each batch
_RECEIVED: dict[tuple[int, int], Tensor] = {}  # in the main process: blocks that go round, by process and number


@dataclass
class Batch:
    """What one rank needs for one forward pass over B images."""

    images: Tensor  # uint8 [B, C, H, W], channels-last in memory
    labels: Tensor  # int64 [B]
    keys: list[str]
    epoch: int
    step: int  # within the epoch
    micro_index: int  # which of the step's micro-batches
    noise: Tensor | None = None  # float32 [B, num_patches] uniforms, pretraining: the lowest quarter stays
    drop: Tensor | None = None  # float32 [B, 2 · depth] uniforms, fine-tuning with drop path
    mix: Mix | None = None  # fine-tuning with mixup or cutmix

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        mix = None if self.mix is None else Mix(change(self.mix.lam), change(self.mix.box))
        return replace(self, **changed, mix=mix)


@dataclass(frozen=True)
class Packed:
    """A batch as one block of memory; a message of a few hundred bytes between processes.

    Small on purpose: a message below the pipe's atomic 4 KB is never seen in half, even from a process killed while
    sending, and the pipe never fills up and blocks a process that wants to end.
    """

    block: Tensor | None  # uint8 [HEADER + bytes]; None: the main process knows it by its number
    layout: tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, offset
    place: tuple[int, int, int]  # epoch, step, micro_index
    name: tuple[int, int] | None = None  # process and number of a block that goes round

    def unpack(self) -> Batch:
        """The batch, its tensors views of the block, which is filled again when the last of them is gone."""
        values: dict[str, Any] = self.arrays()
        keys = json.loads(values.pop("keys").tobytes())
        tensors = {name: torch.from_numpy(array) for name, array in values.items()}
        images = tensors.pop("images").permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]
        mix = Mix(tensors.pop("lam"), tensors.pop("box")) if "lam" in tensors else None
        epoch, step, micro_index = self.place
        return Batch(images, tensors.pop("labels"), keys, epoch, step, micro_index, mix=mix, **tensors)

    def received(self) -> Packed:
        """With its block, in the main process; call once for each message, in any order of batches."""
        if self.name is None:
            return self
        if self.block is not None:
            _RECEIVED[self.name] = self.block
        return replace(self, block=_RECEIVED[self.name])

    def pin_memory(self) -> Batch:
        return self.received().unpack().pin_memory()

    def arrays(self) -> dict[str, np.ndarray]:
        assert self.block is not None, "received() gives it"
        memory = self.block.numpy()  # what the views below keep alive
        if self.name is not None and get_worker_info() is None:
            weakref.finalize(memory, _hand_back, self.block, os.getpid()).atexit = False
        views = {}
        for name, dtype, shape, offset in self.layout:
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            views[name] = memory[offset : offset + nbytes].view(dtype).reshape(shape)
        return views


class Blocks:
    """The reusable blocks of one loader process, `keep` of them; any beyond that are used once.

    The first byte of a block marks that the main process still uses it: set here, cleared there.
    """

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._kept: dict[int, Tensor] = {}
        self._made = 0

    def take(self, nbytes: int) -> tuple[Tensor, tuple[int, int] | None, bool]:
        """(block of `nbytes` or more, its name, is it new to the main process); no name: it does not go round."""
        for number, block in self._kept.items():
            if not block[0] and len(block) >= nbytes:
                block[0] = 1
                return block, (os.getpid(), number), False
        block = _shared(-(-nbytes // ROUNDED) * ROUNDED)
        for number in [n for n, old in self._kept.items() if not old[0]][: len(self._kept) + 1 - self._keep]:
            del self._kept[number]  # too small
        if len(self._kept) >= self._keep:
            return block, None, True
        block[0] = 1
        self._made += 1
        self._kept[self._made] = block
        return block, (os.getpid(), self._made), True

    def drop(self) -> None:
        """Let go of the blocks; batches that are in use keep theirs."""
        self._kept.clear()


def forget(processes: Sequence[BaseProcess]) -> None:
    """Let go of the blocks of these loader processes; batches that are in use keep theirs."""
    pids = [process.pid for process in processes]
    for name in [name for name in _RECEIVED if name[0] in pids]:
        del _RECEIVED[name]


def pack(
    arrays: dict[str, np.ndarray],
    *,
    images: tuple[int, ...],
    place: tuple[int, int, int],
    blocks: Blocks | None = None,
) -> tuple[Packed, Packed]:
    """(a block with room for `images` [B, H, W, C] and a copy of `arrays`, what to send of it).

    `blocks`: those of this loader process; None in the main process, whose memory is its own.
    """
    offset = HEADER + -(-int(np.prod(images)) // 64) * 64
    layout = [("images", "|u1", images, HEADER)]
    for name, array in arrays.items():
        layout.append((name, array.dtype.str, array.shape, offset))
        offset += -(-array.nbytes // 64) * 64
    if blocks is None:
        block, block_name, is_new = torch.empty(offset, dtype=torch.uint8), None, True
    else:
        block, block_name, is_new = blocks.take(offset)
    packed = Packed(block, tuple(layout), place, block_name)
    views = packed.arrays()
    for name, array in arrays.items():
        views[name][...] = array
    return packed, packed if is_new else replace(packed, block=None)


def _hand_back(block: Tensor, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked while the batch was in use
        block[0] = 0


def _shared(nbytes: int) -> Tensor:
    """uint8 [nbytes], shared with the main process and without a name, so that nothing is left over."""
    try:
        storage = torch.UntypedStorage._new_shared(nbytes)
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for a batch of {nbytes:,} bytes: {error}",
            remedy="give /dev/shm more room (docker: --shm-size), or lower data.prefetch or data.workers",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)
