"""`livt doctor`: what this machine has, and what would fail here.

Each line is one check: its status (ok; note: works, but know this; problem: something would fail), what was found, and
what to do. Only a problem makes the exit code 1. The checks are in `livt_scale.doctor.checks`.

    note     shared memory   0.1 GiB in /dev/shm: loader processes hand their batches over there
             fix: give the container more (docker run --shm-size=8g), or --set data.workers=0
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Force, check_needs
from livt_scale.cli.output import echo
from livt_scale.doctor.finding import Finding
from livt_scale.util.errors import UsageError

DEVICE_MARK = "# Measured by livt doctor --bench, for livt plan --device."


def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="Also measure network, disks and decoding on all ranks.")
    ] = False,
    dirs: Annotated[
        list[Path] | None, typer.Option("--dir", help="With --bench: folder whose disk to measure. Repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="With --bench: recipe whose folders and images to measure.")
    ] = None,
    device_file: Annotated[
        Path | None, typer.Option("--device-file", help="With --bench: write what livt plan --device reads (YAML).")
    ] = None,
    force: Force = False,
    node: Annotated[
        Path | None, typer.Option("--node", help="Check this node quickly; write the result to FOLDER/NODE.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=3, max=600, help="With --bench: approximate duration.", show_default="60")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: libraries, GPUs, memory, network, disks.

    Exit codes: 0; 1 if something would fail here.
    """
    of_bench = {"--dir": dirs, "--recipe": recipe, "--device-file": device_file, "--seconds": seconds}
    if node is not None:
        _refuse_with_node({"--bench": bench, **of_bench, "--force": force, "--json": as_json})
        _look_at_node(node)
    check_needs("--force", "--device-file", given=force, there=device_file is not None)
    for name, value in of_bench.items():
        check_needs(name, "--bench", given=bool(value), there=bench)
    measured: dict[str, Any] = {}
    findings: list[Finding] = []
    if bench:
        found = _bench(dirs or [], recipe, seconds=seconds or 60.0, device_file=device_file, force=force)
        if found is None:
            return  # rank 0 prints for all
        measured, findings = {"bench": found[0]}, found[1]
    from livt_scale.doctor.checks import examine

    findings = examine() + findings
    failed = any(f.status == "problem" for f in findings)
    if as_json:
        echo(json.dumps({"ok": not failed, "checks": [asdict(f) for f in findings], **measured}, indent=2))
    else:
        _print(findings)
    raise typer.Exit(1 if failed else 0)


def _refuse_with_node(options: dict[str, Any]) -> None:
    """Raise UsageError for the first of `options` that is given."""
    given = next((name for name, value in options.items() if value), None)
    if given is not None:
        raise UsageError(f"{given} has no effect with --node", remedy="leave it out")


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        echo(f"{finding.status:<9}{finding.name:<16}{finding.message}")
        if finding.fix:
            echo(f"{'':<9}fix: {finding.fix}")


def _look_at_node(folder: Path) -> None:
    from livt_scale.doctor.node import look_at_node

    findings = look_at_node(folder)
    _print(findings)
    raise typer.Exit(1 if any(f.status == "problem" for f in findings) else 0)


def _bench(
    dirs: list[Path], recipe: Path | None, *, seconds: float, device_file: Path | None, force: bool
) -> tuple[dict[str, Any], list[Finding]] | None:
    from livt_scale.config.load import load_recipe
    from livt_scale.config.yaml import dump
    from livt_scale.doctor import bench as doctor_bench
    from livt_scale.util.atomic import write_atomic
    from livt_scale.util.outputs import check_output

    if device_file is not None:
        check_output(device_file, marks=[DEVICE_MARK.encode()], command="doctor", force=force)
    loaded = None if recipe is None else load_recipe(recipe)
    folders = doctor_bench.folders_to_measure(dirs, loaded)
    found = doctor_bench.bench(folders, loaded, seconds=seconds, device_too=device_file is not None)
    if found is not None and device_file is not None:
        write_atomic(device_file, (f"{DEVICE_MARK}\n" + dump(found[0]["device_speeds"])).encode())
    return found
