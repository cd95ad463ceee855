"""Reads DCP's `.metadata` (where each tensor is stored) without trusting it.

The file is a pickle, and a pickle can call any function it names. Here names are looked up in a short list: the dozen
records that DCP writes become inert objects created for this read, `torch.Size` becomes `tuple`, a dtype is looked up
among torch's, `getattr` finds only the members of one Enum (Python 3.11.0 to 3.11.3 pickles Enums by it), and any
other name (`os.system`) is refused before anything runs. Then every value is checked: file names must be plain and
listed in the manifest, sizes non-negative, pieces inside their tensor, and every item a tensor: an item of bytes, which
DCP would unpickle with code enabled, is refused. Layout as of torch 2.11 to 2.14.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from livt_scale.checkpoint.foreign.dry_run import dry_run
from livt_scale.checkpoint.manifest import CheckpointManifest
from livt_scale.util.errors import CheckpointDamaged
from livt_scale.util.outside import read_checked
from livt_scale.util.text import first_line

METADATA = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "BytesStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},  # storage_meta of other writers has the path
    "pathlib._local": {"PosixPath"},
}


@dataclass(frozen=True)
class Piece:
    """One stored part of a tensor: `shape` at `offset` in it, in bytes [start, start + bytes) of `file`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    bytes: int


@dataclass(frozen=True)
class SavedTensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of a checkpoint by name."""

    tensors: Mapping[str, SavedTensor]

    def piece(self, name: str, offset: tuple[int, ...]) -> Piece:
        return next(p for p in self.tensors[name].pieces if p.offset == offset)

    def as_dcp(self, names: Mapping[str, Any]) -> Metadata:
        """What DCP's load planner needs to know about the tensors `names`."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=saved.dtype),
                    size=torch.Size(saved.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.shape)) for p in saved.pieces],
                )
                for name, saved in self.tensors.items()
                if name in names
            }
        )


def read_index(folder: Path, manifest: CheckpointManifest, *, partial: bool = False) -> TensorIndex:
    """The tensors in the checkpoint `folder`; CheckpointDamaged where the file is not what our writer writes.

    `partial`: a tensor's pieces need not make up all of it, as one node's do not.
    """
    path = folder / METADATA
    try:
        _want(any(entry.name == METADATA for entry in manifest.files), "the manifest does not list it")
        tree = _load(path)
        tensors, others = _tensors(tree, {f.name: f.bytes for f in manifest.files}, partial=partial)
        _want(not others, f"{', '.join(others[:1])!r} is an item of bytes, not a tensor")
        index = TensorIndex(tensors)
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a hostile or damaged pickle raises whatever it likes
        raise CheckpointDamaged(
            f"{path} was refused: {first_line(error)}",
            remedy="Nothing in it was executed. Take a checkpoint that livt wrote",
        ) from error
    if len(index.tensors) != manifest.num_tensors:
        raise CheckpointDamaged(f"{path} holds {len(index.tensors)} tensors, the manifest {manifest.num_tensors}")
    return index


def read_foreign_index(folder: Path) -> tuple[TensorIndex, list[str]]:
    """The tensors in a torch.distributed.checkpoint folder that livt did not write, and the names of its other items.

    Other items are separate pickles: they are listed, never opened. Raises CheckpointDamaged as `read_index` does.
    """
    path = folder / METADATA
    try:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file() and file != path}
        tensors, others = _tensors(_load(path), sizes, partial=False)
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a hostile or damaged pickle raises whatever it likes
        raise CheckpointDamaged(
            f"{path} was refused: {first_line(error)}",
            remedy="Nothing in it was executed. Take one written by dcp.save",
        ) from error
    return TensorIndex(tensors), others


def _load(path: Path) -> Any:
    """The records in the file `path`, once a dry run has shown that they take no more memory than the file is worth."""
    raw = read_checked(path, "checkpoint index")
    dry_run(raw, allowed=lambda _: True)  # names are looked up by `_Restricted`
    return _Restricted(io.BytesIO(raw)).load()


