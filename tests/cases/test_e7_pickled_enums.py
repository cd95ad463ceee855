"""Case E7: Enums as Python 3.11.0 to 3.11.3 pickles them, in checkpoints of ours and of DeepSpeed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from livt_scale.checkpoint import dcp_metadata
from livt_scale.checkpoint.foreign.pickles import InertZeroStage, read_pickle
from livt_scale.util.errors import CheckpointDamaged


class PickledByGetattr(pickle._Pickler):
    """A pickler in Python, for which an Enum's member is a call of getattr, as it was before 3.11.4."""

    def reducer_override(self, value):
        if type(value).__name__ in ("_MEM_FORMAT_ENCODING", "ZeroStageEnum"):
            return getattr, (type(value), value.name)
        return NotImplemented


def pickled_by_getattr(tree: object, *, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    PickledByGetattr(file, protocol).dump(tree)
    assert b"getattr" in file.getvalue()
    return file.getvalue()


@pytest.mark.parametrize("protocol", [2, 4])
def test_e7_the_metadata_of_a_checkpoint_is_read_back(protocol):
    properties = dcp.TensorProperties(dtype=torch.float32)
    properties.memory_format = torch.contiguous_format
    chunk = dcp.ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tree = dcp.Metadata({"model.w": dcp.TensorStorageMetadata(properties, torch.Size([2]), [chunk])})
    found = dcp_metadata._Restricted(io.BytesIO(pickled_by_getattr(tree, protocol=protocol))).load()
    assert dcp_metadata._dtype(found.state["state_dict_metadata"]["model.w"].state["properties"]) == torch.float32


RECORD = b"ctorch.distributed.checkpoint.metadata\n"
CALLS = {
    "a record's method": b"cbuiltins\ngetattr\n(" + RECORD + b"Metadata\nS'__init__'\ntR.",
    "a method of the Enum": b"cbuiltins\ngetattr\n(" + RECORD + b"_MEM_FORMAT_ENCODING\nS'mro'\ntR.",
    "no member": b"cbuiltins\ngetattr\n(" + RECORD + b"_MEM_FORMAT_ENCODING\nS'__class__'\ntR.",
    "a module": b"cbuiltins\ngetattr\n(ctorch\nfloat32\nS'to'\ntR.",
    "itself": b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__globals__'\ntR.",
    "a default": b"cbuiltins\ngetattr\n(" + RECORD + b"_MEM_FORMAT_ENCODING\nS'x'\nI1\ntR.",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_e7_getattr_finds_nothing_but_members_of_known_enums(tmp_path, call):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        dcp_metadata._Restricted(io.BytesIO(call)).load()
    with pytest.raises(CheckpointDamaged, match="refused"):
        read_pickle(saved_by_torch(tmp_path / "x.pt", call))


def saved_by_torch(path: Path, data: bytes) -> Path:
    """A file of torch.save whose pickle is `data`."""
    torch.save(1, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def test_e7_the_stage_in_a_checkpoint_of_deepspeed_is_read(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    tree = {"zero_stage": ZeroStageEnum.gradients, "partition_count": 2}
    found = read_pickle(saved_by_torch(tmp_path / "states.pt", pickled_by_getattr(tree)))
    assert isinstance(found["zero_stage"], InertZeroStage)
    assert found["zero_stage"].args == (2,)
    for call in (b"S'mro'", b"S'from_bytes'"):
        spoilt = b"cbuiltins\ngetattr\n(cdeepspeed.runtime.zero.config\nZeroStageEnum\n" + call + b"\ntR."
        with pytest.raises(CheckpointDamaged, match="refused"):
            read_pickle(saved_by_torch(tmp_path / "spoilt.pt", spoilt))
