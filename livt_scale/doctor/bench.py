"""`livt doctor --bench`: measures all nodes of an allocation for a minute and reports which are slow.

    srun --ntasks-per-node 8 livt doctor --bench --dir /scratch/runs
    note     disk vm07        /scratch/runs: writes 81 MB/s, the others 412
             fix: see what else uses it, or leave the node out (sbatch --exclude=vm07)

All ranks run the same phases. A barrier before each phase names a rank that hangs within a time limit, and no rank
waits longer. `judge_…` are functions of plain numbers. The limits are rules of thumb, not guarantees: what matters is a
node that is slower than its peers, because all wait for it.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from livt_scale.config.run_place import absolute_run_dir
from livt_scale.doctor.finding import Finding
from livt_scale.util.errors import RunError, UsageError
from livt_scale.util.outside import in_home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from livt_scale.config.recipe import Recipe
    from livt_scale.distributed.world import World

SLOW_SHARE = 0.7  # of the median: what is below it is slow
SLOW_WRITE_MB_S = 100.0  # ViT-L with its moments are 3.6 GB: more than half a minute a save
SLOW_SMALL_FILE_S = 0.1
SLOW_GPU_LINK_GB_S = {"within": 5.0, "between": 1.0}  # PCIe 3.0 x8; 10 Gbit Ethernet
SLOW_DECODE = 150.0  # images/s of a core: half of the usual speed
GRACE_S = 30.0  # a phase may exceed its time by this

Facts = dict[str, Any]


def bench(
    dirs: list[Path], recipe: Recipe | None, *, seconds: float, device_too: bool = False
) -> tuple[Facts, list[Finding]] | None:
    """The measurements and the findings; None on all ranks but the first. RunError if a rank hangs or fails.

    device_too: also `device_speeds`, of the first rank's device while all are at work, for `livt plan --device`.
    """
    from livt_scale.distributed.world import detect, process_group

    world = detect()
    each_s = seconds / (7 if device_too else 6)
    with process_group(world, timeout_s=int(each_s + GRACE_S)), _bounded(seconds + 4 * GRACE_S):
        facts = _measure(world, dirs, recipe, each_s=each_s, device_too=device_too)
    return (facts, judge(facts)) if world.is_main else None


def _measure(world: World, dirs: list[Path], recipe: Recipe | None, *, each_s: float, device_too: bool) -> Facts:
    from livt_scale.doctor import network

    together = Together(world, wait_s=each_s + GRACE_S)
    hosts = together.do("start", socket.gethostname)
    leads = hosts.index(socket.gethostname()) == world.rank  # the lowest rank of each node works for it
    found: Facts = {"hosts": hosts, "device": world.device.type}
    found["compute_tflops"] = together.do("compute", lambda: network.compute_speed(world, seconds=each_s / 2))
    if device_too:
        from livt_scale.doctor import device_speeds

        found["device_speeds"] = together.do("device", lambda: device_speeds.measure(world.device, seconds=each_s))[0]
    if world.world_size > 1:
        found["all_reduce"] = together.do("all-reduce", lambda: network.all_reduce_speeds(world, seconds=each_s))[0]
        found["pairs"] = together.do("pairs", lambda: network.pair_speeds(world, seconds=each_s))[0]
    disks = together.do("disk", lambda: _disks(dirs, each_s) if leads else None)
    found["disks"] = {host: disk for host, disk in zip(hosts, disks, strict=True) if disk is not None}
    rates = together.do("decode", lambda: _decode(recipe, each_s / 2) if leads else None)
    found["decode"] = {host: rate for host, rate in zip(hosts, rates, strict=True) if rate is not None}
    return found


class Together:
    """Phases that all ranks go through, called by name before each."""

    def __init__(self, world: World, *, wait_s: float) -> None:
        self._world, self._wait_s = world, wait_s
        self._roll: Any = None
        if world.world_size > 1:
            import torch.distributed as dist

            # a separate group: if a phase breaks the connections of another, ranks can still be listed
            self._roll = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s))

    def do(self, phase: str, work: Callable[[], Any]) -> list[Any]:
        """Each rank's `work()`, on every rank. RunError on all that still answer, naming who does not.

        What `work` raises on one rank is raised on all.
        """
        _now["phase"] = phase
        self._call_names(f"before {phase!r}")
        try:
            peers = self._world.peers
            return peers.all_gather(peers.run_all(work))
        except RuntimeError as error:  # a collective that broke or timed out: a rank is gone
            self._call_names(f"in {phase!r}")
            raise RunError(f"livt doctor failed in {phase!r}: {str(error).splitlines()[0]}") from error

    def _call_names(self, when: str) -> None:
        if self._roll is None:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self._roll, timeout=timedelta(seconds=self._wait_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise RunError(
                f"a rank does not answer {when}: {str(error).splitlines()[0]}",
                remedy="look at that rank's node: it hangs, or its process ended",
            ) from error


_now = {"phase": "start"}


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """The last net: whatever hangs, this process ends."""

    def end() -> None:
        print(f"livt: error: livt doctor hangs in {_now['phase']!r} for over {seconds:.0f} s: ended", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _disks(dirs: list[Path], seconds: float) -> list[Facts]:
    from livt_scale.doctor.disk import measure

    found = []
    for folder in dirs:
        try:
            found.append(measure(folder, seconds=seconds / len(dirs)))
        except OSError as error:
            found.append({"folder": str(folder), "error": error.strerror or str(error)})
    return found


def _decode(recipe: Recipe | None, seconds: float) -> Facts:
    """Images per second: of the recipe's first stage by all of the node, or of one core on an image of noise."""
    if recipe is not None:
        from livt_scale.data.shard_set import ShardSet
        from livt_scale.doctor.decode import bench as decode_bench

        shards = ShardSet.open(recipe.data.train, data=recipe.data)
        return decode_bench(shards, recipe, recipe.stage_names[0], seconds=seconds / 2)
    import time

    import numpy as np
    import simplejpeg

    smooth = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(smooth[:375, :500]), quality=90)
    images, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds / 2:
        simplejpeg.decode_jpeg(jpeg)
        images += 1
    return {"set": "one JPEG of 500x375", "images_per_s": {"core": images / passed}}


