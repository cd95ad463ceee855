"""Writes and reads named tensors by torch.distributed.checkpoint (DCP), in its layout, for any world size.

Writing: all ranks agree on a plan (who writes which piece; a replicated tensor is written once, and the ranks share the
work), each copies its pieces, each writes one file. Reading: each rank reads the pieces that its own tensors need; no
collectives. Instead of `dcp.save` and `dcp.load` we call the planner and the writer step by step, because the plan is
kept between saves, only the rank's own pieces are copied, files are hashed while written, and the pickle that DCP
calls `.metadata` must not be loaded by pickle (see `dcp_metadata.py`). Only tensors are written and read.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from livt_scale.checkpoint.dcp_metadata import METADATA, Piece, SavedTensor, TensorIndex
from livt_scale.checkpoint.foreign.pickles import read_tensor
from livt_scale.checkpoint.io import HashedFile
from livt_scale.checkpoint.manifest import FileEntry
from livt_scale.distributed.collectives import Peers
from livt_scale.util.errors import CheckpointDamaged, CheckpointError
from livt_scale.util.outside import MAX_BYTES, open_checked
from livt_scale.util.text import first_line

# a piece is a small zip archive: its records are aligned to 64 bytes and its directory is about 1.5 kB
OVERHEAD_BYTES_A_PIECE = 2048
ALIGNMENT = 64  # bytes, of a piece in the buffer that it is copied to


@dataclass(frozen=True)
class WritePlan:
    """What this rank writes; on rank 0 also the complete `metadata` and the total bytes that all ranks write."""

    signature: tuple[Any, ...]
    mine: SavePlan
    metadata: Metadata | None
    needed_bytes: int


def signature_of(state: dict[str, Tensor]) -> tuple[Any, ...]:
    """What a plan depends on: names, shapes, types and placements, not values."""
    return tuple(
        (name, tuple(t.shape), t.dtype, str(getattr(t, "placements", "")), tuple(_local(t).shape))
        for name, t in state.items()
    )


def plan_write(state: dict[str, Tensor], peers: Peers, *, partial: bool = False) -> WritePlan:
    """Agree with all of `peers` who writes what (a collective call). `partial`: what they hold is not all there is."""
    planner = _save_planner(state, peers)
    locals_ = peers.gather(peers.run_all(planner.create_local_plan))
    plans: list[SavePlan] | None = None
    metadata: Metadata | None = None
    if locals_ is not None:
        # DCP's planner does these two steps, and then requires every tensor to be complete
        plans, metadata = (
            create_default_global_save_plan(dedup_save_plans(locals_))
            if partial
            else planner.create_global_plan(locals_)
        )
        # only names the files, one prefix a rank; the folder is of no account
        plans = FileSystemWriter(os.devnull).prepare_global_plan(plans)
    mine = planner.finish_plan(peers.scatter(plans))
    needed = _needed_bytes(metadata) if metadata is not None else 0
    return WritePlan(signature_of(state), mine, metadata, needed)


class Staging:
    """Copies of this rank's pieces, in a buffer that is kept from save to save (page-locked for a GPU's tensors).

    Keeping it holds memory level and saves the page faults of fresh memory; the price is one copy of the rank's pieces
    for as long as the run lasts. One buffer, because torch rounds each page-locked one up to a power of two.
    """

    def __init__(self) -> None:
        self._layout: list[_Piece] = []
        self._copies: dict[MetadataIndex, Tensor] = {}

    def copy(self, state: dict[str, Tensor], plan: WritePlan, peers: Peers) -> Pieces:
        """Copies whose values no later step can change: the device has finished copying when this returns."""
        sources = _live_pieces(state, plan, peers)
        layout = [_Piece(index, piece.shape, piece.dtype, piece.is_cuda) for index, piece in sources.items()]
        if layout != self._layout:
            self._layout, self._copies = layout, {}  # free the old one first
            self._copies = _in_buffers(layout)
        for index, source in sources.items():
            self._copies[index].copy_(source, non_blocking=source.is_cuda)
        for device in {source.device for source in sources.values() if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return Pieces(self._copies)

    @property
    def num_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())


@dataclass(frozen=True)
class _Piece:
    index: MetadataIndex
    shape: torch.Size
    dtype: torch.dtype
    pinned: bool

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _in_buffers(layout: list[_Piece]) -> dict[MetadataIndex, Tensor]:
    """An empty tensor for each piece, side by side in one page-locked and one ordinary buffer.

    Each has its own storage, of its own size: DCP would copy what is a part of a larger one before it writes it.
    """
    found = {piece.index: torch.empty(piece.shape, dtype=piece.dtype) for piece in layout if not piece.num_bytes}
    for pinned in (False, True):
        pieces = [piece for piece in layout if piece.pinned == pinned and piece.num_bytes]
        ends = list(accumulate(-(-piece.num_bytes // ALIGNMENT) * ALIGNMENT for piece in pieces))
        if not ends:
            continue
        buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned).numpy()
        for piece, start in zip(pieces, [0, *ends], strict=False):
            count = piece.shape.numel()
            flat = torch.frombuffer(buffer, dtype=piece.dtype, count=count, offset=start)  # keeps `buffer` alive
            found[piece.index] = flat.view(piece.shape)
    return found


class Pieces(SavePlanner):
    """What DCP's writer asks for the data of an item: this rank's pieces, copied or (sync mode) the live ones."""

    def __init__(self, tensors: dict[MetadataIndex, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def live(cls, state: dict[str, Tensor], plan: WritePlan, peers: Peers) -> Pieces:
        return cls({index: piece.contiguous() for index, piece in _live_pieces(state, plan, peers).items()})

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.tensors[write_item.index]

    # the planning was done by plan_write
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        raise NotImplementedError


class FolderWriter:
    """Writes this rank's pieces, and on rank 0 the metadata, into `folder`; each file synced and hashed.

    `full` is the OSError of the first failed write, which torch hides behind other errors.
    """

    def __init__(self, folder: Path, peers: Peers) -> None:
        self._files = _HashingFiles()
        # one pass in the order of the plan, whatever the device: sync and async mode write the same bytes
        self._dcp = _NeutralWriter(folder, sync_files=True, per_thread_copy_ahead=0, overwrite=False)
        self._dcp.fs = self._files
        self._dcp.set_up_storage_writer(peers.leads)
        self._rank = peers.rank

    @property
    def full(self) -> OSError | None:
        return self._files.error

    def write_pieces(self, plan: WritePlan, pieces: Pieces) -> list[WriteResult]:
        return self._dcp.write_data(plan.mine, pieces).wait()

    def write_metadata(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._dcp.finish(dataclasses.replace(metadata), results)
        size, limit = self._files.written[METADATA].bytes, MAX_BYTES["checkpoint index"]
        if size > limit:
            raise CheckpointError(f"{METADATA} has {size:,} bytes; one of more than {limit:,} would not be read again")

    def entries(self) -> list[FileEntry]:
        return [
            FileEntry(name=name, bytes=file.bytes, sha256=file.sha256, rank=self._rank)
            for name, file in sorted(self._files.written.items())
        ]


def not_covered(into: dict[str, Tensor], index: TensorIndex) -> list[str]:
    """The tensors of `into` of whose part on this rank not everything is among the pieces of a partial `index`."""
    _, items = _plan_read({name: tensor for name, tensor in into.items() if name in index.tensors}, index)
    found = dict.fromkeys(into, 0)
    for item in items:
        found[item.dest_index.fqn] += math.prod(item.lengths)  # pieces do not overlap
    return [name for name, tensor in into.items() if found[name] != _local(tensor).numel()]


def read_into(folder: Path, into: dict[str, Tensor], index: TensorIndex, *, check_crc: bool = False) -> None:
    """Fill this rank's tensors `into` from the pieces in `folder`. Names, shapes and types must have been checked.

    check_crc: of files that no manifest has the SHA-256 of.
    """
    planner, items = _plan_read(into, index)
    by_file: dict[str, list[tuple[Piece, ReadItem]]] = {}
    for item in items:
        piece = index.piece(item.storage_index.fqn, tuple(item.storage_index.offset or ()))
        by_file.setdefault(piece.file, []).append((piece, item))
    for name, wanted in sorted(by_file.items()):
        with open_checked(folder / name, "checkpoint file") as file:
            for piece, item in sorted(wanted, key=lambda pair: pair[0].start):
                of = index.tensors[item.storage_index.fqn]
                saved = _read_piece(file, piece, of, folder / name, check_crc=check_crc)
                target = planner.resolve_tensor(item).detach()
                target.copy_(_narrow(saved, item.storage_offsets, item.lengths))


def _plan_read(into: dict[str, Tensor], index: TensorIndex) -> tuple[DefaultLoadPlanner, list[ReadItem]]:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(into, index.as_dcp(into))
    return planner, planner.create_local_plan().items


def _read_piece(file: BinaryIO, piece: Piece, of: SavedTensor, path: Path, *, check_crc: bool) -> Tensor:
    file.seek(piece.start)
    raw = file.read(piece.bytes)
    try:
        tensor = read_tensor(raw, check_crc=check_crc)
    except Exception as error:  # torch raises many kinds for a damaged or a hostile archive
        raise CheckpointDamaged(f"{path}: tensor {of.name!r} cannot be read ({first_line(error)})") from error
    if type(tensor) is not Tensor or tuple(tensor.shape) != piece.shape or tensor.dtype != of.dtype:
        raise CheckpointDamaged(f"{path}: what is stored for tensor {of.name!r} is not what {METADATA} says")
    return tensor


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _save_planner(state: dict[str, Tensor], peers: Peers) -> DefaultSavePlanner:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=peers.leads)
    return planner


def _live_pieces(state: dict[str, Tensor], plan: WritePlan, peers: Peers) -> dict[MetadataIndex, Tensor]:
    planner = _save_planner(state, peers)
    pieces = {}
    for item in plan.mine.items:
        piece = planner.resolve_data(item)
        assert isinstance(piece, Tensor), f"{item.index.fqn}: only tensors can be saved"
        pieces[item.index] = piece.detach()
    return pieces


def _needed_bytes(metadata: Metadata) -> int:
    total = 64 * 1024
    for saved in metadata.state_dict_metadata.values():
        assert isinstance(saved, TensorStorageMetadata)
        total += sum(math.prod(c.sizes) for c in saved.chunks) * saved.properties.dtype.itemsize
        total += OVERHEAD_BYTES_A_PIECE * len(saved.chunks)
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _NeutralWriter(FileSystemWriter):
    """DCP's writer, leaving out the absolute path and the random id that it records otherwise."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()


class _HashingFiles(FileSystem):
    def __init__(self) -> None:
        self.written: dict[str, HashedFile] = {}

    @property
    def error(self) -> OSError | None:
        return next((file.error for file in self.written.values() if file.error), None)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        assert mode == "wb"
        file = self.written[Path(path).name] = HashedFile(Path(path))
        try:
            yield file
        finally:
            file.close()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)
