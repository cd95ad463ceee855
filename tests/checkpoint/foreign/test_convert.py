"""Into one safetensors file and back, and from real files of DeepSpeed and torch; hostile ones are refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from livt_scale.checkpoint import io
from livt_scale.checkpoint.foreign import convert
from livt_scale.checkpoint.foreign.convert import read, write_checkpoint, write_safetensors
from livt_scale.checkpoint.load import load, newest_whole, read_manifest, read_tensors, verify
from livt_scale.distributed.state_dict import collect
from livt_scale.util.errors import CheckpointDamaged, CheckpointError, DataError, UsageError
from tests.checkpoint.test_node_local import run_ranks


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


# --- a checkpoint of ours, there and back ---


def test_there_and_back_is_the_same_checkpoint_bit_for_bit(tmp_path, save):
    path = save(7, score=0.5, final=True)
    file, back = tmp_path / "one.safetensors", tmp_path / "step-00000007"
    write_safetensors(read(path), file)
    assert load_file(file).keys() == read_tensors(path).keys()  # anybody can read it
    write_checkpoint(read(file), back)
    same_bits(read_tensors(back), read_tensors(path))
    assert verify(back) == []
    old, new = read_manifest(path), read_manifest(back)
    for name in ("position", "facts", "score", "final", "saved_at", "num_tensors"):
        assert getattr(new, name) == getattr(old, name), name
    assert newest_whole(tmp_path) == back


def test_odd_values_survive(tmp_path, save, state):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]).view(torch.int32)
    odd[0] |= 0x1234  # a NaN with a payload
    it = convert.Converted("x", {**state(1), "model.odd": odd.view(torch.float32)})
    write_safetensors(it, tmp_path / "x.safetensors")
    same_bits(read(tmp_path / "x.safetensors").tensors, it.tensors)
    write_checkpoint(it, tmp_path / "a checkpoint")
    same_bits(read(tmp_path / "a checkpoint").tensors, it.tensors)


def test_nothing_is_overwritten_or_half_written(tmp_path, save, monkeypatch):
    it = read(save(1))
    for name, write in (("a.safetensors", write_safetensors), ("a", write_checkpoint)):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match="there already"):
            write(it, tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
        with pytest.raises(UsageError, match="no folder"):
            write(it, tmp_path / "absent" / name)
    with pytest.raises(UsageError, match="cannot hold step 1"):
        write_checkpoint(it, tmp_path / "step-00000002")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(convert, "write_tensors", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(convert, "FolderWriter", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    for name, write in (("b.safetensors", write_safetensors), ("b", write_checkpoint)):
        with pytest.raises(DataError, match="No space"):
            write(it, tmp_path / name)
    monkeypatch.setattr(io, "free_bytes", lambda folder: 10)
    with pytest.raises(CheckpointError, match="are needed"):
        write_safetensors(it, tmp_path / "c.safetensors")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_source_is_refused(tmp_path, save):
    path = save(1)
    data = path / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match="__0_0"):
        read(path)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(CheckpointDamaged, match="cannot be read as safetensors"):
        read(tmp_path / "x.safetensors")
    for about in ("[1]", '{"position": 3}', "{"):
        save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors", metadata={convert.KEY: about})
        with pytest.raises(CheckpointDamaged):
            read(tmp_path / "y.safetensors")
    os.mkfifo(tmp_path / "pipe.pth")
    for other in (tmp_path / "absent", tmp_path, tmp_path / "pipe.pth"):
        with pytest.raises(UsageError):
            read(other)


# --- DeepSpeed's own ---


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(Path(__file__).with_name("deepspeed_ranks.py"), folder, 2, "1", "2", "3")
    return folder


@pytest.fixture(params=[1, 2, 3], ids=lambda stage: f"zero{stage}")
def zero(request, by_deepspeed) -> tuple[int, Path]:
    return request.param, by_deepspeed


@pytest.mark.slow
def test_deepspeeds_own_checkpoint_becomes_ours(zero, tmp_path):
    """Real files of two ranks: weights as DeepSpeed's own script gives them, moments as one process of torch has."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    stage, folder = zero
    it = read(folder / f"zero{stage}")
    assert f"ZeRO {stage}, 2 ranks" in it.kind
    assert it.position.step == 3
    reference = load_file(folder / f"zero{stage}.safetensors")
    assert it.tensors.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(it.tensors[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for name, tensor in get_fp32_state_dict_from_zero_checkpoint(str(folder / f"zero{stage}")).items():
        assert torch.equal(it.tensors[f"model.{name}"], tensor), name
    write_checkpoint(it, tmp_path / "step-00000003")
    same_bits(read_tensors(tmp_path / "step-00000003"), it.tensors)
    same_bits(read(folder / f"zero{stage}" / "global_step3").tensors, it.tensors)


def test_a_missing_rank_is_named(zero, tmp_path):
    stage, folder = zero
    source = folder / f"zero{stage}" / "global_step3"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        if "rank_1" not in file.name:
            (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointDamaged, match="is of 2 ranks, and the files of 1"):
        read(copy)
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(CheckpointDamaged, match="no folder beside it"):
        read(tmp_path)


def test_a_call_smuggled_into_deepspeeds_files_is_refused_unexecuted(zero, tmp_path, canary):
    stage, folder = zero
    for victim in sorted((folder / f"zero{stage}" / "global_step3").iterdir()):
        copy = tmp_path / victim.name
        copy.mkdir()
        for file in victim.parent.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tree = torch.load(victim, weights_only=False)
        torch.save(tree | {"ds_version": Hostile(canary)}, copy / victim.name)
        with pytest.raises(CheckpointDamaged, match=r"asks for (posix|os)\.system"):
            read(copy)
    assert not canary.exists()


# --- torch's ---


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


def trained(*, named: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("named", [False, True])
def test_a_training_scripts_file_gives_weights_and_moments(tmp_path, named):
    model, optimizer = trained(named=named)
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
    }
    torch.save(tree, tmp_path / "checkpoint.pth")
    for place in (tmp_path / "checkpoint.pth", tmp_path):
        it = read(place)
        same_bits(it.tensors, collect(model, optimizer))
        assert it.left == ["epoch", "args"]
    write_checkpoint(it, tmp_path / "ours")
    other, its_optimizer = trained(named=False)
    load(tmp_path / "ours", into := collect(other, its_optimizer))
    same_bits(into, collect(model, optimizer))


def test_moments_that_cannot_be_told_apart_are_left(tmp_path):
    model, _ = trained(named=False)
    groups = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (2, 1)]
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    it = read(tmp_path / "x.pt")
    assert it.left == ["optimizer (it numbers its parameters, and does not name them)"]
    assert it.made == ["it has weights but no moments: training cannot resume from it"]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: OrderedDict(s)])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_alone_under_the_usual_keys_and_wrappers(tmp_path, wrap, prefix):
    model, _ = trained(named=False)
    torch.save(wrap({prefix + k: v for k, v in model.state_dict().items()}), tmp_path / "pytorch_model.bin")
    it = read(tmp_path)
    same_bits(it.tensors, {f"model.{k}": v for k, v in model.state_dict().items()})
    assert it.facts is None


