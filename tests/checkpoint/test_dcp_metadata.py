"""A checkpoint from a stranger whose hashes match: nothing in it is executed, and what is odd is refused."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import pickletools
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from livt_scale.checkpoint.dcp_metadata import read_foreign_index, read_index
from livt_scale.checkpoint.foreign import dry_run as foreign_dry_run
from livt_scale.checkpoint.foreign.dry_run import dry_run
from livt_scale.checkpoint.load import load, newest_whole, read_manifest, read_tensors, verify
from livt_scale.util.errors import CheckpointDamaged, CheckpointError
from livt_scale.util.outside import MAX_BYTES


class Hostile:
    """Pickles into a call that makes the canary file."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


def calls(canary: Path) -> list[Hostile]:
    return [
        Hostile(os.system, f"touch '{canary}'"),
        Hostile(eval, f"open({str(canary)!r}, 'w').close()"),
        Hostile(os.mkdir, str(canary)),
        Hostile(torch.save, 1, str(canary)),
    ]


def refused(path: Path, state, canary: Path, match: str) -> None:
    assert verify(path) == []  # the hashes match: they cannot help here
    assert newest_whole(path.parent) == path
    for attempt in (lambda: load(path, state(0)), lambda: read_tensors(path)):
        with pytest.raises(CheckpointDamaged, match=match):
            attempt()
    assert not canary.exists()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_metadata_file_that_calls_is_refused_unexecuted(save, sign, state, canary, which, protocol):
    path = save(1)
    (path / ".metadata").write_bytes(pickle.dumps(calls(canary)[which], protocol=protocol))
    sign(path)
    refused(path, state, canary, "was refused")
    with pytest.raises(Exception):  # noqa: B017, PT011  the canary works: an open unpickler does make it
        raise RuntimeError(pickle.loads((path / ".metadata").read_bytes()))
    assert canary.exists()


@pytest.mark.parametrize("which", range(4))
def test_a_data_file_that_calls_is_refused_unexecuted(save, sign, state, canary, which):
    path = save(1)
    archive = io.BytesIO()
    torch.save(calls(canary)[which], archive)
    data = archive.getvalue()
    size = len(data) + 10_000
    (path / "__0_0.distcp").write_bytes(100 * (data + bytes(10_000)))
    edit(path, lambda meta: [place_at(meta, key, k * size, size) for k, key in enumerate(meta.storage_data)])
    sign(path)
    refused(path, state, canary, "cannot be read")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("io.open", b"cio\nopen\n(S'CANARY'\nS'w'\ntR."),
        ("torch.load", b"ctorch\nload\n(S'CANARY'\ntR."),
        ("builtins.getattr", b"cbuiltins\ngetattr\n(ctorch\nfloat32\nS'to'\ntR."),
        ("torch.serialization.os", b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93."),
        ("torch._C", b"ctorch\n_C\n."),
    ],
)
def test_any_name_outside_the_list_is_refused(save, sign, state, canary, name, call):
    path = save(1)
    (path / ".metadata").write_bytes(call.replace(b"CANARY", str(canary).encode().replace(b"\n", b"")))
    sign(path)
    refused(path, state, canary, "which no checkpoint needs")


def test_a_pickle_cannot_spoil_the_records_for_the_next_reading(save, sign, state):
    """BUILD with attributes on a class object would patch it for the whole process, were the class shared."""
    path, honest = save(1), save(2)
    spoil = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'state'\nI1\nstb."
    (path / ".metadata").write_bytes(spoil)
    sign(path)
    with pytest.raises(CheckpointDamaged, match="was refused"):
        load(path, state(0))
    load(honest, state(0))


def test_an_item_of_bytes_is_never_read(save, sign, state, canary):
    path = save(1)

    def bytes_item(metadata) -> None:
        metadata.state_dict_metadata["model.weight"] = BytesStorageMetadata()

    edit(path, bytes_item)
    sign(path)
    refused(path, state, canary, "is an item of bytes")


def replaced(field: str, value):
    def change(metadata):
        saved = metadata.state_dict_metadata["model.weight"]
        metadata.state_dict_metadata["model.weight"] = dataclasses.replace(saved, **{field: value})

    return change