# --- judging: pure functions ---


def judge(facts: Facts) -> list[Finding]:
    hosts = facts["hosts"]
    names = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]
    findings = judge_alike("compute", dict(zip(names, facts["compute_tflops"], strict=True)), unit="TFLOP/s")
    if "all_reduce" in facts:
        findings.append(judge_all_reduce(facts["all_reduce"], ranks=len(hosts)))
        findings += judge_pairs(facts["pairs"], hosts, on_gpu=facts["device"] == "cuda")
    folders = [disk["folder"] for disk in next(iter(facts["disks"].values()))]
    for number, folder in enumerate(folders):
        findings += judge_disk_speed(folder, {host: disks[number] for host, disks in facts["disks"].items()})
    rates = {host: decode["images_per_s"]["core"] for host, decode in facts["decode"].items()}
    return findings + judge_alike("decode", rates, unit="images/s a core", slow=SLOW_DECODE)


def judge_alike(name: str, values: dict[str, float], *, unit: str, slow: float = 0.0) -> list[Finding]:
    """More is better. A note for each that is below SLOW_SHARE of the median, or below `slow`."""
    median = statistics.median(values.values())
    told = [
        Finding(
            f"{name}",
            "note",
            f"{who}: {value:,.3g} {unit}, " + (f"the median is {median:,.3g}" if value < median else "slow"),
            "see what else runs there and its clocks, or leave the node out (sbatch --exclude)",
        )
        for who, value in values.items()
        if value < SLOW_SHARE * median or value < slow
    ]
    spread = f"{min(values.values()):,.3g} to {max(values.values()):,.3g}" if len(values) > 1 else f"{median:,.3g}"
    return told or [Finding(name, "ok", f"{spread} {unit}")]


