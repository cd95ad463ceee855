"""How long `livt train` takes to its first step, by number of ranks on this machine.

    python benchmarks/startup.py --json startup.json        # 1, 8 and 32 ranks, three times each
    python benchmarks/startup.py --quick                    # 1 and 2 ranks, once

All ranks are forked from this process, so that Python's start and the imports (about 4 s of CPU per rank) do not count.
Each trains the first stage of a very small model under ddp over gloo, and ends after one step. Seconds are those since
the fork until the last rank has reached a point: `group`, the process group exists; `loop`, checks, sets, model,
strategy and the search for a checkpoint are done; `step`, the first step is done. `cpu` is the mean CPU time of a rank
up to there: with many ranks on few cores, wall time measures the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer would import in each rank

from livt_scale.config.load import load_recipe
from livt_scale.distributed.world import World, process_group
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.run import train_together

RECIPE = Path(__file__).parents[1] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
SETS = {
    "model.width": 48,
    "model.depth": 2,
    "model.decoder.width": 32,
    "model.decoder.depth": 1,
    "model.decoder.heads": 2,
    "stages.pretrain.global_batch": 64,
    "stages.pretrain.micro_batch": 2,
    "parallel.strategy": "ddp",
    "log.tensorboard": False,
    "log.num_reconstructions": 0,
    "data.workers": 0,
}
POINTS = ("group_s", "loop_s", "step_s", "cpu_s")


class FirstStep(Hook):
    """Writes when this rank has reached which point, and ends it after its first step."""

    def __init__(self, folder: Path, world: World, *, begun: float, group_s: float) -> None:
        self._folder, self._world, self._begun = folder, world, begun
        self._points = {"group_s": group_s}

    def at_start(self, loop: Loop) -> None:  # noqa: ARG002 - as a hook's
        self._points["loop_s"] = time.perf_counter() - self._begun

    def after_step(self, loop: Loop, step: Step) -> None:
        self._points |= {"step_s": time.perf_counter() - self._begun, "cpu_s": time.process_time()}
        (self._folder / f"rank-{self._world.rank}.json").write_text(json.dumps(self._points))
        loop.world.peers.all_gather(step.number)  # nobody leaves while another needs it
        os._exit(0)


def measure(world_size: int, port: int) -> dict[str, float]:
    """Seconds to each point, of the last rank; the mean of the CPU time."""
    with tempfile.TemporaryDirectory(prefix="livt-startup-") as name:
        folder, ranks = Path(name), []
        begun = time.perf_counter()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _run_rank(World(rank, world_size, rank, world_size), folder, port=port, begun=begun)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    last = {point: max(points[point] for points in found) for point in POINTS}
    return last | {"cpu_s": statistics.mean(points["cpu_s"] for points in found)}


def _run_rank(world: World, folder: Path, *, port: int, begun: float) -> None:
    """In the fork; does not return."""
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        torch.set_num_threads(1)
        recipe = load_recipe(RECIPE, sets=[f"{k}={v}" for k, v in SETS.items()] + [f"run_dir={folder / 'run'}"])
        with process_group(world, timeout_s=300):
            group_s = time.perf_counter() - begun
            hook = FirstStep(folder, world, begun=begun, group_s=group_s)
            train_together(recipe, ("pretrain",), world=world, hooks=[hook])
    except BaseException as error:  # a fork must not run what follows in its parent
        print(f"rank {world.rank}: {type(error).__name__}: {error}", flush=True)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first step, by number of ranks.")
    parser.add_argument("--ranks", type=int, nargs="+", help="default 1 8 32, quick 1 2")
    parser.add_argument("--rounds", type=int, help="times each; a figure is the median; default 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="few ranks: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    sizes, rounds = args.ranks or ([1, 2] if args.quick else [1, 8, 32]), args.rounds or (1 if args.quick else 3)
    results: dict[str, Any] = {}
    print(f"{'ranks':>5}" + "".join(f"{point.removesuffix('_s'):>9}" for point in POINTS))
    for world_size in sizes:
        found = [measure(world_size, _free_port()) for _ in range(rounds)]
        figures = {point: statistics.median(one[point] for one in found) for point in POINTS}
        results[str(world_size)] = figures
        print(f"{world_size:>5}" + "".join(f"{figures[point]:>7.2f} s" for point in POINTS), flush=True)
    conditions = {"cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__, "rounds": rounds}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"startup": results, "conditions": conditions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
