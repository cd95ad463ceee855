"""The state of a node's GPUs as its driver reports it: the part of `livt doctor --node` that needs no CUDA.

    read_gpus(xml)       of `nvidia-smi -q -x`: memory errors, clocks and what slows them down
    read_links(text)     of `nvidia-smi nvlink --status`
    read_xids(text)      of `dmesg`: errors that the driver has logged (https://docs.nvidia.com/deploy/xid-errors/)

A field that a driver or a card does not report is None and is not judged: names have changed between drivers. A
`problem` takes the node out of a chain of jobs, so it is what makes runs fail, stop or compute wrongly; a `note` only
makes them slow or needs attention later.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from livt_scale.doctor.finding import Finding

TIMEOUT_S = 60.0  # of each command; a GPU that has fallen off the bus can make them wait
SLOW_SHARE = 0.85  # of the median of the node's GPUs
RECENT_S = 86_400.0  # an older Xid may be from before a repair
RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset) or reboot"
REPLACE = "take the node out of use and have the GPU replaced"
COOL = "see the cooling and power of the node; leave it out until then"

# Those after which the GPU or its links are not to be trusted; 13, 31, 43 and 45 are mostly the program's.
BAD_XIDS = {
    48: "uncorrectable memory error",
    62: "internal micro-controller halt",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many correctable memory errors",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
    140: "unrecovered memory error",
}
SLOWDOWNS = {
    "hw_slowdown": "the hardware slows the clocks down (heat or power)",
    "hw_thermal_slowdown": "too hot: the hardware slows the clocks down",
    "hw_power_brake_slowdown": "the power supply slows the clocks down",
}


@dataclass(frozen=True)
class GpuState:
    """What the driver reports of a GPU. None: not reported."""

    name: str  # gpu 0
    bus: str  # 0000:1b:00, as dmesg has it
    uuid: str = ""  # without GPU-, as torch has it
    uncorrectable: int | None = None  # memory errors since the driver was loaded
    sram_threshold_exceeded: bool | None = None
    remapped_uncorrectable: int | None = None
    remap_pending: bool | None = None
    remap_failure: bool | None = None
    recovery: str | None = None  # the action that the driver asks for
    slowdowns: tuple[str, ...] = ()
    clock_mhz: int | None = None  # that applications are given
    max_clock_mhz: int | None = None
    persistent: bool | None = None


def look(product_s: Mapping[str, float]) -> list[Finding]:
    """Findings about the GPUs that this process sees; if it sees none, about all of the node.

    product_s: by the UUID of each GPU that it sees, seconds of the same matrix product on each.
    """
    if shutil.which("nvidia-smi") is None:
        return [Finding("nvidia-smi", "note", "not on the PATH: the state of GPUs is not checked")]
    xml = _output(["nvidia-smi", "-q", "-x"])
    if xml is None:
        message = f"nvidia-smi -q -x failed, or took over {TIMEOUT_S:.0f} s"
        return [Finding("nvidia-smi", "problem", message, "see what nvidia-smi prints; reboot the node")]
    links = read_links(_output(["nvidia-smi", "nvlink", "--status"]) or "")
    xids = read_xids(
        _output(["dmesg"]) or "", now_s=time.monotonic()
    )  # since boot; nothing where only root may read it
    return judge(read_gpus(xml), links, xids, product_s)


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


# --- reading: pure functions of what the commands print ---


def read_gpus(xml: str) -> list[GpuState]:
    """The GPUs in `nvidia-smi -q -x`, numbered in its order, which is nvidia-smi's index."""
    log = ElementTree.fromstring(xml)  # noqa: S314 - the driver's own output
    return [_gpu(node, index) for index, node in enumerate(log.findall("gpu"))]


def _gpu(node: ElementTree.Element, index: int) -> GpuState:
    errors = [_number(e.text) for e in node.findall("ecc_errors/volatile//*") if "uncorrectable" in e.tag]
    counted = [count for count in errors if count is not None]
    return GpuState(
        name=f"gpu {index}",
        bus=_bus(node.get("id", "")),
        uuid=(node.findtext("uuid") or "").removeprefix("GPU-"),
        uncorrectable=sum(counted) if counted else None,
        sram_threshold_exceeded=_yes(node.findtext("ecc_errors/aggregate/sram_threshold_exceeded")),
        remapped_uncorrectable=_number(node.findtext("remapped_rows/remapped_row_unc")),
        remap_pending=_yes(node.findtext("remapped_rows/remapped_row_pending")),
        remap_failure=_yes(node.findtext("remapped_rows/remapped_row_failure")),
        recovery=node.findtext("gpu_recovery_action"),
        slowdowns=tuple(reason for reason in SLOWDOWNS if _is_active(node, reason)),
        clock_mhz=_number(node.findtext("applications_clocks/graphics_clock")),
        max_clock_mhz=_number(node.findtext("default_applications_clocks/graphics_clock")),
        persistent=_yes(node.findtext("persistence_mode")),
    )


def _is_active(node: ElementTree.Element, reason: str) -> bool:
    """Drivers before 535 call the reasons `throttle`, later ones `event`."""
    names = [f"clocks_{kind}_reasons/clocks_{kind}_reason_{reason}" for kind in ("event", "throttle")]
    return any(node.findtext(name) == "Active" for name in names)