def judge_all_reduce(speeds: list[dict[str, float]], *, ranks: int) -> Finding:
    small, large = speeds[0], speeds[-1]
    message = f"{ranks} ranks: {1e6 * small['s']:,.0f} µs for 4 bytes, {large['gb_s']:.2f} GB/s for "
    return Finding("all-reduce", "ok", f"{message}{large['bytes'] / 2**20:.0f} MiB")


def judge_pairs(pairs: list[Facts], hosts: list[str], *, on_gpu: bool) -> list[Finding]:
    """Links within nodes and between them are each compared with their own kind, on GPUs with a limit too."""
    told: list[Finding] = []
    for kind in ("within", "between"):
        alike = [p for p in pairs if (hosts[p["ranks"][0]] == hosts[p["ranks"][1]]) == (kind == "within")]
        if not alike:
            continue
        median = statistics.median(p["gb_s"] for p in alike)
        limit = SLOW_GPU_LINK_GB_S[kind] if on_gpu else 0.0
        for pair in alike:
            if pair["gb_s"] < max(SLOW_SHARE * median, limit):
                ends = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in pair["ranks"])
                message = f"{ends}: {pair['gb_s']:.2f} GB/s, the median {kind} nodes is {median:.2f}"
                fix = "see NCCL_DEBUG=INFO which network it takes, and the link's cable and switch"
                told.append(Finding("link", "note", message, fix))
        worst = max(p["latency_s"] for p in alike)
        message = f"{len(alike)} {kind} nodes: {median:.2f} GB/s, {1e6 * worst:,.0f} µs at most one way"
        told.append(Finding("links", "ok", message))
    return told


def judge_disk_speed(folder: str, by_host: dict[str, Facts]) -> list[Finding]:
    told = [
        Finding("disk", "problem", f"{folder} on {host}: {facts['error']}", "give a folder that can be written")
        for host, facts in by_host.items()
        if "error" in facts
    ]
    good = {host: facts for host, facts in by_host.items() if "error" not in facts}
    if not good:
        return told
    median = statistics.median(facts["write_mb_s"] for facts in good.values())
    for host, facts in good.items():
        said = (
            f"{folder} on {host}: writes {facts['write_mb_s']:,.0f} MB/s synced, reads {facts['read_mb_s']:,.0f}, "
            f"a small file {1000 * facts['small_file_s']:.1f} ms, {facts['free_gib']:,.0f} GiB free"
        )
        if facts["write_mb_s"] < max(SLOW_SHARE * median, SLOW_WRITE_MB_S) or facts["small_file_s"] > SLOW_SMALL_FILE_S:
            if facts["write_mb_s"] < SLOW_SHARE * median:
                said += f"; the median of the nodes is {median:,.0f} MB/s"
            fix = "checkpoints will take long: save less often, or first to a local disk (checkpoint.local_dir)"
            told.append(Finding("disk", "note", said, fix))
        else:
            told.append(Finding("disk", "ok", said))
    return told


def folders_to_measure(dirs: list[Path], recipe: Recipe | None) -> list[Path]:
    """The folders given; else those of the recipe's run and cache, else this one and the default cache."""
    from livt_scale.data.remote.cache import default_folder

    if dirs:
        missing = [str(folder) for folder in dirs if not folder.is_dir()]
        if missing:
            raise UsageError(f"--dir {missing[0]} is no folder", remedy="make it, or name one that is there")
        return dirs
    run_dir, cache = Path.cwd(), default_folder()
    if recipe is not None:
        run_dir = absolute_run_dir(recipe.run_dir, name=recipe.name)
        cache = in_home(recipe.data.cache.dir or cache)
    there = [
        next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir()) for folder in (run_dir, cache)
    ]
    return list(dict.fromkeys(there))
