"""What `livt plan` prints: a summary of at most 20 lines of 80 columns, or with --details everything."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH, MAX_LINES = 80, 20
INDENT = 11


def summary_lines(answer: dict[str, Any]) -> list[str]:
    """Whether it fits, the strategy, hours and cost as a range, the limit that decides, and what to change."""
    lines = _summary(answer, remarks=True)
    return lines if len(lines) <= MAX_LINES else _summary(answer, remarks=False)


def _summary(answer: dict[str, Any], *, remarks: bool) -> list[str]:
    data, device = answer["data"], answer["device"]
    where = f"{answer['gpus']} x {device['name']} on {answer['nodes']} node{'s' * (answer['nodes'] > 1)}"
    lines = _wrapped(f"{where}; {data['images']:,} images, {data['classes']} classes ({data['from']})", indent=2)
    for stage in answer["stages"]:
        first, *others = _stage_facts(stage, remarks=remarks)
        lines += _wrapped(f"{stage['stage']:<{INDENT}}{first}")
        lines += [line for fact in others for line in _wrapped(" " * INDENT + fact)]
    total = [_range(answer)] if len(answer["stages"]) > 1 else []
    total.append(f"{_count(answer['device_hours'])} device hours")
    if answer["cost"] is not None:
        total.append(f"cost {answer['cost_low']:,.0f} to {answer['cost_high']:,.0f}, likely {answer['cost']:,.0f}")
    lines += _wrapped(f"{'in all':<{INDENT}}{'; '.join(total)}")
    if answer["device_defaults"]:
        names = ", ".join(answer["device_defaults"])
        lines += _wrapped(f"{device['name']} gives no {names}: the defaults are used, and the range is wider", indent=2)
    lines += _wrapped("--details: memory, parts of a step, candidates, checkpoints, assumptions")
    return lines


def _stage_facts(stage: dict[str, Any], *, remarks: bool) -> list[str]:
    peak, usable = stage["memory_gib"]["peak"], stage["usable_gib"]
    fits = f"fits, {_gib(peak)} of {_gib(usable)}" if stage["fits"] else f"does NOT fit: {stage['why_not']}"
    steps = f"{stage['steps']:,} steps of {_time(stage['step_s'])}"
    hours = [_range(stage), steps]
    if stage["segments"] is not None:
        hours.append(f"{stage['segments']} jobs")
    facts = [f"{_chosen(stage)}: {fits}", "; ".join(hours)]
    if stage["fits"]:
        facts += [stage["limit"]["why"], f"change: {stage['limit']['lift']}"]
    known = stage["calibration"]
    if known:
        facts.append(
            f"calibrated: times x {known['scale']:.2f}; "
            f"high is {known['width']:.1f} times low, not {known['width_before']:.1f}"
        )
    if remarks and stage["storage_wait_hours"] > 0.02 * stage["hours"]:
        facts.append(f"of these {_time(3600 * stage['storage_wait_hours'])} until the nodes' memory holds the set")
    if remarks and stage["warning"]:
        facts.append(stage["warning"])
    best = stage["best"]
    if not stage["fits"] or (best and best["hours"] < 0.95 * stage["hours"]):
        facts.append(f"better: {_named(best)}, {_time(3600 * best['hours'])}" if best else "nothing fits on these GPUs")
    return facts


def _range(one: dict[str, Any]) -> str:
    low, likely, high = (3600 * one[name] for name in ("hours_low", "hours", "hours_high"))
    return f"{_time(low)} to {_time(high)}, likely {_time(likely)}"


def _wrapped(text: str, *, indent: int = INDENT) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, replace_whitespace=False)


def detail_lines(answer: dict[str, Any]) -> list[str]:
    """The summary, then each stage's numbers, the candidates, and all assumptions."""
    lines = summary_lines(answer)[:-1]
    for stage in answer["stages"]:
        lines += ["", *_stage_lines(stage)]
    lines += ["", "assumed, with what low and high hours take (--assume NAME=VALUE, --device FILE.yaml):"]
    for name, one in answer["assumptions"].items():
        span = "" if one["low"] == one["high"] else f" ({one['low']:g} to {one['high']:g})"
        lines.append(f"  {name:<20} {one['value']:>8g}{' *' if one['changed'] else '  '} {one['is']}{span}")
    device = answer["device"]
    plain = ", ".join(
        f"{name} {value}" for name, value in device.items() if not isinstance(value, dict) and name != "name"
    )
    lines.append(f"  device               {plain}, peak TFLOP/s {device['peak_tflops']}")
    return lines


