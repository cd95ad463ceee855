"""What a checkpoint costs: how long a save holds up training, how fast it is written and read, by how many ranks.

    python benchmarks/checkpoint.py --json checkpoint.json          # ViT-B with AdamW's moments, 1.0 GB
    python benchmarks/checkpoint.py --quick                         # a small one, seconds

The same state is saved in turn by `sync` (the step waits until it is whole on disk) and by `async` (the step waits
until this rank's pieces are copied), round by round; a figure is the median over rounds. `stall_s` is how long `save`
holds the step up. Beside it: a step of matrix products, alone and while a save is written behind it, for what the
writing takes from a machine whose cores have no time to spare. Then all of it by several ranks: whole on each (ddp) and
sharded (fsdp), on GPUs where there is one for each. Saves are hashed, synced and renamed, as in a run. Resuming reads
every byte twice: to verify, to load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from livt_scale.checkpoint.load import Position, Retention, Saver, load, newest_whole, read_manifest
from livt_scale.config.recipe import MODEL_SIZES, Model
from livt_scale.distributed.state_dict import collect
from livt_scale.distributed.world import World
from livt_scale.models.classifier import build_classifier

LAYOUTS = (("one process", 1, False), ("ddp", 2, False), ("fsdp", 2, True))
MODES = ("sync", "async")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(MODEL_SIZES), default="vit_b")
    parser.add_argument("--rounds", type=int, default=5, help="of each mode, after one that is not counted")
    parser.add_argument("--dir", type=Path, help="a folder on the file system to measure; default: the temporary one")
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    size, rounds = ("vit_ti", 2) if options.quick else (options.size, options.rounds)
    folder = Path(tempfile.mkdtemp(prefix="livt-checkpoint-", dir=options.dir))
    try:
        most = torch.cuda.device_count() or max(
            world for _, world, _ in LAYOUTS
        )  # asks the driver alone: no fork is harmed
        results = {
            name: _measured(folder, size, world, sharded, rounds) for name, world, sharded in LAYOUTS if world <= most
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    alone = results["one process"]
    report = {
        "stall_s": alone["stall_s"],
        "stall_ratio": alone["stall_s"]["async"] / alone["stall_s"]["sync"],
        "save_gb_per_s": alone["save_gb_per_s"],
        "load_gb_per_s": alone["load_gb_per_s"],
        "resume_s": alone["resume_s"],
        "bytes": alone["bytes"],
        "layouts": results,
        "conditions": _conditions(size, rounds, folder),
    }
    _print(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _measured(folder: Path, size: str, world: int, sharded: bool, rounds: int) -> dict[str, Any]:
    """One layout, in processes of its own; rank 0's figures (every rank waits for the slowest)."""
    work = Path(tempfile.mkdtemp(dir=folder))
    # forked: nothing has been computed yet, and nothing has to be imported again
    mp.start_processes(_rank, args=(world, work, size, sharded, rounds), nprocs=world, start_method="fork")
    result = json.loads((work / "result.json").read_text())
    shutil.rmtree(work)
    return result


