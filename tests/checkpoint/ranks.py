"""What two gloo ranks do with the store; run by test_ranks.py, once a rank: ranks.py FOLDER RANK WORLD_SIZE.

FOLDER/alone holds a checkpoint that one process saved. The ranks load it sharded and replicated, train, save, and leave
what they had, whole, in FOLDER/expected.safetensors. Then they disagree and fail on purpose.
"""

from __future__ import annotations

import errno
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from livt_scale.checkpoint import io
from livt_scale.checkpoint.load import (
    Peers,
    Position,
    Retention,
    Saver,
    load,
    newest_whole,
    read_manifest,
    read_tensors,
    verify,
)
from livt_scale.distributed.state_dict import collect
from livt_scale.util.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch


class Net(nn.Module):
    """Uneven over two ranks: a class token of one row (rank 1 holds none of it), three rows, five rows; a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.one = nn.Linear(4, 5)
        self.two = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor(float(seed)))

    def forward(self, x):
        return self.two(self.one(x + self.token[0]).relu()) * self.scale


def build(seed: int, *, mesh=None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net(seed)
    if mesh is not None:
        fully_shard(model.one, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=mesh is None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: t.detach().clone().contiguous() for name, t in full.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def main(folder: Path, rank: int, world_size: int) -> None:
    ranks = {"rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", timeout=timedelta(seconds=90), **ranks)
    mesh = init_device_mesh("cpu", (world_size,))
    sharded = build(2, mesh=mesh)
    with Saver(folder / "sharded", mode="async", retention=Retention(keep_last=9), **ranks) as saver:
        loads_what_one_process_saved(folder, sharded, saver.peers)
        train(*sharded, 2)
        saver.save(collect(*sharded), position=Position(1, 12), facts={"strategy": "fsdp"})
        expected = whole(collect(*sharded))
        train(*sharded, 3)  # while it is being written
        saver.wait()
        path = folder / "sharded" / "step-00000012"
        same(read_tensors(path), expected)
        assert {entry.rank for entry in read_manifest(path).files if entry.name != ".metadata"} == {0, 1}
        again = build(3, mesh=mesh)
        load(path, into := collect(*again), peers=saver.peers)
        same(whole(into), expected)
        if rank == 0:
            save_file(expected, folder / "expected.safetensors")
    replicated_tensors_are_written_once(folder, ranks)
    ranks_that_disagree_are_told(folder, rank, ranks)
    the_failure_of_one_rank_is_that_of_all(folder, rank, ranks)
    dist.barrier()
    dist.destroy_process_group()


def loads_what_one_process_saved(folder: Path, sharded, peers: Peers) -> None:
    alone = newest_whole(folder / "alone", peers=peers)
    assert alone == folder / "alone" / "step-00000005"
    into = collect(*sharded)
    manifest = load(alone, into, peers=peers)
    assert manifest["world_size"] == 1
    same(whole(into), read_tensors(alone))


def replicated_tensors_are_written_once(folder: Path, ranks: dict) -> None:
    state = {f"model.{k}": torch.full((100,), float(k)) for k in range(8)}
    for mode in ("sync", "async"):
        with Saver(folder / f"replicated {mode}", mode=mode, **ranks) as saver:
            for step in (1, 2):  # the second by the plan of the first
                saver.save(state, position=Position(0, step), facts={"strategy": "ddp", "mode": mode})
            saver.wait()
            path = newest_whole(saver.folder, peers=saver.peers)
            assert path is not None
            same(read_tensors(path), state)
            sizes = [entry.bytes for entry in read_manifest(path).files if entry.name != ".metadata"]
            assert len(sizes) == 2
            assert min(sizes) > 0.7 * max(sizes)  # the ranks share the work
            assert saver._plan is not None
            assert len(saver._plan.mine.items) == 4


def ranks_that_disagree_are_told(folder: Path, rank: int, ranks: dict) -> None:
    """mosaicml/composer#2146: one rank resumed an older checkpoint than the others."""
    with Saver(folder / "replicated sync", mode="sync", **ranks) as saver:
        into = {f"model.{k}": torch.zeros(100) for k in range(8)}
        expect(CheckpointError, "would load step", lambda: load(step_path(saver, 2 - rank), into, peers=saver.peers))
        other = folder / ("replicated sync" if rank == 0 else "replicated async")
        expect(CheckpointError, "another", lambda: newest_whole(other, peers=saver.peers))
        wrong = {**into, "model.0": torch.zeros(100 + rank)}
        expect(CheckpointMismatch, "rank 1: ", lambda: load(step_path(saver, 2), wrong, peers=saver.peers))
        assert not any(t.any() for t in into.values())  # no rank has loaded any of it
        data = step_path(saver, 2) / "__1_0.distcp"
        raw = data.read_bytes()
        dist.barrier()
        if rank == 0:
            data.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        dist.barrier()
        damaged: list[str] = []
        path = newest_whole(saver.folder, on_damage=lambda p, w: damaged.extend(w), peers=saver.peers)
        assert path == step_path(saver, 1)
        assert (damaged != []) == (rank == 0)
        expect(CheckpointDamaged, "__1_0.distcp", lambda: load(step_path(saver, 2), into, peers=saver.peers))


def the_failure_of_one_rank_is_that_of_all(folder: Path, rank: int, ranks: dict) -> None:
    with Saver(folder / "replicated async", mode="async", **ranks) as saver:
        real = io.HashedFile.write

        def failing(self, data):
            if rank == 1:
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            return real(self, data)

        io.HashedFile.write = failing
        saver.save({"model.a": torch.ones(9), "model.b": torch.ones(9)}, position=Position(0, 3), facts={})
        expect(CheckpointError, "rank 1: .*the disk is full", saver.wait)
        io.HashedFile.write = real
        dist.barrier()
        assert sorted(p.name for p in saver.folder.iterdir()) == ["step-00000001", "step-00000002"]
        assert verify(step_path(saver, 2)) == []


def step_path(saver: Saver, step: int) -> Path:
    return saver.folder / f"step-{step:08d}"


def expect(kind: type[Exception], match: str, work) -> None:
    with pytest.raises(kind, match=match):
        work()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