class _Record:
    """An inert stand-in for one of DCP's records: it only keeps what the pickle sets."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Restricted(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # fresh types for each reading: a pickle that sets attributes on a class spoils only its own copy
        self._kinds = {
            (module, name): type(name, (_Record,), {}) for module, names in _RECORDS.items() for name in names
        }
        self._memory_format = type("_MEM_FORMAT_ENCODING", (int,), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._kinds:
            return self._kinds[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str  # every layout but "torch.strided" is refused below
        if (module, name) == ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"):
            return self._memory_format
        if module in ("builtins", "__builtin__") and name == "getattr":
            return self._member
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")

    def _member(self, kind: Any, name: Any) -> int:
        """What stands for `getattr`."""
        if kind is self._memory_format and type(name) is str and name in _MEM_FORMAT_ENCODING.__members__:
            return int(_MEM_FORMAT_ENCODING[name].value)
        raise pickle.UnpicklingError(
            "it asks for builtins.getattr of something else than an Enum of torch's, which no checkpoint needs"
        )

    def persistent_load(self, pid: Any) -> NoReturn:  # noqa: ARG002
        raise pickle.UnpicklingError("it asks for a persistent object, which no checkpoint needs")


def _tensors(tree: Any, file_bytes: dict[str, int], *, partial: bool) -> tuple[dict[str, SavedTensor], list[str]]:
    """The tensors by name, and the names of all other items."""
    root = _fields(tree, "Metadata")
    places = {}
    for key, info in _mapping(root["storage_data"]).items():
        index, place = _fields(key, "MetadataIndex"), _fields(info, "_StorageInfo")
        if index.get("offset") is None:  # of an item of bytes
            continue
        _want(place.get("transform_descriptors") is None, "a piece is transformed")
        places[_text(index["fqn"]), _sizes(index["offset"])] = place
    tensors, others = {}, []
    for key, saved in _mapping(root["state_dict_metadata"]).items():
        name = _text(key)
        if _kind(saved) == "BytesStorageMetadata":
            others.append(name)
            continue
        fields = _fields(saved, "TensorStorageMetadata")
        dtype = _dtype(fields["properties"])
        shape = _sizes(fields["size"])
        _want(isinstance(fields["chunks"], list), f"the pieces of {name!r} are not a list")
        pieces = tuple(_piece(name, chunk, shape, places, file_bytes) for chunk in fields["chunks"])
        stored = sum(math.prod(p.shape) for p in pieces)
        whole = stored == math.prod(shape) or (partial and stored < math.prod(shape))
        _want(whole, f"the pieces of {name!r} do not make up the tensor")
        bytes_ = sum(p.bytes for p in pieces)
        _want(stored * dtype.itemsize <= bytes_, f"{name!r} is larger than the bytes stored for it")
        tensors[name] = SavedTensor(name, shape, dtype, pieces)
    _check_apart(tensors)
    return tensors, others


def _check_apart(tensors: Mapping[str, SavedTensor]) -> None:
    """Check that no two tensors share a stored piece: a file could name one for a million, all kept in memory."""
    ends: dict[str, int] = {}
    stored = [piece for saved in tensors.values() for piece in saved.pieces]
    for piece in sorted(stored, key=lambda piece: (piece.file, piece.start)):
        _want(piece.start >= ends.get(piece.file, 0), f"two pieces overlap in {piece.file!r} at byte {piece.start}")
        ends[piece.file] = piece.start + piece.bytes


def _piece(name: str, chunk: Any, shape: tuple[int, ...], places: dict[Any, Any], file_bytes: dict[str, int]) -> Piece:
    fields = _fields(chunk, "ChunkStorageMetadata")
    offset, size = _sizes(fields["offsets"]), _sizes(fields["sizes"])
    inside = len(offset) == len(size) == len(shape) and all(
        o + s <= whole for o, s, whole in zip(offset, size, shape, strict=True)
    )
    _want(inside, f"a piece of {name!r} is outside the tensor")
    _want((name, offset) in places, f"no place is given for a piece of {name!r}")
    place = places[name, offset]
    file, start, length = _text(place["relative_path"]), place["offset"], place["length"]
    _want(file in file_bytes, f"{name!r} is in {file!r}, which the manifest does not list")
    _want(_is_count(start) and _is_count(length), f"the place of {name!r} is not a number")
    _want(start + length <= file_bytes[file], f"{name!r} begins beyond the end of {file!r}")
    return Piece(offset, size, file, start, length)


def _want(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _kind(record: Any) -> str:
    return type(record).__name__ if isinstance(record, _Record) else "another thing"


def _fields(record: Any, kind: str) -> dict[str, Any]:
    state = getattr(record, "state", None)
    _want(_kind(record) == kind and isinstance(state, dict), f"{_kind(record)} is where {kind} belongs")
    return state  # type: ignore[return-value]


def _dtype(properties: Any) -> torch.dtype:
    state = getattr(properties, "state", None)
    _want(_kind(properties) == "TensorProperties" and isinstance(state, tuple) and len(state) == 5, "no properties")
    dtype, layout = state[0], state[1]  # type: ignore[index]
    _want(isinstance(dtype, torch.dtype) and layout == "torch.strided", "a tensor that is not dense")
    return dtype


def _mapping(value: Any) -> dict[Any, Any]:
    _want(isinstance(value, dict), "no table where one belongs")
    return value


def _text(value: Any) -> str:
    _want(type(value) is str, "no name where one belongs")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _sizes(value: Any) -> tuple[int, ...]:
    _want(type(value) is tuple and all(_is_count(v) for v in value), "no sizes where they belong")
    return value