def _stage_lines(s: dict[str, Any]) -> list[str]:
    memory = s["memory_gib"]
    lines = [
        f"{s['stage']}: {_chosen(s)}",
        f"  {s['params'] / 1e6:.1f} M parameters; {_flops(s['train_flops_per_image'])} per training image "
        f"({_flops(s['hardware_flops_per_image'])} computed)",
        "  memory per rank: " + ", ".join(f"{name} {_gib(value)}" for name, value in memory.items())
        + f" of {_gib(s['usable_gib'])} usable",
    ]  # fmt: skip
    if s["offload"] != "none":
        where = "memory" if s["offload"] == "cpu" else "disk"
        lines.append(f"  offloaded to a node's {where}: {_gib(s['offloaded_gib_per_node'])}")
    if "exact_gib" in s:
        exact = s["exact_gib"]
        lines.append(f"  measured ({exact['measured']}): states {_gib(exact['states'])}, peak {_gib(exact['peak'])}")
    lines += [*_time_lines(s), *_input_lines(s), *_checkpoint_lines(s)]
    lines.append(f"  best: {_named(s['best']) if s['best'] else 'nothing fits'}")
    for one in s["candidates"]:
        lines.append(
            f"    {_named(one):<44} {_time(one['hours'] * 3600):>9} {_gib(one['peak_gib']):>10}  "
            f"{one['why_not'] or 'fits'}"
        )
    return lines


def _time_lines(s: dict[str, Any]) -> list[str]:
    energy = "" if s["energy_kwh"] is None else f", {_count(s['energy_kwh'])} kWh"
    cost = "" if s["cost"] is None else f", cost {s['cost']:.0f}"
    parts = ", ".join(f"{name} {_time(value)}" for name, value in s["parts_s"].items() if value)
    offload = f", {_time(s['offload_s'])} to and from the host" if s["offload_s"] else ""
    return [
        f"  step {_time(s['step_s'])}: {parts}; MFU {s['mfu']:.2g}",
        f"  the host launches {s['kernels']} kernels in {_time(s['host_s'])}; exchange {_time(s['exchange_s'])} "
        f"({_bytes(s['exchanged_bytes_per_rank'])} per rank), of which {_time(s['exposed_exchange_s'])} do not hide; "
        f"{s['optimizer']} {_time(s['optimizer_s'])}{offload}",
        f"  {s['steps']} steps: {_time(s['hours'] * 3600)}, {_count(s['device_hours'])} device hours{energy}{cost}",
        f"  {s['segments_how']}",
    ]


def _input_lines(s: dict[str, Any]) -> list[str]:
    lines = [
        f"  {s['images_per_s']:.0f} images/s: {s['decode_cores_per_node']:.0f} cores per node decode; "
        f"input alone takes {_time(s['decode_s'])} per step"
    ]
    if s["storage_wait_hours"]:
        lines.append(
            f"  the first epoch waits for storage, {_time(s['storage_s'])} per step; "
            f"{_time(3600 * s['storage_wait_hours'])} in all until the nodes' memory holds the set"
        )
    reads = _bytes(s["read_gb_s"] * 1e9)
    return [*lines, f"  reads {reads}/s where files are not in memory, {_bytes(s['read_tb'] * 1e12)} in all"]


def _checkpoint_lines(s: dict[str, Any]) -> list[str]:
    checkpoint = s["checkpoint"]
    return [
        f"  checkpoint {_bytes(checkpoint['bytes'])}: stalls {_time(checkpoint['stall_s'])}, written in "
        f"{_time(checkpoint['write_s'])}; every {checkpoint['every_steps']} steps loses "
        f"{checkpoint['lost_share']:.2%}, Daly's every {_time(checkpoint['daly_interval_s'])} "
        f"{checkpoint['lost_share_daly']:.2%}"
    ]


def _in_units(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """`value` in the largest unit of which it is at least one: three digits, or all of the integer part."""
    name, size = next(((name, size) for name, size in units if value >= size), units[-1])
    return f"{_count(value / size)} {name}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == 0 else f"{number:.3g}"


def _gib(gib: float) -> str:
    return _in_units(gib, (("GiB", 1), ("MiB", 2**-10), ("KiB", 2**-20)))


def _bytes(number: float) -> str:
    return _in_units(number, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)))


def _time(seconds: float) -> str:
    return _in_units(seconds, (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def _flops(number: float) -> str:
    return _in_units(number, (("GFLOP", 1e9), ("MFLOP", 1e6)))


def _chosen(stage: dict[str, Any]) -> str:
    return f"{_named(stage)} x {stage['accumulation']}"


def _named(one: dict[str, Any]) -> str:
    again = ", recomputed" if one["activation_checkpointing"] else ""
    return f"{one['strategy']}{again}, micro-batch {one['micro_batch']}"