def _number(text: str | None) -> int | None:
    """The first number of "1980 MHz"; None for N/A."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def _yes(text: str | None) -> bool | None:
    return {"Yes": True, "Enabled": True, "No": False, "Disabled": False}.get(text or "")


def _bus(text: str) -> str:
    """00000000:1B:00.0 and 0000:1b:00 are one device.

    >>> _bus("00000000:1B:00.0")
    '0000:1b:00'
    """
    parts = text.lower().partition(".")[0].split(":")
    return ":".join((parts[0][-4:], *parts[1:]))


def read_links(text: str) -> dict[str, list[bool]]:
    """Whether each NVLink of each GPU is active; GPUs without links are left out.

    >>> read_links("GPU 0: NVIDIA H100 (UUID: GPU-1)\\n\\t Link 0: 26.562 GB/s\\n\\t Link 1: <inactive>\\n")
    {'gpu 0': [True, False]}
    """
    links: dict[str, list[bool]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.match(r"GPU (\d+):", line):
            name = f"gpu {found[1]}"
        elif found := re.match(r"\s+Link \d+: (.*)", line):
            speed = re.match(r"[\d.]+", found[1])
            links.setdefault(name, []).append(speed is not None and float(speed[0]) > 0)
    return links


def read_xids(text: str, *, now_s: float) -> list[tuple[str, int]]:
    """(bus, number) of each Xid that dmesg has from the last day; of any day where lines have no time.

    >>> read_xids("[  100.5] NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.", now_s=200)
    [('0000:1b:00', 79)]
    """
    found = []
    for line in text.splitlines():
        if (xid := re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", line)) is None:
            continue
        stamp = re.match(r"\[\s*(\d+\.\d+)\]", line)
        if stamp is None or now_s - float(stamp[1]) <= RECENT_S:
            found.append((_bus(xid[1]), int(xid[2])))
    return list(dict.fromkeys(found))


# --- judging ---


def judge(
    gpus: Sequence[GpuState],
    links: Mapping[str, Sequence[bool]],
    xids: Sequence[tuple[str, int]],
    product_s: Mapping[str, float],
) -> list[Finding]:
    """Of a node that several jobs share, the GPUs in `product_s`; a GPU that the driver has lost is anybody's."""
    ours = [gpu for gpu in gpus if gpu.uuid in product_s] or gpus
    others = {gpu.name for gpu in gpus} - {gpu.name for gpu in ours}
    found = [finding for gpu in ours for finding in judge_state(gpu)]
    found += [*judge_links(links), *judge_xids(xids, gpus), *judge_products(product_s, gpus)]
    return [finding for finding in found if finding.name not in others]


def judge_state(gpu: GpuState) -> list[Finding]:
    """One finding for each thing that is not as it should be."""
    found: list[tuple[bool, Finding]] = [
        (bool(gpu.uncorrectable), _problem(gpu, f"{gpu.uncorrectable} uncorrectable memory errors (ECC)", RESET)),
        (gpu.remap_failure is True, _problem(gpu, "a memory row could not be remapped", REPLACE)),
        (gpu.remap_pending is True, _problem(gpu, "a memory row waits for its remapping", RESET)),
        (gpu.sram_threshold_exceeded is True, _problem(gpu, "too many errors of its caches (SRAM)", REPLACE)),
        (
            gpu.recovery not in (None, "None", "N/A"),
            _problem(gpu, f"the driver asks for recovery: {gpu.recovery}", RESET),
        ),
        *((True, _problem(gpu, SLOWDOWNS[reason], COOL)) for reason in gpu.slowdowns),
        (
            gpu.clock_mhz is not None and gpu.max_clock_mhz is not None and gpu.clock_mhz < gpu.max_clock_mhz,
            Finding(
                gpu.name, "note", f"clocks limited to {gpu.clock_mhz} of {gpu.max_clock_mhz} MHz",
                "reset them: nvidia-smi --reset-applications-clocks",
            ),
        ),
        (
            bool(gpu.remapped_uncorrectable),
            Finding(
                gpu.name, "note", f"{gpu.remapped_uncorrectable} memory rows remapped after uncorrectable errors",
                "watch whether they increase",
            ),
        ),
        (
            gpu.persistent is False,
            Finding(gpu.name, "note", "persistence mode is off: each start is slower", "nvidia-smi -pm 1, as root"),
        ),
    ]  # fmt: skip
    return [finding for is_so, finding in found if is_so]


def _problem(gpu: GpuState, message: str, fix: str) -> Finding:
    return Finding(gpu.name, "problem", message, fix)


def judge_links(links: Mapping[str, Sequence[bool]]) -> list[Finding]:
    """GPUs of a node have equally many active links; fewer than the others' is a fault of cable, switch or GPU."""
    most = max((sum(active) for active in links.values()), default=0)
    fix = "see nvidia-smi nvlink --status and the fabric manager's log; leave the node out until then"
    return [
        Finding(name, "problem", f"{sum(active)} NVLinks are active, on other GPUs {most}", fix)
        for name, active in links.items()
        if sum(active) < most
    ]


def judge_xids(xids: Sequence[tuple[str, int]], gpus: Sequence[GpuState]) -> list[Finding]:
    names = {gpu.bus: gpu.name for gpu in gpus}
    return [
        Finding(names.get(bus, f"gpu at {bus}"), "problem", f"Xid {number}: {BAD_XIDS[number]}", f"see dmesg; {RESET}")
        for bus, number in xids
        if number in BAD_XIDS
    ]


def judge_products(seconds: Mapping[str, float], gpus: Sequence[GpuState]) -> list[Finding]:
    """seconds: of the same product on each GPU, by its UUID."""
    names = {gpu.uuid: gpu.name for gpu in gpus}
    usual = statistics.median(seconds.values()) if seconds else 0.0
    message = "a matrix product runs at {:.0%} of the median of the node's GPUs"
    return [
        Finding(names.get(uuid, f"gpu {uuid}"), "problem", message.format(usual / taken), COOL)
        for uuid, taken in seconds.items()
        if usual / taken < SLOW_SHARE
    ]
