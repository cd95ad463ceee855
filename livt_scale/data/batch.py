"""A batch, and how it crosses from a loader process to the main one: as one block of shared memory.

    loader process   pack(labels, noise, keys …) -> block with room for the images -> each is decoded into its place
    pipe             name of the block and its layout: a few hundred bytes
    main process     Packed.unpack() -> Batch, its tensors views of the block

Why not torch's default: it shares every tensor on its own, a file descriptor and a round trip each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from livt_scale.data.mixing import Mix
from livt_scale.errors import DataError


@dataclass
class Batch:
    """What one rank needs for one forward pass over B images."""

    images: Tensor  # uint8 [B, C, H, W], channels-last in memory
    labels: Tensor  # int64 [B]
    keys: list[str]
    epoch: int
    step: int  # within the epoch
    micro: int  # which of the step's micro-batches
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

    block: Tensor  # uint8 [bytes]
    layout: tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, offset
    place: tuple[int, int, int]  # epoch, step, micro

    def unpack(self) -> Batch:
        """The batch, its tensors views of the block."""
        values: dict[str, Any] = self.arrays()
        keys = json.loads(values.pop("keys").tobytes())
        tensors = {name: torch.from_numpy(array) for name, array in values.items()}
        images = tensors.pop("images").permute(0, 3, 1, 2)  # [B, H, W, C] -> [B, C, H, W]
        mix = Mix(tensors.pop("lam"), tensors.pop("box")) if "lam" in tensors else None
        epoch, step, micro = self.place
        return Batch(images, tensors.pop("labels"), keys, epoch, step, micro, mix=mix, **tensors)

    def pin_memory(self) -> Batch:
        return self.unpack().pin_memory()

    def arrays(self) -> dict[str, np.ndarray]:
        memory = self.block.numpy()
        views = {}
        for name, dtype, shape, offset in self.layout:
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            views[name] = memory[offset : offset + nbytes].view(dtype).reshape(shape)
        return views


def pack(arrays: dict[str, np.ndarray], *, images: tuple[int, ...], place: tuple[int, int, int]) -> Packed:
    """A block with room for `images` [B, H, W, C] and a copy of `arrays`."""
    offset = -(-int(np.prod(images)) // 64) * 64
    layout = [("images", "|u1", images, 0)]
    for name, array in arrays.items():
        layout.append((name, array.dtype.str, array.shape, offset))
        offset += -(-array.nbytes // 64) * 64
    packed = Packed(_memory(offset), tuple(layout), place)
    views = packed.arrays()
    for name, array in arrays.items():
        views[name][...] = array
    return packed


def _memory(nbytes: int) -> Tensor:
    """uint8 [nbytes]; in a loader process shared with the main one and without a name, so that nothing is left over."""
    if get_worker_info() is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(nbytes)
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for a batch of {nbytes:,} bytes: {error}",
            remedy="give /dev/shm more room (docker: --shm-size), or lower data.prefetch or data.workers",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)