def _rank(rank: int, world: int, work: Path, size: str, sharded: bool, rounds: int) -> None:
    torch.set_num_threads(1)  # more of them wait for each other where cores are shared: the copy's time then is theirs
    device = World(rank, world, rank, world).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        where, kind = f"file://{work}/store", "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(kind, init_method=where, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    state = _state(size, world, sharded=sharded, device=device)
    savers = {
        mode: Saver(work / mode, mode=mode, retention=Retention(keep_last=1), rank=rank, world_size=world)
        for mode in MODES
    }
    result = _saves(savers, state, rounds) | _steps(savers["async"], state, rounds, device)
    result |= _loads(savers["async"], state, rounds)
    for saver in savers.values():
        saver.close()
    if rank == 0:
        (work / "result.json").write_text(json.dumps(result))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _saves(savers: dict[str, Saver], state: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    stalls: dict[str, list[float]] = {mode: [] for mode in savers}
    wholes: dict[str, list[float]] = {mode: [] for mode in savers}
    for step in range(rounds + 1):
        for mode, saver in savers.items():
            began = time.perf_counter()
            saver.save(state, position=Position(0, step), facts={})
            stalls[mode].append(time.perf_counter() - began)
            saver.wait()
            wholes[mode].append(time.perf_counter() - began)
    path = newest_whole(savers["async"].folder, peers=savers["async"].peers)
    assert path is not None
    entries = read_manifest(path).files
    num_bytes = sum(entry.bytes for entry in entries)
    by_rank: dict[int, int] = {}
    for entry in entries:
        by_rank[entry.rank] = by_rank.get(entry.rank, 0) + entry.bytes
    return {
        "stall_s": {mode: statistics.median(times[1:]) for mode, times in stalls.items()},
        "first_stall_s": {mode: times[0] for mode, times in stalls.items()},
        "save_s": {mode: statistics.median(times[1:]) for mode, times in wholes.items()},
        "save_gb_per_s": {mode: num_bytes / 1e9 / statistics.median(times[1:]) for mode, times in wholes.items()},
        "bytes": num_bytes,
        "bytes_by_rank": [by_rank[rank] for rank in sorted(by_rank)],
    }


def _steps(saver: Saver, state: dict[str, Tensor], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of matrix products: with nothing behind it, and while a save is written."""
    side = 768 if device.type == "cpu" else 8192  # milliseconds on either
    one, other = torch.randn(2, side, side, device=device)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times: dict[str, list[float]] = {"alone": [], "while_saving": []}
    for number in range(rounds):
        times["alone"] += [step() for _ in range(5)]
        saver.save(state, position=Position(1, 1000 + number), facts={})
        times["while_saving"] += [step() for _ in range(5)]
        saver.wait()
    return {"step_s": {name: statistics.median(values) for name, values in times.items()}}


def _loads(saver: Saver, state: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    finding, loading = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        path = newest_whole(saver.folder, peers=saver.peers)
        assert path is not None
        found = time.perf_counter()
        load(path, into, check=False, peers=saver.peers)
        finding.append(found - began)
        loading.append(time.perf_counter() - found)
    num_bytes = read_manifest(path).num_bytes
    return {
        "verify_gb_per_s": num_bytes / 1e9 / statistics.median(finding),
        "load_gb_per_s": num_bytes / 1e9 / statistics.median(loading),
        "resume_s": statistics.median(a + b for a, b in zip(finding, loading, strict=True)),
    }


def _state(size: str, world: int, *, sharded: bool, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_classifier(Model.model_validate({"size": size}), num_classes=1000, drop_path=0.0)
    model.to(device)
    if sharded:
        fully_shard(model, mesh=init_device_mesh(device.type, (world,)))
    state = collect(model, torch.optim.AdamW(model.parameters()))
    torch.manual_seed(0)
    for tensor in state.values():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.copy_(torch.randn_like(local))
    return state


def _conditions(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    return {
        "model": size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "rounds": rounds,
        "folder": str(folder.parent),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "page_cache": "warm: what is read was written just before",
    }


def _print(report: dict[str, Any]) -> None:
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("stall, sync", lambda r: f"{r['stall_s']['sync']:.2f} s"),
        ("stall, async", lambda r: f"{r['stall_s']['async']:.3f} s"),
        ("async / sync", lambda r: f"{r['stall_s']['async'] / r['stall_s']['sync']:.1%}"),
        ("save, sync", lambda r: f"{r['save_gb_per_s']['sync']:.2f} GB/s"),
        ("save, async", lambda r: f"{r['save_gb_per_s']['async']:.2f} GB/s"),
        ("step while saving / alone", lambda r: f"{r['step_s']['while_saving'] / r['step_s']['alone']:.2f}"),
        ("verify", lambda r: f"{r['verify_gb_per_s']:.2f} GB/s"),
        ("load", lambda r: f"{r['load_gb_per_s']:.2f} GB/s"),
        ("resume (verify and load)", lambda r: f"{r['resume_s']:.2f} s"),
        ("written by rank", lambda r: " + ".join(f"{b / 1e6:.0f}" for b in r["bytes_by_rank"]) + " MB"),
    ]
    names = list(report["layouts"])
    print(f"{report['bytes'] / 1e9:.2f} GB, {report['conditions']}")
    print(f"{'':26}" + "".join(f"{name:>22}" for name in names))
    for title, cell in rows:
        print(f"{title:26}" + "".join(f"{cell(report['layouts'][name]):>22}" for name in names))


if __name__ == "__main__":
    main()