@pytest.mark.parametrize("other", [lambda w: w, lambda w: w[1:], lambda w: w.view(-1)[:5]])
def test_weights_that_share_memory_are_written_each(tmp_path, other):
    weight = torch.randn(4, 3)
    tree = {"embed": weight, "head": other(weight), "rest": torch.ones(2)}
    torch.save({"model": tree}, tmp_path / "tied.pth")
    write_safetensors(read(tmp_path / "tied.pth"), tmp_path / "tied.safetensors")
    written = read(tmp_path / "tied.safetensors").tensors
    same_bits(written, {f"model.{name}": tensor for name, tensor in tree.items()})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_dcp_without_our_manifest(tmp_path):
    model, optimizer = trained(named=False)
    ours = collect(model, optimizer)
    nested = {
        "app": {
            "model": {k: v.clone() for k, v in model.state_dict().items()},
            "optim": {"state": {n: optimizer.state[p] for n, p in model.named_parameters()}, "lr": [0.1]},
        },
        "when": "today",
    }
    dcp.save(nested, checkpoint_id=tmp_path / "dcp", no_dist=True)
    it = read(tmp_path / "dcp")
    same_bits(it.tensors, ours)
    assert sorted(it.left) == ["app.optim.lr.0 (not a tensor)", "when (not a tensor)"] or len(it.left) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_calls_is_refused_unexecuted_and_the_call_named(tmp_path, canary, old):
    hostile = {"model": {"w": torch.ones(1)}, "args": Hostile(canary)}
    torch.save(hostile, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointDamaged, match=r"asks for (posix|os)\.system.*Nothing in it was executed"):
        read(tmp_path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Hostile(canary)))
    (tmp_path / "noise.bin").write_bytes(os.urandom(300))
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("plain.bin", "noise.bin", "empty.bin"):
        with pytest.raises(CheckpointDamaged, match="was refused"):
            read(tmp_path / name)
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Hostile(canary)))
    with pytest.raises(CheckpointDamaged, match=r"asks for (posix|os)\.system"):
        read(tmp_path / "dcp")
    assert not canary.exists()


@pytest.mark.parametrize("tree", [[torch.ones(1)], torch.ones(1), {}, {"epoch": 1}, {"model": {"a": 1}}])
def test_a_file_without_tensors_by_name_is_said(tmp_path, tree):
    torch.save(tree, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="tensors by name"):
        read(tmp_path / "x.pth")


def test_the_metadata_is_json_that_others_can_read(tmp_path, save):
    from safetensors import safe_open

    write_safetensors(read(save(30)), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        about = json.loads(opened.metadata()[convert.KEY])
    assert about["position"] == {"epoch": 3, "step": 30}
    assert about["facts"] == {"stage": "pretrain"}
