"""Quick saves on nodes' own disks; run by test_local.py, once a rank: nodes.py FOLDER RANK WORLD_SIZE.

Every two ranks are a node: a folder FOLDER/disk-NODE of their own stands for its disk.
"""

from __future__ import annotations

import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from livt_scale.checkpoint import io
from livt_scale.checkpoint.load import Position, list_checkpoints
from livt_scale.checkpoint.manager import Tiers
from livt_scale.config.runtime import Checkpoint
from livt_scale.distributed.collectives import Peers
from livt_scale.distributed.state_dict import collect


def build(seed: int, *, mesh=None, offload: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))  # uneven over four: rank 3 holds none of some
    if mesh is not None:
        policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
        fully_shard(model, mesh=mesh, **policy)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, rank: int) -> None:
    for step in range(steps):
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: local(tensor).clone() for name, tensor in state.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        assert torch.equal(local(tensor), expected[name]), name


class Run:
    """One run in FOLDER/NAME: `start` it again and again, on nodes whose disks are where `disk` says."""

    def __init__(self, folder: Path, name: str, world: Peers, *, mesh=None, offload: bool = False) -> None:
        self.folder, self.world, self.mesh, self.offload = folder / name, world, mesh, offload
        self.disk = folder / f"disk-{world.rank // 2}"

    def open(self, *, disk: Path | None = None) -> Tiers:
        saving = Checkpoint(mode="async", local_dir="/not-this", local_every_steps=1, keep_last=9)
        return Tiers(self.folder / "checkpoints", saving=saving, world=self.world, local_dir=disk or self.disk)

    def saved(self, tiers: Tiers, seed: int, step: int, *, quick: bool) -> dict[str, torch.Tensor]:
        model, optimizer = build(seed, mesh=self.mesh, offload=self.offload)
        train(model, optimizer, steps=2, rank=self.world.rank)
        state = collect(model, optimizer)
        save = tiers.save_locally if quick else tiers.save
        save(state, position=Position(0, step), facts={"step": step})
        expected = copied(state)
        train(model, optimizer, steps=1, rank=self.world.rank)  # while it is being written
        return expected

    def found(self, tiers: Tiers, expected: dict[str, torch.Tensor] | None, step: int | None, *, quick: bool) -> None:
        state = collect(*build(99, mesh=self.mesh, offload=self.offload))
        damaged: list[str] = []
        found = tiers.newest(state, on_damage=lambda path, wrong: damaged.append(f"{path.name}: {wrong[0]}"))
        self.damaged = damaged
        if step is None:
            assert found is None
            return
        assert found is not None
        assert found.path.name == f"step-{step:08d}"
        assert (found.local is not None) == quick
        assert tiers.load(found, state)["position"]["step"] == step
        assert expected is not None
        same(state, expected)


def quick_saves_are_taken_and_a_replaced_node_falls_back(run: Run) -> None:
    with run.open() as tiers:
        run.found(tiers, None, None, quick=False)
        shared = run.saved(tiers, 1, 10, quick=False)
        run.saved(tiers, 2, 12, quick=True)
        quick = run.saved(tiers, 3, 14, quick=True)
    with run.open() as tiers:
        assert steps(tiers) == [12, 14]
        run.found(tiers, quick, 14, quick=True)
        assert steps(tiers) == [14]
    dist.barrier()
    if run.world.rank == 2:  # node 1 is another machine now
        shutil.rmtree(run.disk)
    dist.barrier()
    with run.open() as tiers:
        run.found(tiers, shared, 10, quick=False)
        assert steps(tiers) == []  # what will be done again is gone
        run.saved(tiers, 4, 11, quick=True)
    with run.open() as tiers:
        newer = run.saved(tiers, 5, 16, quick=False)
    with run.open() as tiers:
        run.found(tiers, newer, 16, quick=False)  # a shared one that is newer is taken


def a_damaged_piece_on_one_node_costs_that_save_alone(run: Run) -> None:
    with run.open() as tiers:
        one = run.saved(tiers, 1, 2, quick=True)
        run.saved(tiers, 2, 4, quick=True)
        tiers.wait()
        folder = tiers._place.folder
    dist.barrier()
    if run.world.rank == 3:
        file = sorted((folder / "step-00000004").glob("*.distcp"))[-1]
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    dist.barrier()
    with run.open() as tiers:
        run.found(tiers, one, 2, quick=True)
        assert (len(run.damaged) == 1) == (run.world.rank == 0)


def another_start_on_the_same_folders_is_another_run(run: Run) -> None:
    """The shared checkpoints were removed by hand, to begin anew: what lies on the nodes is of the old run."""
    with run.open() as tiers:
        run.saved(tiers, 1, 8, quick=True)
    dist.barrier()
    if run.world.rank == 0:
        shutil.rmtree(run.folder / "checkpoints")
    dist.barrier()
    with run.open() as tiers:
        run.found(tiers, None, None, quick=False)
        assert len(list(tiers._place.own.iterdir())) == 1


def a_node_whose_disk_is_full_stops_nothing(run: Run) -> None:
    real = io.free_bytes
    with run.open() as tiers:
        one = run.saved(tiers, 1, 2, quick=True)
        tiers.wait()
        if run.world.rank >= 2:
            io.free_bytes = lambda folder: 0
        run.saved(tiers, 2, 4, quick=True)
        tiers.wait()
        assert tiers.report().get("failed_local_saves", 0) == (1 if run.world.rank >= 2 else 0)
        io.free_bytes = real
    with run.open() as tiers:
        run.found(tiers, one, 2, quick=True)


def the_end_of_a_stage_leaves_nothing_on_the_nodes(run: Run) -> None:
    run.disk.mkdir(exist_ok=True)
    (run.disk / "somebody-elses").mkdir(exist_ok=True)
    with run.open() as tiers:
        run.saved(tiers, 1, 2, quick=True)
        state = collect(*build(1, mesh=run.mesh, offload=run.offload))
        tiers.save(state, position=Position(0, 3), facts={}, final=True)
        own = tiers._place.own
        assert own.exists()
    dist.barrier()
    assert not own.exists()
    assert (run.disk / "somebody-elses").exists()


def only_own_pieces_are_copied(run: Run) -> None:
    with run.open() as tiers:
        state = collect(*build(1, mesh=run.mesh, offload=run.offload))
        tiers.save(state, position=Position(0, 1), facts={})
        tiers.wait()
        mine = sum(local(tensor).nbytes for name, tensor in state.items() if not name.endswith("step"))
        assert tiers.shared._staging.num_bytes <= mine + 4 * 6


def steps(tiers: Tiers) -> list[int]:
    return [info.position.step for info in list_checkpoints(tiers._place.folder)]


def main(folder: Path, rank: int, world_size: int) -> None:
    ranks = {"rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", timeout=timedelta(seconds=90), **ranks)
    world = Peers(rank, world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for name, options in (("ddp", {}), ("fsdp", {"mesh": mesh}), ("offload", {"mesh": mesh, "offload": True})):
        quick_saves_are_taken_and_a_replaced_node_falls_back(Run(folder, f"{name} 1", world, **options))
        if name == "ddp":
            a_node_whose_disk_is_full_stops_nothing(Run(folder, "full", world))
            the_end_of_a_stage_leaves_nothing_on_the_nodes(Run(folder, "end", world))
        else:
            only_own_pieces_are_copied(Run(folder, f"{name} 2", world, **options))
    a_damaged_piece_on_one_node_costs_that_save_alone(Run(folder, "damaged", world, mesh=mesh))
    another_start_on_the_same_folders_is_another_run(Run(folder, "anew", world, mesh=mesh))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