def moved(**place):
    def change(metadata):
        for key, info in metadata.storage_data.items():
            metadata.storage_data[key] = dataclasses.replace(info, **place)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (moved(relative_path="../../secret"), "which the manifest does not list"),
        (moved(relative_path="/etc/passwd"), "which the manifest does not list"),
        (moved(offset=10**9), "beyond the end"),
        (moved(offset=-1), "not a number"),
        (moved(transform_descriptors=["zstd"]), "transformed"),
        (replaced("size", torch.Size([10**9, 10**9])), "do not make up the tensor"),
        (replaced("chunks", []), "do not make up the tensor"),
        (replaced("chunks", [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([9, 9]))]), "outside the tensor"),
        (lambda metadata: metadata.state_dict_metadata.pop("model.weight"), "the manifest 5"),
        (lambda metadata: metadata.storage_data.clear(), "no place is given"),
    ],
)
def test_a_table_that_cannot_be_is_refused(save, sign, state, canary, change, match):
    path = save(1)
    edit(path, change)
    sign(path)
    refused(path, state, canary, match)


def test_our_reading_agrees_with_that_of_dcp(save):
    path = save(3)
    index = read_index(path, read_manifest(path))
    trusted = FileSystemReader(path).read_metadata()
    assert index.tensors.keys() == trusted.state_dict_metadata.keys()
    for name, saved in index.tensors.items():
        theirs = trusted.state_dict_metadata[name]
        assert (torch.Size(saved.shape), saved.dtype) == (theirs.size, theirs.properties.dtype)
    assert not any("GLOBAL" in op.name and arg and "os" in str(arg).split() for op, arg, _ in pickletools.genops(
        (path / ".metadata").read_bytes()))  # fmt: skip


def many_pieces(*, ranks: int) -> Metadata:
    """What DCP writes for tensors of 0 to 5 dimensions on `ranks` ranks."""
    tensors, places = {}, {}
    for k in range(12):
        name, sides = f"model.{'deep.' * k}w{k}", (2**33, 300, 70_000, 1, 5)[: k % 6]
        starts = [(rank * sides[0], *[0] * (len(sides) - 1)) for rank in range(ranks)] if sides else [()]
        chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(sides)) for start in starts]
        size = torch.Size((ranks * sides[0], *sides[1:]) if sides else ())
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, chunks)
        for rank, chunk in enumerate(chunks):
            index = MetadataIndex(
                name, chunk.offsets if k % 2 else torch.Size(list(chunk.offsets)), rank if k % 3 else None
            )
            places[index] = _StorageInfo(f"__{rank}_0.distcp" if k % 4 else "x" * 20 * k, rank * 2**35, 2**k)
    return Metadata(tensors, storage_data=places)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_dry_run_of_a_piece_in_one_step_equals_that_of_its_opcodes(monkeypatch, protocol):
    raw = pickle.dumps(many_pieces(ranks=20), protocol=protocol)
    fast = dry_run(raw, allowed=lambda _: True)
    monkeypatch.setattr(foreign_dry_run, "RECORD", re.compile(b"(?!)"))
    slow = dry_run(raw, allowed=lambda _: True)
    assert (fast.end, fast.stack, fast.marks) == (slow.end, slow.stack, slow.marks)
    assert fast.memo.keys() == slow.memo.keys()
    for place, value in fast.memo.items():  # a name, a text and whatever holds something are known in both
        assert value is None or type(value) is type(slow.memo[place])
    if protocol >= 4:
        assert fast.num_ops < slow.num_ops / 3


@pytest.mark.parametrize("bomb", [b"Nr\xff\xff\xff\x7f.", b"})" + b"2\x86" * 70 + b"Ns."])
def test_a_large_index_is_dry_run_too(tmp_path, bomb):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02X" + (2**24).to_bytes(4, "little") + b"a" * 2**24 + b"0" + bomb)
    with pytest.raises(CheckpointDamaged, match=r"memo|too often") as error:
        read_foreign_index(tmp_path)
    assert str(error.value).isprintable()


def test_an_index_beyond_the_bound_is_refused_with_size_and_bound_and_never_written(tmp_path, save, monkeypatch):
    with (tmp_path / ".metadata").open("wb") as file:
        file.truncate(MAX_BYTES["checkpoint index"] + 1)
    with pytest.raises(CheckpointDamaged, match=r"201,326,593 bytes, more than .*: 201,326,592"):
        read_foreign_index(tmp_path)
    monkeypatch.setitem(MAX_BYTES, "checkpoint index", 1000)
    with pytest.raises(CheckpointError, match="would not be read again"):
        save(1)


def place_at(metadata, key, offset: int, length: int) -> None:
    metadata.storage_data[key] = dataclasses.replace(metadata.storage_data[key], offset=offset, length=length)


def edit(path: Path, change) -> None:
    metadata = FileSystemReader(path).read_metadata()
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
