"""Step time, memory a rank and tokens a second, by strategy and world size.

    python benchmarks/strategies.py --json strategies.json           # ViT-Ti on 1, 2 and 4 CPU processes (GPUs: ViT-B)
    python benchmarks/strategies.py --size vit_l --precision bf16    # on 1, 2, 4, 8 GPUs, as many as there are
    python benchmarks/strategies.py --quick                                    # a few steps of two strategies

Each strategy trains the same masked autoencoder on the same random images, `--batch` a rank, in processes of its own,
so that one that runs out of memory stops no other. Strategies take turns, round by round; a figure is the median over
rounds of the median step. `held` is what a rank keeps of weights, gradients and moments after a backward pass, the most
of any rank; `peak` all that the device gave out (GPUs alone). `tokens`: those of the encoder and the decoder together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from livt_scale.config.capabilities import CAPABILITIES, STRATEGIES, StrategyName
from livt_scale.config.recipe import MODEL_SIZES, Model, Parallel
from livt_scale.distributed.world import World, detect, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.mae import build_mae
from livt_scale.optim import param_groups

BETAS, LR, MASK_RATIO = (0.9, 0.95), 1e-4, 0.75
WARM_UP = 2  # steps that are not timed
BOUND_S = 1200  # for one strategy on one world size


def tokens_an_image(model: Model) -> int:
    """Encoder: kept patches and class token; decoder: all patches and class token."""
    return int(model.num_patches * (1 - MASK_RATIO)) + 1 + model.num_patches + 1


def measure_here(args: argparse.Namespace, out: Path) -> None:
    """One rank: train `args.steps` steps by one strategy; rank 0 writes the figures of all."""
    world = detect()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    with process_group(world, timeout_s=300):
        mine = _train(args, world)
        ranks: list[Any] = [mine]
        if world.world_size > 1:
            ranks = [None] * world.world_size
            dist.all_gather_object(ranks, mine)
        if world.is_main:
            seconds = [max(step) for step in zip(*(r["step_s"] for r in ranks), strict=True)]
            figures = {name: max(r[name] or 0 for r in ranks) or None for name in ("held_bytes", "peak_bytes")}
            out.write_text(json.dumps({"step_s": statistics.median(seconds), "loss": mine["loss"], **figures}))


def _train(args: argparse.Namespace, world: World) -> dict[str, Any]:
    model = Model(size=args.size)
    torch.manual_seed(0)
    network = build_mae(model, norm_pix=True, mask_ratio=MASK_RATIO)
    parallel = Parallel(strategy=args.strategies[0], precision=args.precision, activation_checkpointing=args.recompute)

    def groups(network: torch.nn.Module) -> list[dict[str, Any]]:
        return param_groups(network, lr=1e-3, weight_decay=0.05, layer_decay=None, tokens_decay=True)

    strategy = make_strategy(parallel, network, groups, betas=BETAS, world=world)
    generator = torch.Generator().manual_seed(world.rank)
    images = torch.randn(args.batch, 3, model.image_px, model.image_px, generator=generator).to(world.device)
    noise = torch.rand(args.batch, model.num_patches, generator=generator).to(world.device)
    seconds = []
    for _ in range(WARM_UP + args.steps):
        _wait(world)
        start = time.perf_counter()
        loss = strategy.call(images, noise, last=True)
        strategy.backward(loss, last=True)
        strategy.update(LR, max_norm=None)
        _wait(world)
        seconds.append(time.perf_counter() - start)
    strategy.backward(strategy.call(images, noise, last=True), last=True)  # not timed: gradients are held after it
    held = strategy.held_bytes()
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    return {"step_s": seconds[WARM_UP:], "held_bytes": held, "peak_bytes": peak, "loss": float(loss)}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def measure(args: argparse.Namespace, strategy: StrategyName, world_size: int) -> dict[str, Any]:
    """The figures of one strategy on `world_size` processes of this machine, or {"failed": why}."""
    if CAPABILITIES[strategy].zero_stage and find_spec("deepspeed") is None:
        return {"failed": "deepspeed is not installed"}
    with tempfile.TemporaryDirectory(prefix="livt-strategies-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        out, log = Path(folder) / "figures.json", Path(folder) / "log"
        words = [sys.executable, __file__, "--rank-writes", str(out), "--size", args.size, "--batch", str(args.batch)]
        words += ["--steps", str(args.steps), "--precision", args.precision, "--strategies", strategy]
        words += ["--recompute"] if args.recompute else []
        with log.open("w+") as output:
            processes = [
                subprocess.Popen(words, env=_environ(rank, world_size, port), stdout=output, stderr=output)
                for rank in range(world_size)
            ]
            codes = _wait_for(processes)
            output.seek(0)
            said = output.read().strip().splitlines()
        if any(codes) or not out.exists():
            return {"failed": next((line for line in reversed(said) if "Error" in line), f"exit codes {codes}")[:200]}
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def _environ(rank: int, world_size: int, port: str) -> dict[str, str]:
    ranks = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    return {
        **os.environ, **{k: str(v) for k, v in ranks.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
    }  # fmt: skip


def _wait_for(processes: list[subprocess.Popen[bytes]]) -> list[int | str]:
    """Exit codes; the others are ended when one fails or the bound has passed."""
    until = time.monotonic() + BOUND_S
    try:
        while any(p.poll() is None for p in processes):
            if time.monotonic() > until or any(p.poll() for p in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [p.returncode for p in processes]


def run(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for world_size in args.worlds:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.strategies}
        for _ in range(args.rounds):
            for name, told in rounds.items():
                if not (told and "failed" in told[-1]):
                    told.append(measure(args, name, world_size))
        results[str(world_size)] = {name: _median(args, told, world_size) for name, told in rounds.items()}
    return results


def _median(args: argparse.Namespace, rounds: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    if "failed" in rounds[-1]:
        return rounds[-1]
    step_s = statistics.median(r["step_s"] for r in rounds)
    tokens = args.batch * world_size * tokens_an_image(Model(size=args.size))
    return {**rounds[-1], "step_s": step_s, "rounds_s": [r["step_s"] for r in rounds], "tokens_per_s": tokens / step_s}


def table(results: dict[str, Any]) -> str:
    lines = [f"{'ranks':>5} {'strategy':9} {'step':>9} {'of ddp':>7} {'tokens/s':>9} {'held MB':>8} {'peak MB':>8}"]
    for world_size, by_strategy in results.items():
        ddp = by_strategy.get("ddp", {}).get("step_s")
        for name, figures in by_strategy.items():
            if "failed" in figures:
                lines.append(f"{world_size:>5} {name:9} {figures['failed']}")
                continue
            relative = f"{figures['step_s'] / ddp:.2f}" if ddp else "-"
            peak = f"{figures['peak_bytes'] / 1e6:.1f}" if figures["peak_bytes"] else "-"
            lines.append(
                f"{world_size:>5} {name:9} {figures['step_s'] * 1e3:>6.0f} ms {relative:>7} "
                f"{figures['tokens_per_s']:>9.0f} {figures['held_bytes'] / 1e6:>8.1f} {peak:>8}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training step by strategy and world size.")
    parser.add_argument(
        "--quick", action="store_true", help="ddp and fsdp on 1 and 2 processes, few steps: does it run?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--size", choices=sorted(MODEL_SIZES), help="default vit_ti (vit_b on GPUs), quick vit_ti")
    parser.add_argument("--batch", type=int, help="images a rank; default 8 (64 on GPUs), quick 2")
    parser.add_argument("--steps", type=int, help="timed steps; default 6, quick 2")
    parser.add_argument("--rounds", type=int, help="times that each is started; default 3, quick 1")
    parser.add_argument("--worlds", type=int, nargs="+", help="world sizes; default 1 2 4, on GPUs up to their number")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="default: all")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--rank-writes", type=Path, help=argparse.SUPPRESS)  # the processes that it starts
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    # A small model would measure how fast a GPU is given work.
    args.size = args.size or ("vit_b" if gpus and not args.quick else "vit_ti")
    args.batch = args.batch or (2 if args.quick else 64 if gpus else 8)
    args.steps = args.steps or (2 if args.quick else 6)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.strategies = args.strategies or list(STRATEGIES[:2] if args.quick else STRATEGIES)
    args.worlds = args.worlds or [n for n in ((1, 2) if args.quick else (1, 2, 4, 8)) if n <= (gpus or 4)]
    if args.rank_writes:
        measure_here(args, args.rank_writes)
        return
    results = run(args)
    conditions = {
        "size": args.size, "batch_a_rank": args.batch, "precision": args.precision, "recompute": args.recompute,
        "device": torch.cuda.get_device_name() if gpus else platform.processor() or "cpu", "cores": os.cpu_count(),
        "torch": torch.__version__, "load": os.getloadavg(),
    }  # fmt: skip
    print(f"{args.size}, {args.batch} images a rank, {args.precision}, {conditions['device']}, {os.cpu_count()} cores")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps({"strategies": results, "conditions": conditions}, indent=2) + "\n")
    if any("failed" in figures for world in results.values() for figures in world.values()):
        sys.exit("some did not run: see the table")


if __name__ == "__main__":
    main()
